"""The list of what a user has given a VM of this machine: NAME.given, beside its control socket.

A monitor says what its machine is when that is saved, and whoever is told opens for a copy what is
named there. So one that was taken over must not name more than the VM has. The list is begun
before the guest runs, and added to by whoever opens a device that comes later; a monitor in its
box can write no file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from pyvmm.control import registry as running
from pyvmm.errors import ConfigError
from pyvmm.kinds.vm_spec import given_by, given_of

if TYPE_CHECKING:
    from pyvmm.spec.vm import DeviceSpec, DiskSpec, VmSpec

_MOST = 1 << 20  # bytes of a list


def begin(path: str, spec: VmSpec) -> None:
    """Make the list at `path`, of what `spec` has. Raises OSError."""
    with suppress(FileNotFoundError):
        os.unlink(path)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, _lines(given_by(spec)))
    finally:
        os.close(fd)


def open_list(path: str) -> int:
    """A descriptor for `add`, of a list that is there. Raises OSError."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)


def add(fd: int, part: DiskSpec | DeviceSpec) -> None:
    """Add what `part`, a disk or another device that has come, has. Raises OSError."""
    os.write(fd, _lines(given_of(part)))


def add_to(vm: str, part: DiskSpec | DeviceSpec) -> None:
    """The same in the list of the VM called `vm`; nothing where there is none, or none to be
    written."""
    with suppress(OSError, ConfigError):
        fd = open_list(running.given_of(vm))
        try:
            add(fd, part)
        finally:
            os.close(fd)


def check(vm: str, spec: VmSpec) -> None:
    """Raise ConfigError if the VM called `vm` says that it is `spec`, and there is more in that
    than it was given."""
    path = running.given_of(vm)
    try:
        with open(path, "rb") as file:
            there = set(file.read(_MOST).splitlines())
    except OSError as error:
        raise ConfigError(
            f"nobody knows what {vm} was given: {path}: {error.strerror}", cure="start it anew"
        ) from None
    for name in given_by(spec):
        if _line(name) not in there:
            raise ConfigError(
                f"{vm} says that it has {name}, and was not given that",
                cure="end it, and look at what it has said: somebody may have taken it over",
            )


def _lines(names: Iterable[str]) -> bytes:
    return b"".join(_line(name) + b"\n" for name in names)


def _line(name: str) -> bytes:
    return ascii(name).encode()
