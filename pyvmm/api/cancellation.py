"""Work in threads that asyncio can cancel, honestly: when `in_thread` is cancelled, the thread has
given up before CancelledError goes on.

Whatever waits in such a thread says how it can be woken (`woken_by`); elsewhere that does nothing.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


class Cancelled(Exception):
    """The call that this thread waited for has been cancelled."""


class Cancellation:
    """True if a thread is to give up, and how to have it notice."""

    def __init__(self) -> None:
        self.cancelled = False
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], object]] = []

    def cancel(self) -> None:
        """Have the thread give up."""
        with self._lock:
            self.cancelled = True
            wakers = list(self._wakers)
        for wake in wakers:
            _call(wake)

    def add(self, wake: Callable[[], object]) -> None:
        """Call `wake` on cancellation; now, if that has been."""
        with self._lock:
            self._wakers.append(wake)
            cancelled = self.cancelled
        if cancelled:
            _call(wake)

    def remove(self, wake: Callable[[], object]) -> None:
        """Do not call it any more."""
        with self._lock:
            self._wakers.remove(wake)


def _call(wake: Callable[[], object]) -> None:
    with suppress(OSError):  # A socket that is no longer connected needs no waking.
        wake()


_this_thread = threading.local()


def active() -> Cancellation | None:
    """The cancellation of what this thread does; None where nobody can cancel it."""
    found: Cancellation | None = getattr(_this_thread, "cancellation", None)
    return found


def check() -> None:
    """Raise Cancelled if this thread is to give up."""
    found = active()
    if found is not None and found.cancelled:
        raise Cancelled


@contextmanager
def woken_by(wake: Callable[[], object]) -> Iterator[None]:
    """While this thread is inside, `wake` has it return or fail; as Cancelled, then."""
    found = active()
    if found is None:
        yield
        return
    check()
    found.add(wake)
    try:
        yield
    except Exception as error:
        if found.cancelled:
            raise Cancelled from error
        raise
    finally:
        found.remove(wake)


async def in_thread(call: Callable[..., T], *args: Any, **options: Any) -> T:
    """The result of `call`, which runs in a thread of its own."""
    return await made_in_thread(_nothing, call, *args, **options)


async def made_in_thread(
    undo: Callable[[T], object], call: Callable[..., T], *args: Any, **options: Any
) -> T:
    """As `in_thread`, for a result that is something to end: if the call is cancelled when it is
    there already, nobody gets it, and `undo` is called with it, in a thread too."""
    done = _begin(call, *args, **options)
    try:
        return await asyncio.shield(done.future)
    except asyncio.CancelledError:
        done.cancellation.cancel()
        # A task: whoever cancels twice does not wait, and leaves no more behind.
        undoing = asyncio.create_task(_undo(undo, done.future))
        _undoing.add(undoing)
        undoing.add_done_callback(_undoing.discard)
        await asyncio.wait([undoing])
        raise


_undoing: set[asyncio.Task[None]] = set()  # an event loop does not hold its tasks


async def _undo(undo: Callable[[T], object], future: asyncio.Future[T]) -> None:
    await asyncio.wait([future])
    if future.exception() is None and undo is not _nothing:
        undone = _begin(undo, future.result()).future
        await asyncio.wait([undone])
        undone.exception()  # has been seen


def _nothing(_: object) -> None:
    pass


class _Begun(NamedTuple):
    """What a thread does, and how to cancel it."""

    future: asyncio.Future[Any]
    cancellation: Cancellation


def _begin(call: Callable[..., object], *args: Any, **options: Any) -> _Begun:
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()
    cancellation = Cancellation()

    def settle(settle: Callable[[Any], None], value: object) -> None:
        if not done.cancelled():
            settle(value)

    def work() -> None:
        _this_thread.cancellation = cancellation
        outcome: tuple[Callable[[Any], None], object]
        try:
            outcome = (done.set_result, call(*args, **options))
        except BaseException as error:
            outcome = (done.set_exception, error)
        with suppress(RuntimeError):  # The loop is closed.
            loop.call_soon_threadsafe(settle, *outcome)

    # Not in the loop's pool of threads: there may be more guests to wait for than it has.
    name = getattr(call, "__name__", "call")
    threading.Thread(target=work, name=f"pyvmm {name}", daemon=True).start()
    return _Begun(done, cancellation)
