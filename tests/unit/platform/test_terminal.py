"""Raw mode on a real terminal, and the terminal as it was, however the process ends."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import termios
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PATIENCE = 60.0  # seconds until a test counts as hung
LFLAG = 3
COOKED = termios.ICANON | termios.ECHO | termios.ISIG

# A session of its own, as a terminal window gives its shell, so that keys become signals and the
# terminal has a foreground.
LEAD_SESSION = """
import fcntl, os, signal, sys, termios, time
from pyvmm.platform.terminal import Terminal
def say(word):
    os.write(3, word + b"\\n")
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
# A shell that runs the tests in the background has these ignored, and children inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
"""


class Session:
    """A process with a pseudo-terminal as its input; its descriptor 3 is a pipe to the test."""

    def __init__(self, script: str) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self._pipe, writer = os.pipe()
        program = LEAD_SESSION + textwrap.dedent(script)
        # The shell makes descriptor 3 out of whatever number the pipe has here.
        command = f'exec 3>&{writer}; exec "$0" -c "$1"'
        self.process = subprocess.Popen(
            ["bash", "-c", command, sys.executable, program],
            stdin=self.slave,
            stdout=self.slave,
            stderr=subprocess.DEVNULL,
            pass_fds=[writer],
            start_new_session=True,
        )
        os.close(writer)

    def hear(self, word: bytes) -> None:
        ready, _, _ = select.select([self._pipe], [], [], PATIENCE)
        assert ready, f"hung before {word!r}"
        heard = b""
        while not heard.endswith(b"\n"):
            byte = os.read(self._pipe, 1)
            assert byte, f"ended before {word!r}, after {heard!r}"
            heard += byte
        assert heard == word + b"\n"

    @property
    def is_raw(self) -> bool:
        flags = termios.tcgetattr(self.slave)[LFLAG] & COOKED
        assert flags in (0, COOKED)
        return flags == 0

    def end(self) -> int:
        code = self.process.wait(PATIENCE)
        assert termios.tcgetattr(self.slave) == self.before
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)
        for fd in (self.master, self.slave, self._pipe):
            os.close(fd)


Start = Callable[[str], Session]


@pytest.fixture
def start() -> Iterator[Start]:
    sessions: list[Session] = []

    def start(script: str) -> Session:
        sessions.append(Session(script))
        return sessions[-1]

    yield start
    for session in sessions:
        session.close()


def test_every_key_is_the_guests(start: Start) -> None:
    session = start(
        """
        with Terminal(0):
            say(b"raw")
            say(os.read(0, 1).hex().encode())
            say(os.read(0, 1).hex().encode())
        """
    )
    session.hear(b"raw")
    assert session.is_raw
    os.write(session.master, b"\x03")  # Ctrl-C is a byte, not a signal
    session.hear(b"03")
    os.write(session.master, b"\r")  # Enter stays a carriage return
    session.hear(b"0d")
    assert session.end() == 0


@pytest.mark.parametrize(
    ("ending", "code"),
    [("pass", 0), ("sys.exit(4)", 4), ("raise ValueError('crash')", 1)],
)
@pytest.mark.parametrize("form", ["with Terminal(0):", "if Terminal(0).__enter__():"])
def test_restored_when_the_program_ends(start: Start, form: str, ending: str, code: int) -> None:
    """With the block left, and by the interpreter's exit alone."""
    session = start(
        f"""
        {form}
            say(b"raw")
            os.read(0, 1)
            {ending}
        """
    )
    session.hear(b"raw")
    assert session.is_raw
    os.write(session.master, b"x")
    assert session.end() == code


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT], ids=lambda n: n.name
)
def test_restored_by_a_signal(start: Start, number: signal.Signals) -> None:
    session = start(
        """
        with Terminal(0):
            say(b"raw")
            time.sleep(60)
        """
    )
    session.hear(b"raw")
    assert session.is_raw
    session.process.send_signal(number)
    assert session.end() == -number  # whoever started it sees which signal it was


def test_handlers_of_the_program_are_kept_and_given_back(start: Start) -> None:
    session = start(
        """
        ended = []
        mine = lambda number, frame: ended.append(number)
        signal.signal(signal.SIGTERM, mine)
        with Terminal(0):
            assert signal.getsignal(signal.SIGTERM) is mine
            assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL
            os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL
        """
    )
    assert session.end() == 0


def test_entered_in_another_thread(start: Start) -> None:
    """Signals belong to the main thread; raw mode works all the same."""
    session = start(
        """
        import threading
        def work():
            with Terminal(0):
                say(b"raw")
                os.read(0, 1)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        """
    )
    session.hear(b"raw")
    assert session.is_raw
    os.write(session.master, b"x")
    assert session.end() == 0


# A shell with one job, which it starts in the foreground or not.
JOB = """
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
leader = os.getpgrp()
go_reader, go_writer = os.pipe()
job = os.fork()
if not job:
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    os.setpgid(0, 0)
    os.read(go_reader, 1)
    with Terminal(0):
        say(b"entered")
        while True:
            time.sleep(60)
os.setpgid(job, job)
def stopped_or_ended():
    _, status = os.waitpid(job, os.WUNTRACED)
    os.tcsetpgrp(0, leader)
    return os.WIFSTOPPED(status)
"""


def wait_for_mode(session: Session, *, raw: bool) -> None:
    """A signal takes effect soon; look until it has."""
    for _ in range(int(PATIENCE / 0.01)):
        if session.is_raw == raw:
            return
        select.select([], [], [], 0.01)
    pytest.fail(f"the terminal is {'not ' if raw else ''}raw")


def test_suspended_and_continued(start: Start) -> None:
    session = start(
        JOB
        + textwrap.dedent(
            """
            os.tcsetpgrp(0, job)
            os.write(go_writer, b"x")
            assert stopped_or_ended()
            say(b"stopped")
            while os.read(0, 1) != b"f":
                pass
            os.tcsetpgrp(0, job)
            os.kill(-job, signal.SIGCONT)
            assert not stopped_or_ended()
            """
        )
    )
    session.hear(b"entered")
    assert session.is_raw
    job = os.tcgetpgrp(session.master)
    os.kill(job, signal.SIGTSTP)
    session.hear(b"stopped")
    assert termios.tcgetattr(session.slave) == session.before
    os.write(session.master, b"f\n")
    wait_for_mode(session, raw=True)
    os.kill(job, signal.SIGTERM)
    assert session.end() == 0


def test_in_the_background_until_brought_forward(start: Start) -> None:
    """`pyvmm run … &`: neither stopped by SIGTTOU nor in the shell's way; raw after `fg`."""
    session = start(
        JOB
        + textwrap.dedent(
            """
            os.write(go_writer, b"x")
            while os.read(0, 1) != b"f":
                pass
            os.tcsetpgrp(0, job)
            os.kill(-job, signal.SIGCONT)
            assert not stopped_or_ended()
            """
        )
    )
    session.hear(b"entered")
    assert not session.is_raw
    os.write(session.master, b"f\n")
    wait_for_mode(session, raw=True)
    os.kill(os.tcgetpgrp(session.master), signal.SIGTERM)
    assert session.end() == 0


# --- no terminal ---------------------------------------------------------------------------------

WHOLE_CONSOLE = """
import sys
from pyvmm.platform import serial as uart
from pyvmm.platform.console import Console, standard_fds
from pyvmm.platform.serial import Serial
import threading
interrupt = threading.Semaphore(0)
def on_quit():
    raise SystemExit("not a keyboard")
with Console(*standard_fds(), on_quit=on_quit) as console:
    port = Serial(lambda level: level and interrupt.release(), console.write)
    console.connect(port)
    port.write(uart.FCR, 1, 1)
    port.write(uart.IER, 1, uart.IER_RDI)
    for byte in b"up;":
        port.write(uart.THR, 1, byte)
    left = int(sys.argv[1])
    while left:
        interrupt.acquire()
        while port.read(uart.LSR, 1) & uart.LSR_DR:
            port.write(uart.THR, 1, port.read(uart.RBR, 1))
            left -= 1
"""


def run_console(count: int, shell: str, cwd: Path, stdin: bytes = b"") -> bytes:
    """The console's output for a guest that echoes `count` bytes, under shell redirections."""
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'exec "$0" -c "$1" "$2" {shell}',
            sys.executable,
            WHOLE_CONSOLE,
            str(count),
        ],
        input=stdin,
        capture_output=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        cwd=cwd,
    )
    assert done.returncode == 0
    assert done.stderr == b""
    return done.stdout


@pytest.mark.parametrize("shell", ["</dev/null", "<&-"], ids=["dev-null", "closed"])
def test_output_without_input(shell: str, tmp_path: Path) -> None:
    assert run_console(0, shell, tmp_path) == b"up;"


def test_binary_pipe_passes_clean(tmp_path: Path) -> None:
    data = bytes(range(256)) * 20 + b"\x01x\x01h\x01\x01"
    assert run_console(len(data), "", tmp_path, data) == b"up;" + data


def test_regular_file_as_input(tmp_path: Path) -> None:
    (tmp_path / "script").write_bytes(b"one\ntwo\n\x01x")
    assert run_console(10, "<script", tmp_path) == b"up;one\ntwo\n\x01x"


def test_closed_standard_output(tmp_path: Path) -> None:
    assert run_console(0, ">&-", tmp_path) == b""


def test_the_terminal_quits_with_ctrl_a_x(start: Start) -> None:
    session = start(
        """
        import threading
        from pyvmm.platform.console import Console
        from pyvmm.platform.serial import Serial
        quit_pressed = threading.Event()
        with Console(0, 1, on_quit=quit_pressed.set) as console:
            console.connect(Serial(lambda level: None, console.write))
            say(b"raw")
            quit_pressed.wait()
        """
    )
    session.hear(b"raw")
    os.write(session.master, b"typed before\x01h")
    shown = b""
    while b"end the guest" not in shown:
        shown += os.read(session.master, 1000)
    assert b"typed before" not in shown  # no echo by the terminal
    os.write(session.master, b"\x01x")
    assert session.end() == 0
