"""Console input: whatever standard input is, it arrives whole, and the monitor does not spin."""

from __future__ import annotations

import os
import pty
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.platform import serial as uart
from pyvmm.platform.console_pump import READ_AHEAD, ConsolePump
from pyvmm.platform.escape import Command
from pyvmm.platform.serial import Serial

# An exception in a thread fails the test.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

PATIENCE = 60.0  # seconds until a test counts as hung


class Guest:
    """A vCPU whose driver reads what comes when the interrupt line rises."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.interrupt = threading.Semaphore(0)
        self.serial = Serial(self._irq, lambda data: None)

    def _irq(self, level: bool) -> None:
        if level:
            self.interrupt.release()

    def open(self) -> None:
        self.serial.write(uart.FCR, 1, uart.FCR_ENABLE)
        self.serial.write(uart.IER, 1, uart.IER_RDI)

    def read(self, count: int) -> bytes:
        while len(self.received) < count:
            assert self.interrupt.acquire(timeout=PATIENCE), f"{len(self.received)} bytes, hung"
            while self.serial.read(uart.LSR, 1) & uart.LSR_DR:
                self.received.append(self.serial.read(uart.RBR, 1))
        return bytes(self.received)


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
def pump() -> Iterator[Callable[..., ConsolePump]]:
    pumps: list[ConsolePump] = []

    def start(*args, **kwargs) -> ConsolePump:
        pumps.append(ConsolePump(*args, **kwargs))
        pumps[-1].start()
        return pumps[-1]

    yield start
    for each in pumps:
        each.stop()
        assert not each._thread.is_alive()


@pytest.fixture
def keyboard() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    tty.setraw(slave)
    yield master, slave
    os.close(master)
    os.close(slave)


def feed(fd: int, data: bytes, *, close: bool = False) -> threading.Thread:
    def write() -> None:
        rest = data
        while rest:
            rest = rest[os.write(fd, rest) :]
        if close:
            os.close(fd)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread


def test_pipe_arrives_whole_every_byte_of_it(guest: Guest, pump: Callable) -> None:
    reader, writer = os.pipe()
    data = bytes(range(256)) * 400  # Ctrl-A x is in there too
    feed(writer, data, close=True)
    pump(reader, guest.serial)
    guest.open()
    assert guest.read(len(data)) == data
    os.close(reader)


def test_pipe_is_not_read_before_the_guest_takes_it(guest: Guest, pump: Callable) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    running = pump(reader, guest.serial)
    accepted = 0
    for _ in range(10_000):
        try:
            accepted += os.write(writer, bytes(1000))
        except BlockingIOError:
            break
    else:
        pytest.fail("the pump read without bound")
    running.stop()
    assert len(running._waiting) <= 4096
    os.close(reader)
    os.close(writer)


def test_paste_of_100_kb_into_a_terminal(
    guest: Guest, pump: Callable, keyboard: tuple[int, int]
) -> None:
    master, slave = keyboard
    text = b"a line of some length, over and over again\r" * 2500
    pump(slave, guest.serial, on_command=lambda command: None)
    feed(master, text)
    guest.open()
    assert guest.read(len(text)) == text


def test_quit_is_heard_behind_a_paste_that_the_guest_does_not_take(
    guest: Guest, pump: Callable, keyboard: tuple[int, int]
) -> None:
    master, slave = keyboard
    quit_pressed = threading.Event()
    running = pump(slave, guest.serial, on_command=lambda command: quit_pressed.set())
    feed(master, bytes(b"x" * (READ_AHEAD + 10_000)) + b"\x01x")
    assert quit_pressed.wait(PATIENCE)
    running.stop()
    assert len(running._waiting) == READ_AHEAD


def test_escape_keys_of_a_terminal(guest: Guest, pump: Callable, keyboard: tuple[int, int]) -> None:
    master, slave = keyboard
    commands: list[Command] = []
    pump(slave, guest.serial, on_command=commands.append)
    guest.open()
    for key in (b"l", b"\x01", b"h", b"s", b"\x01", b"a"):
        os.write(master, key)
    assert guest.read(3) == b"ls\x01"
    assert commands == [Command.HELP]


def test_stop_from_the_quit_key(guest: Guest, pump: Callable, keyboard: tuple[int, int]) -> None:
    master, slave = keyboard
    done = threading.Event()

    def quit_pressed(command: Command) -> None:
        running.stop()
        done.set()

    running = pump(slave, guest.serial, on_command=quit_pressed)
    os.write(master, b"\x01x")
    assert done.wait(PATIENCE)


def test_regular_file(guest: Guest, pump: Callable, tmp_path: Path) -> None:
    path = tmp_path / "script"
    data = os.urandom(10_000)
    path.write_bytes(data)
    with path.open("rb") as script:
        pump(script.fileno(), guest.serial)
        guest.open()
        assert guest.read(len(data)) == data


def test_dev_null_and_closed_input_just_end(guest: Guest, pump: Callable) -> None:
    with open("/dev/null", "rb") as null:
        running = pump(null.fileno(), guest.serial)
        running.stop()
    gone = os.open("/dev/null", os.O_RDONLY)
    os.close(gone)
    pump(gone, guest.serial)
    pump(None, guest.serial)
    guest.open()
    assert guest.serial.enqueue_input(b"") == 0


def test_endless_input_is_held_back(guest: Guest, pump: Callable) -> None:
    with open("/dev/zero", "rb") as zero:
        running = pump(zero.fileno(), guest.serial)
        guest.open()
        assert guest.read(1000)[:1000] == bytes(1000)
        running.stop()
        assert len(running._waiting) <= 4096


def test_terminal_that_hangs_up_ends_the_input(guest: Guest, pump: Callable) -> None:
    master, slave = pty.openpty()
    tty.setraw(slave)
    running = pump(slave, guest.serial, on_command=lambda command: None)
    guest.open()
    os.write(master, b"x")
    guest.read(1)
    os.close(master)
    running.stop()
    os.close(slave)


def test_stop_before_start(guest: Guest) -> None:
    ConsolePump(None, guest.serial).stop()
