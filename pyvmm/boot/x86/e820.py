"""The guest's map of its physical memory: E820, the same for every way to boot."""

from __future__ import annotations

from typing import NamedTuple

from pyvmm.boot.x86 import layout
from pyvmm.memory import GuestMemory

RAM = 1
RESERVED = 2
ACPI = 3  # tables, free to be reused once they are read


class Range(NamedTuple):
    """`size` bytes at guest-physical `addr`; `kind` as in <asm/e820/types.h>."""

    addr: int
    size: int
    kind: int


def memory_map(memory: GuestMemory) -> list[Range]:
    """The map of `memory`, ascending. The legacy video hole is left out, as on a PC."""
    low, *high = memory.regions
    return [
        Range(0, layout.EBDA, RAM),
        Range(layout.EBDA, layout.EBDA_END - layout.EBDA, RESERVED),
        Range(layout.VMCLOCK, layout.VMCLOCK_SIZE, RESERVED),
        Range(layout.ACPI_TABLES, layout.ACPI_TABLES_SIZE, ACPI),
        Range(layout.HIGH_RAM, low.end - layout.HIGH_RAM, RAM),
        *(Range(region.guest_addr, region.size, RAM) for region in high),
    ]
