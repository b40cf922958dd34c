"""The command line that a guest gets, and what it says of the PCI bus."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import boot_images
import pytest

from pyvmm.machine.board.registry import board_for
from pyvmm.machine.builder import prepare
from pyvmm.machine.cmdline import command_line, turns_pci_off
from pyvmm.machine.outcome import Alarm
from pyvmm.spec.vm import DiskSpec, VmSpec

SPEC = VmSpec(kernel="vmlinuz", memory=64 << 20, name="web")


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_nobody_but_the_user_turns_pci_off(transport: str) -> None:
    spec = replace(SPEC, transport=transport)
    board = board_for("x86_64")
    assert not turns_pci_off(command_line(spec, board))
    assert turns_pci_off(command_line(replace(spec, cmdline="pci=off"), board))


def test_a_guest_of_an_emulated_host_waits_longer_for_its_disks() -> None:
    board = board_for("x86_64")
    spec = replace(SPEC, disks=(DiskSpec("root.img"),))
    assert "pyvmm.devicewait=" not in command_line(spec, board)
    assert "pyvmm.devicewait=900" in command_line(spec, board, quiet=True)
    mine = replace(spec, cmdline="pyvmm.devicewait=5")
    assert command_line(mine, board, quiet=True).count("pyvmm.devicewait=") == 1
    assert "pyvmm.devicewait=" not in command_line(SPEC, board, quiet=True)


@pytest.mark.parametrize(
    ("cmdline", "off"),
    [
        ("pci=off", True),
        ("quiet pci=noacpi,off", True),
        ('"pci=off"', True),
        ('pci="off"', True),
        ("pci=conf1 pci=off", True),
        ("pci=offline", False),
        ("pcie=off pcie_port_pm=off", False),
        ("pci", False),
        ("init=/x -- pci=off", False),
    ],
)
def test_what_turns_pci_off(cmdline: str, off: bool) -> None:
    assert turns_pci_off(cmdline) is off


@pytest.mark.parametrize(
    ("transport", "cmdline", "lines"),
    [
        ("pci", "pci=off", ["the guest finds no device: pci=off on its command line hides"]),
        ("pci", "pci=noacpi", []),
        ("mmio", "pci=off", []),
    ],
)
def test_a_bus_that_the_user_hides_is_said_in_one_line(
    transport: str, cmdline: str, lines: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "kernel").write_bytes(boot_images.bzimage())
    kernel = str(tmp_path / "kernel")
    spec = replace(SPEC, kernel=kernel, transport=transport, cmdline=cmdline)
    with ExitStack() as closing:
        prepare(spec, (), Alarm(), closing)
    said = capfd.readouterr().err.splitlines()
    assert len(said) == len(lines)
    for line, expected in zip(said, lines, strict=True):
        assert line.startswith(f"pyvmm: web: {expected}") and "--transport mmio" in line
