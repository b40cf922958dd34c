"""Console output: nothing lost, nothing hoarded, and a stop that works when nobody reads."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator

import pytest

from pyvmm.platform.console_output import LIMIT, ConsoleOutput
from pyvmm.platform.serial import THR, Serial

# An exception in a thread fails the test.
pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")

PATIENCE = 20.0  # seconds until a test counts as hung


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


def wait_until_steady(count: Callable[[], int]) -> None:
    """Until `count` has been the same, and not 0, for 20 looks in a row."""
    pause = threading.Event()
    same, last = 0, 0
    for _ in range(int(PATIENCE / 0.01)):
        same = same + 1 if count() == last != 0 else 0
        last = count()
        if same == 20:
            return
        pause.wait(0.01)
    pytest.fail("the guest was never held up")


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


def test_flood_into_a_blocked_reader_is_bounded_and_can_be_stopped() -> None:
    reader, writer = os.pipe()
    output = ConsoleOutput(writer, warn=lambda line: None)
    output.start()
    written = 0
    stop = threading.Event()

    def guest() -> None:
        nonlocal written
        while not stop.is_set():
            output.write(b"x")
            written += 1

    vcpus = [threading.Thread(target=guest, daemon=True) for _ in range(2)]
    for vcpu in vcpus:
        vcpu.start()
    wait_until_steady(lambda: written)
    # The pipe is full, one batch is on its way, the buffer is full, and the vCPUs wait.
    assert written <= fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) + 2 * LIMIT + 2 * len(vcpus)
    stop.set()
    output.release()
    for vcpu in vcpus:
        vcpu.join(PATIENCE)
        assert not vcpu.is_alive()
    assert not output.close(timeout=0.01)  # says that not everything was read
    for _ in range(3 * LIMIT):
        output.write(b"y")  # waits for nobody any more, and keeps nothing
    assert len(output._buffer) <= LIMIT
    os.close(reader)
    assert output.close(PATIENCE)
    os.close(writer)


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


def test_help_does_not_wait_for_a_blocked_terminal() -> None:
    output = ConsoleOutput(None)  # not started: nobody writes
    assert output.offer(b"x" * LIMIT)
    assert not output.offer(b"help")
    output.close()


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
