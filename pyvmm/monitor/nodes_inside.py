"""Nodes of block devices in an emulated host, and what a keeper opens there by name."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from contextlib import suppress
from glob import glob

PLACE = "/run/pyvmm-plug"  # of the nodes of disks that come later
_PORT = re.compile(r"/dev/vport[0-9]+p[0-9]+")


def serve(what: bytes, rest: bytes) -> int:
    """What a keeper does for the monitor: see pyvmm.monitor.keeper. Raises OSError, ValueError."""
    if what == b"plg":
        path, serial = map(str, json.loads(rest))
        if not path.startswith(f"{PLACE}/") or path != os.path.normpath(path):
            raise ValueError
        device = device_of(serial)
        if device is None:
            raise FileNotFoundError(errno.ENOENT, serial)
        place(path, device)
        return -1
    path = os.fsdecode(rest)
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and _PORT.fullmatch(path))):
            raise ValueError
    finally:
        os.close(fd)
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_RDWR)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
        return os.open(path, flags | os.O_RDONLY)


def device_of(serial: str) -> int | None:
    """The number of the block device with that serial number, if it is there."""
    for block in glob("/sys/block/vd*"):
        try:
            with open(f"{block}/serial") as file:
                if file.read().strip() != serial:
                    continue
            with open(f"{block}/dev") as file:
                major, _, minor = file.read().strip().partition(":")
                return os.makedev(int(major), int(minor))
        except (OSError, ValueError):
            continue  # it has just come, or gone
    return None


def place(path: str, device: int) -> None:
    """Make a node for the block device `device` at `path`. Raises OSError."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with suppress(FileNotFoundError):
        os.unlink(path)
    os.mknod(path, stat.S_IFBLK | 0o600, device)
