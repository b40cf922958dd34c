"""Objects that are forgotten without being closed give their descriptors back all the same."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import pytest
from descriptors import open_descriptors

from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory


@pytest.mark.parametrize("make", [EventFd, lambda: GuestMemory([(0, 1 << 20)])])
def test_a_thing_that_nobody_refers_to_is_closed(make: Callable[[], EventFd | GuestMemory]) -> None:
    before = open_descriptors()
    things = [make() for _ in range(20)]
    assert open_descriptors() >= before + 20
    first = things[0].fd
    things[1].close()
    other = os.open("/dev/null", os.O_RDONLY)  # may have the number that was closed
    del things
    gc.collect()
    os.fstat(other)
    os.close(other)
    assert open_descriptors() == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)


def test_memory_that_could_not_be_had_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()

    def refuse(fd: int, size: int) -> None:
        raise MemoryError

    monkeypatch.setattr("pyvmm.host.syscalls.map_shared", refuse)
    with pytest.raises(MemoryError):
        GuestMemory([(0, 1 << 20)])
    assert open_descriptors() == before
