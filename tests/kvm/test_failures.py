"""Guests that cannot go on end in a report with registers and code, not in a bare number."""

from __future__ import annotations

from collections.abc import Callable

from bare_guest import CODE, BareGuest

from pyvmm.errors import GuestMemoryError
from pyvmm.kvm.exits import InternalError, Shutdown
from pyvmm.kvm.report import crash_report
from pyvmm.kvm.x86 import registers as r
from pyvmm.kvm.x86 import uapi
from pyvmm.kvm.x86.state_text import state_lines

MakeGuest = Callable[..., BareGuest]


def test_a_triple_fault_is_reported(bare_guest: MakeGuest) -> None:
    code = bytes.fromhex(
        "b8efbeadde"  # mov eax, 0xdeadbeef
        "8ed8"  # mov ds, ax: no such segment, and no IDT for the fault
    )
    guest = bare_guest(code)
    assert guest.run() is None
    event = guest.vcpu.exit()
    assert event == Shutdown()
    report = crash_report(guest.vcpu, event, guest.memory.read, state_lines)
    assert "vCPU 0: KVM_EXIT_SHUTDOWN: triple fault" in report
    assert "cr0" in report
    assert "idt" in report


def test_an_internal_error_names_suberror_registers_and_code(bare_guest: MakeGuest) -> None:
    # Code from a device cannot be fetched: every KVM gives up here.
    code = bytes.fromhex(
        "b8efbeadde"  # mov eax, 0xdeadbeef
        "bb000000d0"  # mov ebx, 0xd0000000
        "ffe3"  # jmp ebx
    )
    guest = bare_guest(code)
    assert guest.run() is None
    assert guest.vcpu.exit_reason == uapi.KVM_EXIT_INTERNAL_ERROR
    event = guest.vcpu.exit()
    assert isinstance(event, InternalError)
    assert event.name == "KVM_INTERNAL_ERROR_EMULATION"
    report = crash_report(guest.vcpu, event, guest.memory.read, state_lines)
    assert "KVM_INTERNAL_ERROR_EMULATION" in report
    assert "rax    00000000deadbeef" in report
    assert "rip    00000000d0000000" in report
    assert "cs   0010 base 0 limit ffffffff dpl 0 type b 32-bit code" in report
    assert "code at d0000000: unavailable" in report


def test_the_report_shows_the_bytes_at_the_instruction_through_page_tables(
    bare_guest: MakeGuest,
) -> None:
    guest = bare_guest(bytes.fromhex("90f4e6f4"), mode="long64")
    report = crash_report(guest.vcpu, Shutdown(), guest.memory.read, state_lines)
    assert f"code at {CODE:x}: 90 f4 e6 f4" in report
    assert "64-bit code" in report


def test_the_report_says_what_is_not_mapped(bare_guest: MakeGuest) -> None:
    guest = bare_guest(b"", mode="long64")
    regs = r.get_regs(guest.vcpu)
    regs.rip = 0x7FFF_0000_0000
    r.set_regs(guest.vcpu, regs)
    report = crash_report(guest.vcpu, Shutdown(), guest.memory.read, state_lines)
    assert "code at 7fff00000000: not mapped" in report


def test_a_report_never_raises(bare_guest: MakeGuest) -> None:
    def unreadable(address: int, length: int) -> bytes:
        raise GuestMemoryError(address, length)

    guest = bare_guest(b"")
    assert "unavailable" in crash_report(guest.vcpu, Shutdown(), unreadable, state_lines)
    guest.vcpu.close()
    report = crash_report(guest.vcpu, Shutdown(), unreadable, state_lines)
    assert "general registers unavailable" in report
    assert "segments and control registers unavailable" in report
