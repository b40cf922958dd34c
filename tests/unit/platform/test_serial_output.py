"""Console output: nothing lost to who reads, nothing hoarded, nobody held up by who does not."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pyvmm.platform.console_output import KEPT, LIMIT, ConsoleOutput
from pyvmm.platform.serial import THR, Serial

# An exception in a thread fails the test.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

PATIENCE = 60.0  # seconds until a test counts as hung


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def read_exactly(fd: int, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := os.read(fd, count - len(data))):
        data += more
    return data


def test_a_prompt_without_newline_appears(pipe: tuple[int, int]) -> None:
    output = ConsoleOutput(pipe[1])
    output.start()
    serial = Serial(lambda level: None, output.write)
    for _ in range(3):
        for byte in b"login: ":
            serial.write(THR, 1, byte)
        assert read_exactly(pipe[0], 7) == b"login: "
    assert output.close()


def test_everything_arrives_in_order_through_a_slow_reader(pipe: tuple[int, int]) -> None:
    text = bytes(index % 251 for index in range(5 * LIMIT))
    output = ConsoleOutput(pipe[1])
    output.start()
    serial = Serial(lambda level: None, output.write)
    guest = threading.Thread(target=lambda: [serial.write(THR, 1, byte) for byte in text])
    guest.start()
    assert read_exactly(pipe[0], len(text)) == text
    guest.join(PATIENCE)
    assert not guest.is_alive()
    assert output.close()


def test_several_vcpus_lose_no_byte(pipe: tuple[int, int]) -> None:
    output = ConsoleOutput(pipe[1])
    output.start()

    def guest(byte: bytes) -> None:
        for _ in range(5000):
            output.write(byte)

    guests = [threading.Thread(target=guest, args=(byte,)) for byte in (b"a", b"b", b"c")]
    for thread in guests:
        thread.start()
    text = read_exactly(pipe[0], 15000)
    assert [text.count(byte) for byte in (b"a", b"b", b"c")] == [5000] * 3
    assert output.close()


class Divisible(bytearray):
    """A bytearray whose changes take a while, in which nobody else's may begin: as in a Python
    without an interpreter's lock."""

    busy = False
    disturbed = 0

    @contextmanager
    def changing(self) -> Iterator[None]:
        self.disturbed += self.busy
        self.busy = True
        time.sleep(0)
        yield
        self.busy = False

    def __iadd__(self, data: Any) -> Divisible:
        with self.changing():
            self.extend(data)
        return self

    def __delitem__(self, key: Any) -> None:
        with self.changing():
            super().__delitem__(key)

    def clear(self) -> None:
        with self.changing():
            super().clear()


def test_vcpus_and_the_writer_change_the_buffer_in_turn() -> None:
    seen = bytearray()
    output = ConsoleOutput(None, observer=seen.extend)
    buffer = output._buffer = Divisible()
    output.start()
    guests = [
        threading.Thread(target=lambda: [output.write(b"x") for _ in range(1000)]) for _ in range(3)
    ]
    for guest in guests:
        guest.start()
    for guest in guests:
        guest.join(PATIENCE)
        assert not guest.is_alive()
    assert output.close()
    assert (len(seen), buffer.disturbed) == (3000, 0)


def test_a_guest_never_waits_for_a_reader_who_does_not_read() -> None:
    reader, writer = os.pipe()
    seen = 0

    def observe(data: bytes) -> None:
        nonlocal seen
        seen += len(data)

    output = ConsoleOutput(writer, observer=observe)
    output.start()
    room = fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) + KEPT + 2 * LIMIT
    piece = b"x" * 1024
    vcpus = [
        threading.Thread(target=lambda: [output.write(piece) for _ in range(room // 512)])
        for _ in range(2)
    ]
    for vcpu in vcpus:
        vcpu.start()
    for vcpu in vcpus:
        vcpu.join(PATIENCE)
        assert not vcpu.is_alive()
    output.settle()
    written = 2 * (room // 512) * len(piece)
    left_out = output.left_out
    assert written - room <= left_out < written
    # Whoever looks for a panic, or keeps the end, sees what the reader does not.
    assert seen > room
    output.write(b"last words")
    assert not output.close(timeout=0.01)  # says that not everything was read
    os.close(writer)
    os.close(reader)


def test_a_reader_who_comes_back_is_told_how_much_he_missed(pipe: tuple[int, int]) -> None:
    output = ConsoleOutput(pipe[1])
    output.start()
    while not output.left_out:
        output.write(b"x" * 1024)
    output.settle()
    missed = output.left_out
    output.write(b"!")
    output.settle()
    text = b""
    while b"left out]" not in text:
        text += os.read(pipe[0], 1 << 16)
    assert text.strip(b"x\r\n") == b"[pyvmm: %d bytes left out]" % (missed + 1)
    output.write(b"again")
    assert read_exactly(pipe[0], 5) == b"again"
    assert output.close()


def test_a_terminal_that_is_paused_holds_up_nobody() -> None:
    master, slave = os.openpty()
    termios.tcflow(slave, termios.TCOOFF)
    output = ConsoleOutput(slave)
    output.start()
    while not output.left_out:
        output.write(b"x" * 1024)
    assert os.get_blocking(slave)  # which is everybody's
    termios.tcflow(slave, termios.TCOON)
    text = b""
    while b"left out]" not in text:
        text += os.read(master, 1 << 16)
    assert output.close()
    os.close(slave)
    os.close(master)


def test_a_reader_that_has_gone_ends_the_output_not_the_guest() -> None:
    reader, writer = os.pipe()
    warnings: list[str] = []
    output = ConsoleOutput(writer, warn=warnings.append)
    output.start()
    os.close(reader)
    for _ in range(4 * LIMIT):
        output.write(b"x")
    assert output.close()
    os.close(writer)
    assert len(warnings) == 1
    assert "Broken pipe" in warnings[0]


def test_full_disk_is_said_once() -> None:
    warnings: list[str] = []
    with open("/dev/full", "wb", buffering=0) as full:
        output = ConsoleOutput(full.fileno(), warn=warnings.append)
        output.start()
        output.write(b"x")
        assert output.close()
    assert len(warnings) == 1
    assert "No space left" in warnings[0]


def test_nonblocking_output_is_waited_for(pipe: tuple[int, int]) -> None:
    """Another program on the same terminal may have set O_NONBLOCK for everybody."""
    os.set_blocking(pipe[1], False)
    text = os.urandom(3 * LIMIT)
    output = ConsoleOutput(pipe[1])
    output.start()
    guest = threading.Thread(target=output.write, args=(text,), daemon=True)
    guest.start()
    assert read_exactly(pipe[0], len(text)) == text
    assert output.close()


def test_close_writes_what_is_left(pipe: tuple[int, int]) -> None:
    output = ConsoleOutput(pipe[1])
    output.start()
    output.write(b"reboot: Power down\r\n")
    assert output.close()
    assert os.read(pipe[0], 100) == b"reboot: Power down\r\n"
    assert output.close()  # once more does no harm


def test_closed_standard_output_is_no_error() -> None:
    seen = bytearray()
    output = ConsoleOutput(None, observer=seen.extend)
    output.start()
    for _ in range(2):
        output.write(b"text")
    assert output.close()
    assert seen == b"texttext"


def test_observer_sees_all_that_is_written(pipe: tuple[int, int]) -> None:
    seen = bytearray()
    output = ConsoleOutput(pipe[1], observer=seen.extend)
    output.start()
    output.write(b"Kernel panic")
    assert output.close()
    assert seen == b"Kernel panic"


def test_an_offer_waits_for_a_slow_reader_only() -> None:
    reader, writer = os.pipe()
    room = threading.Event()
    output = ConsoleOutput(writer)
    output.watch_room(room.set)
    output.start()
    refused = 0
    while not output.left_out:
        if not output.offer(b"x" * 4096):
            refused += 1
            assert room.wait(PATIENCE)
            room.clear()
    assert refused
    output.close(0.01)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    ("ending", "code"), [("pass", 0), ("sys.exit(3)", 3), ("raise RuntimeError('crash')", 1)]
)
def test_last_words_survive_the_end_of_the_process(ending: str, code: int) -> None:
    script = textwrap.dedent(
        f"""
        import sys
        from pyvmm.platform.console_output import ConsoleOutput
        output = ConsoleOutput(1)
        output.start()
        output.write(b"last words")
        {ending}
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=PATIENCE)
    assert done.stdout == b"last words"
    assert done.returncode == code
