"""struct hvm_start_info: what a kernel entered by its PVH note is told.

Source: Xen public/arch-x86/hvm/start_info.h, version 1 (the one with a memory map).
"""

from __future__ import annotations

import struct

from pyvmm.boot.x86 import e820, layout
from pyvmm.memory import GuestMemory

MAGIC = 0x336E_C578
VERSION = 1


def write(memory: GuestMemory, *, cmdline_addr: int, initrd: tuple[int, int], rsdp: int) -> None:
    """Write start info, module list and memory map to their places in `memory`.

    `initrd` is (address, bytes), (0, 0) for none.
    """
    ranges = e820.memory_map(memory)
    modules = 1 if initrd[1] else 0
    memory.write(
        layout.PVH_START_INFO,
        struct.pack(
            "<4I4Q2I",
            MAGIC,
            VERSION,
            0,  # flags
            modules,
            layout.PVH_MODLIST if modules else 0,
            cmdline_addr,
            rsdp,
            layout.PVH_MEMMAP,
            len(ranges),
            0,
        ),
    )
    if modules:
        memory.write(layout.PVH_MODLIST, struct.pack("<4Q", *initrd, 0, 0))
    table = b"".join(struct.pack("<2Q2I", *entry, 0) for entry in ranges)
    memory.write(layout.PVH_MEMMAP, table)
