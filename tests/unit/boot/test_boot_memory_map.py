"""docs/memory-map.md says what boot's and the board's layout say, and the map holds together."""

from __future__ import annotations

import re
from pathlib import Path

from pyvmm.boot.x86 import AcpiConfig, VirtioMmioDevice, e820
from pyvmm.boot.x86 import layout as boot_layout
from pyvmm.boot.x86.acpi import build
from pyvmm.machine.board.x86 import layout as board_layout
from pyvmm.machine.board.x86.layout import FIXED_DEVICES
from pyvmm.memory import GuestMemory

DOC = Path(__file__).resolve().parents[3] / "docs/memory-map.md"
NOT_PLACES = {"KIB", "MIB", "GIB", "FIXED_DEVICES", "PCI_HOST"}


def documented() -> dict[str, int | tuple[int, ...]]:
    rows = re.findall(r"^\| ([A-Z0-9_]+) \| ([^|]+) \|", DOC.read_text(), re.MULTILINE)
    values: dict[str, int | tuple[int, ...]] = {}
    for name, text in rows:
        numbers = [int(word, 0) for word in text.split()]
        values[name] = tuple(numbers) if name.endswith("GSIS") else numbers[0]
    return values


def in_module() -> dict[str, int | tuple[int, ...]]:
    return {
        name: value
        for name, value in (vars(boot_layout) | vars(board_layout)).items()
        if name.isupper() and name not in NOT_PLACES and isinstance(value, int | tuple)
    }


def test_the_tables_of_the_document_are_the_module() -> None:
    assert documented() == in_module(), "change docs/memory-map.md and the layouts together"


def test_addresses_in_the_pictures_are_the_modules() -> None:
    pictures = "".join(re.findall(r"```(.*?)```", DOC.read_text(), re.DOTALL))
    module = in_module()
    found = re.findall(r"^ (0x[0-9A-F_]+) .*?\b([A-Z][A-Z0-9_]{3,})\b", pictures, re.MULTILINE)
    named = [(int(a, 16), module[n]) for a, n in found if n in module and "+" not in n]
    assert len(named) >= 10
    for address, value in named:
        assert address in (value, 0x3_0000)


def test_boot_data_does_not_overlap() -> None:
    at = boot_layout
    areas = [
        (at.BOOT_GDT, at.BOOT_GDT_SIZE),
        (at.PVH_START_INFO, at.PVH_SIZE),
        (at.BOOT_PARAMS, at.BOOT_PARAMS_SIZE),
        (at.BOOT_STACK_BOTTOM, at.BOOT_STACK - at.BOOT_STACK_BOTTOM),
        (at.BOOT_PML4, 0x1000),
        (at.BOOT_PDPT, 0x1000),
        (at.BOOT_PD, at.BOOT_TABLES_END - at.BOOT_PD),
        (at.CMDLINE, at.CMDLINE_SIZE),
        (at.EBDA, at.EBDA_END - at.EBDA),
        (at.VMCLOCK, at.VMCLOCK_SIZE),
        (at.ACPI_TABLES, at.ACPI_TABLES_SIZE),
        (at.HIGH_RAM, 1),
    ]
    end = 0
    for start, size in areas:
        assert start >= end
        end = start + size


def test_the_hole_holds_the_devices() -> None:
    at = board_layout
    last = at.VIRTIO_MMIO_BASE + len(at.VIRTIO_GSIS) * at.VIRTIO_MMIO_STRIDE
    assert (
        boot_layout.HOLE_START
        <= at.VIRTIO_MMIO_BASE
        < last
        <= at.IOAPIC
        < at.LOCAL_APIC
        < boot_layout.HOLE_END
    )
    assert at.KVM_TSS + 0x3000 <= boot_layout.HOLE_END
    assert not {0, 1, 2, 8, at.SERIAL_GSI, at.ACPI_SCI_GSI} & set(at.VIRTIO_GSIS)
    assert len(set(at.VIRTIO_GSIS)) == len(at.VIRTIO_GSIS)


def test_e820_is_ascending_disjoint_and_within_ram() -> None:
    for mebibytes in (32, 3072, 3073, 5120):
        memory = GuestMemory(boot_layout.ram_ranges(mebibytes << 20))
        end = 0
        for entry in e820.memory_map(memory):
            assert entry.addr >= end and entry.size > 0
            assert memory.contains(entry.addr, entry.size)
            end = entry.addr + entry.size
        assert end == memory.regions[-1].end
        memory.close()


def test_tables_of_a_large_machine_fit_their_place() -> None:
    at = board_layout
    devices = tuple(
        VirtioMmioDevice(at.VIRTIO_MMIO_BASE + n * at.VIRTIO_MMIO_STRIDE, 512, gsi)
        for n, gsi in enumerate(at.VIRTIO_GSIS)
    )
    assert (
        len(build(AcpiConfig(FIXED_DEVICES, cpus=512, virtio=devices)).blob)
        <= boot_layout.ACPI_TABLES_SIZE
    )
