"""struct boot_params, the "zero page": what a 64-bit Linux kernel is told at its entry.

Offsets as in Documentation/arch/x86/zero-page.rst and boot.rst, "Details of Header Fields";
structure as in <asm/bootparam.h>.
"""

from __future__ import annotations

import struct

from pyvmm.boot.x86 import e820, layout
from pyvmm.memory import GuestMemory

ACPI_RSDP_ADDR = 0x070
EXT_RAMDISK_IMAGE = 0x0C0
EXT_RAMDISK_SIZE = 0x0C4
EXT_CMD_LINE_PTR = 0x0C8
E820_ENTRIES = 0x1E8
HDR = 0x1F1  # struct setup_header, in the zero page as in the file
BOOT_FLAG = 0x1FE
HEADER_MAGIC = 0x202
VERSION = 0x206
TYPE_OF_LOADER = 0x210
LOADFLAGS = 0x211
CODE32_START = 0x214
RAMDISK_IMAGE = 0x218
RAMDISK_SIZE = 0x21C
CMD_LINE_PTR = 0x228
KERNEL_ALIGNMENT = 0x230
CMDLINE_SIZE = 0x238
HDR_END = 0x290  # what follows in the zero page is not part of the header any more
E820_TABLE = 0x2D0
E820_MAX = 128

HDRS = b"HdrS"
LOADER_UNDEFINED = 0xFF  # no number was assigned to this loader
LOADED_HIGH = 1 << 0


def write(
    memory: GuestMemory,
    *,
    header: bytes,
    load_addr: int,
    cmdline_addr: int,
    initrd: tuple[int, int],
    rsdp: int,
) -> None:
    """Write the zero page to its place in `memory`.

    `header` is the file's setup header, from offset 0x1f1 on. `load_addr` is where the kernel was
    loaded; `initrd` is (address, bytes), (0, 0) for none.
    """
    page = bytearray(layout.BOOT_PARAMS_SIZE)
    page[HDR : HDR + len(header)] = header
    page[TYPE_OF_LOADER] = LOADER_UNDEFINED
    page[LOADFLAGS] |= LOADED_HIGH
    _put32(page, CODE32_START, load_addr)
    _put_split(page, RAMDISK_IMAGE, EXT_RAMDISK_IMAGE, initrd[0])
    _put_split(page, RAMDISK_SIZE, EXT_RAMDISK_SIZE, initrd[1])
    _put_split(page, CMD_LINE_PTR, EXT_CMD_LINE_PTR, cmdline_addr)
    struct.pack_into("<Q", page, ACPI_RSDP_ADDR, rsdp)
    ranges = e820.memory_map(memory)
    page[E820_ENTRIES] = len(ranges)
    for index, entry in enumerate(ranges):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * index, *entry)
    memory.write(layout.BOOT_PARAMS, page)


def header_for_elf() -> bytes:
    """A setup header for a kernel that comes without one: an ELF entered in long mode."""
    page = bytearray(HDR_END)
    page[BOOT_FLAG : BOOT_FLAG + 2] = b"\x55\xaa"
    page[HEADER_MAGIC : HEADER_MAGIC + 4] = HDRS
    struct.pack_into("<H", page, VERSION, 0x020F)
    _put32(page, KERNEL_ALIGNMENT, 0x100_0000)
    _put32(page, CMDLINE_SIZE, layout.CMDLINE_SIZE - 1)
    return bytes(page[HDR:])


def _put32(page: bytearray, offset: int, value: int) -> None:
    struct.pack_into("<I", page, offset, value & 0xFFFF_FFFF)


def _put_split(page: bytearray, low: int, high: int, value: int) -> None:
    _put32(page, low, value)
    _put32(page, high, value >> 32)
