"""ioctl numbers of <linux/kvm.h>, in its order, computed as its _IO macros do.

A number holds the size of the structure that the call takes, so that a wrong structure shows up as
ENOTTY and not as memory overwritten.
"""

from __future__ import annotations

from ioctl_opt import IOC, IOC_NONE, IOC_READ, IOC_WRITE

from pyvmm.kvm.uapi.constants import KVMIO
from pyvmm.kvm.uapi.x86_structures import ffi


def _IO(nr: int) -> int:
    return int(IOC(IOC_NONE, KVMIO, nr, 0))


def _IOR(nr: int, c_type: str) -> int:
    return int(IOC(IOC_READ, KVMIO, nr, ffi.sizeof(c_type)))


def _IOW(nr: int, c_type: str) -> int:
    return int(IOC(IOC_WRITE, KVMIO, nr, ffi.sizeof(c_type)))


def _IOWR(nr: int, c_type: str) -> int:
    return int(IOC(IOC_READ | IOC_WRITE, KVMIO, nr, ffi.sizeof(c_type)))


# --- on /dev/kvm ---------------------------------------------------------------------------------
KVM_GET_API_VERSION = _IO(0x00)
KVM_CREATE_VM = _IO(0x01)
KVM_GET_MSR_INDEX_LIST = _IOWR(0x02, "struct kvm_msr_list")
KVM_CHECK_EXTENSION = _IO(0x03)
KVM_GET_VCPU_MMAP_SIZE = _IO(0x04)
KVM_GET_SUPPORTED_CPUID = _IOWR(0x05, "struct kvm_cpuid2")
KVM_GET_MSR_FEATURE_INDEX_LIST = _IOWR(0x0A, "struct kvm_msr_list")

# --- on a VM -------------------------------------------------------------------------------------
KVM_CREATE_VCPU = _IO(0x41)
KVM_GET_DIRTY_LOG = _IOW(0x42, "struct kvm_dirty_log")
KVM_SET_USER_MEMORY_REGION = _IOW(0x46, "struct kvm_userspace_memory_region")
KVM_SET_TSS_ADDR = _IO(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _IOW(0x48, "uint64_t")
KVM_CREATE_IRQCHIP = _IO(0x60)
KVM_IRQ_LINE = _IOW(0x61, "struct kvm_irq_level")
KVM_GET_IRQCHIP = _IOWR(0x62, "struct kvm_irqchip")
KVM_SET_IRQCHIP = _IOR(0x63, "struct kvm_irqchip")
KVM_SET_GSI_ROUTING = _IOW(0x6A, "struct kvm_irq_routing")
KVM_IRQFD = _IOW(0x76, "struct kvm_irqfd")
KVM_CREATE_PIT2 = _IOW(0x77, "struct kvm_pit_config")
KVM_IOEVENTFD = _IOW(0x79, "struct kvm_ioeventfd")
KVM_SET_CLOCK = _IOW(0x7B, "struct kvm_clock_data")
KVM_GET_CLOCK = _IOR(0x7C, "struct kvm_clock_data")
KVM_GET_PIT2 = _IOR(0x9F, "struct kvm_pit_state2")
KVM_SET_PIT2 = _IOW(0xA0, "struct kvm_pit_state2")
KVM_SIGNAL_MSI = _IOW(0xA5, "struct kvm_msi")

# --- on a vCPU -----------------------------------------------------------------------------------
KVM_RUN = _IO(0x80)
KVM_GET_REGS = _IOR(0x81, "struct kvm_regs")
KVM_SET_REGS = _IOW(0x82, "struct kvm_regs")
KVM_GET_SREGS = _IOR(0x83, "struct kvm_sregs")
KVM_SET_SREGS = _IOW(0x84, "struct kvm_sregs")
KVM_TRANSLATE = _IOWR(0x85, "struct kvm_translation")
KVM_INTERRUPT = _IOW(0x86, "struct kvm_interrupt")
KVM_GET_MSRS = _IOWR(0x88, "struct kvm_msrs")
KVM_SET_MSRS = _IOW(0x89, "struct kvm_msrs")
KVM_GET_FPU = _IOR(0x8C, "struct kvm_fpu")
KVM_SET_FPU = _IOW(0x8D, "struct kvm_fpu")
KVM_GET_LAPIC = _IOR(0x8E, "struct kvm_lapic_state")
KVM_SET_LAPIC = _IOW(0x8F, "struct kvm_lapic_state")
KVM_SET_CPUID2 = _IOW(0x90, "struct kvm_cpuid2")
KVM_GET_CPUID2 = _IOWR(0x91, "struct kvm_cpuid2")
KVM_GET_MP_STATE = _IOR(0x98, "struct kvm_mp_state")
KVM_SET_MP_STATE = _IOW(0x99, "struct kvm_mp_state")
KVM_NMI = _IO(0x9A)
KVM_SET_GUEST_DEBUG = _IOW(0x9B, "struct kvm_guest_debug")
KVM_GET_VCPU_EVENTS = _IOR(0x9F, "struct kvm_vcpu_events")
KVM_SET_VCPU_EVENTS = _IOW(0xA0, "struct kvm_vcpu_events")
KVM_GET_DEBUGREGS = _IOR(0xA1, "struct kvm_debugregs")
KVM_SET_DEBUGREGS = _IOW(0xA2, "struct kvm_debugregs")
KVM_ENABLE_CAP = _IOW(0xA3, "struct kvm_enable_cap")
KVM_GET_XSAVE = _IOR(0xA4, "struct kvm_xsave")
KVM_SET_XSAVE = _IOW(0xA5, "struct kvm_xsave")
KVM_GET_XCRS = _IOR(0xA6, "struct kvm_xcrs")
KVM_SET_XCRS = _IOW(0xA7, "struct kvm_xcrs")
KVM_KVMCLOCK_CTRL = _IO(0xAD)
KVM_GET_STATS_FD = _IO(0xCE)  # and on a VM
