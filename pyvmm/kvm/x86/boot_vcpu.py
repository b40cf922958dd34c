"""A vCPU as a boot loader and firmware would leave it.

Every vCPU gets `setup_vcpu`; vCPU 0 then gets `setup_boot_vcpu` with the kernel's entry. The others
start at INIT and SIPI, from the guest. The segment registers match a GDT that the caller has put
into guest memory: null, null, code (0x10), data (0x18), TSS (0x20).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.x86 import cpuid, lapic, msrs
from pyvmm.kvm.x86 import registers as r
from pyvmm.kvm.x86.uapi import ffi

CODE_SELECTOR = 0x10
DATA_SELECTOR = 0x18
TSS_SELECTOR = 0x20
_GDT_LIMIT = 5 * 8 - 1

Mode = Literal["long64", "protected32"]


def setup_vcpu(vcpu: Vcpu, supported: Sequence[cpuid.CpuidEntry], index: int, count: int) -> None:
    """CPUID, MSRs, FPU and local APIC of vCPU `index` of `count`.

    `supported` is `cpuid.supported(kvm)`. Needs the in-kernel irqchip. Raises HostError.
    """
    cpuid.set_cpuid(vcpu, cpuid.for_vcpu(supported, index, count))
    msrs.set_msrs(vcpu, msrs.BOOT_MSRS)
    _setup_fpu(vcpu)
    lapic.setup_local_pins(vcpu)


def setup_boot_vcpu(
    vcpu: Vcpu,
    *,
    mode: Mode,
    rip: int,
    gdt_base: int,
    rsp: int = 0,
    rsi: int = 0,
    rbx: int = 0,
    cr3: int = 0,
) -> None:
    """Put `vcpu` at a kernel's entry point `rip`, interrupts off.

    "long64" is Linux' 64-bit boot protocol: paging on with the tables at `cr3`, which map the first
    4 GiB one to one; `rsi` is the address of boot_params. "protected32", with paging off, is
    PVH's entry, where `rbx` is the address of hvm_start_info, and that of Linux' 32-bit boot
    protocol, which wants RBX, RBP and RDI to be 0. All addresses are guest-physical.

    Raises HostError.
    """
    _setup_sregs(vcpu, mode, gdt_base, cr3)
    regs = ffi.new("struct kvm_regs *")
    regs.rflags = r.RFLAGS_RESERVED
    regs.rip = rip
    regs.rsp = rsp
    regs.rsi = rsi
    regs.rbx = rbx
    r.set_regs(vcpu, regs)


def _setup_sregs(vcpu: Vcpu, mode: Mode, gdt_base: int, cr3: int) -> None:
    sregs = r.get_sregs(vcpu)  # apic_base, above all, stays
    sregs.gdt.base = gdt_base
    sregs.gdt.limit = _GDT_LIMIT
    sregs.idt.base = 0
    sregs.idt.limit = 0
    set_flat_segments(sregs, mode)
    if mode == "long64":
        sregs.cr3 = cr3
        sregs.cr4 = r.CR4_PAE
        sregs.cr0 = r.CR0_PE | r.CR0_ET | r.CR0_PG
        sregs.efer = r.EFER_LME | r.EFER_LMA
    else:
        sregs.cr3 = 0
        sregs.cr4 = 0
        sregs.cr0 = r.CR0_PE | r.CR0_ET
        sregs.efer = 0
    r.set_sregs(vcpu, sregs)


def set_flat_segments(sregs: Any, mode: Mode) -> None:
    """Flat code, data and TSS in struct kvm_sregs `sregs`, for `mode`."""
    long = mode == "long64"
    r.set_code_segment(sregs.cs, selector=CODE_SELECTOR, long=long, db=not long)
    for segment in (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        r.set_data_segment(segment, selector=DATA_SELECTOR)
    r.set_task_register(sregs.tr, selector=TSS_SELECTOR)


def _setup_fpu(vcpu: Vcpu) -> None:
    # What FNINIT leaves (Intel SDM, volume 3, table 9-1). KVM ignores mxcsr here, and
    # starts with the value of a reset.
    fpu = ffi.new("struct kvm_fpu *")
    fpu.fcw = 0x37F
    r.set_fpu(vcpu, fpu)
