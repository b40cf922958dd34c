"""The one memory map of an x86 guest: guest-physical addresses and I/O ports.

docs/memory-map.md draws what stands here; a test compares the two.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

MIN_RAM = 32 * MIB
MAX_RAM = 32 << 40  # half of what Linux can map at once, with four-level page tables

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
EBDA_END = 0xA_0000  # where VGA memory would begin
ACPI_TABLES = 0xE_0000  # the RSDP is searched for here, 16-byte aligned
ACPI_TABLES_SIZE = 0x2_0000
HIGH_RAM = 0x10_0000  # kernels load from 1 MiB

# --- the hole below 4 GiB ------------------------------------------------------------------------
HOLE_START = 0xC000_0000
HOLE_END = 0x1_0000_0000
VIRTIO_MMIO_BASE = 0xD000_0000
VIRTIO_MMIO_STRIDE = 0x1000
VIRTIO_MMIO_SIZE = 0x200  # registers to 0x100, then the device's configuration space
IOAPIC = 0xFEC0_0000
LOCAL_APIC = 0xFEE0_0000
KVM_IDENTITY_MAP = 0xFFFB_C000  # one page, for KVM on Intel
KVM_TSS = 0xFFFB_D000  # three pages, likewise

# --- above the RAM -------------------------------------------------------------------------------
MAPPED_FILE_ALIGN = GIB  # the largest page, eight of Linux's memory sections
MAX_MAPPED_FILES = 4 << 40  # KASLR leaves 10 TiB above the RAM, a KVM memory slot has at most 8

# --- I/O ports and interrupts --------------------------------------------------------------------
SERIAL_PORT = 0x3F8
SERIAL_PORTS = 8
SERIAL_GSI = 4
I8042_DATA_PORT = 0x60
I8042_COMMAND_PORT = 0x64
ACPI_SLEEP_CONTROL_PORT = 0x600
ACPI_SLEEP_STATUS_PORT = 0x601
ACPI_RESET_PORT = 0x602
ACPI_SCI_GSI = 9  # the FADT wants one; there is no SCI on a hardware-reduced machine, so …
POWER_BUTTON_GSI = 9  # … this has its line
ACPI_SLEEP_TYPE_S5 = 5  # what the guest writes to SLP_TYP to power off; the DSDT's \_S5 says so
ACPI_RESET_VALUE = 1  # what it writes to the reset port

# GSIs of virtio-mmio devices, in the order they are given out: the ISA lines first, because a
# kernel that learns of a device from its command line can only reach those.
VIRTIO_GSIS = (5, 6, 7, 10, 11, 12, 14, 15, *range(16, 24))


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """Where `size` bytes of RAM lie: (guest-physical address, bytes) below and above the hole.

    Raises ConfigError for a size that is too small or not made of whole MiB.
    """
    if size < MIN_RAM:
        raise ConfigError(
            f"{size >> 20} MiB of memory is too little for a guest",
            cure=f"give it {MIN_RAM >> 20}M or more",
            option="--memory",
        )
    if size > MAX_RAM:
        raise ConfigError(
            f"{size >> 30} GiB of memory is too much for a guest",
            cure=f"give it {MAX_RAM >> 30}G or less",
            option="--memory",
        )
    if size % MIB:
        raise ConfigError(
            f"{size} bytes is not a whole number of MiB", cure="round it up", option="--memory"
        )
    low = min(size, HOLE_START)
    ranges = [(0, low)]
    if size > low:
        ranges.append((HOLE_END, size - low))
    return ranges


def mapped_files_start(ram: int) -> int:
    """Where the first file lies that is memory of a guest with `ram` bytes of RAM."""
    end = max(HOLE_END, *(start + size for start, size in ram_ranges(ram)))
    return -(-end // MAPPED_FILE_ALIGN) * MAPPED_FILE_ALIGN
