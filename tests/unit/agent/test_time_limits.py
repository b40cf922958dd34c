"""Time limits and Ctrl-C hold whatever the guest does: by the host's clock, by the second signal.

The control socket, its server and the agent are the real ones; the guest between them stands still
when it is told to.
"""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from agent_rig import GREETING, Guest, compile_agent, liar, needs_compiler, running, vm_of

from pyvmm.agent import PORT, Agent, CommandTimeout, NoAgent, Process, client
from pyvmm.agent.errors import TimeLimit
from pyvmm.agent.protocol import Entry, FrameType, entry_frame, frame
from pyvmm.api.aio import AsyncCommand
from pyvmm.api.command import Command
from pyvmm.control import client as control_client
from pyvmm.control import registry
from pyvmm.control.client import NoAnswer, connect_vsock
from pyvmm.control.protocol import ControlError, Upgrade
from pyvmm.errors import HostError
from pyvmm.host import unix_sockets

HANG = 60.0  # seconds; no measure of speed
LIMIT = 0.2
PYVMM = [sys.executable, "-m", "pyvmm"]
STUBBORN = ["sh", "-c", "trap '' INT TERM HUP; echo begun; while :; do sleep 0.1; done"]


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The address at which an agent serves."""
    program = compile_agent(tmp_path_factory.mktemp("program"))
    with running(program, tmp_path_factory.mktemp("served")) as (_, path, _):
        yield path


@pytest.fixture
def guest(path: Path) -> Iterator[Guest]:
    """The guest of the VM called vm."""
    with vm_of(Guest(path)) as found:
        yield found


def pyvmm(*words: str, **options) -> subprocess.Popen[bytes]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen([*PYVMM, *words], **pipes)


def begun(*words: str, **options) -> subprocess.Popen[bytes]:
    """`pyvmm exec`, which has seen that its command runs."""
    client = pyvmm("exec", *words, **options)
    assert client.stdout is not None
    assert client.stdout.readline() == b"begun\n"
    return client


def begun_with_limit(*words: str) -> subprocess.Popen[bytes]:
    """The same with a time limit in which the command has begun: on a busy machine a longer one."""
    for limit in (1, 4, 16):
        client = pyvmm("exec", f"--timeout={limit}", *words)
        assert client.stdout is not None
        if client.stdout.readline() == b"begun\n":
            return client
        with client:
            assert client.wait(HANG) == 124
    pytest.fail("no command begins in 16 s")


def test_a_user_who_is_not_in_the_guest_is_one_line_with_its_option(guest: Guest) -> None:
    client = pyvmm("exec", "--user", "nobody-here", "vm", "true")
    _, said = client.communicate(timeout=HANG)
    why = b"pyvmm: --user: in the guest: no such user: 'nobody-here'\n"
    assert (client.returncode, said) == (126, why)


def end_by(
    client: subprocess.Popen[bytes],
    *numbers: signal.Signals,
    send: Callable[[int, int], None] = os.kill,
) -> int:
    """The exit code, after `numbers`, each once the one before was looked at."""
    with client:
        for number in numbers:
            wait_for(lambda: client.poll() is not None or _has_no_signals(client.pid))
            time.sleep(0.3)
            send(client.pid, number)
        return client.wait(HANG)


def _has_no_signals(pid: int) -> bool:
    """True once it, and the child that it passes them on to, have taken all that they were sent.
    Two of a number, the first not taken yet, would be one."""
    if _signals(pid, "ShdPnd"):
        return False
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return not any(_signals(child, "ShdPnd") & ~_signals(child, "SigBlk") for child in children)


def _signals(pid: int | str, kind: str) -> int:
    """One of the sets of signals in /proc/PID/status, bit n - 1 for signal n; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith(f"{kind}:")]
    return int(found[0], 16) if found else 0


# --- exec ----------------------------------------------------------------------------------------


@needs_compiler
def test_a7_the_limit_holds_where_the_guest_stands_still(guest: Guest) -> None:
    client = begun_with_limit("vm", "--", *STUBBORN)
    guest.stand_still()
    with client:
        assert client.wait(HANG) == 124
        assert client.stderr is not None
        assert client.stderr.read() == b"pyvmm: sh took too long and was ended\n"


@needs_compiler
def test_a7_the_limit_holds_before_the_guest_has_heard_of_the_command(guest: Guest) -> None:
    guest.stand_still()
    with pyvmm("exec", "--timeout=0.5", "vm", "--", "true") as client:
        assert client.wait(HANG) == 124
        assert client.stderr is not None
        assert client.stderr.read() == b"pyvmm: true took longer than 0.5 s\n"


@needs_compiler
def test_the_limit_holds_where_nobody_reads_the_output(guest: Guest) -> None:
    with pyvmm("exec", "--timeout=1", "vm", "--", "sh", "-c", "cat /dev/zero; :") as client:
        assert client.wait(HANG) == 124


def test_a9_the_limit_holds_for_a_monitor_that_does_not_answer() -> None:
    with registry.register("vm"), pyvmm("exec", "--timeout=0.5", "vm", "--", "true") as client:
        assert client.wait(HANG) == 124


@needs_compiler
@pytest.mark.parametrize("frozen", [False, True], ids=["living", "frozen"])
@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ((signal.SIGINT, signal.SIGINT), 130),
        ((signal.SIGTERM, signal.SIGTERM), 143),
        ((signal.SIGINT, signal.SIGTERM), 143),
        ((signal.SIGTERM, signal.SIGHUP), 129),
    ],
)
def test_a8_a_second_signal_ends_the_client(guest: Guest, frozen: bool, numbers, code: int) -> None:
    client = begun("vm", "--", *STUBBORN)
    if frozen:
        guest.stand_still()
    assert end_by(client, *numbers) == code


@needs_compiler
def test_a_second_signal_ends_a_client_whose_output_nobody_reads(guest: Guest) -> None:
    client = pyvmm("exec", "vm", "--", "cat", "/dev/zero")
    assert client.stdout is not None
    client.stdout.read(1)
    time.sleep(0.5)  # the pipe fills up
    guest.stand_still()
    assert end_by(client, signal.SIGINT, signal.SIGINT) == 130


@needs_compiler
def test_the_first_signal_is_the_commands(guest: Guest) -> None:
    command = 'trap "echo caught; exit 5" INT; echo begun; while :; do sleep 0.1; done'
    client = begun("vm", "--", "sh", "-c", command)
    assert end_by(client, signal.SIGINT) == 5


# Ends by the third Ctrl-C. A shell that waits for another program may miss one.
THIRD_TIME = """
import itertools, os, signal, sys
count = itertools.count(1)
def caught(number, frame):
    n = next(count)
    os.write(1, b"caught %d\\n" % n)  # print() would not like a signal that comes meanwhile
    if n == 3:
        sys.exit(7)
signal.signal(signal.SIGINT, caught)
os.write(1, b"begun\\n")
while True:
    signal.pause()
"""


@needs_compiler
@pytest.mark.parametrize("frozen", [False, True], ids=["living", "frozen"])
def test_a_terminals_ctrl_c_is_the_guests_unless_it_takes_none(guest: Guest, frozen: bool) -> None:
    ours, theirs = os.openpty()
    words = ["exec", "-it", "vm", "--", sys.executable, "-c", THIRD_TIME]
    client = pyvmm(*words, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    read_until(ours, b"begun")
    if frozen:
        guest.stand_still()
        os.write(ours, b"\x03\x03")
    for number in () if frozen else (1, 2, 3):
        os.write(ours, b"\x03")
        read_until(ours, b"caught %d" % number)
    assert client.wait(HANG) == (130 if frozen else 7)
    os.close(ours)


def read_until(fd: int, wanted: bytes) -> bytes:
    said = b""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    while wanted not in said:
        assert poll.poll(HANG * 1000), said
        try:
            said += os.read(fd, 4096)
        except OSError as error:  # EIO: the other side has ended
            raise AssertionError(said) from error
    return said


# --- cp ------------------------------------------------------------------------------------------


def endless(end) -> None:
    """A tree without end, which begins with a file that stays half."""
    entry = Entry(0o755, 0, 0, b"x")
    end.sendall(GREETING + entry_frame(FrameType.DIRECTORY, entry))
    while True:
        head = entry_frame(FrameType.REGULAR, entry._replace(name=os.urandom(8).hex().encode()))
        end.sendall(head + frame(FrameType.DATA, b"x" * 100) + frame(FrameType.UP))
        end.sendall(frame(FrameType.SKIPPED, bytes(24) + b"device") * 100)


def half(end) -> None:
    """A file that never comes whole."""
    end.sendall(GREETING + entry_frame(FrameType.REGULAR, Entry(0o644, 0, 9, b"x")))
    end.sendall(frame(FrameType.DATA, b"half"))
    while end.recv(1 << 16):
        pass


@pytest.mark.parametrize("serve", [endless, half])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a5_a_copy_ends_by_a_signal_with_nothing_half_done(serve, number, code, tmp_path) -> None:
    (tmp_path / "target").mkdir()
    with vm_of(Guest(serve)) as guest:
        client = pyvmm("cp", "vm:/x", str(tmp_path / "target"))
        assert guest.reached.acquire(timeout=HANG)
        wait_for(lambda: any((tmp_path / "target").iterdir()))
        assert end_by(client, number) == code
    assert not list((tmp_path / "target").rglob(".pyvmm*"))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- a VM that is paused -------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize(
    "words",
    [
        ["exec", "vm", "--", "true"],
        ["exec", "--timeout=50", "vm", "--", "true"],
        ["exec", "--wait=50", "vm", "--", "true"],
        ["cp", "vm:/etc/hosts", "."],
        ["cp", "/etc/hosts", "vm:/"],
    ],
    ids=" ".join,
)
def test_a9_a_paused_vm_is_named_as_such_at_once(guest: Guest, words: list[str], tmp_path) -> None:
    guest.state = "paused"
    with pyvmm(*words, cwd=tmp_path) as client:
        assert client.wait(HANG) == 1
        assert client.stderr is not None
        assert client.stderr.read() == b"pyvmm: vm is paused; pyvmm resume vm has it go on\n"


@needs_compiler
def test_a_vm_that_is_paused_while_it_is_reached_is_named_too(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pausing(Guest):
        """It is paused right after somebody has reached for it."""

        pauses = False

        def _connect(self, port: int) -> Upgrade:
            found = super()._connect(port)
            self.state = "paused" if self.pauses else "running"
            return found

    monkeypatch.setattr(control_client, "_LOOK_SECONDS", HANG)
    with vm_of(Pausing(path)) as guest:
        guest.stand_still()
        with pytest.raises(NoAnswer, match="the guest of vm does not answer"):
            connect_vsock("vm", PORT, patience=2)
        guest.pauses = True
        with pytest.raises(ControlError, match="vm is paused; pyvmm resume vm"):
            connect_vsock("vm", PORT, patience=2)


# --- Python --------------------------------------------------------------------------------------


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """An agent that begins a command, and says no more. What it says is there from the start."""
    monkeypatch.setattr(client, "_GRACE", LIMIT)
    ends: list[socket.socket] = []

    def connect() -> unix_sockets.Socket:
        ours, theirs = socket.socketpair()
        theirs.sendall(GREETING + frame(FrameType.STDOUT, b"begun"))
        ends.append(theirs)
        return unix_sockets.adopt(ours.detach())

    yield Agent(connect)
    for end in ends:
        end.close()


def test_a_command_that_is_waited_for_in_any_way_is_given_up(silent: Agent) -> None:
    with pytest.raises(TimeLimit, match=r"true took longer than 0\.2 s") as caught:
        silent.run(["true"], timeout=LIMIT)
    assert caught.value.stdout == b"begun"
    for wait in (Process.wait, lambda process: list(process.events()), _by_poll):
        with silent.open(["true"], timeout=LIMIT) as process:
            wait(process)
            assert process.timed_out
            assert process.returncode == -signal.SIGKILL
            assert process.read() is None


def _by_poll(process: Process) -> None:
    poll = select.poll()
    poll.register(process.fileno(), select.POLLIN)
    while process.returncode is None:
        assert process.deadline is not None
        poll.poll(max(0.0, process.deadline - time.monotonic()) * 1000)
        process.receive()


def test_input_that_a_guest_never_reads_is_no_way_past_the_limit(monkeypatch) -> None:
    monkeypatch.setattr(client, "_GRACE", LIMIT)
    grants = frame(FrameType.MORE_STDIN, b"\0\0\1\0")

    def act(end) -> None:
        end.sendall(GREETING)
        while True:
            end.sendall(grants)

    with liar(act) as agent, pytest.raises(TimeLimit):
        agent.run(["cat"], input=bytes(8 << 20), timeout=LIMIT)


def test_a_shorter_wait_than_the_limit_is_just_a_wait(silent: Agent) -> None:
    with silent.open(["true"], timeout=HANG) as process:
        assert process.read() == (1, b"begun")
        with pytest.raises(CommandTimeout):
            process.read(LIMIT)
        assert (process.returncode, process.timed_out) == (None, False)


def test_asyncio_gives_a_command_up_as_well(silent: Agent) -> None:
    async def wait() -> int:
        process = silent.open(["true"], timeout=LIMIT)
        async with asyncio.timeout(HANG), AsyncCommand(Command(process, nullcontext)) as command:
            return await command.wait()

    assert asyncio.run(wait()) == -signal.SIGKILL


@pytest.mark.parametrize("copy", ["push", "pull"])
def test_copies_have_a_limit(copy: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 << 20))

    def act(end) -> None:
        if copy == "pull":
            endless(end)
        end.sendall(GREETING)  # and reads nothing
        poll = select.poll()
        poll.register(end.fileno(), select.POLLRDHUP)
        poll.poll(HANG * 1000)

    (tmp_path / "target").mkdir()
    with liar(act) as agent, pytest.raises(TimeLimit, match=r"the copy took longer than 0\.2 s"):
        getattr(agent, copy)(str(tmp_path / "file"), str(tmp_path / "target"), timeout=LIMIT)


def test_whatever_has_a_limit_tells_the_connection_of_it() -> None:
    told: list[float] = []

    def connect(seconds: float):
        told.append(seconds)
        raise NoAnswer("vm does not answer")

    agent = Agent(connect)
    with pytest.raises(NoAnswer):
        agent.run(["true"], timeout=5)
    with pytest.raises(NoAnswer):
        agent.wait_ready(500)
    for ask in (agent.clock, agent.set_clock, agent.power_off, lambda: agent.run(["true"])):
        with pytest.raises(NoAnswer):
            ask()
    assert 0 < told[0] <= 5
    assert 400 < told[1] <= 500
    assert max(told[2:]) <= 60


def test_a_connection_that_takes_all_the_time_is_late() -> None:
    def connect(seconds: float):
        time.sleep(seconds)
        raise NoAnswer("vm does not answer")

    agent = Agent(connect)
    with pytest.raises(TimeLimit):
        agent.run(["true"], timeout=LIMIT)
    with pytest.raises(CommandTimeout, match="vm does not answer"):
        agent.power_off(timeout=LIMIT)


@pytest.mark.parametrize(
    "make",
    [
        lambda connect: lambda: connect(),
        lambda connect: lambda name="vm": connect(),
        lambda connect: lambda *, patience=1.0: connect(),
        lambda connect: lambda *arguments: connect(),
    ],
)
def test_a_connection_that_wants_no_limit_is_told_none(make) -> None:
    def connect():
        raise NoAnswer("asked")

    with pytest.raises(NoAnswer, match="asked"):
        Agent(make(connect)).run(["true"], timeout=5)


def test_waiting_for_an_agent_ends_in_time_where_a_guest_only_greets_slowly() -> None:
    def act(end) -> None:
        time.sleep(2 * LIMIT)

    with liar(act) as agent, pytest.raises(NoAgent):
        agent.wait_ready(LIMIT)


# --- run … -- CMD --------------------------------------------------------------------------------

# The monitor of a machine that is not there: it ends by the second SIGTERM.
RUN = """
import os, select, signal, sys, threading
from pathlib import Path
from agent_rig import Guest
from pyvmm.monitor.run_command import CommandLine, run_with_command
from pyvmm.control import client as control_client
from pyvmm.control import registry
from pyvmm.control.server import ControlServer
from pyvmm.spec.vm import VmSpec

path, still, *argv = sys.argv[1:]
asked = threading.Semaphore(0)
signal.signal(signal.SIGTERM, lambda *_: asked.release())  # from the start, as it may come early
guest = Guest(Path(path))
registration = registry.register("vm")

def run():
    if still == "deaf":
        select.select([registration.listener], [], [])
        return 15
    server = ControlServer(registration.listener, guest.methods().get)
    server.start()
    for _ in range(2):
        while not asked.acquire(timeout=0.1):
            if os.path.exists(still):
                guest.state = "paused"
                guest.stand_still()
    registration.close()
    return 15

spec = VmSpec("kernel", name="vm")
line = CommandLine(tuple(argv), user=os.environ.get("AS"), user_option="--guest-user")
sys.exit(run_with_command(spec, registration.listener, run, line, debug=False)[0])
"""


@needs_compiler
class TestRunCommand:
    def launch(self, path: Path, *argv: str, still: Path | str = "") -> subprocess.Popen[bytes]:
        folder = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        return subprocess.Popen(
            [sys.executable, "-c", RUN, path, still, *argv],
            **{"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
            env=environment,
            start_new_session=True,
        )

    def start(self, path: Path, *argv: str, still: Path | str = "") -> subprocess.Popen[bytes]:
        client = self.launch(path, *argv, still=still)
        assert client.stdout is not None
        assert client.stdout.readline() == b"begun\n", client.stderr and client.stderr.read()
        return client

    def test_a_user_who_is_not_in_the_guest_is_one_line_with_its_option(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AS", "nobody-here")
        client = self.launch(path, "true")
        _, said = client.communicate(timeout=HANG)
        why = b"--guest-user: in the guest: no such user: 'nobody-here'"
        assert (client.returncode, said.splitlines()[0].rpartition(b"pyvmm: ")[2]) == (126, why)

    def test_two_ctrl_c_end_it(self, path: Path) -> None:
        client = self.start(path, *STUBBORN)
        assert end_by(client, signal.SIGINT, signal.SIGINT) == 130

    def test_two_ctrl_c_of_a_terminal_end_it(self, path: Path) -> None:
        client = self.start(path, *STUBBORN)
        assert end_by(client, signal.SIGINT, signal.SIGINT, send=os.killpg) == 130

    def test_one_ctrl_c_is_the_commands_and_counts_once(self, path: Path) -> None:
        command = 'trap "echo caught; exit 9" INT; echo begun; while :; do sleep 0.1; done'
        for send in (os.killpg, os.kill):
            client = self.start(path, "sh", "-c", command)
            with client:
                time.sleep(0.3)
                send(client.pid, signal.SIGINT)
                assert client.stdout is not None
                assert client.stdout.readline() == b"caught\n"
                assert client.wait(HANG) == 9

    def test_a_paused_guest_holds_nobody(self, path: Path, tmp_path: Path) -> None:
        client = self.start(path, *STUBBORN, still=tmp_path / "still")
        (tmp_path / "still").touch()
        assert end_by(client, signal.SIGINT, signal.SIGINT) == 130

    def test_one_ctrl_c_ends_a_guest_that_never_comes_up(self, tmp_path: Path) -> None:
        client = self.launch(tmp_path / "no agent", "true")
        with client:
            # From then on a Ctrl-C is passed on, and no exception.
            wait_for(lambda: bool(_signals(client.pid, "SigBlk") >> signal.SIGINT - 1 & 1))
            client.send_signal(signal.SIGINT)
            assert client.wait(HANG) == 130, client.stderr and client.stderr.read()

    def test_a_monitor_that_ends_while_it_is_asked_is_not_waited_for(self, tmp_path: Path) -> None:
        """Its socket has the connection, which nobody takes any more."""
        client = self.launch(tmp_path / "no agent", "true", still="deaf")
        with client:
            assert client.wait(HANG) == 15, client.stderr and client.stderr.read()

    def test_without_its_client_the_monitor_ends(self, path: Path) -> None:
        client = self.start(path, *STUBBORN)
        [child] = Path(f"/proc/{client.pid}/task/{client.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        with client:
            assert client.wait(HANG) == 15


def test_a_guest_without_an_agent_is_named_so_though_the_last_try_had_no_time_for_an_answer() -> (
    None
):
    tries: list[float] = []

    def connect(seconds: float):
        tries.append(seconds)
        if len(tries) == 1:
            raise HostError(errno.ECONNREFUSED, "port 1023 of the guest")
        time.sleep(seconds)
        raise NoAnswer("vm does not answer")

    with pytest.raises(NoAgent, match="after 3 s"):
        Agent(connect).wait_ready(3)
    assert len(tries) > 1


def test_a_monitor_that_does_not_answer_is_not_taken_for_a_guest_without_an_agent() -> None:
    def connect(seconds: float):
        time.sleep(seconds)
        raise NoAnswer("vm does not answer")

    with pytest.raises(NoAnswer):
        Agent(connect).wait_ready(LIMIT)
