"""ioctl numbers of <linux/kvm.h> whose structures are x86's, or that x86 alone has."""

from __future__ import annotations

from pyvmm.kvm.uapi.numbers import Numbers
from pyvmm.kvm.x86.uapi.structures import ffi

_numbers = Numbers(ffi)
_IO, _IOR, _IOW, _IOWR = _numbers.io, _numbers.ior, _numbers.iow, _numbers.iowr

# --- on /dev/kvm ---------------------------------------------------------------------------------
KVM_GET_MSR_INDEX_LIST = _IOWR(0x02, "struct kvm_msr_list")
KVM_GET_SUPPORTED_CPUID = _IOWR(0x05, "struct kvm_cpuid2")
KVM_GET_MSR_FEATURE_INDEX_LIST = _IOWR(0x0A, "struct kvm_msr_list")

# --- on a VM -------------------------------------------------------------------------------------
KVM_SET_TSS_ADDR = _IO(0x47)
KVM_SET_IDENTITY_MAP_ADDR = _IOW(0x48, "uint64_t")
KVM_GET_IRQCHIP = _IOWR(0x62, "struct kvm_irqchip")
KVM_SET_IRQCHIP = _IOR(0x63, "struct kvm_irqchip")
KVM_CREATE_PIT2 = _IOW(0x77, "struct kvm_pit_config")
KVM_GET_PIT2 = _IOR(0x9F, "struct kvm_pit_state2")
KVM_SET_PIT2 = _IOW(0xA0, "struct kvm_pit_state2")

# --- on a vCPU -----------------------------------------------------------------------------------
KVM_GET_REGS = _IOR(0x81, "struct kvm_regs")
KVM_SET_REGS = _IOW(0x82, "struct kvm_regs")
KVM_GET_SREGS = _IOR(0x83, "struct kvm_sregs")
KVM_SET_SREGS = _IOW(0x84, "struct kvm_sregs")
KVM_TRANSLATE = _IOWR(0x85, "struct kvm_translation")
KVM_GET_MSRS = _IOWR(0x88, "struct kvm_msrs")
KVM_SET_MSRS = _IOW(0x89, "struct kvm_msrs")
KVM_GET_FPU = _IOR(0x8C, "struct kvm_fpu")
KVM_SET_FPU = _IOW(0x8D, "struct kvm_fpu")
KVM_GET_LAPIC = _IOR(0x8E, "struct kvm_lapic_state")
KVM_SET_LAPIC = _IOW(0x8F, "struct kvm_lapic_state")
KVM_SET_CPUID2 = _IOW(0x90, "struct kvm_cpuid2")
KVM_GET_CPUID2 = _IOWR(0x91, "struct kvm_cpuid2")
KVM_SET_GUEST_DEBUG = _IOW(0x9B, "struct kvm_guest_debug")
KVM_GET_VCPU_EVENTS = _IOR(0x9F, "struct kvm_vcpu_events")
KVM_SET_VCPU_EVENTS = _IOW(0xA0, "struct kvm_vcpu_events")
KVM_GET_DEBUGREGS = _IOR(0xA1, "struct kvm_debugregs")
KVM_SET_DEBUGREGS = _IOW(0xA2, "struct kvm_debugregs")
KVM_GET_XSAVE = _IOR(0xA4, "struct kvm_xsave")
KVM_SET_XSAVE = _IOW(0xA5, "struct kvm_xsave")
KVM_GET_XCRS = _IOR(0xA6, "struct kvm_xcrs")
KVM_SET_XCRS = _IOW(0xA7, "struct kvm_xcrs")
KVM_SET_TSC_KHZ = _IO(0xA2)
KVM_GET_TSC_KHZ = _IO(0xA3)
KVM_GET_XSAVE2 = _IOR(0xCF, "struct kvm_xsave")
