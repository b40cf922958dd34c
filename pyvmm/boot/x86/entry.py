"""The state a vCPU starts in: descriptor table, page tables, segments and control registers.

Two ways in: long mode, as the 64-bit boot protocol of Linux wants it (its file
Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"), and 32-bit protected mode without paging,
as the PVH entry wants it (Xen docs/misc/pvh.pandoc). Everything here is plain numbers; applying
them to a vCPU is the machine's part.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pyvmm.memory import GuestMemory
from pyvmm.memory import layout_x86 as layout

LONG64 = "long64"
PROTECTED32 = "protected32"

BOOT_CS = 0x10
BOOT_DS = 0x18
BOOT_TSS = 0x20

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10

_PRESENT_WRITABLE = 0x3
_PAGE_SIZE_2M = 0x80
_CODE = 0xB  # execute, read, accessed
_DATA = 0x3  # read, write, accessed
_BUSY_TSS = 0xB


@dataclass(frozen=True)
class Segment:
    """One segment register with its hidden part; fields as in struct kvm_segment of <linux/kvm.h>.

    `limit` is in bytes, whatever `g` says.
    """

    selector: int
    base: int
    limit: int
    type: int
    present: int = 1
    dpl: int = 0
    db: int = 0
    s: int = 1
    l: int = 0  # noqa: E741 - the header's name
    g: int = 0

    def descriptor(self) -> int:
        """The eight-byte descriptor of this segment, as the global descriptor table holds it."""
        limit = self.limit >> 12 if self.g else self.limit
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        flags = self.l << 1 | self.db << 2 | self.g << 3
        low = (limit & 0xFFFF) | (self.base & 0xFF_FFFF) << 16 | access << 40
        return low | (limit >> 16 & 0xF) << 48 | flags << 52 | (self.base >> 24 & 0xFF) << 56


@dataclass(frozen=True)
class Entry:
    """How the first vCPU enters the guest: plain numbers, all interrupts off.

    `mode` is ``"long64"`` or ``"protected32"``. `data` is for DS, ES, FS, GS and SS; `task` for TR.
    `gdt_limit` is the size of the table in bytes minus one. `cmdline` is what the kernel was given.
    """

    mode: str
    rip: int
    rsp: int
    rsi: int
    rbx: int
    cr0: int
    cr3: int
    cr4: int
    efer: int
    gdt_base: int
    gdt_limit: int
    code: Segment
    data: Segment
    task: Segment
    rflags: int = 0x2  # bit 1 is always set
    cmdline: str = ""


def long_mode_entry(memory: GuestMemory, *, rip: int, rsi: int) -> Entry:
    """Write descriptors and page tables to `memory`; the entry to `rip` in 64-bit long mode.

    The first 4 GiB are identity mapped. `rsi` is the address of struct boot_params.
    """
    code = Segment(BOOT_CS, 0, 0xFFFF_FFFF, _CODE, l=1, g=1)
    _write_identity_map(memory)
    return _entry(
        memory,
        LONG64,
        code,
        rip=rip,
        rsi=rsi,
        cr0=CR0_PE | CR0_ET | CR0_PG,
        cr3=layout.BOOT_PML4,
        cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA,
    )


def protected_mode_entry(memory: GuestMemory, *, rip: int, rbx: int) -> Entry:
    """Write descriptors to `memory`; the entry to `rip` in flat 32-bit mode without paging.

    `rbx` is the address of struct hvm_start_info.
    """
    code = Segment(BOOT_CS, 0, 0xFFFF_FFFF, _CODE, db=1, g=1)
    return _entry(memory, PROTECTED32, code, rip=rip, rbx=rbx, cr0=CR0_PE | CR0_ET)


def _entry(
    memory: GuestMemory,
    mode: str,
    code: Segment,
    *,
    rip: int,
    cr0: int,
    rsi: int = 0,
    rbx: int = 0,
    cr3: int = 0,
    cr4: int = 0,
    efer: int = 0,
) -> Entry:
    data = Segment(BOOT_DS, 0, 0xFFFF_FFFF, _DATA, db=1, g=1)
    task = Segment(BOOT_TSS, 0, 0x67, _BUSY_TSS, s=0)
    table = struct.pack("<5Q", 0, 0, code.descriptor(), data.descriptor(), task.descriptor())
    memory.write(layout.BOOT_GDT, table)
    return Entry(
        mode=mode,
        rip=rip,
        rsp=layout.BOOT_STACK,
        rsi=rsi,
        rbx=rbx,
        cr0=cr0,
        cr3=cr3,
        cr4=cr4,
        efer=efer,
        gdt_base=layout.BOOT_GDT,
        gdt_limit=len(table) - 1,
        code=code,
        data=data,
        task=task,
    )


def _write_identity_map(memory: GuestMemory) -> None:
    """Page tables that map the first 4 GiB to themselves, in pages of 2 MiB."""
    pml4 = layout.BOOT_PDPT | _PRESENT_WRITABLE
    memory.write(layout.BOOT_PML4, struct.pack("<Q", pml4))
    directories = [layout.BOOT_PD + index * 0x1000 | _PRESENT_WRITABLE for index in range(4)]
    memory.write(layout.BOOT_PDPT, struct.pack("<4Q", *directories))
    pages = range(_PAGE_SIZE_2M | _PRESENT_WRITABLE, 4 * layout.GIB, 2 * layout.MIB)
    memory.write(layout.BOOT_PD, struct.pack("<2048Q", *pages))
