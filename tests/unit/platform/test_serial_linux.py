"""The serial port as Linux's 8250 driver uses it (drivers/tty/serial/8250/8250_port.c).

The functions below are named after the driver's, and do to the registers what those do.
"""

from __future__ import annotations

from collections import deque

import pytest
from serial_rig import FakeTimer

from pyvmm.host.timer import Ring
from pyvmm.platform import serial as uart
from pyvmm.platform.serial import Serial

CONF_MODE_A, CONF_MODE_B = 0x80, 0xBF  # values of LCR that unlock features other chips have


class Driver:
    """The driver and the interrupt controller between it and the port: edge-triggered.

    Each access takes `exit_seconds`, and what the port does by itself happens meanwhile.
    """

    timer: FakeTimer

    def __init__(self, exit_seconds: float = 10e-6, burst: float = 0) -> None:
        self.exit_seconds = exit_seconds
        self.out = bytearray()
        self.received = bytearray()
        self.to_send: deque[int] = deque()
        self.pending_edge = False
        self.interrupts = 0
        self.piped = b""  # what the far end would like to send, at any time
        # What another processor prints, without end: as soon as there is room, or when all that it
        # printed before has been written.
        self.printing = b""
        self.dlab = False
        self.ier = 0  # up->ier: the driver does not read the register for it
        self.runs_dry = False
        self.serial = Serial(self._irq, self.out.extend, self._make_timer, burst=burst)

    def _make_timer(self, ring: Ring) -> FakeTimer:
        self.timer = FakeTimer(ring)
        return self.timer

    def _irq(self, level: bool) -> None:
        self.pending_edge |= level

    def get(self, offset: int) -> int:
        self._offer()
        self.timer.advance(self.exit_seconds)
        return self.serial.read(offset, 1)

    def put(self, offset: int, value: int) -> None:
        self._offer()
        self.timer.advance(self.exit_seconds)
        self._put(offset, value)

    def _put(self, offset: int, value: int) -> None:
        self.serial.write(offset, 1, value)
        if offset == uart.LCR:
            self.dlab = bool(value & uart.LCR_DLAB)
        elif offset == uart.IER and not self.dlab:
            self.ier = value

    def _offer(self) -> None:
        if self.piped:
            self.piped = self.piped[self.serial.enqueue_input(self.piped) :]

    def clear_fifos(self) -> None:
        self.put(uart.FCR, 0x01)
        self.put(uart.FCR, 0x01 | 0x02 | 0x04)
        self.put(uart.FCR, 0)

    def autoconfig(self) -> str:
        """The name of the chip that the driver believes to have found."""
        self.put(uart.IER, 0)
        if self.get(uart.IER) & 0x0F:
            return "unknown: IER stuck"
        self.put(uart.IER, 0x0F)
        if self.get(uart.IER) & 0x0F != 0x0F:
            return "unknown: IER missing"
        self.put(uart.IER, 0)
        save_mcr = self.get(uart.MCR)
        self.put(uart.MCR, uart.MCR_LOOP | uart.MCR_OUT2 | uart.MCR_RTS)
        status = self.get(uart.MSR) & 0xF0
        self.put(uart.MCR, save_mcr)
        if status != uart.MSR_DCD | uart.MSR_CTS:
            return "unknown: loopback"
        save_lcr = self.get(uart.LCR)
        self.put(uart.LCR, CONF_MODE_B)
        self.put(2, 0)
        self.put(uart.LCR, 0)
        self.put(uart.FCR, uart.FCR_ENABLE)
        kind = {0: "8250 or 16450", 1: "unknown", 2: "16550", 3: "16550A"}[self.get(uart.IIR) >> 6]
        if kind == "16550A":
            kind = self.autoconfig_16550a()
        elif kind == "8250 or 16450":
            kind = self.autoconfig_8250()
        self.put(uart.LCR, save_lcr)
        self.put(uart.MCR, save_mcr)
        self.clear_fifos()
        self.get(uart.RBR)
        self.put(uart.IER, 0)
        return kind

    def autoconfig_8250(self) -> str:
        saved = self.get(uart.SCR)
        echoes = []
        for value in (0xA5, 0x5A):
            self.put(uart.SCR, value)
            echoes.append(self.get(uart.SCR) == value)
        self.put(uart.SCR, saved)
        return "16450" if all(echoes) else "8250"

    def autoconfig_16550a(self) -> str:
        self.put(uart.LCR, CONF_MODE_A)
        if self.get(2) == 0:
            return "16650"
        self.put(uart.LCR, CONF_MODE_B)
        if self.get(2) == 0:
            return "16850"
        if self.is_natsemi():
            return "NS16550A super I/O"
        self.put(uart.LCR, 0)
        self.put(uart.FCR, 0x21)
        plain = self.get(uart.IIR) >> 5
        self.put(uart.FCR, uart.FCR_ENABLE)
        self.put(uart.LCR, CONF_MODE_A)
        self.put(uart.FCR, 0x21)
        unlocked = self.get(uart.IIR) >> 5
        self.put(uart.FCR, uart.FCR_ENABLE)
        self.put(uart.LCR, 0)
        if (plain, unlocked) != (6, 6):
            return "16750"
        saved = self.get(uart.IER)
        self.put(uart.IER, saved | 0x40)
        has_uue = bool(self.get(uart.IER) & 0x40)
        self.put(uart.IER, saved)
        return "XScale" if has_uue else "16550A"

    def is_natsemi(self) -> bool:
        self.put(uart.LCR, 0)
        mcr = self.get(uart.MCR)
        self.put(uart.LCR, 0xE0)
        first = (self.get(2) ^ mcr) & uart.MCR_LOOP
        self.put(uart.LCR, 0)
        if first:
            return False
        self.put(uart.MCR, mcr ^ uart.MCR_LOOP)
        self.put(uart.LCR, 0xE0)
        second = (self.get(2) ^ mcr) & uart.MCR_LOOP
        self.put(uart.LCR, 0)
        self.put(uart.MCR, mcr)
        return bool(second)

    def startup(self) -> dict[str, bool]:
        """Open the port; the bugs that the driver believes to have found."""
        self.clear_fifos()
        for offset in (uart.LSR, uart.RBR, uart.IIR, uart.MSR):
            self.get(offset)
        self.put(uart.LCR, 0x03)
        self.put(uart.IER, uart.IER_THRI)
        first = self.get(uart.IIR)
        self.put(uart.IER, 0)
        self.put(uart.IER, uart.IER_THRI)
        again = self.get(uart.IIR)
        self.put(uart.IER, 0)
        self.put(uart.MCR, uart.MCR_OUT2)
        self.put(uart.IER, uart.IER_THRI)
        lsr, iir = self.get(uart.LSR), self.get(uart.IIR)
        self.put(uart.IER, 0)
        for offset in (uart.LSR, uart.RBR, uart.IIR, uart.MSR):
            self.get(offset)
        self.set_termios()
        no_int = uart.IIR_NO_INT
        return {
            "THRE": bool(again & no_int and not first & no_int),
            "TXEN": bool(lsr & uart.LSR_TEMT and iir & no_int),
        }

    def set_termios(self) -> None:
        self.put(uart.IER, uart.IER_RLSI | uart.IER_RDI)
        self.put(uart.LCR, 0x03 | uart.LCR_DLAB)
        self.put(0, 1)
        self.put(1, 0)
        self.put(uart.LCR, 0x03)
        self.put(uart.FCR, uart.FCR_ENABLE)
        self.put(uart.FCR, uart.FCR_ENABLE | 0x80)
        self.put(uart.MCR, uart.MCR_OUT2 | uart.MCR_DTR | uart.MCR_RTS)

    def console_write(self, text: bytes) -> None:
        saved = self.get(uart.IER)
        self.put(uart.IER, 0)
        for byte in text:
            assert self.get(uart.LSR) & uart.LSR_THRE
            self.put(uart.THR, byte)
        self.put(uart.IER, saved)

    def start_tx(self, data: bytes) -> None:
        """From a process, on another processor than the handler's: it takes that no time."""
        self.to_send.extend(data)
        if not self.ier & uart.IER_THRI:
            self._put(uart.IER, self.ier | uart.IER_THRI)

    def serve_interrupts(self) -> None:
        """Run the handler for each edge until there is none, and none to come."""
        while self.pending_edge or self.timer.left is not None:
            if not self.pending_edge:
                self.timer.ring()
            self.handle_edge()

    def handle_edge(self) -> int:
        """handle_edge_irq of kernel/irq/chip.c, with an interrupt controller that gives
        edges which come meanwhile to another processor: that one marks them as pending, and the
        handler starts over. How often it ran before it left the processor; 50 is for ever."""
        rounds = 0
        while self.pending_edge and rounds < 50:
            self.pending_edge = False
            self.interrupts += 1
            rounds += 1
            while not self.handle_irq():
                pass
        return rounds

    def handle_irq(self) -> bool:
        if self.get(uart.IIR) & uart.IIR_NO_INT:
            return True
        status = self.get(uart.LSR)
        while status & uart.LSR_DR:
            self.received.append(self.get(uart.RBR))
            status = self.get(uart.LSR)
        self.get(uart.MSR)
        if status & uart.LSR_THRE and self.to_send:
            for _ in range(min(16, len(self.to_send))):
                self.put(uart.THR, self.to_send.popleft())
            if not self.runs_dry:
                self.to_send.extend(self.printing)
        if not self.to_send and self.ier & uart.IER_THRI:
            self.put(uart.IER, self.ier & ~uart.IER_THRI)
            if self.printing:
                self.start_tx(self.printing)
        return False


@pytest.fixture
def driver() -> Driver:
    return Driver()


def test_autoconfig_finds_a_16550a(driver: Driver) -> None:
    assert driver.autoconfig() == "16550A"
    assert driver.out == b""


def test_startup_finds_no_bugs(driver: Driver) -> None:
    driver.autoconfig()
    assert driver.startup() == {"THRE": False, "TXEN": False}


def test_interrupt_driven_output(driver: Driver) -> None:
    driver.autoconfig()
    driver.startup()
    text = bytes(range(256)) * 8
    driver.start_tx(text)
    driver.serve_interrupts()
    assert driver.out == text
    assert not driver.get(uart.IER) & uart.IER_THRI


@pytest.mark.parametrize("exit_seconds", [1e-6, 10e-6, 100e-6, 300e-6])
@pytest.mark.parametrize("text", [b"x", b"what a guest has to say\n"])
@pytest.mark.parametrize("runs_dry", [False, True])
def test_the_handler_leaves_its_processor_while_another_one_prints_without_end(
    exit_seconds: float, text: bytes, runs_dry: bool
) -> None:
    driver = Driver(exit_seconds)
    driver.startup()
    driver.printing, driver.runs_dry = text, runs_dry
    driver.start_tx(text)
    for _ in range(100):
        assert driver.handle_edge() == 1
        assert not driver.pending_edge
        driver.timer.ring()
    assert len(driver.out) >= 100 * len(text[:8])


@pytest.mark.parametrize("exit_seconds", [1e-6, 10e-6, 100e-6, 300e-6, 1e-3])
@pytest.mark.parametrize("text", [b"x", b"what a guest has to say\n"])
def test_after_a_burst_the_handler_leaves_its_processor_as_well(
    exit_seconds: float, text: bytes
) -> None:
    driver = Driver(exit_seconds, burst=uart.BURST)
    driver.startup()
    driver.printing = text
    driver.start_tx(text)
    assert driver.handle_edge() <= uart.BURST // uart.FIFO_SIZE + 1
    for _ in range(100):
        assert not driver.pending_edge
        driver.timer.ring()
        assert driver.handle_edge() == 1


def test_the_last_words_are_out_before_the_guest_has_ended() -> None:
    """Linux sends from its handler what it keeps for the port, and waits for no timer."""
    driver = Driver(burst=uart.BURST)
    driver.startup()
    for text in (b"why it ends\n", b"x" * (uart.BURST - 16)):
        driver.timer.advance(1)
        before = len(driver.out)
        driver.start_tx(text)
        driver.handle_edge()
        assert driver.out[before:] == text
    assert driver.timer.sets == 0


def test_output_by_interrupts_keeps_tens_of_kilobytes_a_second(driver: Driver) -> None:
    driver.startup()
    begin = driver.timer.now()
    driver.start_tx(bytes(100_000))
    driver.serve_interrupts()
    assert 30_000 < len(driver.out) / (driver.timer.now() - begin) < 64_000


def test_what_is_printed_by_polling_never_waits(driver: Driver) -> None:
    driver.startup()
    driver.start_tx(b"user space ")
    driver.handle_edge()
    sets = driver.timer.sets
    driver.console_write(b"[kernel] " * 100)  # looks into LSR before each byte, and finds it ready
    assert driver.timer.sets == sets
    driver.serve_interrupts()
    assert driver.out == b"user space " + b"[kernel] " * 100


def test_output_restarts_after_it_ran_dry(driver: Driver) -> None:
    driver.startup()
    for _ in range(3):
        driver.start_tx(b"again ")
        driver.serve_interrupts()
    assert driver.out == b"again " * 3


def test_input_by_fifo_and_timeout(driver: Driver) -> None:
    driver.startup()
    text = bytes(range(256)) * 4
    rest = text
    while rest:
        rest = rest[driver.serial.enqueue_input(rest) :]
        driver.serve_interrupts()
    assert driver.received == text


def test_input_given_before_boot_reaches_the_driver_whole(driver: Driver) -> None:
    """`echo … | pyvmm run …`: probing and opening clear the FIFO and read stray characters."""
    driver.piped = b"echo hello from a pipe\n"
    driver.console_write(b"early message\r\n")
    driver.autoconfig()
    driver.startup()
    while driver.piped:
        driver.get(uart.SCR)
        driver.serve_interrupts()
    assert driver.received == b"echo hello from a pipe\n"


def test_kernel_messages_between_input_and_output_lose_nothing(driver: Driver) -> None:
    driver.startup()
    driver.start_tx(b"user space ")
    driver.serial.enqueue_input(b"typed")
    driver.console_write(b"[kernel] ")
    driver.serve_interrupts()
    assert driver.received == b"typed"
    assert sorted(driver.out) == sorted(b"user space [kernel] ")
    driver.serial.enqueue_input(b" more")
    driver.serve_interrupts()
    assert driver.received == b"typed more"
