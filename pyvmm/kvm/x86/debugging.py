"""The reasons for which an x86 vCPU stops for a debugger."""

from __future__ import annotations

from typing import NamedTuple

from pyvmm.kvm.exits import Debug
from pyvmm.kvm.x86.uapi import ffi


class DebugStop(NamedTuple):
    """struct kvm_debug_exit_arch: `exception` is DB_VECTOR or BP_VECTOR, `pc` the linear address of
    the instruction, `dr6` says which condition was met (Intel SDM, volume 3, 17.2.3 "Debug Status
    Register (DR6)")."""

    exception: int
    pc: int
    dr6: int
    dr7: int


def debug_stop(event: Debug) -> DebugStop:
    """The meaning of `event`, an exit of an x86 vCPU."""
    arch = ffi.from_buffer("struct kvm_debug_exit_arch *", event.arch)
    return DebugStop(arch.exception, arch.pc, arch.dr6, arch.dr7)
