"""The 16550A's registers and interrupts, one rule of the data sheet at a time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serial_rig import FakeTimer

from pyvmm.host.timer import Ring
from pyvmm.platform import serial as uart
from pyvmm.platform.serial import Serial

FIFO_ON = uart.FCR_ENABLE
TRIGGER_8 = 0x80


class Port:
    """A serial port with everything that comes out of it."""

    def __init__(self, burst: float = 0) -> None:
        self.sent = bytearray()
        self.edges: list[bool] = []
        self.rooms = 0
        self.serial = Serial(self.edges.append, self.sent.extend, self.make_timer, burst=burst)
        self.serial.watch_room(self.count_room)

    def make_timer(self, ring: Ring) -> FakeTimer:
        self.timer = FakeTimer(ring)
        return self.timer

    def count_room(self) -> None:
        self.rooms += 1

    @property
    def line(self) -> bool:
        return bool(self.edges) and self.edges[-1]

    def get(self, offset: int) -> int:
        return self.serial.read(offset, 1)

    def put(self, offset: int, value: int) -> None:
        assert self.serial.write(offset, 1, value) is None

    def cause(self) -> int:
        return self.get(uart.IIR) & 0x0F

    def drain(self) -> bytes:
        data = bytearray()
        while self.get(uart.LSR) & uart.LSR_DR:
            data.append(self.get(uart.RBR))
        return bytes(data)


@pytest.fixture
def port() -> Port:
    return Port()


@pytest.fixture
def listening(port: Port) -> Port:
    port.put(uart.FCR, FIFO_ON)
    port.put(uart.IER, uart.IER_RDI)
    return port


def test_reset_values(port: Port) -> None:
    assert port.get(uart.IER) == 0
    assert port.get(uart.IIR) == uart.IIR_NO_INT
    assert port.get(uart.LCR) == 0
    assert port.get(uart.MCR) == 0
    assert port.get(uart.LSR) == uart.LSR_THRE | uart.LSR_TEMT
    assert port.get(uart.MSR) == uart.MSR_CTS | uart.MSR_DSR | uart.MSR_DCD


def test_bytes_come_out_in_order_and_the_transmitter_is_ready_again(port: Port) -> None:
    for byte in b"hello\r\n":
        port.put(uart.THR, byte)
        assert port.get(uart.LSR) & uart.LSR_THRE
    assert port.sent == b"hello\r\n"
    assert port.edges == []


def test_divisor_latch_hides_data_and_ier(port: Port) -> None:
    port.put(uart.IER, uart.IER_MSI)
    port.put(uart.LCR, uart.LCR_DLAB | 0x03)
    port.put(0, 0x34)
    port.put(1, 0x12)
    assert (port.get(0), port.get(1)) == (0x34, 0x12)
    assert port.get(uart.IIR) == uart.IIR_NO_INT
    port.put(uart.LCR, 0x03)
    assert port.sent == b""
    assert port.get(uart.IER) == uart.IER_MSI
    port.put(uart.THR, ord("x"))
    assert port.sent == b"x"


def test_unused_bits_read_zero(port: Port) -> None:
    port.put(uart.IER, 0xFF)
    port.put(uart.MCR, 0xEF)
    assert port.get(uart.IER) == 0x0F
    assert port.get(uart.MCR) == 0x0F


def test_status_registers_ignore_writes(port: Port) -> None:
    before = port.get(uart.LSR), port.get(uart.MSR)
    port.put(uart.LSR, 0xFF)
    port.put(uart.MSR, 0xFF)
    assert (port.get(uart.LSR), port.get(uart.MSR)) == before


@pytest.mark.parametrize("value", [0x00, 0x55, 0xAA, 0xFF])
def test_scratch_register(port: Port, value: int) -> None:
    port.put(uart.SCR, value)
    assert port.get(uart.SCR) == value


def test_wide_access_is_one_access_per_register(port: Port) -> None:
    port.put(uart.LCR, uart.LCR_DLAB)
    port.serial.write(0, 2, 0x0102)  # a driver may set the divisor with one outw
    assert (port.get(0), port.get(1)) == (0x02, 0x01)
    assert port.serial.read(0, 2) == 0x0102
    assert port.serial.read(7, 2) == 0xFF00


# --- transmitter interrupt -----------------------------------------------------------------------


def test_enabling_thri_interrupts_each_time(port: Port) -> None:
    for _ in range(2):
        port.put(uart.IER, uart.IER_THRI)
        assert port.line
        assert port.cause() == uart.IIR_THRI
        assert not port.line  # reading IIR as the source cleared it
        assert port.cause() == uart.IIR_NO_INT
        port.put(uart.IER, 0)
    assert port.edges == [True, False] * 2


def test_rewriting_ier_with_thri_still_set_is_no_new_interrupt(port: Port) -> None:
    port.put(uart.IER, uart.IER_THRI)
    port.cause()
    port.put(uart.IER, uart.IER_THRI | uart.IER_MSI)
    assert port.cause() == uart.IIR_NO_INT


def test_disabling_thri_drops_the_line(port: Port) -> None:
    port.put(uart.IER, uart.IER_THRI)
    port.put(uart.IER, 0)
    assert port.edges == [True, False]


@pytest.fixture
def sending(port: Port) -> Port:
    """The interrupt for more bytes has been taken, a second ago."""
    port.put(uart.FCR, FIFO_ON)
    port.put(uart.IER, uart.IER_THRI)
    port.cause()
    port.timer.advance(1.0)
    return port


BYTE = uart._BYTE_SECONDS
LATE = uart._LONGEST_FILL + 1e-9  # past the interrupt for one byte of a guest that took its time


def test_a_written_byte_interrupts_when_it_has_been_sent(sending: Port) -> None:
    sending.put(uart.THR, ord("a"))
    assert sending.sent == b"a"
    assert sending.edges == [True, False]
    sending.timer.advance(LATE)
    assert sending.edges == [True, False, True]
    assert sending.cause() == uart.IIR_THRI


@pytest.mark.parametrize(("count", "taken"), [(1, 1), (7, 7), (16, 16), (40, 16)])
def test_the_interrupt_comes_after_the_time_of_what_is_in_the_fifo(
    port: Port, count: int, taken: int
) -> None:
    port.put(uart.FCR, FIFO_ON)
    port.put(uart.IER, uart.IER_THRI)
    port.cause()
    for byte in range(count):
        port.put(uart.THR, byte)
    port.timer.advance(BYTE * taken - 1e-9)
    assert not port.line
    port.timer.advance(2e-9)
    assert port.line
    assert len(port.sent) == count
    assert port.edges == [True, False, True]  # one edge for all
    assert port.timer.sets == 1


def test_a_guest_that_fills_the_fifo_slowly_gets_as_much_time_for_the_rest(port: Port) -> None:
    port.put(uart.IER, uart.IER_THRI)
    port.cause()
    for byte in range(16):
        port.timer.advance(100e-6)
        port.put(uart.THR, byte)
    port.timer.advance(1600e-6 - 1e-9)
    assert not port.line
    port.timer.advance(2e-9)
    assert port.line


def test_a_guest_that_took_very_long_does_not_wait_as_long(sending: Port) -> None:
    sending.put(uart.THR, 0)
    sending.timer.advance(LATE)
    assert sending.line


def test_each_byte_makes_the_interrupt_later(sending: Port) -> None:
    for byte in b"0123456789":
        sending.put(uart.THR, byte)
        sending.timer.advance(uart._LONGEST_FILL - 1e-6)
        assert not sending.line
    sending.timer.advance(1e-3)
    assert sending.line


def test_writing_takes_back_the_interrupt(port: Port) -> None:
    port.put(uart.IER, uart.IER_THRI)
    port.put(uart.THR, ord("a"))
    assert port.edges == [True, False]
    assert port.cause() == uart.IIR_NO_INT
    port.timer.ring()
    assert port.edges == [True, False, True]


def test_the_transmitter_always_looks_empty(sending: Port) -> None:
    for byte in range(100):
        assert sending.get(uart.LSR) & uart.LSR_THRE
        assert sending.get(uart.LSR) & uart.LSR_TEMT
        sending.put(uart.THR, byte)
    assert sending.sent == bytes(range(100))


def test_without_the_interrupt_no_time_is_kept(port: Port) -> None:
    for byte in bytes(100):
        port.put(uart.THR, byte)
    port.put(uart.IER, uart.IER_RDI)
    port.put(uart.THR, ord("x"))
    assert port.timer.sets == 0
    port.put(uart.IER, uart.IER_THRI)
    assert port.line  # what was sent before is not waited for


def test_thri_enabled_while_bytes_are_sent_interrupts_after_them(sending: Port) -> None:
    sending.put(uart.THR, ord("a"))
    sending.put(uart.IER, 0)
    sending.put(uart.IER, uart.IER_THRI)
    assert not sending.line
    sending.timer.ring()
    assert sending.line


def test_bytes_that_have_been_sent_interrupt_nobody_who_does_not_ask(sending: Port) -> None:
    sending.put(uart.THR, ord("a"))
    sending.put(uart.IER, 0)
    sending.timer.ring()
    assert not sending.line
    sending.put(uart.IER, uart.IER_THRI)
    assert sending.line


@pytest.mark.parametrize("fcr", [FIFO_ON | uart.FCR_CLEAR_XMIT, 0])
def test_a_cleared_transmitter_is_empty_at_once(sending: Port, fcr: int) -> None:
    sending.put(uart.THR, ord("a"))
    sending.put(uart.FCR, fcr)
    assert sending.line
    assert sending.cause() == uart.IIR_THRI
    sending.timer.ring()
    assert not sending.line
    # And the next byte has its own time.
    sending.put(uart.THR, ord("b"))
    assert not sending.line
    sending.timer.ring()
    assert sending.line


def test_nothing_rings_when_nothing_is_printed(sending: Port) -> None:
    sending.put(uart.THR, ord("a"))
    sending.timer.ring()
    sending.cause()
    assert sending.timer.left is None
    assert sending.timer.sets == 1


def test_a_closed_port_interrupts_no_more(sending: Port) -> None:
    sending.put(uart.THR, ord("a"))
    sending.serial.close()
    sending.timer.advance(1.0)
    assert not sending.line


# --- receiver ------------------------------------------------------------------------------------


def test_one_key_interrupts_as_character_timeout(listening: Port) -> None:
    listening.put(uart.FCR, FIFO_ON | TRIGGER_8)
    assert listening.serial.enqueue_input(b"k") == 1
    assert listening.edges == [True]
    assert listening.get(uart.IIR) == uart.IIR_FIFO_ENABLED | uart.IIR_TIMEOUT
    assert listening.line  # IIR does not clear it, reading the character does
    assert listening.drain() == b"k"
    assert listening.edges == [True, False]


@pytest.mark.parametrize(("fcr", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_trigger_level(listening: Port, fcr: int, level: int) -> None:
    listening.put(uart.FCR, FIFO_ON | fcr)
    listening.serial.enqueue_input(b"x" * level)
    assert listening.cause() == uart.IIR_RDI
    listening.get(uart.RBR)
    expected = uart.IIR_TIMEOUT if level > 1 else uart.IIR_NO_INT
    assert listening.cause() == expected


def test_trigger_needs_the_enable_bit(listening: Port) -> None:
    listening.put(uart.FCR, 0xC0)  # without bit 0 the others are not programmed
    listening.put(uart.FCR, FIFO_ON)
    listening.serial.enqueue_input(b"x")
    assert listening.cause() == uart.IIR_RDI


def test_input_is_bounded_by_the_fifo(listening: Port) -> None:
    """CVE-2020-27173: input from the user must not collect in the monitor."""
    assert listening.serial.enqueue_input(bytes(range(100))) == 16
    assert listening.serial.enqueue_input(b"more") == 0
    assert listening.drain() == bytes(range(16))


def test_without_fifo_one_character_fits(port: Port) -> None:
    port.put(uart.IER, uart.IER_RDI)
    assert port.serial.enqueue_input(b"ab") == 1
    assert port.get(uart.IIR) == uart.IIR_RDI
    assert port.drain() == b"a"


def test_room_is_told_once_when_the_fifo_is_empty(listening: Port) -> None:
    listening.serial.enqueue_input(bytes(17))
    for _ in range(15):
        listening.get(uart.RBR)
    assert listening.rooms == 0
    listening.get(uart.RBR)
    listening.get(uart.RBR)
    assert listening.rooms == 1


def test_room_is_not_told_when_everything_fitted(listening: Port) -> None:
    listening.serial.enqueue_input(b"abc")
    listening.drain()
    assert listening.rooms == 0


def test_every_refill_is_a_new_edge(listening: Port) -> None:
    """A handler that gives up on an endless stream half-way must be called again."""
    for _ in range(3):
        listening.serial.enqueue_input(bytes(20))
        for _ in range(16):
            listening.get(uart.RBR)
    assert listening.edges == [True, False] * 3


def test_clearing_the_receive_fifo(listening: Port) -> None:
    listening.serial.enqueue_input(bytes(17))
    listening.put(uart.FCR, FIFO_ON | uart.FCR_CLEAR_RCVR)
    assert not listening.get(uart.LSR) & uart.LSR_DR
    assert not listening.line
    assert listening.rooms == 1


def test_switching_the_fifo_on_keeps_what_a_driver_may_be_interrupted_for(port: Port) -> None:
    port.put(uart.IER, uart.IER_RDI)
    assert port.serial.enqueue_input(b"abc") == 1
    port.put(uart.FCR, FIFO_ON)
    assert port.drain() == b"a"


def test_switching_the_fifo_off_clears_it(listening: Port) -> None:
    listening.serial.enqueue_input(b"abc")
    listening.put(uart.FCR, 0)
    assert listening.drain() == b""
    assert listening.get(uart.IIR) == uart.IIR_NO_INT


def test_reading_an_empty_receiver_is_harmless(port: Port) -> None:
    assert port.get(uart.RBR) == 0


# --- input waits for a listener ------------------------------------------------------------------


def test_no_input_before_the_guest_listens(port: Port) -> None:
    assert port.serial.enqueue_input(b"first line\n") == 0
    assert not port.get(uart.LSR) & uart.LSR_DR
    port.put(uart.FCR, FIFO_ON)
    assert port.rooms == 0
    port.put(uart.IER, uart.IER_RDI)
    assert port.rooms == 1
    assert port.serial.enqueue_input(b"first line\n") == 11


def test_a_guest_that_tries_the_bits_of_ier_does_not_listen(port: Port) -> None:
    port.put(uart.IER, uart.IER_ALL)
    assert port.serial.enqueue_input(b"first line\n") == 0
    port.put(uart.MCR, uart.MCR_OUT2)  # its interrupts now reach the PC: it means it
    assert port.rooms == 1
    assert port.serial.enqueue_input(b"first line\n") == 1


def test_a_guest_that_polls_is_a_listener(port: Port) -> None:
    port.serial.enqueue_input(b"x")
    for _ in range(100):
        port.get(uart.LSR)
    assert port.rooms == 1
    assert port.serial.enqueue_input(b"x") == 1
    assert port.drain() == b"x"


def test_polling_before_each_byte_of_output_is_not_listening(port: Port) -> None:
    port.serial.enqueue_input(b"x")
    for byte in bytes(100):
        port.get(uart.LSR)
        port.put(uart.THR, byte)
    assert port.rooms == 0
    assert len(port.sent) == 100


def test_a_driver_that_stops_listening_gets_no_more(listening: Port) -> None:
    listening.put(uart.IER, 0)
    assert listening.serial.enqueue_input(b"x") == 0
    listening.put(uart.IER, uart.IER_RDI)
    assert listening.rooms == 1


# --- priorities, errors, modem -------------------------------------------------------------------


def overrun(port: Port) -> None:
    port.put(uart.MCR, uart.MCR_LOOP)
    for byte in range(17):
        port.put(uart.THR, byte)


def test_loopback_overrun_loses_the_new_character(port: Port) -> None:
    port.put(uart.FCR, FIFO_ON)
    overrun(port)
    assert port.sent == b""
    assert port.get(uart.LSR) & uart.LSR_OE
    assert not port.get(uart.LSR) & uart.LSR_OE  # reading cleared it
    assert port.drain() == bytes(range(16))


def test_overrun_without_fifo_overwrites(port: Port) -> None:
    port.put(uart.MCR, uart.MCR_LOOP)
    port.put(uart.THR, ord("a"))
    port.put(uart.THR, ord("b"))
    assert port.get(uart.LSR) & uart.LSR_OE
    assert port.drain() == b"b"


def test_interrupt_priorities(port: Port) -> None:
    port.put(uart.FCR, FIFO_ON)
    overrun(port)
    port.put(uart.MCR, uart.MCR_LOOP | uart.MCR_RTS)
    port.put(uart.IER, 0x0F)
    assert port.cause() == uart.IIR_RLSI
    port.get(uart.LSR)
    assert port.cause() == uart.IIR_RDI
    port.drain()
    assert port.cause() == uart.IIR_THRI
    assert port.cause() == uart.IIR_MSI
    port.get(uart.MSR)
    assert port.cause() == uart.IIR_NO_INT
    assert port.edges == [True, False]  # high for as long as anything was pending


def test_no_input_arrives_in_loopback(listening: Port) -> None:
    listening.put(uart.MCR, uart.MCR_LOOP)
    assert listening.serial.enqueue_input(b"x") == 0
    listening.put(uart.MCR, 0)
    assert listening.rooms == 1


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (uart.MCR_DTR, uart.MSR_DSR),
        (uart.MCR_RTS, uart.MSR_CTS),
        (uart.MCR_OUT1, uart.MSR_RI),
        (uart.MCR_OUT2, uart.MSR_DCD),
    ],
)
def test_loopback_joins_modem_lines(port: Port, output: int, line: int) -> None:
    port.put(uart.MCR, uart.MCR_LOOP | output)
    assert port.get(uart.MSR) & 0xF0 == line
    assert port.get(uart.MSR) & 0x0F == 0  # the changes were read
    port.put(uart.MCR, uart.MCR_LOOP)
    assert (
        port.get(uart.MSR)
        == {
            uart.MSR_DSR: uart.MSR_DDSR,
            uart.MSR_CTS: uart.MSR_DCTS,
            uart.MSR_RI: uart.MSR_TERI,
            uart.MSR_DCD: uart.MSR_DDCD,
        }[line]
    )


def test_ring_counts_at_its_end_only(port: Port) -> None:
    port.put(uart.MCR, uart.MCR_LOOP)
    port.get(uart.MSR)
    port.put(uart.MCR, uart.MCR_LOOP | uart.MCR_OUT1)
    assert port.get(uart.MSR) == uart.MSR_RI


# --- a hostile guest -----------------------------------------------------------------------------

ACCESS = st.tuples(
    st.booleans(), st.integers(0, 15), st.sampled_from((1, 2, 4, 8)), st.integers(0, 2**64 - 1)
)


@given(st.lists(st.one_of(ACCESS, st.binary(max_size=40)), max_size=80))
def test_any_sequence_of_accesses_is_survived(steps: list) -> None:
    port = Port()
    for step in steps:
        if isinstance(step, bytes):
            assert 0 <= port.serial.enqueue_input(step) <= 16
            continue
        is_write, offset, size, value = step
        port.timer.advance(value % 64 * 1e-6)
        if is_write:
            assert port.serial.write(offset, size, value) is None
        else:
            assert 0 <= port.serial.read(offset, size) < 1 << 8 * size
        assert all(a != b for a, b in zip(port.edges, port.edges[1:], strict=False))
    # Whatever it did, a driver that starts from the beginning finds a working port.
    port.put(uart.LCR, 0)
    port.put(uart.MCR, 0)
    port.put(uart.IER, 0)
    port.put(uart.FCR, 0)
    port.get(uart.LSR)
    port.get(uart.MSR)
    assert not port.line
    del port.sent[:]
    port.put(uart.THR, ord("!"))
    assert port.sent == b"!"
    port.put(uart.FCR, FIFO_ON | uart.FCR_CLEAR_RCVR)
    port.put(uart.IER, uart.IER_RDI)
    assert port.serial.enqueue_input(b"?") == 1
    assert port.line
    assert port.drain() == b"?"
