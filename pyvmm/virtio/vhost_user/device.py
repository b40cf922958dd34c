"""A virtio device whose queues another process serves: vhost-user's front end.

The driver's kicks go to the back end and the back end's interrupts to the driver without a step in
this process; what is here is the conversation about it, and what happens when it ends. While
somebody holds a queue's lock the back end has stopped that ring (`pyvmm.virtio.offload`).
docs/decisions/0420-vhost-user-front-end.md tells why things are as they are.

Locks, in the order in which they are taken: the device lock of the negotiation, a queue's, then
`_talking`, which is held for requests to the back end, each bounded in time. A thread of the
activation's own waits for the end of the connection and for what the back end asks.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Lock, Thread
from typing import Any

from pyvmm.errors import ConfigError, HostError, PyvmmError, how_many
from pyvmm.host.log import RateLimited
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import EventFd
from pyvmm.vhost_user import protocol
from pyvmm.vhost_user.inflight import Inflight
from pyvmm.vhost_user.protocol import BackEndError
from pyvmm.virtio import features
from pyvmm.virtio.device import Activation, VirtioDevice, unsaveable
from pyvmm.virtio.features import (
    VIRTIO_F_EVENT_IDX,
    VIRTIO_F_INDIRECT_DESC,
    VIRTIO_F_RING_PACKED,
    VIRTIO_F_RING_RESET,
    VIRTIO_F_VERSION_1,
    mask,
)
from pyvmm.virtio.offload import OffloadLock, serve
from pyvmm.virtio.queue.protocol import Queue, QueueLock
from pyvmm.virtio.queue.split import SplitQueue
from pyvmm.virtio.queue.state import QueueState
from pyvmm.virtio.vhost_user import rings, session
from pyvmm.virtio.vhost_user.link import CONFIG_CHANGED, PATIENCE, STARTING, Link, StateRefused
from pyvmm.virtio.vhost_user.served import Served
from pyvmm.virtio.worker import QueueWorker

RING_FEATURES = mask(
    VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1, VIRTIO_F_RING_PACKED
)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds between attempts to reconnect
_SETTLED = 2.0  # seconds that a connection must last, or the time for the next one goes on
_STEP = 0.001


class VhostUserDevice(VirtioDevice):
    """The device that the back end at `path` serves."""

    lends_memory = True

    def __init__(
        self,
        path: str,
        served: Served,
        *,
        name: str,
        queue_size: int = 128,
        reconnect: float = 30.0,
        patience: float = PATIENCE,
        log: Callable[[str], None] | None = None,
        connection: socket.socket | None = None,
        state: bytes | None = None,
        server: str = "",
    ) -> None:
        """Connect, and find out what the back end can do. It has `patience` seconds for each
        answer. After its death another one has `reconnect` seconds to be there. `connection` is one
        to a back end that was just started, with more time for its first answers, and that nobody
        else can reach: `path` is for messages then. `state` is what a device that is to be restored
        has had in its `take_state`. `server` is what to call the back end.

        Raises HostError where nobody listens, BackEndError for one that cannot serve this.
        """
        self.name = name
        self.device_type = served.number
        self.queue_sizes = (queue_size,) * served.queues
        self._path = path
        self._server = server or f"the back end at {path}"
        self._served = served
        self._reconnect = reconnect
        self._patience = patience
        self._log = log or RateLimited(prefix=f"{name}: ", device=name, error="back_end")
        self._talking = Lock()
        self._refusing = Lock()  # a leaf: for a worker that refuses a queue, as long as it has one
        self._wake, self._error = EventFd(), EventFd()
        self._given, self._only_given = connection, connection is not None
        self._connecting: Link | None = None
        self._needed = 0
        self._config = bytes(served.config_size)
        self._written: dict[int, bytes] = {}  # by the driver to its configuration, by offset
        self._link: Link | None = None
        self._session: Link | None = None  # the link that has heard of the activation
        self._activation: Activation | None = None
        self._thread: Thread | None = None
        self._stopping = self._failed = self._has_given_up = False
        self._give_up_at = self._linked_at = 0.0
        self._queues: dict[int, Queue] = {}
        self._began: dict[int, int] = {}  # where the back end found a queue first
        self._away: dict[int, Link] = {}  # queues that a back end has, and which
        self._unclean: set[int] = set()  # that it had when it died
        self._workers: dict[int, QueueWorker] = {}  # those that refuse everything
        self._inflight: tuple[bytes, int] | None = None
        self._state = state  # of a back end that is not stateless: to be loaded, or saved
        self._reconnections = 0
        try:
            self._link = link = self._open_link()
        except BaseException:
            self._close_own()
            raise
        self._from_back_end = link.features & (served.features | RING_FEATURES)
        self.features = self._from_back_end & ~mask(VIRTIO_F_RING_PACKED)
        self._needed = self.features
        self.features |= served.own_features | mask(VIRTIO_F_RING_RESET)  # which is ours to do

    @property
    def knows_packed(self) -> bool:
        """True if the back end can serve packed rings."""
        return features.has(self._from_back_end, VIRTIO_F_RING_PACKED)

    def close(self) -> None:
        """Leave the back end; the device must be reset."""
        with self._talking:
            link, self._link = self._link, None
            if link is not None:
                link.close()
            self._forget_inflight()
        self._close_own()

    def _close_own(self) -> None:
        self._wake.close()
        self._error.close()

    def stats(self) -> Mapping[str, object]:
        """Who serves the queues, and counts their requests if anybody does; whether there is a back
        end, and how often there was a new one."""
        return {
            "served_by": self._server,
            "connected": self._link is not None,
            "reconnections": self._reconnections,
        }

    def look(self) -> None:
        """See VirtioDevice: a back end that ends while no driver is at work is noticed here."""
        if self._activation is not None or not self._talking.acquire(blocking=False):
            return
        try:
            link = self._link
            if self._activation is None and link is not None and _has_ended(link):
                self._lose(BackEndError("has gone"))
        finally:
            self._talking.release()

    def queue_lock(self) -> QueueLock:
        """See VirtioDevice: the back end serves the queues while nobody holds it."""
        return OffloadLock()

    # --- configuration space: 2.5 -----------------------------------------------------------------

    def read_config(self, offset: int, length: int) -> bytes:
        """See VirtioDevice."""
        config = self._served.config(self._config, self._link is not None)
        return config[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """The back end takes it, and says what the configuration is then."""
        with self._talking:
            link = self._link
            if link is None or not link.has(protocol.VHOST_USER_PROTOCOL_F_CONFIG):
                return
            if offset + len(data) > self._served.config_size:
                return
            try:
                link.write_config(offset, data)
                # Another back end takes it as well, and the latest last: they may overlap.
                self._written.pop(offset, None)
                self._written[offset] = data
                self._config = self._fetch_config(link)
            except PyvmmError as error:
                self._lose(error)

    def _configure(self, link: Link) -> None:
        """Have a back end know what the driver has written, and find out what it makes of that.
        Raises BackEndError, HostError."""
        if link.has(protocol.VHOST_USER_PROTOCOL_F_CONFIG):
            for offset, data in self._written.items():
                link.write_config(offset, data)
        self._config = self._fetch_config(link)

    def _fetch_config(self, link: Link) -> bytes:
        size = self._served.config_size
        found = None
        if size and link.has(protocol.VHOST_USER_PROTOCOL_F_CONFIG):
            found = link.read_config(size)
        if found is None:
            if self._served.needs_config:
                raise BackEndError(f"gives no {size} bytes of configuration")
            found = bytes(size)
        return found

    # --- the connection ---------------------------------------------------------------------------

    def _open_link(self) -> Link:
        """A connection to a back end that can serve what the driver was offered. Raises HostError,
        BackEndError."""
        link = self._connecting = self._connect()
        try:
            if self._stopping:  # Whoever said so may have looked for a connection too early.
                link.hang_up()
            link.agree()
            self._check(link)
            self._configure(link)
            link.expect(self._patience)
        except BaseException:
            link.close()
            raise
        finally:
            self._connecting = None
        return link

    def _connect(self) -> Link:
        if not self._only_given:
            return Link.to(self._path, self._patience)
        given, self._given = self._given, None
        if given is None:
            raise HostError(errno.ECONNREFUSED, f"connect to {self._path}")
        return Link(given, STARTING)

    def _check(self, link: Link) -> None:
        if not features.has(link.features, VIRTIO_F_VERSION_1):
            raise BackEndError("knows no virtio 1 (VIRTIO_F_VERSION_1)")
        missing = self._needed & ~link.features
        if missing:
            raise BackEndError(f"lacks what the guest was offered: {features.describe(missing)}")
        count = self._served.queues
        if link.has(protocol.VHOST_USER_PROTOCOL_F_MQ) and link.queues < count:
            raise BackEndError(f"has {how_many(link.queues, 'queue')}, and {count} are wanted")

    def _lose(self, error: PyvmmError) -> None:
        """The back end is of no more use, because of `error`. `_talking` is held."""
        link, self._link, self._session = self._link, None, None
        if link is not None:
            link.close()
            more = ", and no other can take its place" if self._only_given else ""
            self._log(f"the back end at {self._path} {_what_it_does(error)}{more}")
        self._wake.signal()

    # --- the driver's doing -----------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """See VirtioDevice: what its driver has told the back end. That one has returned all that
        it had taken, and a device without one is refused: the locks of the queues say so."""
        if self._link is None or self._unclean:
            raise ConfigError(
                f"{self.name} cannot be in a snapshot now: its back end has gone, or does not end "
                "what it does",
                cure="try again",
            )
        if not self._served.is_stateless:
            self._save_state()
        return {
            "config": self._config[: self._served.identity].hex(),
            "written": [
                {"offset": offset, "data": data.hex()} for offset, data in self._written.items()
            ],
        }

    def restore(self, saved: Saved) -> None:
        """See VirtioDevice. Raises ConfigError also for a back end with another disk."""
        if saved.data("config") != self._config[: self._served.identity]:
            raise saved.wrong(f"the back end at {self._path} has a disk of another size")
        most = self._served.config_size
        for row in saved.tables("written", most):
            offset = row.integer("offset", most)
            self._written[offset] = row.data("data", most=most - offset)
        with self._talking:
            if self._link is not None and self._written:
                try:
                    self._configure(self._link)
                except PyvmmError as error:
                    self._lose(error)
        if not self._served.is_stateless:
            self._load_state(saved)

    def _save_state(self) -> None:
        with self._talking:
            link = self._link
            try:
                if link is None:
                    raise BackEndError("has gone")
                self._state = link.save_state()
            except StateRefused as error:
                raise unsaveable(
                    self,
                    f"its state is known to the back end at {self._path} alone, which {error}",
                ) from None
            except PyvmmError as error:
                self._lose(error)
                raise unsaveable(
                    self, f"the back end at {self._path} {_what_it_does(error)}"
                ) from None

    def take_state(self) -> bytes:
        """What `save` has got of the back end's own state; nothing of it is kept here."""
        state, self._state = self._state, None
        return state or b""

    def _load_state(self, saved: Saved) -> None:
        state = self.take_state()
        with self._talking:
            try:
                if self._link is None:
                    raise BackEndError("has gone")
                self._link.load_state(state)
            except PyvmmError as error:
                raise saved.wrong(f"the back end at {self._path} {_what_it_does(error)}") from None

    def activate(self, activation: Activation) -> None:
        """Have the back end serve the queues. Without one, another is waited for."""

        def fail(error: PyvmmError) -> None:
            activation.fail(error)
            self._failed = True
            self._wake.signal()

        self._activation = activation._replace(fail=fail)
        self._stopping = self._failed = self._has_given_up = False
        self._give_up_at = self._linked_at = 0.0
        # What the driver has been offered and the registry has added to it.
        self._needed = self.features & self._from_back_end
        self._wake.drain()
        self._error.drain()
        with self._talking:
            self._find_link()
        for queue in activation.queues:
            if queue is not None:
                self._serve(queue)
        self._say_driver_ok()
        self._thread = Thread(target=self._watch, name=f"{self.name}-link", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # all that Python says of pthread_create's EAGAIN
            self._thread = None
            self._failed = True
            self._stop_all()
            raise HostError(errno.EAGAIN, f"thread for {self.name}") from None

    def _find_link(self) -> None:
        """One that died while no driver was there is noticed now."""
        if self._link is not None and _has_ended(self._link):
            self._lose(BackEndError("has gone"))
        if self._link is None:
            with suppress(BackEndError, HostError):
                self._link = self._open_link()

    def start_queue(self, queue: Queue) -> None:
        """See VirtioDevice."""
        self._serve(queue)

    def _serve(self, queue: Queue) -> None:
        queue.begin_serving()
        self._began[queue.index] = queue.state().next_used
        self._unclean.discard(queue.index)
        # From here on the thread deals with it, and is not to take it for the one of before.
        self._queues[queue.index] = queue
        if self._has_given_up:
            self._refuse(queue)
        else:
            serve(queue, self)

    def reset_queue(self, index: int) -> None:
        """See VirtioDevice."""
        with self._refusing:  # or a worker for it could begin behind our back
            queue = self._queues.pop(index, None)
        if queue is not None:
            serve(queue, None)
        self._end_worker(index)

    def reset(self) -> None:
        """See VirtioDevice: when this returns the back end has stopped all rings, or is gone."""
        self._stopping = True
        self._wake.signal()
        connecting = self._connecting
        if connecting is not None:
            connecting.hang_up()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        for index in list(self._queues):
            self.reset_queue(index)
        with self._talking:
            link, self._session = self._session, None
            if link is not None:
                try:
                    session.say_reset(link)
                except PyvmmError as error:
                    self._lose(error)
            self._forget_inflight()
            self._written = {}
        self._away.clear()
        self._unclean.clear()
        self._activation = None

    def _forget_inflight(self) -> None:
        inflight, self._inflight = self._inflight, None
        if inflight is not None:
            os.close(inflight[1])

    # --- for the rings ----------------------------------------------------------------------------

    def hand_over(self, queue: Queue) -> None:
        """The back end serves `queue`, if there is one; else it waits for one."""
        activation = self._activation
        if activation is None or not queue.ready or self._failed:
            return
        try:
            with self._talking:
                link = self._link
                if link is None:
                    return
                try:
                    self._check_left(queue, activation, link)
                    self._begin_session(link, activation)
                    self._start(link, queue, activation)
                except (BackEndError, HostError) as error:
                    self._lose(error)
                    return
                self._away[queue.index] = link
                self._unclean.discard(queue.index)
        except PyvmmError as error:  # the ring cannot be served by anybody
            activation.fail(error)
            return
        # For what the driver made available when nobody looked, and what it was not told of.
        queue.kick.signal()
        activation.interrupt.signal_used(queue.index)

    def _begin_session(self, link: Link, activation: Activation) -> None:
        if self._session is link:
            return
        session.accept_features(link, activation.features & self._from_back_end)
        session.lend(link, activation.memory)
        if link.has(protocol.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD):
            if self._inflight is None:
                # For the largest that a queue can have after a reset of its own.
                sizes = self.queue_sizes
                self._inflight = link.make_inflight(len(sizes), max(sizes, default=1))
            if self._inflight is not None:
                described, fd = self._inflight
                link.tell("SET_INFLIGHT_FD", described, [fd])
        else:
            self._forget_inflight()  # They would not be true any more when they are wanted.
        self._session = link

    def _start(self, link: Link, queue: Queue, activation: Activation) -> None:
        session.lend(link, activation.memory)  # it may be more memory by now
        call = activation.interrupt.eventfd(queue.index)
        session.start_ring(link, queue, activation.memory, call, self._error)

    def _say_driver_ok(self) -> None:
        with self._talking:
            link = self._session
            if link is not None:
                try:
                    session.say_driver_ok(link)
                except PyvmmError as error:
                    self._lose(error)

    def take_back(self, queue: Queue) -> None:
        """The back end lets go of `queue`, which is as if we had served it."""
        activation = self._activation
        if activation is None or queue.index not in self._away:
            return
        base = None
        with self._talking:
            link = self._away.pop(queue.index)
            if link is self._link:
                try:
                    base = session.stop_ring(link, queue.index)
                except PyvmmError as error:
                    self._lose(error)
        if not queue.ready:
            return
        try:
            self._find_position(link, queue, activation, base)
        except PyvmmError as error:
            activation.fail(error)

    def _find_position(
        self, link: Link, queue: Queue, activation: Activation, base: int | None
    ) -> None:
        state = queue.state()
        if state.packed:
            if base is None:
                raise BackEndError("has gone, and a packed ring does not tell where it was")
            queue.served_to(base >> 16 or base)  # some give the available half alone
            return
        if base is None or not self._settles(link, activation, state, base):
            self._unclean.add(queue.index)
        # Not the base: what was taken and not returned is to be taken again.
        queue.served_to(rings.used_idx(activation.memory, state))

    def _settles(self, link: Link, activation: Activation, state: QueueState, base: int) -> bool:
        """True if all that the back end took is returned; some answer before they are done."""
        with link.waiting() as give_up_at:
            while rings.used_idx(activation.memory, state) != base & 0xFFFF:
                if time.monotonic() > give_up_at or self._link is not link:
                    return False
                time.sleep(_STEP)
        return True

    def _check_left(self, queue: Queue, activation: Activation, link: Link | None = None) -> None:
        """Raise PyvmmError unless another, at `link` or we ourselves, can go on with a ring that a
        back end has left."""
        reads_notes = link is None or link.has(protocol.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD)
        if queue.index not in self._unclean or (self._inflight is not None and reads_notes):
            return
        state, memory = queue.state(), activation.memory
        if not rings.outstanding(memory, state):
            return
        if not rings.looks_in_order(memory, state, self._began[queue.index]):
            raise _Lost(
                "the back end has gone without notes (INFLIGHT) on requests that it had taken in "
                "another order than it was given them"
            )

    # --- the thread: the connection's end, and another one ----------------------------------------

    def _watch(self) -> None:
        try:
            while not self._stopping:
                with self._talking:
                    link = self._link
                if self._failed:
                    self._stop_all()
                if link is not None or self._failed:
                    self._sleep(link)
                elif not self._recover():
                    return
        except PyvmmError as error:
            assert self._activation is not None
            self._activation.fail(error)

    def _stop_all(self) -> None:
        for queue in list(self._queues.values()):
            serve(queue, None)

    def _sleep(self, link: Link | None) -> None:
        """Until something happens; deal with it."""
        poll = select.poll()
        poll.register(self._wake.fd, select.POLLIN)
        poll.register(self._error.fd, select.POLLIN)
        requests = -1
        if link is not None and not self._failed:
            with suppress(ValueError, OSError):  # closed meanwhile
                poll.register(link.fileno(), select.POLLRDHUP)
                requests = link.requests_fd
                if requests >= 0:
                    poll.register(requests, select.POLLIN)
        happened = dict(poll.poll())
        self._wake.drain()
        if self._stopping or self._activation is None:
            return
        if self._error.drain():
            self._activation.fail(BackEndError("the back end reports a ring that it cannot serve"))
        elif requests in happened and link is not None:
            self._take_request(link)
        elif link is not None and self._link is link and _has_ended(link):
            with self._talking:
                if self._link is link:
                    self._lose(BackEndError("has gone"))

    def _take_request(self, link: Link) -> None:
        try:
            asked = link.take_request()
        except (BackEndError, HostError) as error:
            with self._talking:
                if self._link is link:
                    self._lose(error)
            return
        if asked == CONFIG_CHANGED:
            self._refresh_config()
        elif asked:
            self._log(f"the back end at {self._path} makes {asked}, which is not offered")

    def _refresh_config(self) -> None:
        with self._talking:
            link = self._link
            if link is None:
                return
            before = self._config
            try:
                self._config = self._fetch_config(link)
            except PyvmmError as error:
                self._lose(error)
                return
        if self._config != before and self._activation is not None:
            self._activation.interrupt.signal_config_change()

    def _recover(self) -> bool:
        """Find another back end, and have it go on; False if there is to be none."""
        activation = self._activation
        assert activation is not None
        activation.interrupt.signal_config_change()  # a card's link is down, say
        now = time.monotonic()
        if not self._linked_at or now - self._linked_at > _SETTLED:
            self._give_up_at = now + self._reconnect
        # What one back end alone knew has gone with it.
        hopeless = not self._served.resumes and bool(self._away or self._unclean)
        pause = _FIRST_PAUSE
        while not self._stopping and not self._failed:
            if hopeless or time.monotonic() > self._give_up_at:
                self._give_up()
                return False
            try:
                link = self._open_link()
            except (BackEndError, HostError):
                self._pause(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
                continue
            self._go_on(link, activation)
            break
        return True

    def _go_on(self, link: Link, activation: Activation) -> None:
        with self._talking:
            self._link = link
        for queue in list(self._queues.values()):
            serve(queue, self)
        self._say_driver_ok()
        if self._link is link:
            self._reconnections += 1
            self._log(f"another back end is at {self._path}, and goes on")
            activation.interrupt.signal_config_change()
        self._linked_at = time.monotonic()

    def _pause(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._wake.fd, select.POLLIN)
        poll.poll(1000 * seconds)
        self._wake.drain()

    # --- no back end any more ---------------------------------------------------------------------

    def _give_up(self) -> None:
        activation = self._activation
        assert activation is not None
        self._has_given_up = True
        if self._served.refuse is None:
            activation.fail(BackEndError(f"there is no back end at {self._path} any more"))
            return
        if not self._only_given:
            self._log(
                f"there is no back end at {self._path} any more: requests fail until the guest "
                "resets the device"
            )
        for queue in list(self._queues.values()):
            self._refuse(queue)

    def _refuse(self, queue: Queue) -> None:
        """Answer all that is in `queue`, and all that will be, with an error."""
        activation, refuse = self._activation, self._served.refuse
        assert activation is not None and refuse is not None
        serve(queue, None)
        while not queue.lock.acquire(timeout=_LONGEST_PAUSE):  # a VM that is paused
            if self._stopping:
                return
        try:
            if not queue.ready:
                return
            if queue.index in self._unclean:
                self._check_left(queue, activation)
                self._take_up(queue)
        except PyvmmError as error:
            activation.fail(error)
            return
        finally:
            queue.lock.release()
        index = queue.index
        with self._refusing:
            # The driver may have reset it meanwhile, or set it up anew, of which it sees the same.
            if self._queues.get(index) is not queue or index in self._workers:
                return
            worker = QueueWorker(
                self.name, [queue], refuse, activation, [()], thread=f"{self.name}-q{index}"
            )
            worker.start()
            self._workers[index] = worker

    def _take_up(self, queue: Queue) -> None:
        """Take what the back end had taken first, by its notes."""
        if self._inflight is None or not isinstance(queue, SplitQueue):
            return
        notes = Inflight.copy_of(*self._inflight).journal(queue.index, queue.size)
        queue.keep_journal(notes, notes.resume(queue.state().next_used))

    def _end_worker(self, index: int) -> None:
        with self._refusing:
            worker = self._workers.pop(index, None)
        if worker is not None:
            worker.request_stop()
            worker.join()


class _Lost(PyvmmError):
    """Nothing but a reset helps."""


def _what_it_does(error: PyvmmError) -> str:
    told = isinstance(error, BackEndError | StateRefused)
    return str(error) if told else f"cannot be reached: {error}"


def _has_ended(link: Link) -> bool:
    poll = select.poll()
    try:
        poll.register(link.fileno(), select.POLLRDHUP)
    except (ValueError, OSError):
        return True
    return bool(poll.poll(0))
