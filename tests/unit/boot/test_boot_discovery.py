"""The guest is told of virtio-mmio devices by ACPI, by the command line, or by both."""

from __future__ import annotations

from pathlib import Path

import pytest
from boot_images import CODE, Elf, Load, boot, bzimage

from pyvmm.boot import x86
from pyvmm.boot.x86.discovery import parameters
from pyvmm.errors import ConfigError
from pyvmm.machine.board.x86.layout import FIXED_DEVICES
from pyvmm.memory import GuestMemory

DEVICES = (x86.VirtioMmioDevice(0xD000_0000, 512, 5), x86.VirtioMmioDevice(0xD000_1000, 512, 6))
PARAMETERS = "virtio_mmio.device=512@0xd0000000:5 virtio_mmio.device=512@0xd0001000:6"
DEBIAN = b"6.1.0-53-cloud-amd64 (debian-kernel@lists.debian.org) #1 SMP"


def elf(*strings: bytes) -> bytes:
    return Elf(loads=[Load(data=CODE + b"\0".join(strings))]).build()


def told(directory: Path, kernel: bytes, cmdline: str = "", how: str = "auto") -> tuple[bool, str]:
    """True if the tables name the devices; and the command line that is in memory."""
    acpi = x86.AcpiConfig(FIXED_DEVICES, virtio=DEVICES)
    entry, memory = boot(directory, kernel, cmdline=cmdline, acpi=acpi, virtio_discovery=how)
    text = memory.read(0x20000, 2048).partition(b"\0")[0].decode()
    assert text == entry.cmdline
    return b"LNRO0005" in tables_of(memory), text


def tables_of(memory: GuestMemory) -> bytes:
    return memory.read(0xE0000, 0x20000)


def test_the_parameters() -> None:
    assert " ".join(parameters(DEVICES)) == PARAMETERS


@pytest.mark.parametrize(
    ("how", "acpi", "cmdline"),
    [("acpi", True, "x"), ("cmdline", False, f"{PARAMETERS} x"), ("both", True, f"{PARAMETERS} x")],
)
def test_as_the_user_wishes(tmp_path: Path, how: str, acpi: bool, cmdline: str) -> None:
    assert told(tmp_path, bzimage(), "x", how) == (acpi, cmdline)
    assert told(tmp_path, elf(), "x", how) == (acpi, cmdline)


@pytest.mark.parametrize(
    ("kernel", "acpi", "parameters_too"),
    [
        (bzimage(banner=DEBIAN), True, False),
        (bzimage(), True, True),
        (elf(b"LNRO0005", b"virtio_mmio.device"), True, False),
        (elf(b"LNRO0005"), True, False),
        (elf(b"Linux version " + DEBIAN), True, False),
        (elf(b"virtio_mmio.device"), False, True),
        (elf(), True, True),
    ],
)
def test_auto(tmp_path: Path, kernel: bytes, acpi: bool, parameters_too: bool) -> None:
    assert told(tmp_path, kernel) == (acpi, PARAMETERS if parameters_too else "")


def test_auto_finds_a_marker_across_a_chunk(tmp_path: Path) -> None:
    blob = bytearray(5 << 20)
    kernel = Elf(loads=[Load(data=CODE + bytes(blob))]).build()
    cut = (4 << 20) - 4
    kernel = kernel[:cut] + b"LNRO0005" + kernel[cut + 8 :]
    assert told(tmp_path, kernel) == (True, "")


def test_acpi_off_leaves_the_command_line_only(tmp_path: Path) -> None:
    assert told(tmp_path, bzimage(banner=DEBIAN), "acpi=off") == (False, f"{PARAMETERS} acpi=off")


def test_the_parameters_stand_before_inits_arguments(tmp_path: Path) -> None:
    assert told(tmp_path, bzimage(), "a -- b")[1] == f"{PARAMETERS} a -- b"


def test_unknown_way(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auto, acpi, cmdline, both"):
        told(tmp_path, bzimage(), "", "smoke signals")
