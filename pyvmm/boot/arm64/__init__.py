"""Boot an arm64 guest: put kernel, initrd and device tree into RAM; say where to start."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.boot import cmdline as command_line
from pyvmm.boot.arm64 import device_tree, image, layout
from pyvmm.boot.arm64.device_tree import Device, Gic, Machine, PciHost
from pyvmm.boot.arm64.layout import ram_ranges
from pyvmm.boot.file_kinds import check_initrd
from pyvmm.boot.image_file import ImageFile
from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory

__all__ = [
    "Device",
    "Entry",
    "Gic",
    "Machine",
    "PciHost",
    "generation_id",
    "load",
    "ram_ranges",
    "tell_of_copy",
]

_PAGE = 0x1000


class Entry(NamedTuple):
    """The start of the first vCPU: at `pc`, with the address of a device tree in x0: one of
    `trees`, by the version of the interrupt controller that the machine gets. `cmdline` is the
    kernel's."""

    pc: int
    trees: dict[int, int]
    cmdline: str


def load(
    memory: GuestMemory,
    *,
    kernel: str,
    initrd: str | None,
    machine: Machine,
    gics: Sequence[Gic],
) -> Entry:
    """Fill fresh guest RAM for `kernel`; how the first vCPU starts. `machine` is without its
    initrd, which is the file at that path, and without the place of its generation. `gics` are
    those that the machine may get, so many as layout.TREES. Raises ConfigError that names the
    option at fault."""
    command_line.encode(machine.cmdline, layout.CMDLINE_MAX)
    with ImageFile(kernel, "--kernel") as file:
        start, kernel_end = image.load(memory, file)
    ram = memory.regions[0]
    trees_start = _trees_start(memory)
    if trees_start < kernel_end:
        raise ConfigError(
            f"the guest's {ram.size // layout.MIB} MiB of memory have no room for the kernel and "
            "the device tree",
            cure="give it more",
            option="--memory",
        )
    ramdisk = _load_initrd(memory, initrd, kernel_end, trees_start)
    generation = generation_id(memory)
    memory.write(generation, os.urandom(layout.GENERATION_ID_SIZE))
    machine = machine._replace(
        initrd=ramdisk, generation=machine.generation._replace(base=generation)
    )
    trees = {}
    for number, gic in enumerate(gics):
        blob = device_tree.build(machine, gic)
        if len(blob) > layout.TREE_MAX:
            raise ConfigError(
                f"the device tree has {len(blob)} bytes, {layout.TREE_MAX} is the most",
                cure="ask for fewer vCPUs, or a shorter --cmdline",
            )
        trees[gic.version] = trees_start + number * layout.TREE_SIZE
        memory.write(trees[gic.version], blob)
    return Entry(start, trees, machine.cmdline)


def _trees_start(memory: GuestMemory) -> int:
    ram = memory.regions[0]
    top = min(ram.end, ram.guest_addr + layout.WINDOW)
    return (top - layout.TREES * layout.TREE_SIZE) & -layout.TREE_SIZE


def generation_id(memory: GuestMemory) -> int:
    """The guest-physical address of the number that tells a guest whether it is a copy (VMGenID):
    the page behind the device trees."""
    return _trees_start(memory) + layout.TREES * layout.TREE_SIZE - layout.GENERATION_ID_ROOM


def tell_of_copy(memory: GuestMemory) -> None:
    """Put another number there."""
    memory.write(generation_id(memory), os.urandom(layout.GENERATION_ID_SIZE))


def _load_initrd(
    memory: GuestMemory, path: str | None, kernel_end: int, top: int
) -> tuple[int, int]:
    """(address, size) of the initrd, as high as the device tree leaves room."""
    if path is None:
        return 0, 0
    with ImageFile(path, "--initrd") as file:
        check_initrd(file)
        start = (top - file.size) & -_PAGE
        if start < kernel_end:
            size, left = file.size, max(0, top - kernel_end)
            needed = memory.regions[0].size + size - left
            raise file.error(
                f"{path} has {-(-size // layout.MIB)} MiB ({size} bytes), the kernel leaves "
                f"{left // layout.MIB} MiB of the guest's memory",
                f"give it --memory {-(-needed // layout.MIB) + 1}M or more",
            )
        file.read_into(memory.view(start, file.size), 0)
        return start, file.size
