"""Resizing a disk from inside an emulated host: its file is another machine's, and QEMU's."""

from __future__ import annotations

import errno
import json
import os
import select
import time
from collections.abc import Callable

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import unix_sockets
from pyvmm.relay import DISK_SERVICE

_PATIENCE = 30.0  # seconds
_STEP = 0.01


def resize_outside(path: str, size: int | None, open_device: Callable[[str], int]) -> None:
    """Have the disk at `path` resized outside, and wait until its block device here shows it, which
    `open_device` opens.

    Raises ConfigError if it is refused, HostError.
    """
    answer = _ask({"path": path, "size": size})
    if "error" in answer:
        raise ConfigError(str(answer["error"]))
    give_up_at = time.monotonic() + _PATIENCE
    while _size(open_device(path)) != answer["size"]:
        if time.monotonic() > give_up_at:
            raise HostError(errno.ETIMEDOUT, f"resize of {path} in the emulated KVM host")
        time.sleep(_STEP)


def _ask(question: dict[str, object]) -> dict[str, object]:
    connection = unix_sockets.reach(DISK_SERVICE)
    try:
        connection.send(json.dumps(question).encode() + b"\n")
        received = b""
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        while b"\n" not in received:
            if not poll.poll(_PATIENCE * 1000):
                raise HostError(errno.ETIMEDOUT, "answer to a resize")
            data = connection.recv(4096)
            if not data:
                raise HostError(errno.ECONNRESET, "answer to a resize")
            received += data
    except OSError as error:
        raise HostError(error.errno or 0, "resize outside of the emulated KVM host") from None
    finally:
        connection.close()
    answer: dict[str, object] = json.loads(received)
    return answer


def _size(fd: int) -> int:
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
