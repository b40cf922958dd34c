"""The RAM of an x86 guest, and what boot puts into it: guest-physical addresses.

The devices' addresses are the board's (pyvmm/machine/board/x86/layout.py). docs/memory-map.md draws
both; a test compares them.
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

# --- what boot puts into low RAM -----------------------------------------------------------------
BOOT_GDT = 0x0500
BOOT_GDT_SIZE = 0x28  # five descriptors: null, null, code, data, task
PVH_START_INFO = 0x6000  # struct hvm_start_info
PVH_MODLIST = 0x6040  # one struct hvm_modlist_entry: the initrd
PVH_MEMMAP = 0x6080  # struct hvm_memmap_table_entry, one for each E820 range
PVH_SIZE = 0x1000
BOOT_PARAMS = 0x7000  # the "zero page"
BOOT_PARAMS_SIZE = 0x1000
BOOT_STACK_BOTTOM = 0x8000
BOOT_STACK = 0x8FF0  # it grows down from here
BOOT_PML4 = 0x9000
BOOT_PDPT = 0xA000
BOOT_PD = 0xB000  # four pages, one for each of the first 4 GiB
BOOT_TABLES_END = 0xF000
CMDLINE = 0x2_0000
CMDLINE_SIZE = 0x1_0000
EBDA = 0x9_FC00  # end of conventional memory
GENERATION_ID = 0x9_FE00  # in the EBDA, which is reserved: as VMGenID wants it
GENERATION_ID_SIZE = 16
EBDA_END = 0xA_0000  # where VGA memory would begin
VMCLOCK = 0xD_F000  # where no kernel takes RAM for granted; a page, as programs can map it
VMCLOCK_SIZE = 0x1000
ACPI_TABLES = 0xE_0000  # the RSDP is searched for here, 16-byte aligned
ACPI_TABLES_SIZE = 0x2_0000
HIGH_RAM = 0x10_0000  # kernels load from 1 MiB

# --- the hole below 4 GiB, where devices are ------------------------------------------------------
HOLE_START = 0xC000_0000
HOLE_END = 0x1_0000_0000


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """The places of `size` bytes of RAM: (guest-physical address, bytes) below and above the
    hole."""
    low = min(size, HOLE_START)
    ranges = [(0, low)]
    if size > low:
        ranges.append((HOLE_END, size - low))
    return ranges
