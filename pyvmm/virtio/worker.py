"""A thread per queue that sleeps until the driver kicks, and the base of devices that use it.

A device with one queue of buffers to fill is this much:

    class Rng(QueueDevice):
        name, device_type, queue_sizes = "rng", 4, (64,)

        def serve(self, queue: Queue) -> None:
            for chain in queue:
                writer = chain.writer()
                writer.write(os.urandom(writer.available))
                queue.add_used(chain, writer.written)

A device that also waits for something else, a socket or a timer, names it in `sources`; `serve` is
called for that too, and may return a `Rest`.
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from collections.abc import Callable, Sequence
from threading import Thread
from time import perf_counter_ns
from typing import TYPE_CHECKING, NamedTuple

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host.syscalls import EventFd
from pyvmm.host.waiter import Source, Waiter
from pyvmm.virtio.defects import as_device_failure
from pyvmm.virtio.device import Activation, VirtioDevice
from pyvmm.virtio.features import RING_FEATURES
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.protocol import Queue

if TYPE_CHECKING:
    from pyvmm.virtio.rate_limit import RateLimiter


class Rest(NamedTuple):
    """What ends a worker's sleep, returned by `serve` where it is not just "a kick or a source".

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


class QueueWorker:
    """Serves one queue in a thread of its own, from `start` until `request_stop` or an error.

    Each pass takes at most as many chains as the queue has entries, so that a driver that refills
    the queue for ever cannot keep the thread from noticing a stop.
    """

    def __init__(
        self,
        name: str,
        queue: Queue,
        serve: Serve,
        activation: Activation,
        sources: Sequence[Source] = (),
        poll_ns: int = 0,
    ) -> None:
        """`serve` takes the available chains, returns each by `add_used`, and publishes nothing.
        It is called after a kick, and whenever one of `sources` wakes the worker.

        With `poll_ns` the ring is polled for so many nanoseconds before the worker sleeps, if it
        slept for less the last time.

        Raises HostError if the host has no more file descriptors.
        """
        self._name = name
        self.queue = queue
        self._serve = serve
        self._activation = activation
        self._stop = EventFd()
        self._stopping = False
        self._poll_limit = poll_ns
        self._poll = 0  # nanoseconds to poll before the next sleep
        try:
            self._waiter = Waiter(queue.kick, self._stop, sources)
        except BaseException:
            self._stop.close()
            raise
        self._thread = Thread(target=self._run, name=f"{name}-q{queue.index}", daemon=True)

    def start(self) -> None:
        """Begin with what is available already, then wait for kicks. Raises HostError if the host
        has no more threads."""
        self.queue.begin_serving()
        try:
            self._thread.start()
        except RuntimeError:  # all that Python says of pthread_create's EAGAIN
            self._close()
            raise HostError(errno.EAGAIN, f"thread for {self._name}") from None

    def request_stop(self) -> None:
        """Ask the thread to end after the request at hand, which is completed and published."""
        self._stopping = True
        self.queue.end_serving()
        self._stop.signal()

    def join(self) -> None:
        """Wait until the thread has ended: after `request_stop`, or because the device failed."""
        self._thread.join()
        self._close()

    def stop(self) -> None:
        """End the thread after the request at hand; the ring is not touched any more."""
        self.request_stop()
        self.join()
        self.queue.ready = False

    def _close(self) -> None:
        self._waiter.close()
        self._stop.close()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._sleep(self._serve_until_idle())
        except Exception as error:
            self._give_up(as_device_failure(f"{self._name}: queue {self.queue.index}", error))

    def _sleep(self, rest: Rest | None) -> None:
        if rest is None:
            if self._poll_limit:
                self._sleep_and_learn()
            else:
                self._waiter.wait()
            return
        if rest.sources and not rest.kicks:
            self._waiter.arm()
        self._waiter.wait(rest.seconds)

    def _sleep_and_learn(self) -> None:
        """Sleep; the next one is preceded by polling if that would have spared us this one."""
        began = perf_counter_ns()
        self._waiter.wait()
        slept = perf_counter_ns() - began
        self._poll = self._poll_limit if slept < self._poll_limit else 0

    def _serve_until_idle(self) -> Rest | None:
        queue, stats = self.queue, self.queue.stats
        rest = None
        more = True
        began = perf_counter_ns()
        while more and not queue.halt:
            with queue.lock:
                queue.disable_notification()
                before = stats.requests
                rest = self._serve(queue)
                notify = queue.publish_used()
                done = stats.requests - before
            if done:
                now = perf_counter_ns()
                took, began = now - began, now
                stats.latency[took.bit_length()] += done
                stats.nanoseconds += took * done
            # Not under the lock, so that whoever handles the interrupt may take it.
            if notify:
                self._activation.interrupt.signal_used(queue.index)
            if rest is AT_ONCE:
                continue
            if rest is not None and not rest.kicks:
                break
            if self._poll and rest is None and queue.poll(perf_counter_ns() + self._poll):
                began = perf_counter_ns()
                continue
            with queue.lock:
                more = queue.enable_notification()
        return rest

    def _give_up(self, error: PyvmmError) -> None:
        queue = self.queue
        with queue.lock:
            # What was completed before the error stays completed.
            notify = queue.publish_used()
            queue.ready = False
        if notify:
            self._activation.interrupt.signal_used(queue.index)
        if not self._stopping:
            self._activation.fail(error)


class QueueDevice(VirtioDevice):
    """A device all of whose queues are served by a `QueueWorker` each, within `limits` if it has
    some (set before it is activated). It offers RING_FEATURES unless its class says otherwise; one
    that keeps chains when `serve` returns forgets them in `reset_queue` and `reset`.

    `poll_ns` is for how many nanoseconds a worker may poll its ring before it sleeps: a processor's
    time for less latency. Only for a device with one queue and a process to itself, because the
    other threads of a process wait for the interpreter meanwhile.

    Whoever calls `reset` must not hold a lock that `Interrupt.signal_used` or `Activation.fail`
    need: the workers may be about to call them, and `reset` waits for the workers.
    """

    features = RING_FEATURES
    limits: RateLimiter | None = None
    poll_ns: int = 0
    _activation: Activation | None = None
    _workers: dict[int, QueueWorker] = {}  # noqa: RUF012 - replaced, never changed

    @property
    def queues_in_use(self) -> list[Queue]:
        """The queues that have a worker now, those among them that were reset and set up anew."""
        return [worker.queue for worker in self._workers.values()]

    @abstractmethod
    def serve(self, queue: Queue) -> Rest | None:
        """Take chains from `queue` and return each with `queue.add_used`; iterate over the queue
        for all that are available. Called from that queue's thread with `queue.lock` held.

        Returns what to sleep for; nothing stands for the driver's next kick or a source. Wake-ups
        may come without a reason.

        A DriverError that it lets out means that the device needs a reset.
        """

    def size_of(self, chain: DescriptorChain) -> int:
        """How many bytes `chain` counts for in `limits`."""
        return chain.readable_size + chain.writable_size

    def sources(self, index: int) -> Sequence[Source]:
        """What else `serve` is to be called for, in the thread of queue `index`: descriptors that
        are ready to read, say. Asked once for each activation; they stay the device's."""
        return ()

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
        sources = self.sources(queue.index)
        worker = QueueWorker(
            self.name, queue, self._server(), self._activation, sources, self.poll_ns
        )
        worker.start()
        self._workers = {**self._workers, queue.index: worker}

    def _server(self) -> Serve:
        if self.limits is None:
            return self.serve
        from pyvmm.virtio.rate_limit import limited

        return limited(self.serve, self.limits, self.size_of)

    def reset_queue(self, index: int) -> None:
        """Stop and join the worker of queue `index`, which completes the request at hand."""
        workers = dict(self._workers)
        worker = workers.pop(index, None)
        self._workers = workers
        if worker is not None:
            worker.stop()

    def reset(self) -> None:
        """Stop and join all workers; each completes the request it is in the middle of."""
        workers, self._workers = self._workers, {}
        for worker in workers.values():
            worker.request_stop()
        for worker in workers.values():
            worker.stop()
        self._activation = None
