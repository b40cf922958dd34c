"""The threads that serve queues, and the base of devices that need no more than `serve`.

A device with one queue of buffers to fill is this much:

    class Rng(QueueDevice):
        name, device_type, queue_sizes = "rng", 4, (64,)

        def serve(self, queue: Queue) -> None:
            for chain in queue:
                writer = chain.writer()
                writer.write(os.urandom(writer.available))
                queue.add_used(chain, writer.written)

A device that also waits for something else, a socket or a timer, names it in `sources`; `serve` is
called for that too, and may return a `Rest`. One whose queues belong together (vsock's receive and
transmit queue, a console's ports) uses a `Worker` by itself, or it would need locks between them.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, RLock, Thread
from time import perf_counter_ns
from typing import NamedTuple, Protocol

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host.poller import READABLE, Poller, Source
from pyvmm.host.syscalls import EventFd
from pyvmm.virtio.defects import as_device_failure
from pyvmm.virtio.device import Activation, VirtioDevice
from pyvmm.virtio.features import RING_FEATURES
from pyvmm.virtio.polling import Polling
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.protocol import Queue


class Rest(NamedTuple):
    """The reasons that end a worker's sleep, returned by `serve` where it is not just "a kick or a
    source".

    Without `kicks` the driver is told that kicks are not needed: what is left in the ring waits for
    a source, and those that are watched on demand are armed, unless `sources` is false. After
    `seconds` the sleep ends in any case; 0 is not to sleep at all.
    """

    kicks: bool = True
    seconds: float | None = None
    sources: bool = True


FOR_SOURCE = Rest(kicks=False)
AT_ONCE = Rest(kicks=False, seconds=0)  # there is more to do, as far as `serve` knows

Serve = Callable[[Queue], Rest | None]


class Limits(Protocol):
    """The limits of a device's speed; see `rate_limit.RateLimiter`."""

    def around(self, serve: Serve, size_of: Callable[[DescriptorChain], int]) -> Serve:
        """`serve` within these limits, for one queue; `size_of` says how many bytes a chain counts
        for."""

    def charge(self, size: int, operations: int = 1) -> None:
        """Count what went anyway; negative numbers give back what was taken."""

    def lift(self) -> None:
        """Limit nothing from now on. Who waits still is to be woken."""


class Worker(ABC):
    """One thread for one to many queues of a device, and for files of the host beside them.

    It works at the start and after every wake-up: a kick of any queue, an event on a file in its
    poller, or `wake`. `queues` are those in use, by index.
    """

    def __init__(
        self,
        name: str,
        thread: str,
        queues: Iterable[Queue | None],
        activation: Activation,
        poller: Poller,
    ) -> None:
        """`name` is for messages, `thread` the thread's name; `queues` may have a None for one that
        is not in use. Raises HostError, and then `poller` is the caller's still."""
        self._name = name
        self._activation = activation
        self._poller = poller
        self.queues = {queue.index: queue for queue in queues if queue is not None}
        self._stopping = False
        self._heard: set[int] = set()  # the kicks that `poller` has
        self._wake = EventFd()
        self._closing = RLock()  # a signal handler may come while its own thread holds it
        try:
            poller.add(self._wake.fd, None, READABLE)
            for queue in self.queues.values():
                self._listen(queue)
        except BaseException:
            self._wake.close()
            raise
        self._thread = Thread(target=self._run, name=thread, daemon=True)

    def _listen(self, queue: Queue) -> None:
        if queue.kick.fd not in self._heard:  # which outlives the queue's reset
            self._poller.add(queue.kick.fd, None, READABLE)
            self._heard.add(queue.kick.fd)

    @abstractmethod
    def _work(self) -> float | None:
        """Do what can be done without waiting, until a stop is asked for; in how many seconds to be
        called again if nothing happens, or None."""

    def _end(self) -> None:  # noqa: B027 - most have nothing to close
        """Close what `_work` uses, also when the device failed. `poller` is closed after it."""

    # --- from other threads ----------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread: begin with what is available already. Raises HostError, with all
        closed, if the host has no more threads."""
        for queue in self.queues.values():
            queue.begin_serving()
        try:
            self._thread.start()
        except RuntimeError:  # all that Python says of pthread_create's EAGAIN
            self._close()
            self._wake.close()
            raise HostError(errno.EAGAIN, f"thread for {self._name}") from None

    def wake(self) -> None:
        """Have it work soon, if the thread still runs. Any thread may ask, and a signal handler."""
        with self._closing:
            if self._wake.fd >= 0:
                self._wake.signal()

    def request_stop(self) -> None:
        """Ask the thread to end after the request at hand, which is completed and published."""
        self._stopping = True
        for queue in self.queues.values():
            queue.end_serving()
        self._wake.signal()

    def join(self) -> None:
        """Wait until the thread has ended: after `request_stop`, or because the device failed."""
        self._thread.join()
        with self._closing:
            self._wake.close()

    # --- the thread ------------------------------------------------------------------------------

    def batch(
        self, queue: Queue | None, serve: Serve, to_notify: list[int] | None = None
    ) -> Rest | None:
        """Let `serve` take chains from `queue` and return them; then publish and interrupt, or note
        in `to_notify` that this is to be done. What `serve` returns.

        Kicks are off until `ask_for_kicks`. Nothing happens to a queue that is not in use. Raises
        what `serve` raises, with what was returned before published.
        """
        if queue is None:
            return None
        rest = None
        notify = False
        began = perf_counter_ns()
        try:
            with queue.lock:
                stats = queue.stats
                before = stats.requests
                queue.disable_notification()
                try:
                    if queue.ready:
                        rest = serve(queue)
                finally:
                    notify = queue.publish_used()
                    done = stats.requests - before
                    if done:
                        took = perf_counter_ns() - began
                        stats.latency[took.bit_length()] += done
                        stats.nanoseconds += took * done
        finally:
            # Not under the lock, so that whoever handles the interrupt may take it.
            if notify:
                if to_notify is None:
                    self._activation.interrupt.signal_used(queue.index)
                else:
                    to_notify.append(queue.index)
        return rest

    def ask_for_kicks(self, queue: Queue | None) -> bool:
        """Have the driver kick for new buffers; True if some came meanwhile."""
        if queue is None:
            return False
        with queue.lock:
            return queue.enable_notification() and not queue.halt

    def _run(self) -> None:
        work, wait = self._work, self._poller.wait
        try:
            while not self._stopping:
                wait(work())
        except Exception as error:
            self._give_up(as_device_failure(self._name_of_place(), error))
        finally:
            self._close()

    def _name_of_place(self) -> str:
        """The name of this worker for a message about a defect of ours."""
        return self._name

    def _close(self) -> None:
        self._end()
        self._poller.close()

    def _give_up(self, error: PyvmmError) -> None:
        for queue in list(self.queues.values()):
            with queue.lock:
                queue.ready = False
        if not self._stopping:
            self._activation.fail(error)


class DeviceWorker(Worker):
    """For a device whose queues belong together: it says itself what is served in which order.

    `work` does what can be done, by `batch` and `ask_for_kicks`, and goes on only as long as
    `may_go_on` says; what it returns is as for `Worker`. `end` closes what `work` uses. Both are
    called by this thread only. A queue that is reset is taken out.
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
        super().__init__(name, f"{name}-loop", activation.queues, activation, poller)
        self._device_work = work
        self._device_end = end
        self._working = Lock()  # held during `work`
        self._rest_wanted = False  # somebody waits for it

    def _work(self) -> float | None:
        with self._working:
            return self._device_work()

    def _end(self) -> None:
        self._device_end()

    @property
    def may_go_on(self) -> bool:
        """True if `work` may begin another round, or somebody waits for it to return."""
        return not (self._stopping or self._rest_wanted)

    def drop_queue(self, index: int, forget: Callable[[], None] | None = None) -> None:
        """Serve queue `index` no more, which is stopped already; `forget` lets go of its chains.

        It is called, by the thread that calls this, while the worker's own rests."""
        with self._rest():
            self.queues.pop(index, None)
            if forget is not None:
                forget()

    def take_queue(self, queue: Queue) -> None:
        """Serve `queue`, in the place of one that was dropped or never in use. Raises HostError."""
        with self._rest():
            queue.begin_serving()
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


class QueueWorker(Worker):
    """Serves its queues in turn, in their order: `serve` takes the available chains of one, returns
    each by `add_used`, and publishes nothing. It is called for each queue after every wake-up.

    What is sent is often answered at once: whoever sends looks next whether something has come,
    without a second thread to be woken, which on a busy processor takes longer than all the rest.

    Each pass takes at most as many chains as a queue has entries, so that a driver that refills it
    for ever cannot keep the thread from noticing a stop.
    """

    def __init__(
        self,
        name: str,
        queues: Sequence[Queue],
        serve: Serve,
        activation: Activation,
        sources: Sequence[Sequence[Source]],
        *,
        thread: str | None = None,
        poll_ns: int = 0,
    ) -> None:
        """`sources` has what else wakes the worker, for each queue.

        With `poll_ns` the ring, which must be the only one, is polled for so many nanoseconds at
        most before the worker sleeps; `Polling` says when.

        Raises HostError if the host has no more file descriptors.
        """
        self._serve = serve
        self._turns = tuple(queues)
        # One notification for all, where there is more than one.
        self._to_notify: list[int] | None = [] if len(self._turns) > 1 else None
        self._to_arm = {
            queue.index
            for queue, its in zip(queues, sources, strict=True)
            if any(source.on_demand for source in its)
        }
        self._polling = Polling(poll_ns) if poll_ns else None
        poller = Poller()
        try:
            for its in sources:
                for source in its:
                    poller.watch(source)
            super().__init__(name, thread or name, queues, activation, poller)
        except BaseException:
            poller.close()
            raise

    def _name_of_place(self) -> str:
        only = f": queue {self._turns[0].index}" if len(self._turns) == 1 else ""
        return self._name + only

    def _work(self) -> float | None:
        polling = self._polling
        if polling is not None:
            polling.woke()
        while True:
            served = self._turns
            rests: dict[int, Rest] = {}
            more = False
            try:
                for queue in self._turns:
                    if queue.halt or not queue.ready:
                        served = tuple(other for other in served if other is not queue)
                        continue
                    rest = self.batch(queue, self._serve, self._to_notify)
                    if rest is not None:
                        rests[queue.index] = rest
            finally:
                if self._to_notify:
                    self._activation.interrupt.signal_used(*self._to_notify)
                    self._to_notify.clear()
            for queue in served:
                if rests and (rest := rests.get(queue.index)) is not None:
                    if rest is AT_ONCE:
                        more = True
                        continue
                    if not rest.kicks:
                        continue
                elif polling is not None and polling.finds(queue):
                    more = True
                    continue
                with queue.lock:
                    more |= queue.enable_notification() and not queue.halt
            if not more:  # nor after a stop, which halts all queues
                break
        return self._arm_for(rests) if rests else None

    def _arm_for(self, rests: dict[int, Rest]) -> float | None:
        """Arm the sources that are to end the sleep; how many seconds it may last, if not for as
        long as nothing happens."""
        seconds = None
        arm = False
        for index, rest in rests.items():
            arm |= rest.sources and not rest.kicks and index in self._to_arm
            if rest.seconds is not None:
                seconds = rest.seconds if seconds is None else min(seconds, rest.seconds)
        if arm:
            self._poller.arm()
        return seconds


class QueueDevice(VirtioDevice):
    """A device all of whose queues are served by a `QueueWorker` each, within `limits` if it has
    some (set before it is activated). It offers RING_FEATURES unless its class says otherwise; one
    that keeps chains when `serve` returns forgets them in `reset_queue` and `reset`.

    `poll_ns` is for how many nanoseconds a worker may poll its ring before it sleeps, set before it
    is activated: a processor's time for less latency. A source that becomes ready is served when
    that ends. `pyvmm.virtio.polling` tells when it is done.

    Whoever calls `reset` must not hold a lock that `Interrupt.signal_used` or `Activation.fail`
    need: the workers may be about to call them, and `reset` waits for the workers.
    """

    features = RING_FEATURES
    limits: Limits | None = None
    poll_ns: int = 0
    _activation: Activation | None = None
    _workers: dict[int, QueueWorker] = {}  # noqa: RUF012 - replaced, never changed

    @property
    def queues_in_use(self) -> list[Queue]:
        """The queues that have a worker now, those among them that were reset and set up anew."""
        return [worker.queues[index] for index, worker in self._workers.items()]

    @abstractmethod
    def serve(self, queue: Queue) -> Rest | None:
        """Take chains from `queue` and return each with `queue.add_used`; iterate over the queue
        for all that are available. Called from that queue's thread with `queue.lock` held.

        Returns what to sleep for; nothing stands for the driver's next kick or a source. Wake-ups
        may come without a reason.

        A DriverError that it lets out means that the device needs a reset.
        """

    def size_of(self, chain: DescriptorChain) -> int:
        """The number of bytes that `chain` counts for in `limits`."""
        return chain.readable_size + chain.writable_size

    def sources(self, index: int) -> Sequence[Source]:
        """The further sources that `serve` is to be called for, in the thread of queue `index`:
        descriptors that are ready to read, say. Asked once for each activation; they stay the
        device's."""
        return ()

    def signal_config_change(self) -> None:
        """Tell the driver that the configuration space has changed, if one is at work (2.3). Any
        thread may call it; `read_config` has the new contents by then."""
        activation = self._activation
        if activation is not None:
            activation.interrupt.signal_config_change()

    def activate(self, activation: Activation) -> None:
        """Start a worker for each queue that the driver enabled. Raises HostError."""
        self._activation = activation
        try:
            for queue in activation.queues:
                if queue is not None:
                    self.start_queue(queue)
        except BaseException:
            self.reset()
            raise

    def start_queue(self, queue: Queue) -> None:
        """Start a worker for `queue`, on activation or after its reset. Raises HostError."""
        assert self._activation is not None, "only a live device starts queues"
        worker = QueueWorker(
            self.name,
            [queue],
            self._server(),
            self._activation,
            [self.sources(queue.index)],
            thread=f"{self.name}-q{queue.index}",
            poll_ns=self.poll_ns,
        )
        worker.start()
        self._workers = {**self._workers, queue.index: worker}

    def _server(self) -> Serve:
        limits = self.limits
        return self.serve if limits is None else limits.around(self.serve, self.size_of)

    def reset_queue(self, index: int) -> None:
        """Stop and join the worker of queue `index`, which completes the request at hand."""
        workers = dict(self._workers)
        worker = workers.pop(index, None)
        self._workers = workers
        if worker is not None:
            worker.request_stop()
            _finish(worker)

    def reset(self) -> None:
        """Stop and join all workers; each completes the request it is in the middle of."""
        workers, self._workers = self._workers, {}
        for worker in workers.values():
            worker.request_stop()
        for worker in workers.values():
            _finish(worker)
        self._activation = None


def _finish(worker: QueueWorker) -> None:
    """Join `worker`, which was asked to stop: its rings are not touched any more."""
    worker.join()
    for queue in worker.queues.values():
        queue.ready = False
