"""MMIO: loads and stores at addresses without RAM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bare_guest import CODE, MMIO_BASE, BareGuest, Recorder

from pyvmm.bus import Action
from pyvmm.kvm.exits import MmioRead, MmioWrite
from pyvmm.kvm.loop import finish_pending
from pyvmm.kvm.x86 import registers as r

MakeGuest = Callable[..., BareGuest]

# mov edi, 0xd0000000; mov rax, 0x1122334455667788
PROLOGUE = bytes.fromhex("bf000000d0 48b88877665544332211")
STOP = bytes.fromhex("e6f4")  # out 0xf4, al
VALUE = 0x1122_3344_5566_7788


@pytest.mark.parametrize(
    ("store", "load", "size"),
    [
        ("884708", "8a4708", 1),  # mov [rdi+8], al; mov al, [rdi+8]
        ("66894708", "668b4708", 2),
        ("894708", "8b4708", 4),
        ("48894708", "488b4708", 8),
    ],
    ids=["1", "2", "4", "8"],
)
def test_values_of_every_width_pass_unchanged(
    bare_guest: MakeGuest, store: str, load: str, size: int
) -> None:
    code = PROLOGUE + bytes.fromhex(
        f"{store}"  # store to [rdi+8]
        "31c0"  # xor eax, eax
        f"{load}"  # load from [rdi+8]
        "48a30030000000000000"  # mov [0x3000], rax
    )
    guest = bare_guest(code + STOP, mode="long64")
    device = Recorder(0x8877_6655_4433_2211)
    guest.mmio.register(MMIO_BASE, 0x200, device)
    guest.run_to_stop()
    mask = (1 << 8 * size) - 1
    assert device.writes == [(8, size, VALUE & mask)]
    assert device.reads == [(8, size)]
    loaded = int.from_bytes(guest.memory.read(0x3000, 8), "little")
    assert loaded == 0x8877_6655_4433_2211 & mask


def test_an_address_nobody_answers_reads_all_ones(bare_guest: MakeGuest) -> None:
    code = bytes.fromhex("a1000000d1 e7f4")  # mov eax, [0xd1000000]; out 0xf4, eax
    assert bare_guest(code).run_to_stop() == 0xFFFF_FFFF


def test_an_access_across_a_page_arrives_in_natural_pieces(bare_guest: MakeGuest) -> None:
    # KVM splits at the page into 3 and 5 bytes; handlers see 1, 2, 4 and 8 only.
    code = PROLOGUE + bytes.fromhex(
        "488987fd0f0000"  # mov [rdi+0xffd], rax
        "488b87fd0f0000"  # mov rax, [rdi+0xffd]
        "48a30030000000000000"  # mov [0x3000], rax
    )
    guest = bare_guest(code + STOP, mode="long64")
    device = Recorder(0x11, 0x3322, 0x7766_5544, 0x88)
    guest.mmio.register(MMIO_BASE, 0x2000, device)
    guest.run_to_stop()
    assert device.reads == [(0xFFD, 1), (0xFFE, 2), (0x1000, 4), (0x1004, 1)]
    assert device.writes == [
        (0xFFD, 1, 0x88),
        (0xFFE, 2, 0x6677),
        (0x1000, 4, 0x2233_4455),
        (0x1004, 1, 0x11),
    ]
    assert guest.memory.read(0x3000, 8) == bytes.fromhex("1122334455667788")


def test_exits_are_values(bare_guest: MakeGuest) -> None:
    code = bytes.fromhex(
        "b878563412"  # mov eax, 0x12345678
        "a3040000d0"  # mov [0xd0000004], eax
        "a0060000d0"  # mov al, [0xd0000006]
    )
    guest = bare_guest(code)
    guest.vcpu.run()
    assert guest.vcpu.exit() == MmioWrite(0xD000_0004, 4, 0x1234_5678)
    guest.vcpu.run()
    assert guest.vcpu.exit() == MmioRead(0xD000_0006, 1)


def test_a_write_may_end_the_loop_and_the_state_is_right_after_finishing(
    bare_guest: MakeGuest,
) -> None:
    code = PROLOGUE + bytes.fromhex("488987fd0f0000")  # mov [rdi+0xffd], rax
    guest = bare_guest(code, mode="long64")
    device = Recorder(action=Action.RESET)
    guest.mmio.register(MMIO_BASE, 0x2000, device)
    assert guest.run() is Action.RESET
    # The second half of the store is still to come, and asks again.
    assert finish_pending(guest.vcpu, guest.ports, guest.mmio) is Action.RESET
    assert len(device.writes) == 4
    assert r.get_regs(guest.vcpu).rip == CODE + len(code)
