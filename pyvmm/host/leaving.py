"""Signals that would end this process on the spot, as exceptions: what it has made goes first.

Where nobody catches them a monitor leaves its sockets until the next command of its user's. So as
long as it opens and closes, they are `Left`; while its machine runs, that takes them.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LEFT_ALONE = (signal.default_int_handler, signal.SIG_DFL)

_SOON = 0.001  # seconds

_at_once = False
_undisturbed = 0
_waits = 0  # the number of a signal


class Left(KeyboardInterrupt):
    """The user does not want to wait any more: by the signal `number`, or by a Ctrl-C that a guest
    does not take. `code` is the exit code for that."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.code = 128 + number


@contextmanager
def leaving_by_signal() -> Iterator[None]:
    """Have Ctrl-C, SIGTERM and SIGHUP raise Left in the main thread, so that what is inside leaves
    nothing half done; one more of the same ends the process on the spot. Those that somebody
    ignores or takes are left alone."""
    before = {}
    others = sys.unraisablehook

    def look(lost: sys.UnraisableHookArgs) -> None:
        if isinstance(lost.exc_value, Left):
            _raise_again(lost.exc_value.number)
        else:
            others(lost)

    sys.unraisablehook = look
    for number in _ENDING:
        if (handler := signal.getsignal(number)) in _LEFT_ALONE:
            with suppress(ValueError):  # not the main thread
                signal.signal(number, raise_left)
                before[number] = handler
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = others


def _raise_again(number: int) -> None:
    """In a moment: a callback of the garbage collector's, say, has swallowed it."""
    from threading import Thread

    def wait() -> None:
        time.sleep(_SOON)
        os.kill(os.getpid(), number)

    signal.signal(number, raise_left)
    Thread(target=wait, daemon=True).start()


@contextmanager
def undisturbed() -> Iterator[None]:
    """In which no Left is raised: it is at the end. For moments, in the main thread."""
    global _undisturbed, _waits
    _undisturbed += 1
    try:
        yield
    finally:
        _undisturbed -= 1
        if _waits and not _undisturbed:
            number, _waits = _waits, 0
            raise Left(number)


def raise_left(number: int, frame: FrameType | None) -> None:
    """The handler of such a signal."""
    global _waits
    signal.signal(number, signal.SIG_DFL)
    if _at_once:
        os.kill(os.getpid(), number)
    elif _undisturbed:
        _waits = _waits or number
    else:
        raise Left(number)


def at_once() -> None:
    """From now on such signals end the process on the spot: there is somebody who does not end."""
    global _at_once
    _at_once = True
