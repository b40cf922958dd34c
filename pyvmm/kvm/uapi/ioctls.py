"""ioctl numbers of <linux/kvm.h>, in its order: those that every architecture has alike."""

from __future__ import annotations

from pyvmm.kvm.uapi.numbers import Numbers
from pyvmm.kvm.uapi.structures import ffi

_numbers = Numbers(ffi)
_IO, _IOR, _IOW, _IOWR = _numbers.io, _numbers.ior, _numbers.iow, _numbers.iowr

# --- on /dev/kvm ---------------------------------------------------------------------------------
KVM_GET_API_VERSION = _IO(0x00)
KVM_CREATE_VM = _IO(0x01)
KVM_CHECK_EXTENSION = _IO(0x03)
KVM_GET_VCPU_MMAP_SIZE = _IO(0x04)

# --- on a VM -------------------------------------------------------------------------------------
KVM_CREATE_VCPU = _IO(0x41)
KVM_GET_DIRTY_LOG = _IOW(0x42, "struct kvm_dirty_log")
KVM_SET_USER_MEMORY_REGION = _IOW(0x46, "struct kvm_userspace_memory_region")
KVM_CREATE_IRQCHIP = _IO(0x60)
KVM_IRQ_LINE = _IOW(0x61, "struct kvm_irq_level")
KVM_SET_GSI_ROUTING = _IOW(0x6A, "struct kvm_irq_routing")
KVM_IRQFD = _IOW(0x76, "struct kvm_irqfd")
KVM_IOEVENTFD = _IOW(0x79, "struct kvm_ioeventfd")
KVM_SET_CLOCK = _IOW(0x7B, "struct kvm_clock_data")
KVM_GET_CLOCK = _IOR(0x7C, "struct kvm_clock_data")
KVM_SIGNAL_MSI = _IOW(0xA5, "struct kvm_msi")

# --- on a vCPU -----------------------------------------------------------------------------------
KVM_RUN = _IO(0x80)
KVM_INTERRUPT = _IOW(0x86, "struct kvm_interrupt")
KVM_GET_MP_STATE = _IOR(0x98, "struct kvm_mp_state")
KVM_SET_MP_STATE = _IOW(0x99, "struct kvm_mp_state")
KVM_NMI = _IO(0x9A)
KVM_ENABLE_CAP = _IOW(0xA3, "struct kvm_enable_cap")
KVM_KVMCLOCK_CTRL = _IO(0xAD)
KVM_GET_STATS_FD = _IO(0xCE)  # and on a VM
