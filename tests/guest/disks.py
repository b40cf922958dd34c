"""Disk images of guests, seen from the host: made, checked, read."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pyvmm import images
from pyvmm.errors import PyvmmError

_ENVIRONMENT = {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin", "LC_ALL": "C"}


def artifacts(kernel: str = "6.1", variant: str = "minbase") -> images.Artifacts:
    """The files to boot from, built where they are missing; skips where they cannot be built."""
    try:
        return images.artifacts(kernel, variant, make=True)
    except PyvmmError as error:
        pytest.skip(f"the guest's images cannot be built: {error}")


@contextmanager
def root_disk(folder: Path, variant: str = "minbase") -> Iterator[Path]:
    """A fresh, writable root disk, removed at the end: it is hundreds of MiB large."""
    artifacts(variant=variant)
    disk = folder / "root.img"
    images.fresh_disk(str(disk), variant)
    try:
        yield disk
    finally:
        disk.unlink()


def blank_disk(path: Path, size: int) -> Path:
    """A sparse image of `size` bytes, all zero."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def random_disk(path: Path, size: int, *, seed: int) -> Path:
    """An image with `size` bytes that look random, the same for the same `seed`."""
    path.write_bytes(random.Random(seed).randbytes(size))
    return path


def sha256(path: Path, *, start: int = 0, size: int | None = None) -> str:
    """The checksum, in hexadecimal, of `size` bytes from `start` on, or of all that follow."""
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(-1 if size is None else size)).hexdigest()


def fsck(disk: Path) -> str:
    """The faults that `e2fsck -f -n` finds in the file system, "" for none."""
    done = subprocess.run(
        ["e2fsck", "-f", "-n", str(disk)], env=_ENVIRONMENT, capture_output=True, text=True
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def replay_journal(disk: Path) -> None:
    """Do with the ext4 file system on `disk` what its next mount would do after a power failure."""
    done = subprocess.run(["e2fsck", "-p", str(disk)], env=_ENVIRONMENT, capture_output=True)
    assert done.returncode in (0, 1), done.stdout.decode(errors="replace")


def read_file(disk: Path, path: str) -> bytes:
    """The content of the file at `path` in the ext4 file system on `disk`."""
    done = subprocess.run(
        ["debugfs", "-R", f"cat {path}", str(disk)], env=_ENVIRONMENT, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout
