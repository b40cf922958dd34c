"""Registers of an x86 vCPU, as the structures of <asm/kvm.h> with the header's field names.

``regs = get_regs(vcpu); regs.rip += 2; set_regs(vcpu, regs)``. After an IO or MMIO exit they are
stale until the operation completed: see `pyvmm.kvm.loop.finish_pending`. All raise HostError.
"""

from __future__ import annotations

from typing import Any

from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.x86 import uapi
from pyvmm.kvm.x86.uapi import ffi

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_RESERVED = 1 << 1  # always set
RFLAGS_IF = 1 << 9


def _get(vcpu: Vcpu, c_type: str, request: int, call: str) -> Any:
    structure = ffi.new(f"struct {c_type} *")
    struct_ioctl(vcpu.fd, request, structure, call)
    return structure


def get_regs(vcpu: Vcpu) -> Any:
    """struct kvm_regs: general registers, rip, rflags."""
    return _get(vcpu, "kvm_regs", uapi.KVM_GET_REGS, "KVM_GET_REGS")


def set_regs(vcpu: Vcpu, regs: Any) -> None:
    """Set struct kvm_regs."""
    struct_ioctl(vcpu.fd, uapi.KVM_SET_REGS, regs, "KVM_SET_REGS")


def get_sregs(vcpu: Vcpu) -> Any:
    """struct kvm_sregs: segments, descriptor tables, control registers, EFER."""
    return _get(vcpu, "kvm_sregs", uapi.KVM_GET_SREGS, "KVM_GET_SREGS")


def set_sregs(vcpu: Vcpu, sregs: Any) -> None:
    """Set struct kvm_sregs."""
    struct_ioctl(vcpu.fd, uapi.KVM_SET_SREGS, sregs, "KVM_SET_SREGS")


def get_fpu(vcpu: Vcpu) -> Any:
    """struct kvm_fpu: x87 and SSE state."""
    return _get(vcpu, "kvm_fpu", uapi.KVM_GET_FPU, "KVM_GET_FPU")


def set_fpu(vcpu: Vcpu, fpu: Any) -> None:
    """Set struct kvm_fpu."""
    struct_ioctl(vcpu.fd, uapi.KVM_SET_FPU, fpu, "KVM_SET_FPU")


def get_xcrs(vcpu: Vcpu) -> Any:
    """struct kvm_xcrs: XCR0."""
    return _get(vcpu, "kvm_xcrs", uapi.KVM_GET_XCRS, "KVM_GET_XCRS")


def set_xcrs(vcpu: Vcpu, xcrs: Any) -> None:
    """Set struct kvm_xcrs."""
    struct_ioctl(vcpu.fd, uapi.KVM_SET_XCRS, xcrs, "KVM_SET_XCRS")


def get_debugregs(vcpu: Vcpu) -> Any:
    """struct kvm_debugregs: DR0 to DR3, DR6, DR7."""
    return _get(vcpu, "kvm_debugregs", uapi.KVM_GET_DEBUGREGS, "KVM_GET_DEBUGREGS")


def set_debugregs(vcpu: Vcpu, debugregs: Any) -> None:
    """Set struct kvm_debugregs."""
    struct_ioctl(vcpu.fd, uapi.KVM_SET_DEBUGREGS, debugregs, "KVM_SET_DEBUGREGS")


XSAVE_SIZE = 4096  # bytes of struct kvm_xsave's region, which is always there


def get_xsave(vcpu: Vcpu, size: int = XSAVE_SIZE) -> bytes:
    """KVM_GET_XSAVE, or KVM_GET_XSAVE2 for a `size` beyond what that gives (KVM_CAP_XSAVE2 says
    it): the FPU, SSE, AVX and what else the processor has there, as XSAVE would store it."""
    structure = _xsave(size)
    if size <= XSAVE_SIZE:
        struct_ioctl(vcpu.fd, uapi.KVM_GET_XSAVE, structure, "KVM_GET_XSAVE")
    else:
        struct_ioctl(vcpu.fd, uapi.KVM_GET_XSAVE2, structure, "KVM_GET_XSAVE2")
    return bytes(ffi.buffer(structure))[:size]


def set_xsave(vcpu: Vcpu, state: bytes) -> None:
    """KVM_SET_XSAVE."""
    structure = _xsave(len(state))
    ffi.buffer(structure)[: len(state)] = state
    struct_ioctl(vcpu.fd, uapi.KVM_SET_XSAVE, structure, "KVM_SET_XSAVE")


def _xsave(size: int) -> Any:
    return ffi.new("struct kvm_xsave *", {"extra": max(0, -(-(size - XSAVE_SIZE) // 4))})


def get_vcpu_events(vcpu: Vcpu) -> Any:
    """struct kvm_vcpu_events: pending exceptions, interrupts, NMIs."""
    return _get(vcpu, "kvm_vcpu_events", uapi.KVM_GET_VCPU_EVENTS, "KVM_GET_VCPU_EVENTS")


def set_vcpu_events(vcpu: Vcpu, events: Any) -> None:
    """Set struct kvm_vcpu_events."""
    struct_ioctl(vcpu.fd, uapi.KVM_SET_VCPU_EVENTS, events, "KVM_SET_VCPU_EVENTS")


def translate(vcpu: Vcpu, address: int) -> int | None:
    """The guest-physical address of the guest's virtual `address` now, or None if unmapped."""
    translation = ffi.new("struct kvm_translation *")
    translation.linear_address = address
    struct_ioctl(vcpu.fd, uapi.KVM_TRANSLATE, translation, "KVM_TRANSLATE")
    return int(translation.physical_address) if translation.valid else None


def set_code_segment(
    segment: Any, *, selector: int, base: int = 0, db: bool = False, long: bool = False
) -> None:
    """Make `segment` a present flat code segment: 64-bit (`long`), 32-bit (`db`) or 16-bit."""
    _set_segment(segment, selector=selector, base=base, kind=0xB, db=db, long=long)


def set_data_segment(segment: Any, *, selector: int, base: int = 0, db: bool = True) -> None:
    """Make `segment` a present flat writable data segment."""
    _set_segment(segment, selector=selector, base=base, kind=0x3, db=db, long=False)


def _set_segment(
    segment: Any, *, selector: int, base: int, kind: int, db: bool, long: bool
) -> None:
    # Types as in the Intel SDM, volume 3, 3.4.5.1: 0xB executable and readable, 0x3 writable, both
    # accessed (VMX refuses to enter with a segment that is not).
    segment.base = base
    segment.limit = 0xFFFF_FFFF
    segment.selector = selector
    segment.type = kind
    segment.present = 1
    segment.dpl = 0
    segment.db = int(db)
    segment.s = 1
    segment.l = int(long)
    segment.g = 1
    segment.avl = 0
    segment.unusable = 0


def set_task_register(segment: Any, *, selector: int) -> None:
    """Make `segment` a busy 32/64-bit TSS at 0, which VMX wants to see in TR."""
    segment.base = 0
    segment.limit = 0x67
    segment.selector = selector
    segment.type = 0xB
    segment.present = 1
    segment.dpl = 0
    segment.db = 0
    segment.s = 0
    segment.l = 0
    segment.g = 0
    segment.avl = 0
    segment.unusable = 0
