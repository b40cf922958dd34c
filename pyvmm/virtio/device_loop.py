"""One thread for a whole device: its queues, and files of the host that it serves with them.

For devices whose queues belong together (vsock's receive and transmit queue, a console's ports),
where a thread per queue as in `pyvmm.virtio.worker` would need locks between them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock, RLock, Thread
from time import perf_counter_ns

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host.poller import READABLE, Poller
from pyvmm.host.syscalls import EventFd
from pyvmm.virtio.defects import as_device_failure
from pyvmm.virtio.device import Activation
from pyvmm.virtio.queue.protocol import Queue

Serve = Callable[[Queue], None]


class DeviceLoop:
    """Calls `work` once at the start and after every wake-up: a kick of any queue, an event on a
    file in `poller`, or `wake`.

    `work` does what can be done without waiting and returns in how many seconds it wants to be
    called again if nothing happens, or None; it goes on only as long as `may_go_on` says. `end`
    closes what `work` uses, also when the device failed; `poller` is closed after it. Both are
    called by this loop's thread only.

    `queues` are those in use, None for one that is not; a queue that is reset is taken out.
    """

    def __init__(
        self,
        name: str,
        activation: Activation,
        poller: Poller,
        work: Callable[[], float | None],
        end: Callable[[], None],
    ) -> None:
        """Raises HostError, and then `poller` is the caller's still."""
        self._name = name
        self._activation = activation
        self._poller = poller
        self._work = work
        self._end = end
        self.queues: list[Queue | None] = list(activation.queues)
        self.stopping = False
        self._working = Lock()  # held during `work`
        self._rest_wanted = False  # somebody waits for it
        self._heard: set[int] = set()  # the kicks that `poller` has
        self._wake = EventFd()
        self._closing = RLock()  # a signal handler may come while its own thread holds it
        try:
            poller.add(self._wake.fd, _ignore, READABLE)
            for queue in self.queues:
                if queue is not None:
                    self._listen(queue)
        except BaseException:
            self._wake.close()
            raise
        self._thread = Thread(target=self._run, name=f"{name}-loop", daemon=True)

    def _listen(self, queue: Queue) -> None:
        queue.begin_serving()
        if queue.kick.fd not in self._heard:  # which outlives the queue's reset
            self._poller.add(queue.kick.fd, _ignore, READABLE)
            self._heard.add(queue.kick.fd)

    def start(self) -> None:
        """Start the thread. Raises HostError, with all closed, if the host has no more of them."""
        try:
            self._thread.start()
        except RuntimeError:  # all that Python says of pthread_create's EAGAIN
            self._close()
            self._wake.close()
            raise HostError(errno.EAGAIN, f"thread for {self._name}") from None

    def wake(self) -> None:
        """Have `work` called soon, if the thread still runs. Any thread may ask, and a signal
        handler."""
        with self._closing:
            if self._wake.fd >= 0:
                self._wake.signal()

    def request_stop(self) -> None:
        """Ask the thread to end after the request at hand."""
        self.stopping = True
        for queue in self.queues:
            if queue is not None:
                queue.end_serving()
        self._wake.signal()

    @property
    def may_go_on(self) -> bool:
        """Whether `work` may begin another round, or somebody waits for it to return."""
        return not (self.stopping or self._rest_wanted)

    def drop_queue(self, index: int, forget: Callable[[], None] | None = None) -> None:
        """Serve queue `index` no more, which is stopped already; `forget` lets go of its chains.

        It is called, by the thread that calls this, while the loop's own rests."""
        with self._rest():
            self.queues[index] = None
            if forget is not None:
                forget()

    def take_queue(self, queue: Queue) -> None:
        """Serve `queue`, in the place of one that was dropped or never in use. Raises HostError."""
        with self._rest():
            self._listen(queue)
            self.queues[queue.index] = queue

    @contextmanager
    def _rest(self) -> Iterator[None]:
        """`work` is not running meanwhile; what it has left undone is done afterwards."""
        self._rest_wanted = True
        with self._working:
            self._rest_wanted = False
            yield
        self.wake()

    def join(self) -> None:
        """Wait until the thread has ended, after `request_stop` or because the device failed."""
        self._thread.join()
        with self._closing:
            self._wake.close()

    def batch(self, queue: Queue | None, serve: Serve) -> None:
        """Let `serve` take chains from `queue` and return them; then publish and interrupt.

        Kicks are off until `ask_for_kicks`. Nothing happens to a queue that is not in use. Raises
        what `serve` raises, with what was returned before published.
        """
        if queue is None:
            return
        notify = False
        began = perf_counter_ns()
        try:
            with queue.lock:
                before = queue.stats.requests
                queue.disable_notification()
                try:
                    if queue.ready:
                        serve(queue)
                finally:
                    notify = queue.publish_used()
                    queue.stats.end_batch(before, began)
        finally:
            # Not under the lock, so that whoever handles the interrupt may take it.
            if notify:
                self._activation.interrupt.signal_used(queue.index)

    def ask_for_kicks(self, queue: Queue | None) -> bool:
        """Have the driver kick for new buffers; True if some came meanwhile."""
        if queue is None:
            return False
        with queue.lock:
            return queue.enable_notification() and not queue.halt

    def _run(self) -> None:
        try:
            while not self.stopping:
                with self._working:
                    seconds = self._work()
                self._poller.wait(seconds)
        except Exception as error:
            self._give_up(as_device_failure(self._name, error))
        finally:
            self._close()

    def _close(self) -> None:
        self._end()
        self._poller.close()

    def _give_up(self, error: PyvmmError) -> None:
        for queue in self.queues:
            if queue is not None:
                with queue.lock:
                    queue.ready = False
        if not self.stopping:
            self._activation.fail(error)


def _ignore(events: int) -> None:
    """A kick: that the thread is awake is all."""
