"""``--disk FILE.py:CLASS``: a disk whose storage is a class that the user wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyvmm.kinds.user_class import UserClass
from pyvmm.spec.record import replace
from pyvmm.spec.vm import DiskSpec
from pyvmm.virtio.blk.backend import Backend

_LARGEST = 1 << 54  # sectors: 2**63 bytes


def make_backend(disk: DiskSpec) -> Backend:
    """Run the file and make the backend. Raises ConfigError for all that goes wrong in it."""
    return _make(disk)[1]


def for_emulated_host(disk: DiskSpec, visible: Callable[[str, str], str]) -> DiskSpec:
    """The specification for the inside of an emulated host; `visible` makes a path one that is seen
    there.

    Raises the ConfigError that making the backend would raise, so that the user sees it at once.
    """
    backend_class, backend = _make(disk)
    backend.close()
    inside = _user_class(disk).inside(backend_class, visible)
    return replace(disk, path=f"{inside.path}:{inside.class_name}", arguments=inside.options)


def _user_class(disk: DiskSpec) -> UserClass:
    path, _, class_name = disk.path.rpartition(":")
    return UserClass(path, class_name, disk.arguments, "--disk")


def _make(disk: DiskSpec) -> tuple[type[Backend], Backend]:
    user = _user_class(disk)
    backend_class = user.load(Backend, "derive it from Backend")  # type: ignore[type-abstract]
    backend = user.make(backend_class)
    size: Any = getattr(backend, "size_sectors", None)
    if not isinstance(size, int) or not 0 < size < _LARGEST:
        raise user.wrong(
            f"{user} has size_sectors {size!r}", cure="set it to a number of 512-byte sectors"
        )
    if disk.read_only:
        backend.read_only = True
    return backend_class, backend
