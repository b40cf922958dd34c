"""ioctls that take a structure of the uapi."""

from __future__ import annotations

from typing import Any

from pyvmm.host import syscalls
from pyvmm.kvm.uapi import ffi


def struct_ioctl(fd: int, request: int, structure: Any, call: str) -> int:
    """One ioctl on `fd` with a pointer made by ``ffi.new``; its result.

    The kernel reads and writes `structure` in place. Raises HostError that names `call`.
    """
    return syscalls.ioctl(fd, request, memoryview(ffi.buffer(structure)), call)
