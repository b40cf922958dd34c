"""The local APIC's registers, and how firmware leaves its two local interrupt pins."""

from __future__ import annotations

from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.x86 import uapi
from pyvmm.kvm.x86.uapi import ffi

# Register offsets and delivery modes: Intel SDM, volume 3, table 10-1 and 10.5.1.
LVT0 = 0x350
LVT1 = 0x360
_DELIVERY_MASK = 0x700
_DELIVERY_NMI = 0x400
_DELIVERY_EXTINT = 0x700
_LVT_MASKED = 1 << 16


def get_register(state: bytes | bytearray, offset: int) -> int:
    """The 32-bit register at `offset` of a register page."""
    return int.from_bytes(state[offset : offset + 4], "little")


def get_lapic(vcpu: Vcpu) -> bytearray:
    """KVM_GET_LAPIC: the 1 KiB register page. Raises HostError (EINVAL without an irqchip)."""
    state = ffi.new("struct kvm_lapic_state *")
    struct_ioctl(vcpu.fd, uapi.KVM_GET_LAPIC, state, "KVM_GET_LAPIC")
    return bytearray(ffi.buffer(state))


def set_lapic(vcpu: Vcpu, registers: bytes | bytearray) -> None:
    """KVM_SET_LAPIC. Raises HostError."""
    state = ffi.new("struct kvm_lapic_state *")
    ffi.buffer(state)[:] = bytes(registers)
    struct_ioctl(vcpu.fd, uapi.KVM_SET_LAPIC, state, "KVM_SET_LAPIC")


def with_local_pins(registers: bytes | bytearray) -> bytearray:
    """A register page with LINT0 as ExtINT (the PIC's way in) and LINT1 as NMI, both unmasked."""
    changed = bytearray(registers)
    for offset, mode in ((LVT0, _DELIVERY_EXTINT), (LVT1, _DELIVERY_NMI)):
        value = (get_register(changed, offset) & ~(_DELIVERY_MASK | _LVT_MASKED)) | mode
        changed[offset : offset + 4] = value.to_bytes(4, "little")
    return changed


def setup_local_pins(vcpu: Vcpu) -> None:
    """Leave LINT0 and LINT1 as firmware does. Raises HostError."""
    set_lapic(vcpu, with_local_pins(get_lapic(vcpu)))
