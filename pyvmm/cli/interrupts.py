"""Ctrl-C before and after a command does its work.

Python makes a KeyboardInterrupt of it: within an import that is a traceback, or, in a callback of
the garbage collector's, a message and nothing else. So until something has to be cleaned up the
signal does what it does to any program.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_RAISE, _DIE = signal.default_int_handler, signal.SIG_DFL


def die_of_them() -> None:
    """From now on: for a process that is a command. One that ignores them, as what a shell has in
    the background, goes on to do so."""
    if signal.getsignal(signal.SIGINT) in (_RAISE, _DIE):
        signal.signal(signal.SIGINT, _DIE)
        sys.unraisablehook = _die_if_lost


@contextmanager
def raised() -> Iterator[None]:
    """Meanwhile they are KeyboardInterrupt, if the process would die of them."""
    if signal.getsignal(signal.SIGINT) is not _DIE:
        yield
        return
    signal.signal(signal.SIGINT, _RAISE)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _DIE)


def _die_if_lost(lost: sys.UnraisableHookArgs) -> None:
    if lost.exc_type is KeyboardInterrupt:  # nobody else hears of it
        signal.signal(signal.SIGINT, _DIE)
        signal.raise_signal(signal.SIGINT)
    sys.__unraisablehook__(lost)
