"""The I/O APIC that KVM emulates, as far as somebody has to look into it."""

from __future__ import annotations

from pyvmm.kvm import uapi
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.uapi import ffi
from pyvmm.kvm.vm import Vm

_MASKED = 1 << 16  # Intel 82093AA data sheet, 3.2.4 "I/O Redirection Table Registers", bit 16


def is_masked(vm: Vm, pin: int) -> bool:
    """Whether the guest has the interrupt of `pin` switched off, as it is after a reset. Raises
    HostError."""
    chip = ffi.new("struct kvm_irqchip *")
    chip.chip_id = uapi.KVM_IRQCHIP_IOAPIC
    struct_ioctl(vm.fd, uapi.KVM_GET_IRQCHIP, chip, "KVM_GET_IRQCHIP")
    return bool(chip.chip.ioapic.redirtbl[pin].bits & _MASKED)
