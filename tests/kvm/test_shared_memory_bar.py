"""A file as shared memory of a device on PCI: a BAR that a driver sizes, moves and turns off, with
the memory slot of a real KVM behind it, in a guest that reads and writes there."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
from bare_guest import PDPT, BareGuest

from pyvmm.errors import HostError
from pyvmm.kvm.x86.irqchip import default_routes
from pyvmm.machine.board.registry import board_for
from pyvmm.machine.board.x86 import layout
from pyvmm.machine.mapped_files import MappedFiles
from pyvmm.machine.messages import Messages
from pyvmm.machine.pci_host import PciHost
from pyvmm.pci.registers import PCI_EXP_DEVCTL_BCR_FLR
from pyvmm.testing.pci_driver import (
    BUS_MASTER,
    CAP_EXPRESS,
    CAP_VENDOR,
    COMMAND,
    MEMORY,
    PCI_CFG,
    PciDriver,
)
from pyvmm.virtio.device import SharedMemory
from pyvmm.virtio.pmem.device import PmemDevice

MIB = 1 << 20
SIZE = 6 * MIB  # in a BAR of 8
AT = 1 << 32  # the first place above the guest's RAM
ELSEWHERE = AT + 64 * MIB
LOW = layout.PCI_WINDOW + 64 * MIB
BAR2 = 0x18
PAGE_DIRECTORY = 0x1_0000  # of the GiB from AT on
WINDOW = range(AT, AT + (1 << 30))
NOBODY = 0xFFFF_FFFF
CONTENT = 0x0403_0201
ENTROPY = 0x5A5A_0001

# The guest reads what address stands at 0x100, and stops; writes there, and stops; without end:
# read: mov rbx,[0x100]; mov eax,[rbx]; out 0xf4,eax
_READ = bytes.fromhex("488b1c2500010000 8b03 e7f4")
# mov rbx,[0x100]; mov eax,0x5a5a0001; mov [rbx],eax; out 0xf4,eax
_WRITE = bytes.fromhex("488b1c2500010000 b801005a5a 8903 e7f4")

MakeGuest = Callable[..., BareGuest]


class Rig:
    """A pmem device on the bus of a VM; `driver` is its driver, in place of the guest's."""

    def __init__(self, folder: Path, make: MakeGuest, closing: ExitStack, read_only: bool) -> None:
        self.path = folder / "file"
        self.path.write_bytes(struct.pack("<I", CONTENT).ljust(SIZE, b"\0"))
        self.said: list[str] = []
        self._make, self._closing, self._read_only = make, closing, read_only

    def start(self, *steps: bytes) -> None:
        """A guest that does `steps`, one at each `go`."""
        guest = self.guest = self._make(b"".join(steps), mode="long64")
        guest.memory.write(PDPT + 8 * 4, struct.pack("<Q", PAGE_DIRECTORY | 3))
        pages = (AT + (n << 21) | 0x83 for n in range(512))
        guest.memory.write(PAGE_DIRECTORY, struct.pack("<512Q", *pages))
        files = MappedFiles(32 * MIB, self._closing, as_bars=True)
        fd = os.open(self.path, os.O_RDONLY if self._read_only else os.O_RDWR)
        self._closing.callback(os.close, fd)
        assert files.map(fd, SIZE, self._read_only) == AT
        assert files.window.start == AT
        files.check_reach(36)
        places = board_for("x86_64").pci_places
        assert places is not None
        messages = Messages(guest.vm, default_routes(), lambda address: True)
        self.host = PciHost(
            places,
            guest.vm,
            lambda: messages,
            ports=guest.ports,
            mmio=guest.mmio,
            memory_window=WINDOW,
            files=files.slots(guest.vm, 1, self.said.append),
        )
        self.device = PmemDevice(fd, SharedMemory(AT, SIZE), log=self.said.append)
        self.transport = self.host.attach(
            self.device,
            memory=guest.memory,
            log=self.said.append,
            trace=None,
            closing=self._closing,
        )
        bus = self.host.bus
        self.driver = PciDriver(bus.ecam, bus.window, places.window, 1, guest.memory)
        self.driver.find()
        self.driver.write_config(COMMAND, 2, MEMORY | BUS_MASTER)

    def go(self, address: int = AT) -> int:
        """The next step, at `address`; what it read or wrote."""
        self.guest.memory.write(0x100, struct.pack("<Q", address))
        return self.guest.run_to_stop()

    def move(self, address: int) -> None:
        self.driver.write_config(BAR2, 4, address & 0xFFFF_FFFF)
        self.driver.write_config(BAR2 + 4, 4, address >> 32)

    @property
    def start_in_config(self) -> int:
        """As a driver finds it that knows no regions."""
        return int.from_bytes(self.device.read_config(0, 8), "little")

    def in_file(self, offset: int = 0) -> int:
        return int.from_bytes(self.path.read_bytes()[offset : offset + 4], "little")


@pytest.fixture
def rig(tmp_path: Path, bare_guest: MakeGuest, request: pytest.FixtureRequest) -> Iterator[Rig]:
    with ExitStack() as closing:
        yield Rig(tmp_path, bare_guest, closing, getattr(request, "param", False))


read_only = pytest.mark.parametrize("rig", [True], ids=["read-only"], indirect=True)


def test_the_guest_reads_and_writes_the_file(rig: Rig) -> None:
    rig.start(_READ, _WRITE, _READ)
    assert rig.driver.read_config(BAR2, 8) == AT | 0xC  # of 64 bits, prefetchable
    assert rig.go() == CONTENT
    rig.go(AT + SIZE - 4)
    assert rig.in_file(SIZE - 4) == ENTROPY
    assert rig.go(AT + SIZE - 4) == ENTROPY
    assert rig.said == []


def test_row62_the_memory_follows_the_bar(rig: Rig) -> None:
    rig.start(*[_READ] * 4, _WRITE, *[_READ] * 3)
    assert rig.go() == CONTENT
    rig.move(ELSEWHERE)
    assert (rig.go(AT), rig.go(ELSEWHERE)) == (NOBODY, CONTENT)
    assert rig.start_in_config == ELSEWHERE
    rig.move(LOW)  # in the window of registers
    assert rig.go(LOW) == CONTENT
    rig.go(LOW + 8)
    assert rig.in_file(8) == ENTROPY
    assert rig.go(ELSEWHERE) == NOBODY
    rig.move(AT)
    assert rig.go(AT + 8) == ENTROPY
    assert rig.go(LOW) == NOBODY
    assert rig.said == []


def test_row62_memory_without_decoding(rig: Rig) -> None:
    rig.start(*[_READ] * 3, _WRITE)
    rig.driver.write_config(COMMAND, 2, BUS_MASTER)
    assert rig.go() == NOBODY
    rig.driver.write_config(COMMAND, 2, MEMORY)
    assert rig.go() == CONTENT
    rig.driver.write_config(COMMAND, 2, 0)
    assert rig.go() == NOBODY
    rig.go()
    assert rig.in_file() == CONTENT


def test_row61_sizing_memory_leaves_it_where_it_was(rig: Rig) -> None:
    rig.start(_READ, _READ)
    rig.move((1 << 64) - 1)
    assert rig.driver.read_config(BAR2, 8) == (1 << 64) - 8 * MIB | 0xC
    assert rig.go() == NOBODY
    rig.move(AT)
    assert rig.go() == CONTENT


def test_what_lies_in_the_bar_behind_the_region_is_nothing(rig: Rig) -> None:
    rig.start(_READ, _WRITE)
    assert rig.go(AT + SIZE) == NOBODY
    rig.go(AT + SIZE)
    assert rig.path.stat().st_size == SIZE
    assert rig.said == []


@pytest.mark.parametrize(
    "address", [0, layout.PCI_ECAM, layout.PCI_WINDOW, AT - 8 * MIB, AT + (1 << 30), 1 << 52]
)
def test_row62_memory_over_what_is_not_free_is_nowhere(rig: Rig, address: int) -> None:
    """RAM stays RAM, the ECAM and the registers in the window's first page stay what they are."""
    rig.start(_READ, _READ)
    ram = rig.guest.memory.read(0x200, 0x7000)
    rig.move(address)
    assert rig.go() == NOBODY
    assert rig.guest.memory.read(0x200, 0x7000) == ram
    assert rig.driver.read_config(0, 2) == 0x1AF4
    rig.move(AT)
    assert rig.go() == CONTENT
    assert rig.said == []


@pytest.mark.parametrize("how", ["function reset", "unplugged"])
def test_row68_no_memory_is_left_of_a_function(rig: Rig, how: str) -> None:
    rig.start(_READ, _READ)
    assert rig.go() == CONTENT
    if how == "function reset":
        express = dict(rig.driver.capabilities())[CAP_EXPRESS]
        rig.driver.write_config(express + 8, 2, PCI_EXP_DEVCTL_BCR_FLR)
    else:
        rig.host.unplug(1, rig.transport)
    assert rig.go() == NOBODY


@read_only
def test_m5_what_is_read_only_stays_as_it_is_with_one_warning(rig: Rig) -> None:
    rig.start(_READ, _WRITE, _WRITE)
    assert rig.go() == CONTENT
    rig.go()
    rig.go()
    assert rig.in_file() == CONTENT
    [line] = rig.said
    assert "mount it with -o ro" in line


def test_what_kvm_refuses_is_served_at_the_price_of_exits(rig: Rig) -> None:
    rig.start(_READ, _WRITE, _READ)
    with patch.object(rig.guest.vm, "set_memory_region", side_effect=HostError(12, "KVM")):
        rig.move(ELSEWHERE)  # where it was stays, as it cannot be taken away
        rig.driver.write_config(COMMAND, 2, MEMORY)
    assert any("cost an exit each" in line for line in rig.said)
    rig.move(AT)
    assert rig.go() == CONTENT
    rig.driver.write_config(COMMAND, 2, 0)
    with patch.object(rig.guest.vm, "set_memory_region", side_effect=HostError(12, "KVM")):
        rig.driver.write_config(COMMAND, 2, MEMORY)
    rig.go()
    assert rig.in_file() == ENTROPY
    assert rig.go() == ENTROPY


def test_the_region_through_pci_cfg(rig: Rig) -> None:
    rig.start()
    rig.driver.write_config(COMMAND, 2, 0)
    at = rig.driver.structures[PCI_CFG].at
    for offset, length, value in ((2, 2, CONTENT >> 16), (0, 1, 1), (SIZE - 4, 4, 0)):
        for where, size, field in ((4, 1, 2), (8, 4, offset), (12, 4, length)):
            rig.driver.write_config(at + where, size, field)
        assert rig.driver.read_config(at + 16, length) == value
        rig.driver.write_config(at + 16, length, 0x77)
        assert rig.in_file(offset) & 0xFF == 0x77
    assert rig.in_file() == 0x0077_0277
    rig.driver.write_config(at + 8, 4, SIZE)  # in the BAR, behind the region
    rig.driver.write_config(at + 16, 4, 1)
    assert rig.path.stat().st_size == SIZE


def test_m6_a_file_that_is_cut_short_does_not_grow_through_pci_cfg(rig: Rig) -> None:
    rig.start()
    os.truncate(rig.path, 4096)
    at = rig.driver.structures[PCI_CFG].at
    for where, size, field in ((4, 1, 2), (8, 4, 4096), (12, 4, 4)):
        rig.driver.write_config(at + where, size, field)
    assert rig.driver.read_config(at + 16, 4) == NOBODY
    rig.driver.write_config(at + 16, 4, 1)
    assert rig.path.stat().st_size == 4096


def test_the_capability_says_where_the_region_is(rig: Rig) -> None:
    rig.start()
    read = rig.driver.read_config
    places = [at for kind, at in rig.driver.capabilities() if kind == CAP_VENDOR]
    [at] = [at for at in places if read(at + 3, 1) == 8]  # VIRTIO_PCI_CAP_SHARED_MEMORY_CFG
    assert [read(at + where, 1) for where in (2, 4, 5)] == [24, 2, 0]  # length, BAR, shmid
    offset, low, offset_high, high = (read(at + where, 4) for where in (8, 12, 16, 20))
    assert (offset | offset_high << 32, low | high << 32) == (0, SIZE)


def test_places_for_bars_are_aligned_to_their_sizes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with ExitStack() as closing, path.open("w+b") as file:
        file.truncate(5 << 30)
        files = MappedFiles(32 * MIB, closing, as_bars=True)
        places = [files.map(file.fileno(), size, True) for size in (2 * MIB, 5 << 30, MIB * 3)]
        assert places == [4 << 30, 8 << 30, 16 << 30]
        assert files.window == range(4 << 30, 17 << 30)
