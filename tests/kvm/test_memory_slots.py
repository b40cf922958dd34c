"""Guest RAM: slots that come, go and log what was written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bare_guest import CODE, RAM_SIZE, BareGuest, Recorder

from pyvmm.errors import HostError
from pyvmm.kvm.vm import dirty_pages
from pyvmm.kvm.x86 import uapi
from pyvmm.memory import GuestMemory

MakeGuest = Callable[..., BareGuest]

ELSEWHERE = 0x10_0000


def test_a_slot_comes_and_goes_while_the_guest_lives(bare_guest: MakeGuest) -> None:
    code = bytes.fromhex(
        "a100001000"  # again: mov eax, [0x100000]
        "e7f4"  # out 0xf4, eax
        "ebf7"  # jmp again
    )
    guest = bare_guest(code)
    extra = GuestMemory([(0, 0x1000)])
    extra.write(0, b"\x78\x56\x34\x12")
    assert guest.run_to_stop() == 0xFFFF_FFFF, "no RAM, nobody on the bus"
    guest.vm.set_memory_region(1, ELSEWHERE, extra.size, extra.regions[0].host_addr)
    assert guest.run_to_stop() == 0x1234_5678
    guest.vm.set_memory_region(1, ELSEWHERE, 0, 0)
    assert guest.run_to_stop() == 0xFFFF_FFFF


def test_overlapping_slots_are_refused(bare_guest: MakeGuest) -> None:
    guest = bare_guest(b"")
    host_addr = guest.memory.regions[0].host_addr
    with pytest.raises(HostError, match="KVM_SET_USER_MEMORY_REGION"):
        guest.vm.set_memory_region(1, 0x1000, 0x1000, host_addr)


def test_a_read_only_slot_reads_as_ram_and_writes_as_mmio(bare_guest: MakeGuest) -> None:
    code = bytes.fromhex(
        "a100001000"  # mov eax, [0x100000]
        "a304001000"  # mov [0x100004], eax
        "e7f4"  # out 0xf4, eax
    )
    guest = bare_guest(code)
    rom = GuestMemory([(0, 0x1000)])
    rom.write(0, b"\x01\x02\x03\x04")
    device = Recorder()
    guest.mmio.register(ELSEWHERE, 0x1000, device)
    guest.vm.set_memory_region(
        1, ELSEWHERE, rom.size, rom.regions[0].host_addr, uapi.KVM_MEM_READONLY
    )
    assert guest.run_to_stop() == 0x0403_0201
    assert device.writes == [(4, 4, 0x0403_0201)]
    assert rom.read(4, 4) == bytes(4)


def test_the_dirty_log_names_the_pages_written_since_it_was_read(bare_guest: MakeGuest) -> None:
    code = bytes.fromhex(
        "a300500000"  # again: mov [0x5000], eax
        "a3fc1f0300"  # mov [0x31ffc], eax
        "e6f4"  # out 0xf4, al
        "ebf2"  # jmp again
    )
    guest = bare_guest(code)
    guest.set_slot(uapi.KVM_MEM_LOG_DIRTY_PAGES)
    guest.run_to_stop()
    first = dirty_pages(guest.vm.get_dirty_log(0, RAM_SIZE))
    # What KVM maps for the first time may count as written, so the code's page can be among them.
    assert set(first) - {CODE // 0x1000} == {0x5, 0x31}
    assert dirty_pages(guest.vm.get_dirty_log(0, RAM_SIZE)) == []
    guest.run_to_stop()
    assert dirty_pages(guest.vm.get_dirty_log(0, RAM_SIZE)) == [0x5, 0x31]


def test_a_slot_that_does_not_log_has_no_dirty_log(bare_guest: MakeGuest) -> None:
    guest = bare_guest(b"")
    with pytest.raises(HostError, match="KVM_GET_DIRTY_LOG"):
        guest.vm.get_dirty_log(0, RAM_SIZE)
