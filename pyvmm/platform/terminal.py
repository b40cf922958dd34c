"""The user's terminal in raw mode while the guest has it, and as it was before, whatever happens.

In raw mode every key goes to the guest, Ctrl-C included. Restoring is tied to the `with` block, to
the interpreter's exit, and to the signals that would otherwise end the process on the spot; only
SIGKILL leaves the terminal raw (`reset` mends it).
"""

from __future__ import annotations

import atexit
import os
import signal
import termios
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from pyvmm.host import leaving

_FATAL = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGINT)

_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6  # places in termios.tcgetattr's list


def is_terminal(fd: int | None) -> bool:
    """True if `fd` is an open terminal."""
    return fd is not None and os.isatty(fd)


def in_background(fd: int) -> bool:
    """True if `fd` is the terminal that controls this process, and other processes now have it."""
    try:
        return os.tcgetpgrp(fd) != os.getpgrp()
    except OSError:
        return False  # not a terminal, or one that controls nobody here


class Terminal:
    """``with Terminal(fd):`` raw mode for the block. Does nothing if `fd` is not a terminal.

    In the background nothing is changed until the shell brings the process to the foreground.
    Signal handlers are set only where the program has none of its own, and only if this is the
    main thread; what was there comes back at the end.
    """

    def __init__(self, fd: int | None = 0) -> None:
        self._fd = fd if fd is not None and is_terminal(fd) else -1
        self._saved: list[Any] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if self._fd >= 0:
            atexit.register(self.restore)
            self._catch_signals()
            self.make_raw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._fd >= 0:
            # In this order, so that no signal finds the terminal raw and nobody to restore it.
            self.restore()
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            self._handlers.clear()
            atexit.unregister(self.restore)

    def make_raw(self) -> None:
        """Raw mode, unless the terminal is raw already or other processes have it now."""
        if self._saved is not None or in_background(self._fd):
            return
        try:
            saved = termios.tcgetattr(self._fd)
        except termios.error:
            return  # it hung up
        self._saved = saved
        self._set(_raw(saved))

    def restore(self) -> None:
        """The terminal as it was. May be called again and again, from any thread."""
        saved, self._saved = self._saved, None
        # In the background the terminal belongs to the shell, which has set it up for itself.
        if saved is None or in_background(self._fd):
            return
        self._set(saved)

    def _set(self, attributes: list[Any]) -> None:
        try:
            # At once: waiting for the output to drain could take for ever if it is paused.
            termios.tcsetattr(self._fd, termios.TCSANOW, attributes)
        except termios.error:
            return  # it hung up

    def watch_size(self, fd: int | None, on_size: Callable[[int, int], None]) -> None:
        """Have `on_size(columns, rows)` called now and at each change, if `fd` is a terminal.

        Changes come by a signal, so only to the main thread, and only inside the ``with`` block.
        """
        if fd is None or not is_terminal(fd):
            return

        def tell(number: int = 0, frame: FrameType | None = None) -> None:
            told = None
            with suppress(OSError):  # it hung up
                # A change may come while this one is being told, and be told before it.
                while (size := os.get_terminal_size(fd)) != told:
                    on_size(*size)
                    told = size

        # The signal first: a change between the two would never be told.
        if self._fd >= 0 and threading.current_thread() is threading.main_thread():
            self._catch(signal.SIGWINCH, tell)
        tell()

    # --- signals ---------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _FATAL:
            self._catch(number, self._die)
        self._catch(signal.SIGTSTP, self._suspend)
        self._catch(signal.SIGCONT, self._resume)

    def _catch(self, number: int, handler: Any) -> None:
        if signal.getsignal(number) in (signal.SIG_DFL, leaving.raise_left):
            self._handlers[number] = signal.signal(number, handler)

    def _die(self, number: int, frame: FrameType | None) -> None:
        self.restore()
        signal.signal(number, self._handlers.get(number, signal.SIG_DFL))
        os.kill(os.getpid(), number)

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # stops here, until SIGCONT
        signal.signal(number, self._suspend)
        self.make_raw()

    def _resume(self, number: int, frame: FrameType | None) -> None:
        # After SIGSTOP the shell has taken the terminal out of raw mode behind our back.
        if self._saved is None:
            self.make_raw()
        elif not in_background(self._fd):
            self._set(_raw(self._saved))


def _raw(attributes: list[Any]) -> list[Any]:
    """These attributes after cfmakeraw(3): no echo, no lines, no signals, no newlines
    added, because the guest's own terminal driver does all that."""
    raw = [*attributes[:_CC], list(attributes[_CC])]
    raw[_IFLAG] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    raw[_OFLAG] &= ~termios.OPOST
    raw[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    raw[_CFLAG] = raw[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    raw[_CC][termios.VMIN] = 1
    raw[_CC][termios.VTIME] = 0
    return raw
