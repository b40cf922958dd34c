"""Model-specific registers: by name, and the values a kernel expects at its entry."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from pyvmm.errors import HostError
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.x86 import uapi
from pyvmm.kvm.x86.uapi import ffi

# Numbers: Intel SDM, volume 4, "Architectural MSRs", and AMD APM, volume 2, appendix A.
MSR_IA32_TSC = 0x10
MSR_IA32_APICBASE = 0x1B
MSR_IA32_ARCH_CAPABILITIES = 0x10A
MSR_IA32_SYSENTER_CS = 0x174
MSR_IA32_SYSENTER_ESP = 0x175
MSR_IA32_SYSENTER_EIP = 0x176
MSR_IA32_MISC_ENABLE = 0x1A0
MSR_IA32_CR_PAT = 0x277
MSR_MTRR_DEF_TYPE = 0x2FF
MSR_IA32_TSC_DEADLINE = 0x6E0
MSR_EFER = 0xC000_0080
MSR_STAR = 0xC000_0081
MSR_LSTAR = 0xC000_0082
MSR_CSTAR = 0xC000_0083
MSR_SYSCALL_MASK = 0xC000_0084
MSR_KERNEL_GS_BASE = 0xC000_0102

NAMES = {
    value: name
    for name, value in sorted(globals().items())
    if name.startswith("MSR_") and isinstance(value, int)
}

_MISC_ENABLE_FAST_STRING = 1 << 0
_MTRR_ENABLE = 1 << 11
_MTRR_WRITE_BACK = 6

BOOT_MSRS: Mapping[int, int] = {
    MSR_IA32_SYSENTER_CS: 0,
    MSR_IA32_SYSENTER_ESP: 0,
    MSR_IA32_SYSENTER_EIP: 0,
    MSR_STAR: 0,
    MSR_LSTAR: 0,
    MSR_CSTAR: 0,
    MSR_SYSCALL_MASK: 0,
    MSR_KERNEL_GS_BASE: 0,
    # The same value on every vCPU within a second: KVM keeps their counters in step then.
    MSR_IA32_TSC: 0,
    MSR_IA32_MISC_ENABLE: _MISC_ENABLE_FAST_STRING,
    # Without firmware nobody else says that RAM may be cached.
    MSR_MTRR_DEF_TYPE: _MTRR_ENABLE | _MTRR_WRITE_BACK,
}


def name_of(index: int) -> str:
    """The name of MSR `index`, or "MSR 0x…"."""
    return NAMES.get(index, f"MSR {index:#x}")


def set_msrs(vcpu: Vcpu, values: Mapping[int, int]) -> None:
    """KVM_SET_MSRS. Raises HostError that names the MSR that KVM refused."""
    table = ffi.new("struct kvm_msrs *", {"entries": len(values)})
    table.nmsrs = len(values)
    for entry, (index, value) in zip(table.entries, values.items(), strict=True):
        entry.index = index
        entry.data = value
    done = struct_ioctl(vcpu.fd, uapi.KVM_SET_MSRS, table, "KVM_SET_MSRS")
    # KVM stops at the first it does not take and says how many it took.
    if done < len(values):
        index = list(values)[done]
        raise HostError(
            errno.EINVAL,
            f"KVM_SET_MSRS: {name_of(index)} ({index:#x}) = {values[index]:#x} refused",
        )


def get_msrs(vcpu: Vcpu, indices: list[int]) -> dict[int, int]:
    """KVM_GET_MSRS. Raises HostError that names the MSR that KVM does not have."""
    table = ffi.new("struct kvm_msrs *", {"entries": len(indices)})
    table.nmsrs = len(indices)
    for entry, index in zip(table.entries, indices, strict=True):
        entry.index = index
    done = struct_ioctl(vcpu.fd, uapi.KVM_GET_MSRS, table, "KVM_GET_MSRS")
    if done < len(indices):
        index = indices[done]
        raise HostError(errno.EINVAL, f"KVM_GET_MSRS: {name_of(index)} ({index:#x}) refused")
    return {entry.index: entry.data for entry in table.entries[0:done]}
