"""ioctl numbers of <linux/kvm.h> that pyvmm uses on arm64 alone."""

from __future__ import annotations

from pyvmm.kvm.arm64.uapi.structures import ffi
from pyvmm.kvm.uapi.numbers import Numbers

_numbers = Numbers(ffi)
_IOR, _IOW, _IOWR = _numbers.ior, _numbers.iow, _numbers.iowr

# --- on a VM -------------------------------------------------------------------------------------
KVM_CREATE_DEVICE = _IOWR(0xE0, "struct kvm_create_device")
KVM_ARM_PREFERRED_TARGET = _IOR(0xAF, "struct kvm_vcpu_init")

# --- on a vCPU, and on a device ------------------------------------------------------------------
KVM_GET_ONE_REG = _IOW(0xAB, "struct kvm_one_reg")
KVM_SET_ONE_REG = _IOW(0xAC, "struct kvm_one_reg")
KVM_ARM_VCPU_INIT = _IOW(0xAE, "struct kvm_vcpu_init")
KVM_GET_REG_LIST = _IOWR(0xB0, "struct kvm_reg_list")
KVM_GET_VCPU_EVENTS = _IOR(0x9F, "struct kvm_vcpu_events")
KVM_SET_VCPU_EVENTS = _IOW(0xA0, "struct kvm_vcpu_events")
KVM_SET_DEVICE_ATTR = _IOW(0xE1, "struct kvm_device_attr")
KVM_GET_DEVICE_ATTR = _IOW(0xE2, "struct kvm_device_attr")
