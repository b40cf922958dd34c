"""Computes ioctl numbers as the _IO macros of <linux/kvm.h> do.

A number holds the size of the structure that the call takes, so that a wrong structure shows up as
ENOTTY and not as memory overwritten.
"""

from __future__ import annotations

from typing import Any

from ioctl_opt import IOC, IOC_NONE, IOC_READ, IOC_WRITE

from pyvmm.kvm.uapi.constants import KVMIO


class Numbers:
    """The macros for structures that `ffi` knows."""

    def __init__(self, ffi: Any) -> None:
        self._sizeof = ffi.sizeof

    def io(self, nr: int) -> int:
        """_IO: takes no structure."""
        return int(IOC(IOC_NONE, KVMIO, nr, 0))

    def ior(self, nr: int, c_type: str) -> int:
        """_IOR: the kernel writes the structure."""
        return int(IOC(IOC_READ, KVMIO, nr, self._sizeof(c_type)))

    def iow(self, nr: int, c_type: str) -> int:
        """_IOW: the kernel reads it."""
        return int(IOC(IOC_WRITE, KVMIO, nr, self._sizeof(c_type)))

    def iowr(self, nr: int, c_type: str) -> int:
        """_IOWR: the kernel reads and writes it."""
        return int(IOC(IOC_READ | IOC_WRITE, KVMIO, nr, self._sizeof(c_type)))
