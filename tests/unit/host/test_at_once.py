"""Reads that never wait, also in a Python that was built without a name for them."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.host import at_once
from pyvmm.host.syscalls import EventFd


def blocking(fd: int) -> int:
    """As another process may make a file that it was lent."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
    return fd


def test_a_read_at_once_never_waits() -> None:
    with EventFd() as event:
        fd, counter = blocking(event.fd), bytearray(8)
        with pytest.raises(BlockingIOError):
            at_once.read(fd, counter)
        os.eventfd_write(fd, 5)
        assert at_once.read(fd, counter) == 8
        assert int.from_bytes(counter, sys.byteorder) == 5
    with pytest.raises(OSError, match="Bad file descriptor"):
        at_once.read(1 << 20, counter)


WITHOUT = """
import os, sys
del os.RWF_NOWAIT
from fcntl import F_SETFL, fcntl
from pyvmm.host.files import open_image
from pyvmm.host.syscalls import EventFd
from pyvmm.virtio.blk.backend import FileBackend

with EventFd() as event:
    fcntl(event.lend(), F_SETFL, 0)
    assert event.drain() == 0
    event.signal()
    event.signal()
    assert event.drain() == 2

disk, data = FileBackend(open_image(sys.argv[1], True)), bytearray(512)
disk.readv([memoryview(data)], 512, 512)
assert data == b"x" * 512
assert disk.misses == 0
"""


def test_a_python_that_cannot_name_them_reads_as_well(tmp_path: Path) -> None:
    """One built with an old musl has no os.RWF_NOWAIT: nobody may then ask for it."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(512) + b"x" * 512)
    subprocess.run([sys.executable, "-c", WITHOUT, str(image)], check=True, timeout=60)
