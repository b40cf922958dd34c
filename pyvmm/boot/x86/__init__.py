"""Boot an x86 guest: put kernel, initrd, command line and tables into RAM; say where to start."""

from __future__ import annotations

import os

from pyvmm.boot import cmdline as command_line
from pyvmm.boot.file_kinds import check_initrd
from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.x86 import acpi as acpi_tables
from pyvmm.boot.x86 import boot_params, bzimage, detect, discovery, layout, vmclock
from pyvmm.boot.x86.acpi import AcpiConfig, FixedDevices, PciHost, VirtioMmioDevice
from pyvmm.boot.x86.entry import (
    LONG64,
    PROTECTED32,
    Entry,
    long_mode_entry,
    protected_mode_entry,
)
from pyvmm.boot.x86.layout import ram_ranges
from pyvmm.boot.x86.placement import load_initrd
from pyvmm.memory import GuestMemory

__all__ = [
    "LONG64",
    "PROTECTED32",
    "AcpiConfig",
    "Entry",
    "FixedDevices",
    "PciHost",
    "VirtioMmioDevice",
    "load",
    "ram_ranges",
]

_ELF_CMDLINE_MAX = (
    2047  # <asm/setup.h>, COMMAND_LINE_SIZE less the NUL; an ELF does not say its own
)


def load(
    memory: GuestMemory,
    *,
    kernel: str,
    initrd: str | None = None,
    cmdline: str = "",
    acpi: AcpiConfig,
    virtio_discovery: str = discovery.AUTO,
) -> Entry:
    """Fill fresh guest RAM for `kernel`; how the first vCPU starts.

    `kernel` is the path of a bzImage or an ELF vmlinux. `virtio_discovery` is ``"auto"``,
    ``"acpi"``, ``"cmdline"`` or ``"both"``. Raises ConfigError that names the option at fault if
    anything does not fit; the RAM is then not fit to be started.
    """
    with ImageFile(kernel, "--kernel") as file:
        if detect.kind_of(file) == detect.ELF:
            return _load_elf(memory, file, initrd, cmdline, acpi, virtio_discovery)
        return _load_bzimage(memory, file, initrd, cmdline, acpi, virtio_discovery)


def _load_bzimage(
    memory: GuestMemory,
    file: ImageFile,
    initrd: str | None,
    cmdline: str,
    acpi: AcpiConfig,
    wish: str,
) -> Entry:
    image = bzimage.parse(file)
    way = discovery.choose(wish, file, elf=False, banner=image.kernel_version, cmdline=cmdline)
    announced = _announce(way, acpi, cmdline)
    if wish == discovery.AUTO and len(announced[1]) > image.cmdline_max:
        announced = acpi, cmdline  # ACPI needs no room there
    acpi, cmdline = announced
    text = command_line.encode(cmdline, image.cmdline_max)
    bzimage.load(memory, file, image)
    ramdisk = _load_initrd(memory, initrd, (image.load_addr, image.end), image.initrd_addr_max)
    rsdp = _write_common(memory, text, acpi)
    boot_params.write(
        memory,
        header=image.header,
        load_addr=image.load_addr,
        cmdline_addr=layout.CMDLINE,
        initrd=ramdisk,
        rsdp=rsdp,
    )
    start = image.load_addr
    if not image.has_64bit_entry:
        return protected_mode_entry(memory, rip=start, rsi=layout.BOOT_PARAMS, cmdline=cmdline)
    start += bzimage.ENTRY_64
    return long_mode_entry(memory, rip=start, rsi=layout.BOOT_PARAMS, cmdline=cmdline)


def _load_elf(
    memory: GuestMemory,
    file: ImageFile,
    initrd: str | None,
    cmdline: str,
    acpi: AcpiConfig,
    wish: str,
) -> Entry:
    from pyvmm.boot.x86 import elf, pvh

    image = elf.parse(file)
    way = discovery.choose(wish, file, elf=True, banner="", cmdline=cmdline)
    acpi, cmdline = _announce(way, acpi, cmdline)
    text = command_line.encode(cmdline, _ELF_CMDLINE_MAX)
    elf.load(memory, file, image)
    # The kernel's own memory is all it needs: nothing is unpacked below or above it.
    ramdisk = _load_initrd(memory, initrd, (image.start, image.end), layout.HOLE_START - 1)
    rsdp = _write_common(memory, text, acpi)
    if image.pvh_entry is not None:
        pvh.write(memory, cmdline_addr=layout.CMDLINE, initrd=ramdisk, rsdp=rsdp)
        return protected_mode_entry(
            memory, rip=image.pvh_entry, rbx=layout.PVH_START_INFO, cmdline=cmdline
        )
    boot_params.write(
        memory,
        header=boot_params.header_for_elf(),
        load_addr=image.entry,
        cmdline_addr=layout.CMDLINE,
        initrd=ramdisk,
        rsdp=rsdp,
    )
    return long_mode_entry(memory, rip=image.entry, rsi=layout.BOOT_PARAMS, cmdline=cmdline)


def _announce(way: str, acpi: AcpiConfig, cmdline: str) -> tuple[AcpiConfig, str]:
    """`acpi` and `cmdline` changed so that they say where the virtio devices are, in this `way`."""
    if way != discovery.ACPI:
        cmdline = command_line.merge(discovery.parameters(acpi.virtio), cmdline)
    if way == discovery.CMDLINE:
        acpi = acpi._replace(virtio=())
    return acpi, cmdline


def _load_initrd(
    memory: GuestMemory, path: str | None, kernel: tuple[int, int], addr_max: int
) -> tuple[int, int]:
    if path is None:
        return 0, 0
    with ImageFile(path, "--initrd") as file:
        check_initrd(file)
        return load_initrd(memory, file, kernel=kernel, addr_max=addr_max)


def _write_common(memory: GuestMemory, cmdline: bytes, acpi: AcpiConfig) -> int:
    """Write what both ways to boot need; the address of the RSDP."""
    tables = acpi_tables.build(acpi)
    memory.write(tables.rsdp, tables.blob)
    memory.write(layout.CMDLINE, cmdline)
    memory.write(layout.GENERATION_ID, os.urandom(layout.GENERATION_ID_SIZE))
    vmclock.begin(memory)
    return tables.rsdp


def tell_of_copy(memory: GuestMemory) -> None:
    """Put another number where VMGenID says that the guest's is, and have VMClock say that it was
    interrupted: it goes on from where another one was."""
    memory.write(layout.GENERATION_ID, os.urandom(layout.GENERATION_ID_SIZE))
    vmclock.disrupt(memory)
