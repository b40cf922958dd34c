"""Files of the host as memory of a guest that runs on real KVM."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
from bare_guest import PDPT, BareGuest

from pyvmm.errors import ConfigError, GuestMemoryError, HostError
from pyvmm.kvm import uapi
from pyvmm.kvm.exits import MemoryFault
from pyvmm.machine.board.x86 import layout
from pyvmm.machine.mapped_files import MappedFiles

MakeGuest = Callable[..., BareGuest]

MIB = 1 << 20
AT = 1 << 32
PAGE_DIRECTORY = 0x1_0000  # of the GiB from AT on
READ = bytes.fromhex("a1 0000000001000000")  # mov eax, [AT]
WRITE = bytes.fromhex("a3 0410000001000000")  # mov [AT + 0x1004], eax
STOP = bytes.fromhex("e7f4")  # out 0xf4, eax


class Rig:
    """A guest whose code ends with STOP, and a file of 2 MiB that begins with 1, 2, 3, 4."""

    def __init__(self, folder: Path, make: MakeGuest, closing: ExitStack) -> None:
        self.path = folder / "file"
        self.path.write_bytes(b"\x01\x02\x03\x04".ljust(2 * MIB, b"\0"))
        self.lines: list[str] = []
        self._make = make
        self._closing = closing

    def start(self, code: bytes, *, read_only: bool = False, bits: int = 36) -> BareGuest:
        guest = self._make(code + STOP, mode="long64")
        guest.memory.write(PDPT + 8 * 4, struct.pack("<Q", PAGE_DIRECTORY | 3))
        pages = (AT + (n << 21) | 0x83 for n in range(512))
        guest.memory.write(PAGE_DIRECTORY, struct.pack("<512Q", *pages))
        files = MappedFiles(32 * MIB, self._closing)
        fd = os.open(self.path, os.O_RDONLY if read_only else os.O_RDWR)
        assert files.map(fd, 2 * MIB, read_only) == AT
        os.close(fd)
        with patch.object(guest.vm, "set_memory_region", wraps=guest.vm.set_memory_region) as slots:
            files.add_to(guest.vm, guest.mmio, 1, bits, self.lines.append)
        # A KVM that interprets its guests sees no difference, others do.
        [slot] = slots.call_args_list
        assert slot.args[-1] == (uapi.KVM_MEM_READONLY if read_only else 0)
        return guest


@pytest.fixture
def rig(tmp_path: Path, bare_guest: MakeGuest) -> Iterator[Rig]:
    with ExitStack() as closing:
        yield Rig(tmp_path, bare_guest, closing)


def test_the_guest_reads_the_file_and_writes_it(rig: Rig) -> None:
    guest = rig.start(READ + WRITE)
    assert guest.run_to_stop() == 0x0403_0201
    assert rig.path.read_bytes()[0x1004:0x1008] == b"\x01\x02\x03\x04"
    assert not rig.lines


def test_m5_what_is_read_only_stays_as_it_is_with_one_warning(rig: Rig) -> None:
    before = rig.path.read_bytes()
    guest = rig.start(READ + 3 * WRITE, read_only=True)
    assert guest.run_to_stop() == 0x0403_0201
    assert rig.path.read_bytes() == before
    [line] = rig.lines
    assert "read-only" in line and "-o ro" in line


def test_m6_a_file_that_is_cut_short_costs_the_guest_and_not_the_monitor(rig: Rig) -> None:
    guest = rig.start(READ + WRITE)
    os.truncate(rig.path, 0)
    try:
        guest.run()
    except HostError as error:
        assert "KVM_RUN" in str(error)
    else:
        # A KVM that interprets its guests takes the access for one to no memory.
        fault = isinstance(guest.vcpu.exit(), MemoryFault)
        assert fault or guest.stop.values == [0xFFFF_FFFF]
    assert rig.path.stat().st_size == 0


def test_m7_for_devices_it_is_no_memory(rig: Rig) -> None:
    """Queues and chains reach memory by nothing else than this."""
    guest = rig.start(READ)
    for addr, length in ((AT, 1), (AT, 2 * MIB), (AT + MIB, 16)):
        assert not guest.memory.contains(addr, length)
        with pytest.raises(GuestMemoryError):
            guest.memory.view(addr, length)
        with pytest.raises(GuestMemoryError):
            guest.memory.host_addr(addr)


def test_what_the_guests_addresses_do_not_reach_is_refused(rig: Rig) -> None:
    with pytest.raises(ConfigError, match="addresses of 32 bits"):
        rig.start(READ, bits=32)


def test_places_are_whole_gibs_above_the_ram(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    fd = os.open(path, os.O_RDWR)
    try:
        for ram, start in ((32 * MIB, 4), (3 << 30, 4), ((3 << 30) + MIB, 5), (8 << 30, 9)):
            with ExitStack() as closing:
                files = MappedFiles(ram, closing)
                assert [files.map(fd, 2 * MIB, False) for _ in range(2)] == [
                    start << 30,
                    start + 1 << 30,
                ]
    finally:
        os.close(fd)


def test_more_than_a_guest_has_room_for_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(layout.MAX_MAPPED_FILES)
    with ExitStack() as closing, path.open("r+b") as file:
        files = MappedFiles(32 * MIB, closing)
        files.map(file.fileno(), layout.MAX_MAPPED_FILES, False)
        with pytest.raises(ConfigError, match="as memory of one guest"):
            files.map(file.fileno(), 2 * MIB, False)


def test_what_cannot_be_mapped_is_a_host_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    with ExitStack() as closing, path.open("r+b") as file:
        files = MappedFiles(32 * MIB, closing)
        with pytest.raises(HostError, match="mmap"):
            files.map(file.fileno(), 2 * MIB, False)
        assert not list(files)
