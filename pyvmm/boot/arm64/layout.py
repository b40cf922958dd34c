"""The places of an arm64 guest's RAM and of what boot puts into it: guest-physical addresses.

The devices' addresses, all below the RAM, are the board's (pyvmm/machine/board/arm64/layout.py).
docs/memory-map.md draws both; a test compares them.
"""

from __future__ import annotations

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

RAM = GIB
KERNEL_ALIGN = 2 * MIB  # Linux Documentation/arch/arm64/booting.rst
TREE_SIZE = 2 * MIB  # the largest device tree that Linux maps
TREES = 2  # one for each kind of interrupt controller
# VMGenID, in a page that is no RAM to the kernel, at the end of the last tree's room.
GENERATION_ID_ROOM = 4 * KIB
GENERATION_ID_SIZE = 16
TREE_MAX = TREE_SIZE - GENERATION_ID_ROOM
WINDOW = 32 * GIB  # in which Linux wants kernel, initrd and device tree together
CMDLINE_MAX = 2047  # <asm/setup.h>, COMMAND_LINE_SIZE less the NUL


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """The ranges of `size` bytes of RAM: only one, as no device is above its start."""
    return [(RAM, size)]
