"""The state a vCPU starts in: what stands in memory for it, and the numbers that differ by kernel.

Two ways in: long mode, as the 64-bit boot protocol of Linux wants it (its file
Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"), and 32-bit protected mode without paging,
as its "32-bit Boot Protocol" and the PVH entry want it (Xen docs/misc/pvh.pandoc). Setting the
vCPU's registers accordingly is the machine's part.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from pyvmm.boot.x86 import layout
from pyvmm.memory import GuestMemory

LONG64 = "long64"
PROTECTED32 = "protected32"

# Segment descriptors (Intel SDM, volume 3, 3.4.5 "Segment Descriptors"). Flat: base 0, limit 4 GiB.
_CODE64 = 0x00AF_9B00_0000_FFFF  # execute, read, accessed; present; 64-bit; counted in pages
_CODE32 = 0x00CF_9B00_0000_FFFF  # the same, but 32-bit
_DATA = 0x00CF_9300_0000_FFFF  # read, write, accessed
_TASK = 0x0000_8B00_0000_0067  # busy TSS, base 0, 0x68 bytes; nobody ever looks into it

_PRESENT_WRITABLE = 0x3
_PAGE_SIZE_2M = 0x80


class Entry(NamedTuple):
    """The first vCPU's start in the guest, interrupts off: plain numbers, guest-physical addresses.

    `mode` is ``"long64"`` or ``"protected32"``. At `gdt_base` stand five descriptors: null, null,
    code for the mode (selector 0x10), data (0x18) and task (0x20). `cr3` counts in long mode only.
    `cmdline` is what the kernel was given.
    """

    mode: str
    rip: int
    rsp: int
    rsi: int
    rbx: int
    cr3: int
    gdt_base: int
    cmdline: str


def long_mode_entry(memory: GuestMemory, *, rip: int, rsi: int, cmdline: str) -> Entry:
    """Write descriptors and page tables to `memory`; the entry to `rip` in 64-bit long mode.

    The first 4 GiB are mapped to themselves. `rsi` is the address of struct boot_params.
    """
    _write_gdt(memory, _CODE64)
    _write_identity_map(memory)
    return Entry(LONG64, rip, layout.BOOT_STACK, rsi, 0, layout.BOOT_PML4, layout.BOOT_GDT, cmdline)


def protected_mode_entry(
    memory: GuestMemory, *, rip: int, rsi: int = 0, rbx: int = 0, cmdline: str
) -> Entry:
    """Write descriptors to `memory`; the entry to `rip` in flat 32-bit mode without paging.

    `rbx` is the address of struct hvm_start_info, or `rsi` that of struct boot_params.
    """
    _write_gdt(memory, _CODE32)
    return Entry(PROTECTED32, rip, layout.BOOT_STACK, rsi, rbx, 0, layout.BOOT_GDT, cmdline)


def _write_gdt(memory: GuestMemory, code: int) -> None:
    memory.write(layout.BOOT_GDT, struct.pack("<5Q", 0, 0, code, _DATA, _TASK))


def _write_identity_map(memory: GuestMemory) -> None:
    """Page tables that map the first 4 GiB to themselves, in pages of 2 MiB."""
    pml4 = layout.BOOT_PDPT | _PRESENT_WRITABLE
    memory.write(layout.BOOT_PML4, struct.pack("<Q", pml4))
    directories = [layout.BOOT_PD + index * 0x1000 | _PRESENT_WRITABLE for index in range(4)]
    memory.write(layout.BOOT_PDPT, struct.pack("<4Q", *directories))
    pages = range(_PAGE_SIZE_2M | _PRESENT_WRITABLE, 4 * layout.GIB, 2 * layout.MIB)
    memory.write(layout.BOOT_PD, struct.pack("<2048Q", *pages))
