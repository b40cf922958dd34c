"""`--trace` shows what happens between a real driver and the devices, in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from disks import artifacts, root_disk
from guest import Guest, GuestResult

pytestmark = pytest.mark.usefixtures("linux_guests")


def boot_traced(folder: Path) -> GuestResult:
    files = artifacts()
    with root_disk(folder) as disk:
        guest = Guest(
            files.vmlinux,
            files.initramfs,
            [f"{disk},id=system"],
            options=["--trace", "all"],
        )
        return guest.run("dd if=/dev/vda of=/dev/null bs=64k count=1 iflag=direct", folder=folder)


traced = pytest.mark.boot.with_args(boot_traced)


def lines(result: GuestResult, kind: str, device: str = "") -> list[str]:
    """The trace's lines of that kind, without the seconds in front."""
    pattern = rf"^\[ *\d+\.\d+\] {kind} +({re.escape(device)}.*)$"
    return re.findall(pattern, result.stderr, re.MULTILINE)


@traced
def test_registers_are_named_and_their_values_explained(boot: GuestResult) -> None:
    boot.check()
    registers = lines(boot, "registers", "system: ")
    assert registers[0] == "system: read MagicValue 0x74726976"
    text = "\n".join(registers)
    assert re.search(r"read DeviceFeatures 0x\w+ \(.*VIRTIO_BLK_F_FLUSH.*\)", text)
    assert re.search(r"write DriverFeatures 0x1 \(VIRTIO_F_VERSION_1\)", text)
    assert re.search(r"write QueueReady 0x1", text)
    assert re.search(r"read InterruptStatus 0x1 \(used buffer\)", text)


@traced
def test_the_status_goes_the_way_of_the_specification(boot: GuestResult) -> None:
    changes = [line for line in lines(boot, "status", "system: ") if "->" in line]
    steps = [line.rpartition("-> ")[2] for line in changes]
    assert [step for step in steps if step != "RESET"] == [
        "ACKNOWLEDGE",
        "ACKNOWLEDGE|DRIVER",
        "ACKNOWLEDGE|DRIVER|FEATURES_OK",
        "ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK",
    ]


@traced
def test_requests_have_a_type_a_place_and_an_answer(boot: GuestResult) -> None:
    requests = lines(boot, "requests", "system: ")
    assert "system: IN sector 0 + 65536 bytes: OK" in requests
    assert any(re.fullmatch(r"system: FLUSH .*: OK", line) for line in requests)


@traced
def test_exits_are_shown_and_none_is_a_kick(boot: GuestResult) -> None:
    exits = lines(boot, "exits")
    assert any(line.startswith("I/O port write 0x3f8 ") for line in exits), "the serial port"
    assert any(re.match(r"MMIO write 0xd0000064 ", line) for line in exits), "InterruptACK"
    assert not any(re.match(r"MMIO write 0xd0000050 ", line) for line in exits), "QueueNotify"
