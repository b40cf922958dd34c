"""Port I/O of guests in real, protected and long mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bare_guest import CODE, BareGuest, Recorder

from pyvmm.bus import Action
from pyvmm.kvm.exits import Intr, IoIn, IoOut
from pyvmm.kvm.loop import finish_pending
from pyvmm.kvm.x86 import registers as r

MakeGuest = Callable[..., BareGuest]

STOP = bytes.fromhex("e6f4")  # out 0xf4, al
MODES = ("real16", "protected32", "long64")


@pytest.mark.parametrize("mode", MODES)
def test_a_byte_goes_out_and_one_comes_in(bare_guest: MakeGuest, mode: str) -> None:
    code = bytes.fromhex(
        "b041"  # mov al, 'A'
        "e610"  # out 0x10, al
        "e412"  # in al, 0x12
    )
    guest = bare_guest(code + STOP, mode=mode)
    device = Recorder(0x5A)
    guest.ports.register(0x10, 4, device)
    assert guest.run_to_stop() == 0x5A
    assert device.writes == [(0, 1, ord("A"))]
    assert device.reads == [(2, 1)]


@pytest.mark.parametrize(
    ("out", "into", "size"),
    [("ee", "ec", 1), ("66ef", "66ed", 2), ("ef", "ed", 4)],
    ids=["byte", "word", "dword"],
)
def test_values_of_every_width_pass_unchanged(
    bare_guest: MakeGuest, out: str, into: str, size: int
) -> None:
    code = bytes.fromhex(
        "66bac003"  # mov dx, 0x3c0
        "b878563412"  # mov eax, 0x12345678
        f"{out}"  # out dx, al / ax / eax
        "31c0"  # xor eax, eax
        f"{into}"  # in al / ax / eax, dx
        "e7f4"  # out 0xf4, eax
    )
    guest = bare_guest(code)
    device = Recorder(0xFEDC_BA98_7654_3210)
    guest.ports.register(0x3C0, 8, device)
    mask = (1 << 8 * size) - 1
    assert guest.run_to_stop() == 0x7654_3210 & mask
    assert device.writes == [(0, size, 0x1234_5678 & mask)]


def test_a_port_nobody_answers_reads_all_ones(bare_guest: MakeGuest) -> None:
    guest = bare_guest(bytes.fromhex("e599 e7f4"))  # in eax, 0x99; out 0xf4, eax
    assert guest.run_to_stop() == 0xFFFF_FFFF


def test_an_access_over_the_end_of_a_range_goes_to_nobody(bare_guest: MakeGuest) -> None:
    code = bytes.fromhex(
        "b8ffffffff"  # mov eax, -1
        "e713"  # out 0x13, eax
        "e513"  # in eax, 0x13
        "e7f4"  # out 0xf4, eax
    )
    guest = bare_guest(code)
    device = Recorder()
    guest.ports.register(0x10, 4, device)
    assert guest.run_to_stop() == 0xFFFF_FFFF
    assert device.writes == device.reads == []


def test_the_loop_serves_the_same_port_over_and_over(bare_guest: MakeGuest) -> None:
    code = bytes.fromhex(
        "b964000000"  # mov ecx, 100
        "88c8"  # again: mov al, cl
        "e610"  # out 0x10, al
        "e410"  # in al, 0x10
        "01c3"  # add ebx, eax
        "49"  # dec ecx
        "75f5"  # jnz again
        "89d8"  # mov eax, ebx
        "e7f4"  # out 0xf4, eax
    )
    guest = bare_guest(code)
    device = Recorder(*[3] * 100)
    guest.ports.register(0x10, 1, device)
    assert guest.run_to_stop() == 300
    assert [value for _, _, value in device.writes] == list(range(100, 0, -1))


def test_rep_outsb_hands_over_every_byte_in_order(bare_guest: MakeGuest) -> None:
    code = bytes.fromhex(
        "be00300000"  # mov esi, 0x3000
        "b90d000000"  # mov ecx, 13
        "66bae900"  # mov dx, 0xe9
        "f36e"  # rep outsb
        "e6f4"  # out 0xf4, al
    )
    guest = bare_guest(code)
    guest.memory.write(0x3000, b"Hello, world!")
    device = Recorder()
    guest.ports.register(0xE9, 1, device)
    guest.run_to_stop()
    assert bytes(value for _, _, value in device.writes) == b"Hello, world!"


def test_rep_insw_fills_guest_memory_in_order(bare_guest: MakeGuest) -> None:
    code = bytes.fromhex(
        "bf00300000"  # mov edi, 0x3000
        "b904000000"  # mov ecx, 4
        "66baf001"  # mov dx, 0x1f0
        "66f36d"  # rep insw
        "e6f4"  # out 0xf4, al
    )
    guest = bare_guest(code)
    guest.ports.register(0x1F0, 2, Recorder(0x1111, 0x2222, 0x3333, 0x4444))
    guest.run_to_stop()
    assert guest.memory.read(0x3000, 8) == bytes.fromhex("1111222233334444")


def test_an_exit_is_a_value_with_the_data_of_a_string_instruction(bare_guest: MakeGuest) -> None:
    code = bytes.fromhex(
        "be00300000"  # mov esi, 0x3000
        "b903000000"  # mov ecx, 3
        "66ba1000"  # mov dx, 0x10
        "66f36f"  # rep outsw
        "e411"  # in al, 0x11
    )
    guest = bare_guest(code)
    guest.memory.write(0x3000, bytes.fromhex("010002000300"))
    words: list[int] = []
    while True:
        guest.vcpu.run()
        event = guest.vcpu.exit()
        if not isinstance(event, IoOut):
            break
        assert (event.port, event.size) == (0x10, 2)
        assert len(event.values) == event.repeat
        words += event.values
    # KVM may hand over a string in one exit or several.
    assert words == [1, 2, 3]
    assert event == IoIn(port=0x11, size=1, repeat=1)


def test_an_action_leaves_the_loop_with_the_instruction_half_done(bare_guest: MakeGuest) -> None:
    guest = bare_guest(STOP + STOP)
    assert guest.run() is Action.POWEROFF
    # Registers are right only after KVM was entered once more.
    assert finish_pending(guest.vcpu, guest.ports, guest.mmio) is None
    assert guest.vcpu.exit() == Intr()
    assert r.get_regs(guest.vcpu).rip == CODE + 2
    guest.vcpu.set_immediate_exit(False)
    assert guest.run() is Action.POWEROFF
    assert len(guest.stop.values) == 2
