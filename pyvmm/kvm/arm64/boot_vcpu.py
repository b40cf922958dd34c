"""A vCPU as a boot loader and firmware would leave it.

Every vCPU gets `setup_vcpu`; vCPU 0 then gets `setup_boot_vcpu` with the kernel's entry. The others
are off until the guest switches them on by PSCI.
"""

from __future__ import annotations

from pyvmm.kvm.arm64 import registers, uapi
from pyvmm.kvm.arm64.uapi import ffi
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.vm import Vm


def setup_vcpu(vm: Vm, vcpu: Vcpu, *, pmu: bool) -> None:
    """KVM_ARM_VCPU_INIT of `vcpu`, with what this KVM offers a guest: PSCI, pointer authentication,
    and with `pmu` performance counters, for which `finish_pmu` is to be called. Raises
    HostError."""
    init = ffi.new("struct kvm_vcpu_init *")
    struct_ioctl(vm.fd, uapi.KVM_ARM_PREFERRED_TARGET, init, "KVM_ARM_PREFERRED_TARGET")
    for feature in _features(vm, vcpu.id, pmu):
        init.features[feature // 32] |= 1 << feature % 32
    struct_ioctl(vcpu.fd, uapi.KVM_ARM_VCPU_INIT, init, "KVM_ARM_VCPU_INIT")


def _features(vm: Vm, vcpu_id: int, pmu: bool) -> list[int]:
    features = [uapi.KVM_ARM_VCPU_PSCI_0_2]
    if vcpu_id:
        features.append(uapi.KVM_ARM_VCPU_POWER_OFF)
    if pmu:
        features.append(uapi.KVM_ARM_VCPU_PMU_V3)
    pointers = (uapi.KVM_CAP_ARM_PTRAUTH_ADDRESS, uapi.KVM_CAP_ARM_PTRAUTH_GENERIC)
    if all(vm.check_extension(capability) for capability in pointers):  # both or none
        features += [uapi.KVM_ARM_VCPU_PTRAUTH_ADDRESS, uapi.KVM_ARM_VCPU_PTRAUTH_GENERIC]
    return features


def has_pmu(vm: Vm) -> bool:
    """True if vCPUs of this KVM can have performance counters."""
    return vm.check_extension(uapi.KVM_CAP_ARM_PMU_V3) > 0


def finish_pmu(vcpu: Vcpu, interrupt: int) -> None:
    """Have the counters interrupt by the private `interrupt` (16 to 31), once the interrupt
    controller is there. Raises HostError."""
    number = ffi.new("uint32_t *", interrupt)
    for attribute, where in (
        (uapi.KVM_ARM_VCPU_PMU_V3_IRQ, int(ffi.cast("uintptr_t", number))),
        (uapi.KVM_ARM_VCPU_PMU_V3_INIT, 0),
    ):
        request = ffi.new("struct kvm_device_attr *")
        request.group = uapi.KVM_ARM_VCPU_PMU_V3_CTRL
        request.attr = attribute
        request.addr = where
        struct_ioctl(vcpu.fd, uapi.KVM_SET_DEVICE_ATTR, request, "KVM_SET_DEVICE_ATTR of the PMU")


def setup_boot_vcpu(vcpu: Vcpu, *, pc: int, x0: int) -> None:
    """Put `vcpu` at a kernel's entry point `pc`: EL1, translation off, exceptions masked, the
    device tree's address in `x0`, 0 in x1 to x3 as after a reset (Linux
    Documentation/arch/arm64/booting.rst). Raises HostError."""
    pstate = registers.PSTATE_EL1H | registers.PSTATE_MASKED
    registers.set_register(vcpu, registers.PSTATE, pstate)
    registers.set_register(vcpu, registers.PC, pc)
    registers.set_register(vcpu, registers.GENERAL[0], x0)


def mpidr(index: int) -> int:
    """The affinity of vCPU `index` as KVM numbers them (Linux arch/arm64/kvm/sys_regs.c,
    reset_mpidr): sixteen at the lowest level, 256 at each of the next two."""
    return index & 0xF | (index >> 4 & 0xFF) << 8 | (index >> 12 & 0xFF) << 16
