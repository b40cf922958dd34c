"""Registers of an arm64 vCPU, each by the id that KVM has for it (KVM API, 4.68 KVM_SET_ONE_REG).

``set_register(vcpu, PC, address)``. After an MMIO exit they are stale until the access is complete:
see `pyvmm.kvm.loop.finish_pending`. All that ask KVM raise HostError.
"""

from __future__ import annotations

import errno

from pyvmm.errors import HostError
from pyvmm.kvm.arm64 import uapi
from pyvmm.kvm.arm64.uapi import ffi
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.vcpu import Vcpu

_SIZES = {4: uapi.KVM_REG_SIZE_U32, 8: uapi.KVM_REG_SIZE_U64, 16: uapi.KVM_REG_SIZE_U128}
_LARGEST = 256  # bytes, of an SVE register
_MOST_REGISTERS = 1 << 16


def core(*path: str | int) -> int:
    """The id of the field of struct kvm_regs at `path`: ("regs", "pc"). KVM counts in words of
    32 bits there."""
    offset = ffi.offsetof("struct kvm_regs", *path)
    size = _SIZES[ffi.sizeof(_field_type(path))]
    return int(uapi.KVM_REG_ARM64 | size | uapi.KVM_REG_ARM_CORE | offset // 4)


def _field_type(path: tuple[str | int, ...]) -> object:
    found = ffi.typeof("struct kvm_regs")
    for step in path:
        found = found.item if isinstance(step, int) else dict(found.fields)[step].type
    return found


def system(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The id of a system register by its encoding (Arm Architecture Reference Manual, chapter D22
    "AArch64 System register encoding")."""
    return int(
        uapi.KVM_REG_ARM64
        | uapi.KVM_REG_SIZE_U64
        | uapi.KVM_REG_ARM64_SYSREG
        | op0 << uapi.KVM_REG_ARM64_SYSREG_OP0_SHIFT
        | op1 << uapi.KVM_REG_ARM64_SYSREG_OP1_SHIFT
        | crn << uapi.KVM_REG_ARM64_SYSREG_CRN_SHIFT
        | crm << uapi.KVM_REG_ARM64_SYSREG_CRM_SHIFT
        | op2 << uapi.KVM_REG_ARM64_SYSREG_OP2_SHIFT
    )


GENERAL = tuple(core("regs", "regs", number) for number in range(31))  # x0 to x30
SP, PC, PSTATE = core("regs", "sp"), core("regs", "pc"), core("regs", "pstate")
SP_EL1, ELR_EL1, SPSR_EL1 = core("sp_el1"), core("elr_el1"), core("spsr", 0)

MPIDR_EL1 = system(3, 0, 0, 0, 5)
SCTLR_EL1 = system(3, 0, 1, 0, 0)
TTBR0_EL1 = system(3, 0, 2, 0, 0)
TTBR1_EL1 = system(3, 0, 2, 0, 1)
TCR_EL1 = system(3, 0, 2, 0, 2)
ESR_EL1 = system(3, 0, 5, 2, 0)
FAR_EL1 = system(3, 0, 6, 0, 0)
VBAR_EL1 = system(3, 0, 12, 0, 0)
CNTVCT_EL0 = system(3, 3, 14, 3, 2)
"""KVM_REG_ARM_TIMER_CNT: the guest's time, the same for all of a VM's vCPUs."""

SCTLR_M = 1 << 0  # virtual addresses are translated

# PSTATE, as SPSR_EL1 has it: EL1 with its own stack pointer; D, A, I and F mask all exceptions.
PSTATE_EL1H = 0b0101
PSTATE_MASKED = 0b1111 << 6


def name_of(register: int) -> str:
    """The register in words: a system register as an assembler takes it, S3_0_C1_C0_0."""
    kind = register & uapi.KVM_REG_ARM_COPROC_MASK
    if kind != uapi.KVM_REG_ARM64_SYSREG:
        return f"register {register:#x}"
    op0, op1 = register >> uapi.KVM_REG_ARM64_SYSREG_OP0_SHIFT & 3, register >> 11 & 7
    crn, crm = register >> uapi.KVM_REG_ARM64_SYSREG_CRN_SHIFT & 15, register >> 3 & 15
    return f"S{op0}_{op1}_C{crn}_C{crm}_{register & 7}"


def size_of(register: int) -> int:
    """The number of bytes that the register has."""
    size: int = 1 << ((register & uapi.KVM_REG_SIZE_MASK) >> uapi.KVM_REG_SIZE_SHIFT)
    return size


def get_register(vcpu: Vcpu, register: int) -> int:
    """KVM_GET_ONE_REG, as a number."""
    value = ffi.new(f"uint8_t[{_LARGEST}]")
    struct_ioctl(vcpu.fd, uapi.KVM_GET_ONE_REG, _one(register, value), "KVM_GET_ONE_REG")
    return int.from_bytes(bytes(value[0 : size_of(register)]), "little")


def set_register(vcpu: Vcpu, register: int, number: int) -> None:
    """KVM_SET_ONE_REG."""
    value = ffi.new(f"uint8_t[{_LARGEST}]")
    size = size_of(register)
    value[0:size] = number.to_bytes(size, "little")
    struct_ioctl(vcpu.fd, uapi.KVM_SET_ONE_REG, _one(register, value), "KVM_SET_ONE_REG")


def _one(register: int, value: object) -> object:
    one = ffi.new("struct kvm_one_reg *")
    one.id = register
    one.addr = int(ffi.cast("uintptr_t", value))
    return one


def all_registers(vcpu: Vcpu) -> list[int]:
    """KVM_GET_REG_LIST: the ids of all that this vCPU has, which are its state."""
    counted = ffi.new("struct kvm_reg_list *", {"reg": 0})
    try:
        struct_ioctl(vcpu.fd, uapi.KVM_GET_REG_LIST, counted, "KVM_GET_REG_LIST")
    except HostError as error:
        if error.errno != errno.E2BIG or counted.n > _MOST_REGISTERS:
            raise
    found = ffi.new("struct kvm_reg_list *", {"reg": int(counted.n)})
    found.n = counted.n
    struct_ioctl(vcpu.fd, uapi.KVM_GET_REG_LIST, found, "KVM_GET_REG_LIST")
    return list(found.reg[0 : found.n])
