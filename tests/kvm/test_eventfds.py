"""ioeventfd and irqfd: doorbells and interrupts that need no exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from bare_guest import LOCAL_APIC, MMIO_BASE, BareGuest, Recorder

from pyvmm.errors import DriverError, HostError
from pyvmm.host.syscalls import EventFd
from pyvmm.kvm.vm import MsiRoute
from pyvmm.kvm.x86.irqchip import default_routes
from pyvmm.machine.messages import Messages

MakeGuest = Callable[..., BareGuest]
MakeEventFd = Callable[[], EventFd]

STOP = bytes.fromhex("e6f4")  # out 0xf4, al
COUNTER = 0x3000
VECTOR = 0x35


@pytest.fixture
def eventfd() -> Iterator[MakeEventFd]:
    with ExitStack() as stack:
        yield lambda: stack.enter_context(EventFd())


# --- doorbells -----------------------------------------------------------------------------------


def test_a_matching_mmio_write_signals_and_does_not_exit(
    bare_guest: MakeGuest, eventfd: MakeEventFd
) -> None:
    code = bytes.fromhex(
        "bf500000d0"  # mov edi, 0xd0000050
        "c70701000000"  # mov dword [edi], 1
        "c70702000000"  # mov dword [edi], 2
        "c70701000000"  # mov dword [edi], 1
    )
    guest = bare_guest(code + STOP)
    device = Recorder()
    guest.mmio.register(MMIO_BASE, 0x200, device)
    doorbell = eventfd()
    guest.vm.ioeventfd(doorbell.fd, MMIO_BASE + 0x50, 4, datamatch=1)
    guest.run_to_stop()
    assert doorbell.drain() == 2
    assert device.writes == [(0x50, 4, 2)], "only the value that does not match exits"


def test_a_port_write_of_any_length_signals(bare_guest: MakeGuest, eventfd: MakeEventFd) -> None:
    code = bytes.fromhex(
        "e620"  # out 0x20, al
        "66e720"  # out 0x20, ax
        "e720"  # out 0x20, eax
    )
    guest = bare_guest(code + STOP, irqchip=False)
    device = Recorder()
    guest.ports.register(0x20, 4, device)
    doorbell = eventfd()
    guest.vm.ioeventfd(doorbell.fd, 0x20, 0, pio=True)
    guest.run_to_stop()
    assert doorbell.drain() == 3
    assert device.writes == []


def test_a_deassigned_doorbell_exits_again(bare_guest: MakeGuest, eventfd: MakeEventFd) -> None:
    code = bytes.fromhex("a3500000d0")  # mov [0xd0000050], eax
    guest = bare_guest(code + STOP)
    device = Recorder()
    guest.mmio.register(MMIO_BASE, 0x200, device)
    doorbell = eventfd()
    guest.vm.ioeventfd(doorbell.fd, MMIO_BASE + 0x50, 4, datamatch=0)
    guest.vm.ioeventfd(doorbell.fd, MMIO_BASE + 0x50, 4, datamatch=0, deassign=True)
    guest.run_to_stop()
    assert doorbell.drain() == 0
    assert device.writes == [(0x50, 4, 0)]


def test_two_doorbells_for_one_value_are_refused(
    bare_guest: MakeGuest, eventfd: MakeEventFd
) -> None:
    guest = bare_guest(STOP)
    guest.vm.ioeventfd(eventfd().fd, MMIO_BASE, 4, datamatch=0)
    with pytest.raises(HostError, match="KVM_IOEVENTFD"):
        guest.vm.ioeventfd(eventfd().fd, MMIO_BASE, 4, datamatch=0)
    guest.vm.ioeventfd(eventfd().fd, MMIO_BASE, 4, datamatch=1)


# --- interrupts ----------------------------------------------------------------------------------

EDGE, LEVEL = 0x0000, 0x8000  # trigger mode in an I/O APIC's redirection entry


def _interrupted_guest(bare_guest: MakeGuest, trigger: int = EDGE) -> BareGuest:
    """A guest that waits for interrupts and stops with VECTOR for each, after one stop with 1.

    GSI 5 is routed to VECTOR; each interrupt adds one to COUNTER.
    """
    redirection = (VECTOR | trigger).to_bytes(4, "little").hex()
    main = bytes.fromhex(
        "c705f000e0feff010000"  # mov dword [0xfee000f0], 0x1ff: local APIC on
        "c7050000c0fe1b000000"  # mov dword [0xfec00000], 0x1b: I/O APIC, pin 5, upper half
        "c7051000c0fe00000000"  # mov dword [0xfec00010], 0: to APIC 0
        "c7050000c0fe1a000000"  # mov dword [0xfec00000], 0x1a: pin 5, lower half
        f"c7051000c0fe{redirection}"  # mov dword [0xfec00010], VECTOR | trigger
        "b0ff"  # mov al, 0xff
        "e621"  # out 0x21, al: no interrupt from the PICs, which share the line
        "e6a1"  # out 0xa1, al
        "fb"  # sti
        "b001"  # mov al, 1
        "e6f4"  # out 0xf4, al
        "f4"  # wait: hlt
        "ebfd"  # jmp wait
    )
    handler = bytes.fromhex(
        "ff0500300000"  # inc dword [COUNTER]
        "c705b000e0fe00000000"  # mov dword [0xfee000b0], 0: end of interrupt
        "b035"  # mov al, VECTOR
        "e6f4"  # out 0xf4, al
        # An interpreting KVM has no iret in protected mode: drop the frame, go back to waiting.
        "83c40c"  # add esp, 12
        "fb"  # sti
        "b83d100000"  # mov eax, wait
        "ffe0"  # jmp eax
    )
    assert main[0x3D:] == bytes.fromhex("f4ebfd"), "where the handler goes back to"
    guest = bare_guest(main)
    guest.set_idt(VECTOR, handler)
    assert guest.run_to_stop() == 1
    return guest


def _count(guest: BareGuest) -> int:
    return int.from_bytes(guest.memory.read(COUNTER, 4), "little")


def test_an_irqfd_enters_the_guests_handler(bare_guest: MakeGuest, eventfd: MakeEventFd) -> None:
    guest = _interrupted_guest(bare_guest)
    interrupt = eventfd()
    guest.vm.irqfd(interrupt.fd, 5)
    for expected in (1, 2):
        interrupt.signal()
        assert guest.run_to_stop() == VECTOR
        assert _count(guest) == expected


def test_irq_line_enters_the_guests_handler(bare_guest: MakeGuest) -> None:
    guest = _interrupted_guest(bare_guest)
    guest.vm.irq_line(5, True)
    assert guest.run_to_stop() == VECTOR
    guest.vm.irq_line(5, False)
    guest.vm.irq_line(5, True)
    assert guest.run_to_stop() == VECTOR
    assert _count(guest) == 2


def test_a_deassigned_irqfd_interrupts_no_more(bare_guest: MakeGuest, eventfd: MakeEventFd) -> None:
    guest = _interrupted_guest(bare_guest)
    interrupt = eventfd()
    guest.vm.irqfd(interrupt.fd, 5)
    guest.vm.irqfd(interrupt.fd, 5, deassign=True)
    interrupt.signal()
    guest.vm.irq_line(5, True)
    assert guest.run_to_stop() == VECTOR
    assert _count(guest) == 1
    assert interrupt.drain() == 1, "nobody took the signal"


def test_a_level_interrupt_tells_us_when_the_guest_is_done(
    bare_guest: MakeGuest, eventfd: MakeEventFd
) -> None:
    guest = _interrupted_guest(bare_guest, LEVEL)
    interrupt, done = eventfd(), eventfd()
    guest.vm.irqfd(interrupt.fd, 5, resample_fd=done.fd)
    for expected in (1, 2):
        assert done.drain() == 0
        interrupt.signal()
        assert guest.run_to_stop() == VECTOR
        assert done.drain() == 1
        assert _count(guest) == expected


def test_a_gsi_may_be_routed_to_an_msi(bare_guest: MakeGuest, eventfd: MakeEventFd) -> None:
    guest = _interrupted_guest(bare_guest)
    guest.vm.set_gsi_routing([*default_routes(), MsiRoute(30, LOCAL_APIC, VECTOR)])
    message = eventfd()
    guest.vm.irqfd(message.fd, 30)
    message.signal()
    assert guest.run_to_stop() == VECTOR
    guest.vm.irq_line(5, True)
    assert guest.run_to_stop() == VECTOR, "the default routes are as KVM had them"


def test_an_msi_can_be_sent_directly(bare_guest: MakeGuest) -> None:
    guest = _interrupted_guest(bare_guest)
    assert guest.vm.signal_msi(LOCAL_APIC, VECTOR)
    assert guest.run_to_stop() == VECTOR


# --- lines of messages ----------------------------------------------------------------------------


@pytest.fixture
def lines(bare_guest: MakeGuest) -> Iterator[tuple[BareGuest, Messages]]:
    guest = _interrupted_guest(bare_guest)
    yield guest, Messages(guest.vm, default_routes(), lambda address: address >> 20 == 0xFEE)


def _nothing_more_comes(guest: BareGuest, so_far: int) -> None:
    """An interrupt by another way is the only one."""
    guest.vm.irq_line(5, True)
    assert guest.run_to_stop() == VECTOR
    guest.vm.irq_line(5, False)
    assert _count(guest) == so_far + 1


def test_a_line_sends_its_message(lines: tuple[BareGuest, Messages]) -> None:
    guest, messages = lines
    with messages.line() as line, messages.line() as other:
        for one in (line, other):
            one.connect(LOCAL_APIC, VECTOR)
            one.eventfd.signal()
            assert guest.run_to_stop() == VECTOR
            assert not one.pending
        _nothing_more_comes(guest, 2)


def test_row65_signals_wait_while_a_line_is_not_connected(
    lines: tuple[BareGuest, Messages],
) -> None:
    guest, messages = lines
    with messages.line() as line:
        for so_far in (0, 2):
            line.eventfd.signal()
            line.eventfd.signal()
            assert line.pending
            _nothing_more_comes(guest, so_far)
            line.connect(LOCAL_APIC, VECTOR)
            assert guest.run_to_stop() == VECTOR
            assert not line.pending
            line.disconnect()
            assert not line.pending, "what went out does not wait still"
        assert _count(guest) == 4


def test_another_message_on_a_connected_line(lines: tuple[BareGuest, Messages]) -> None:
    guest, messages = lines
    with messages.line() as line:
        line.connect(LOCAL_APIC | 5 << 12, VECTOR)  # to APIC 5, which is not there
        line.eventfd.signal()
        _nothing_more_comes(guest, 0)
        line.connect(LOCAL_APIC, VECTOR)
        line.eventfd.signal()
        assert guest.run_to_stop() == VECTOR
        assert _count(guest) == 2


@pytest.mark.parametrize("address", [0, 0xFED0_0000, 0x1_0000_0000 | LOCAL_APIC])
def test_row66_an_address_of_no_apic(lines: tuple[BareGuest, Messages], address: int) -> None:
    guest, messages = lines
    with messages.line() as line:
        with pytest.raises(DriverError, match="interrupts nobody"):
            line.connect(address, VECTOR)
        line.eventfd.signal()
        assert line.pending
        _nothing_more_comes(guest, 0)


def test_the_table_changes_for_another_message_only(
    lines: tuple[BareGuest, Messages], monkeypatch: pytest.MonkeyPatch
) -> None:
    guest, messages = lines
    tables: list[int] = []
    set_routing = guest.vm.set_gsi_routing

    def count(routes: list[object]) -> None:
        tables.append(len(routes))
        set_routing(routes)  # type: ignore[arg-type]

    monkeypatch.setattr(guest.vm, "set_gsi_routing", count)
    with messages.line() as line, messages.line() as other:
        for one in (line, other, line):
            one.connect(LOCAL_APIC, VECTOR)
            one.disconnect()
        assert tables == [len(default_routes()) + 1, len(default_routes()) + 2]
    with messages.line() as line:
        line.connect(LOCAL_APIC, VECTOR)
    assert tables[2:] == [len(default_routes()) + 1], "routes of closed lines are gone"


def test_lines_end(lines: tuple[BareGuest, Messages]) -> None:
    _, messages = lines
    messages._free[1:] = []
    with messages.line(), pytest.raises(HostError, match="KVM has no more interrupts to route"):
        messages.line()
    messages.line().close()
