"""Computes ioctl numbers as the _IO macros of <linux/kvm.h> do.

A number holds the size of the structure that the call takes, so that a wrong structure shows up as
ENOTTY and not as memory overwritten.
"""

from __future__ import annotations

from typing import Any

from ioctl_opt import IOC, IOC_NONE, IOC_READ, IOC_WRITE

from pyvmm.kvm.uapi.constants import KVMIO

_made: set[int] = set()


def made() -> frozenset[int]:
    """All that were computed so far: those that this process may use."""
    return frozenset(_made)


class Numbers:
    """The macros for structures that `ffi` knows."""

    def __init__(self, ffi: Any) -> None:
        self._sizeof = ffi.sizeof

    def io(self, nr: int) -> int:
        """_IO: takes no structure."""
        return self._number(IOC_NONE, nr, 0)

    def ior(self, nr: int, c_type: str) -> int:
        """_IOR: the kernel writes the structure."""
        return self._number(IOC_READ, nr, self._sizeof(c_type))

    def iow(self, nr: int, c_type: str) -> int:
        """_IOW: the kernel reads it."""
        return self._number(IOC_WRITE, nr, self._sizeof(c_type))

    def iowr(self, nr: int, c_type: str) -> int:
        """_IOWR: the kernel reads and writes it."""
        return self._number(IOC_READ | IOC_WRITE, nr, self._sizeof(c_type))

    def _number(self, direction: int, nr: int, size: int) -> int:
        number = int(IOC(direction, KVMIO, nr, size))
        _made.add(number)
        return number
