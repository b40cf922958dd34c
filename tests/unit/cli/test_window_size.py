"""A terminal's size, by signal and across the border of an emulated host."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.platform import window_size
from pyvmm.platform.terminal import Terminal


@contextmanager
def terminal(columns: int, rows: int) -> Iterator[int]:
    ours, theirs = pty.openpty()
    resize(theirs, columns, rows)
    yield theirs
    os.close(ours)
    os.close(theirs)


def resize(fd: int, columns: int, rows: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Sizes:
    """Takes sizes, and waits for one."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self._changed = threading.Condition()

    def __call__(self, columns: int, rows: int) -> None:
        with self._changed:
            self.seen.append((columns, rows))
            self._changed.notify_all()

    def wait_for(self, size: tuple[int, int]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: size in self.seen, 60), self.seen


def test_a_terminals_size_is_told_at_once_and_at_each_change() -> None:
    with terminal(132, 43) as fd, Terminal(fd) as raw:
        sizes = Sizes()
        raw.watch_size(fd, sizes)
        assert sizes.seen == [(132, 43)]
        resize(fd, 80, 25)
        signal.raise_signal(signal.SIGWINCH)
        assert sizes.seen[-1] == (80, 25)
    assert signal.getsignal(signal.SIGWINCH) == signal.SIG_DFL


def test_a_change_while_the_first_size_is_told_is_not_lost() -> None:
    with terminal(132, 43) as fd, Terminal(fd) as raw:
        seen: list[tuple[int, int]] = []

        def on_size(columns: int, rows: int) -> None:
            if not seen:
                seen.append((columns, rows))
                resize(fd, 80, 25)
                signal.raise_signal(signal.SIGWINCH)
            seen.append((columns, rows))

        raw.watch_size(fd, on_size)
        assert seen[0] == (132, 43) and seen[-1] == (80, 25)


def test_what_is_no_terminal_has_no_size() -> None:
    sizes = Sizes()
    with Terminal(None) as raw:
        raw.watch_size(None, sizes)
        with open(os.devnull) as null:
            raw.watch_size(null.fileno(), sizes)
    assert sizes.seen == []


def test_a_size_crosses_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(132, 43) as fd:
        service = window_size.SizeService(fd)
        monkeypatch.setattr(unix_sockets, "_route", lambda name: service.connect())
        sizes = Sizes()
        window_size.follow(sizes)
        sizes.wait_for((132, 43))
        service.tell(90, 20)
        sizes.wait_for((90, 20))


def test_without_a_terminal_out_there_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> unix_sockets.Socket:
        raise HostError(13, f"connection to {name}")

    sizes = Sizes()
    window_size.follow(sizes)
    monkeypatch.setattr(unix_sockets, "_route", refuse)
    window_size.follow(sizes)
    assert sizes.seen == []
