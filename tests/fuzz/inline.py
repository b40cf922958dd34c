"""A device's workers, each pass of which runs when the harness says, and is watched: without their
threads, or in them, one at a time, so that a case repeats by its number.

Everything but the thread and its sleep is what runs in a monitor.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Semaphore
from typing import Any
from unittest import mock

import _cffi_backend

from pyvmm.errors import DriverError, HostError
from pyvmm.virtio.defects import as_device_failure
from pyvmm.virtio.queue.chain import DescriptorChain, Usual
from pyvmm.virtio.worker import DeviceWorker, QueueWorker, Worker

WATCHED = (
    *("pop", "add_used", "step_back", "publish_used"),
    *("peek_usual", "use_peeked", "pop_buffers", "add_used_buffers"),
)
MOST_PASSES = 2000  # in one go, before a worker counts as one that never sleeps
HANG_SECONDS = 50  # of a thread that has its turn


class QueueLog:
    """A device's dealings with a queue: chains in flight by head, where it may write. Plain
    buffers count as chains of one part."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue
        self.in_flight: dict[int, DescriptorChain | tuple[int, int]] = {}
        self.taken = 0  # since `begin_pass`
        self.pops = 0
        self.returns = 0
        self.writable: set[tuple[int, int]] = set()
        self.written: dict[int, int] = {}  # by head, as returned last
        self._unpublished: set[int] = set()
        self._peeked: list[Usual] = []
        for name in WATCHED:
            if hasattr(queue, name):
                setattr(queue, name, getattr(self, f"_{name}")(getattr(queue, name)))

    def begin_pass(self) -> None:
        self.taken = 0

    def _pop(self, pop: Any) -> Any:
        def watched() -> DescriptorChain | None:
            chain: DescriptorChain | None = pop()
            if chain is not None:
                self.taken += 1
                self.pops += 1
                assert self.taken <= self.queue.size, "more chains in a pass than the queue has"
                assert chain.head not in self.in_flight, "a chain was taken twice"
                # The driver cannot know yet that it was used, so it must not offer it again.
                assert chain.head not in self._unpublished, "a chain was taken twice"
                parts = len(chain.readable) + len(chain.writable)
                assert parts <= self.queue.size, "a chain of more parts than the queue has"
                self.in_flight[chain.head] = chain
                self.writable |= set(chain.writable)
            return chain

        return watched

    def _add_used(self, add_used: Any) -> Any:
        def watched(chain: DescriptorChain, written: int) -> None:
            assert 0 <= written <= chain.writable_size, f"{written} bytes of {chain.writable_size}"
            seen = self.queue.ready
            add_used(chain, written)
            del self.in_flight[chain.head]
            if not seen:  # the device has failed or was stopped: the driver hears no more of it
                self.pops -= 1
                return
            self._unpublished.add(chain.head)
            self.written[chain.head] = written
            self.returns += 1

        return watched

    def _pop_buffers(self, pop_buffers: Any) -> Any:
        def watched(views: list[memoryview], *arguments: int) -> list[int]:
            before = len(views)
            heads: list[int] = pop_buffers(views, *arguments)
            assert len(views) - before == len(heads)
            for head in heads:
                self.taken += 1
                self.pops += 1
                assert self.taken <= self.queue.size, "more chains in a pass than the queue has"
                assert head not in self.in_flight, "a chain was taken twice"
                assert head not in self._unpublished, "a chain was taken twice"
                addr, length, _ = self.queue._taken[head]
                self.in_flight[head] = (addr, length)
                self.writable.add((addr, length))
            return heads

        return watched

    def _add_used_buffers(self, add_used_buffers: Any) -> Any:
        def watched(heads: list[int], last_written: int) -> None:
            seen = self.queue.ready
            add_used_buffers(heads, last_written)
            for place, head in enumerate(heads):
                buffer = self.in_flight.pop(head)
                assert isinstance(buffer, tuple)
                written = last_written if place == len(heads) - 1 else buffer[1]
                assert 0 <= written <= buffer[1], f"{written} bytes of {buffer[1]}"
                if not seen:
                    self.pops -= 1
                    continue
                self._unpublished.add(head)
                self.written[head] = written
                self.returns += 1

        return watched

    def _step_back(self, step_back: Any) -> Any:
        def watched(*chain: DescriptorChain) -> None:
            step_back(*chain)
            undone = chain[0].head if chain else next(reversed(self.in_flight))
            del self.in_flight[undone]
            self.pops -= 1
            self.taken -= 1

        return watched

    def _peek_usual(self, peek_usual: Any) -> Any:
        def watched(*arguments: int) -> tuple[list[Usual], bool]:
            chains, more = peek_usual(*arguments)
            self._peeked = chains
            for _, data, last, size, reads in chains:
                assert data.nbytes == size
                self.writable |= {self._part(last)} | (set() if reads else {self._part(data)})
            return chains, more

        return watched

    def _part(self, view: memoryview) -> tuple[int, int]:
        """Guest-physical address and length of what `view` shows."""
        ffi = _cffi_backend.FFI()
        addr = int(ffi.cast("uintptr_t", ffi.from_buffer(view)))
        for region in self.queue._ram.memory.regions:
            if 0 <= addr - region.host_addr < region.size:
                return region.guest_addr + addr - region.host_addr, view.nbytes
        raise AssertionError("a view of something else than RAM")

    def _use_peeked(self, use_peeked: Any) -> Any:
        def watched(written: Any) -> None:
            heads = list(self.queue._peeked)[: len(written)]
            for length, (_, _, last, size, reads) in zip(written, self._peeked, strict=False):
                room = last.nbytes + (0 if reads else size)
                assert 0 <= length <= room, f"{length} bytes of {room}"
            seen = self.queue.ready
            use_peeked(written)
            if not seen:
                return
            self.taken += len(heads)
            assert self.taken <= self.queue.size, "more chains in a pass than the queue has"
            for head, length in zip(heads, written, strict=True):
                assert head not in self.in_flight, "a chain was taken twice"
                assert head not in self._unpublished, "a chain was taken twice"
                self._unpublished.add(head)
                self.written[head] = length
            self.pops += len(heads)
            self.returns += len(heads)

        return watched

    def _publish_used(self, publish_used: Any) -> Any:
        def watched() -> bool:
            self._unpublished.clear()
            wanted: bool = publish_used()
            return wanted

        return watched


class Workers:
    """All workers that run now; `pump` has each do what its thread would do until it sleeps."""

    def __init__(self, *, may_fail: bool = False, in_threads: bool = False) -> None:
        self.may_fail = may_fail
        self.scarce = False  # the host has had too little, for which a worker may fail
        self.in_threads = in_threads
        self.running: list[Inline] = []
        self.logs: dict[int, QueueLog] = {}

    def pump(self) -> None:
        for one in list(self.running):
            if one in self.running:
                one.run_until_idle()

    def allow(self, error: Exception) -> bool:
        """True if a worker may end so."""
        host_fails = self.scarce and isinstance(error, HostError)
        return self.may_fail or host_fails or isinstance(error, DriverError)

    @contextmanager
    def instead_of_threads(self) -> Iterator[None]:
        def make(inline: type[Inline]) -> Any:
            return lambda *arguments, **options: inline(self, *arguments, **options)

        kinds: tuple[tuple[type, type[Inline]], ...] = (
            (QueueWorker, TurnQueueWorker if self.in_threads else InlineQueueWorker),
            (DeviceWorker, TurnDeviceWorker if self.in_threads else InlineDeviceWorker),
        )
        with ExitStack() as patches:
            for real, inline in kinds:
                for module, name in _users_of(real):
                    patches.enter_context(mock.patch.object(module, name, make(inline)))
            yield


def _users_of(real: type) -> list[tuple[Any, str]]:
    """The modules that have a name for `real`, and the name."""
    return _users_among(real, len(sys.modules))


@functools.cache
def _users_among(real: type, modules_loaded: int) -> list[tuple[Any, str]]:
    modules = [module for name, module in sys.modules.items() if name.startswith("pyvmm.virtio")]
    return [
        (module, name)
        for module in modules
        for name, value in vars(module).items()
        if value is real
    ]


class Inline(Worker):
    """A worker that runs in the thread of whoever pumps. Mixed into each class of workers."""

    _passes = 0  # what `work` is called for in one go
    _rounds = 1

    def __init__(self, workers: Workers, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._workers = workers
        self._logs = {index: self._log_of(queue) for index, queue in self.queues.items()}

    def _log_of(self, queue: Any) -> QueueLog:
        """The one that is kept already, if only the other queues were set up anew."""
        log = self._workers.logs.get(queue.index)
        return log if log is not None and log.queue is queue else QueueLog(queue)

    def start(self) -> None:
        for queue in self.queues.values():
            queue.begin_serving()
        self._workers.running.append(self)
        self._workers.logs |= self._logs

    def join(self) -> None:
        if self in self._workers.running:
            self._workers.running.remove(self)
            self._close()
        self._wake.close()

    def run_until_idle(self) -> None:
        self._passes = 0
        try:
            for _ in range(self._rounds):
                self._poller.wait(0)
                self._work()
        except Exception as error:
            if not self._workers.allow(error):
                raise
            self._workers.running.remove(self)
            self._give_up(as_device_failure(self._name_of_place(), error))
            self._close()

    def batch(self, queue: Any, serve: Any, to_notify: Any = None) -> Any:
        self._passes += 1
        assert self._passes < MOST_PASSES, "the worker never sleeps"
        if queue is not None:
            self._logs[queue.index].begin_pass()
        return super().batch(queue, serve, to_notify)


class InlineQueueWorker(Inline, QueueWorker):
    """One that serves its queues in turn."""


class InlineDeviceWorker(Inline, DeviceWorker):
    """One whose device serves all its queues as it likes."""

    _rounds = 3  # what was done for the guest may move the host's files, and so on

    def take_queue(self, queue: Any) -> None:
        self._logs[queue.index] = self._workers.logs[queue.index] = QueueLog(queue)
        super().take_queue(queue)


class _InTurn(Inline):
    """One in its own thread, which runs while whoever pumps waits for it, and no longer."""

    def __init__(self, workers: Workers, *arguments: Any, **options: Any) -> None:
        super().__init__(workers, *arguments, **options)
        self._turn, self._rests = Semaphore(0), Semaphore(0)
        self._failure: Exception | None = None

    def start(self) -> None:
        self._poller.wait, self._look = self._sleep, self._poller.wait  # type: ignore[method-assign]
        Worker.start(self)
        self._workers.running.append(self)
        self._workers.logs |= self._logs

    def _run(self) -> None:
        self._turn.acquire()
        try:
            super()._run()
        finally:
            self._rests.release()

    def _sleep(self, seconds: float | None = None) -> None:
        self._rests.release()
        self._turn.acquire()
        self._look(0)

    def _give_up(self, error: Any) -> None:
        super()._give_up(error)
        self._workers.running.remove(self)

    def _work(self) -> Any:
        try:
            return super()._work()
        except Exception as error:
            if not self._workers.allow(error):
                self._failure = error
            raise

    def run_until_idle(self) -> None:
        self._passes = 0
        for _ in range(self._rounds):
            if self in self._workers.running:
                self._turn.release()
                assert self._rests.acquire(timeout=HANG_SECONDS), "a worker does not sleep"
        if self._failure is not None:
            raise self._failure

    def join(self) -> None:
        if self in self._workers.running:
            self._workers.running.remove(self)
        self._turn.release()  # for its end, if it has not ended
        Worker.join(self)


class TurnQueueWorker(_InTurn, InlineQueueWorker):
    """One that serves its queues in turn."""


class TurnDeviceWorker(_InTurn, InlineDeviceWorker):
    """One whose device serves all its queues as it likes."""
