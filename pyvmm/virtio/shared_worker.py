"""One thread for a few queues that belong together, such as the two of a network card's pair.

What is sent is often answered at once: whoever sends looks next whether something has come, without
a second thread to be woken, which on a busy processor takes longer than all the rest.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from threading import Thread
from time import perf_counter_ns

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host.syscalls import EventFd
from pyvmm.host.waiter import Source, Waiter
from pyvmm.virtio.defects import as_device_failure
from pyvmm.virtio.device import Activation
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import AT_ONCE, Rest, Serve


class SharedWorker:
    """Serves `queues` in a thread of its own, in their order, from `start` until `request_stop` or
    an error. `serve` is as for `QueueWorker`, and is called for each of them after every wake-up.
    """

    def __init__(
        self,
        name: str,
        queues: Sequence[Queue],
        serve: Serve,
        activation: Activation,
        sources: Sequence[Sequence[Source]],
    ) -> None:
        """`name` is the thread's; `sources` has those of each queue. Raises HostError if the host
        has no more file descriptors."""
        self._name = name
        self._queues = tuple(queues)
        self._serve = serve
        self._activation = activation
        self._stop = EventFd()
        self._stopping = False
        self._to_arm = {
            queue.index
            for queue, its in zip(queues, sources, strict=True)
            if any(source.on_demand for source in its)
        }
        first, *others = (queue.kick for queue in queues)
        watched = [Source(kick.fd) for kick in others]
        try:
            self._waiter = Waiter(
                first, self._stop, [*watched, *(s for its in sources for s in its)]
            )
        except BaseException:
            self._stop.close()
            raise
        self._thread = Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin with what is available already. Raises HostError if the host has no more threads,
        and then all is closed."""
        for queue in self._queues:
            queue.begin_serving()
        try:
            self._thread.start()
        except RuntimeError:  # all that Python says of pthread_create's EAGAIN
            self._close()
            raise HostError(errno.EAGAIN, f"thread for {self._name}") from None

    def request_stop(self) -> None:
        """Ask the thread to end after the request at hand, which is completed and published."""
        self._stopping = True
        for queue in self._queues:
            queue.end_serving()
        self._stop.signal()

    def join(self) -> None:
        """Wait until the thread has ended: after `request_stop`, or because the device failed."""
        self._thread.join()
        self._close()

    def _close(self) -> None:
        self._waiter.close()
        self._stop.close()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._waiter.wait(self._serve_until_idle())
        except Exception as error:
            self._give_up(as_device_failure(self._name, error))

    def _serve_until_idle(self) -> float | None:
        """All that can be done now; after how many seconds there is more, or None."""
        while True:
            more = False
            seconds: float | None = None
            wait_for_kicks = []
            arm = False
            for queue, rest in self._serve_all():
                if rest is AT_ONCE:
                    more = True
                    continue
                if rest is None or rest.kicks:
                    wait_for_kicks.append(queue)
                if rest is not None:
                    arm |= not rest.kicks and rest.sources and queue.index in self._to_arm
                    if rest.seconds is not None:
                        seconds = rest.seconds if seconds is None else min(seconds, rest.seconds)
            for queue in wait_for_kicks:
                with queue.lock:
                    more |= queue.enable_notification() and not queue.halt
            if not more:  # nor if it is to stop: its queues are passed over then
                break
        if arm:
            self._waiter.arm()
        return seconds

    def _serve_all(self) -> list[tuple[Queue, Rest | None]]:
        """One pass over the queues, and then one notification for all of them."""
        passes = []
        notify = []
        try:
            for queue in self._queues:
                if queue.halt or not queue.ready:
                    continue
                began = perf_counter_ns()
                with queue.lock:
                    before = queue.stats.requests
                    queue.disable_notification()
                    rest = self._serve(queue)
                    if queue.publish_used():
                        notify.append(queue.index)
                    queue.stats.end_batch(before, began)
                passes.append((queue, rest))
        finally:
            # Not under the locks, so that whoever handles the interrupt may take them.
            if notify:
                self._activation.interrupt.signal_used(*notify)
        return passes

    def _give_up(self, error: PyvmmError) -> None:
        for queue in self._queues:
            with queue.lock:
                # What was completed before the error stays completed.
                notify = queue.publish_used()
                queue.ready = False
            if notify:
                self._activation.interrupt.signal_used(queue.index)
        if not self._stopping:
            self._activation.fail(error)
