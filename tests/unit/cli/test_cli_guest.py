"""`pyvmm exec`, `cp` and `run … -- CMD` as far as they need no guest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_rig import compile_agent, needs_compiler, running

from pyvmm import images
from pyvmm.agent import Agent
from pyvmm.cli import guest
from pyvmm.cli.commands import run_command as by_click
from pyvmm.cli.quick import split_command
from pyvmm.errors import ConfigError
from pyvmm.host import unix_sockets
from pyvmm.images.bootable import MachineImage
from pyvmm.images.user_image import Process
from pyvmm.kinds.vsock import Spec as Vsock
from pyvmm.monitor import run_command
from pyvmm.monitor.attached import attach, terminal_size
from pyvmm.spec.vm import DiskSpec, VmSpec


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place for control sockets where no VM runs."""
    (tmp_path / "run").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("argv", "code", "why"),
    [
        (["exec", "vm"], 2, "no command; pyvmm exec vm -- uname -r"),
        (["exec", "vm", "--"], 2, "no command"),
        (["exec"], 2, "see pyvmm exec --help"),
        (["exec", "--wait"], 2, "'--wait' requires an argument; see pyvmm exec --help"),
        (["exec", "vm", "--", "true"], 2, "no VM called 'vm' is running; pyvmm ps lists"),
        (["exec", "-e", "=x", "vm", "true"], 2, "-e: '=x' is not a variable"),
        (["exec", "--timeout=0", "vm", "true"], 2, "--timeout"),
        (["exec", "--wait=1", "vm", "true"], 2, "no VM called 'vm'"),
        (["cp", "a", "b"], 2, "one of the two, and one only, has to be in a guest; write VM:PATH"),
        (["cp", "vm:a", "vm:b"], 2, "one of the two, and one only, has to be in a guest"),
        (["cp", "./vm:a", "b"], 2, "one of the two, and one only, has to be in a guest"),
        (["cp", "/etc/hosts", "vm:/x"], 2, "no VM called 'vm' is running"),
        (["cp", "vm:", "x"], 2, "vm: names no file; write vm:/ for all of it"),
        (["exec", "--timeout=nan", "vm", "true"], 2, "not a number of seconds"),
        (["exec", "--timeout=inf", "vm", "true"], 2, "not a number of seconds"),
        (["exec", "--wait=1e300", "vm", "true"], 2, "not a number of seconds"),
        (["stop", "--timeout=inf", "vm"], 2, "not a number of seconds"),
        (["exec", "", "true"], 2, "pyvmm: an empty text is not a name"),
        (["stop", ""], 2, "pyvmm: an empty text is not a name"),
        (["logs", ""], 2, "pyvmm: VM: an empty text is not a name"),
        (["disk", "add", "", "x"], 2, "pyvmm: an empty text is not a name"),
        (["exec", "a/b", "true"], 2, "pyvmm: the name 'a/b' is not printable, has a slash"),
        (
            ["run", "--kernel=k", "--name", "a:b"],
            2,
            "--name: the name 'a:b' is not printable, has a slash or a colon",
        ),
        (["cp", "vm:/x", "."], 2, "no VM called 'vm' is running"),
        (
            ["run", "--detach", "--kernel", "/k", "--", "true"],
            2,
            "--detach: a command is waited for",
        ),
        (["run", "--rm", "--kernel=/k", "--disk=d,direct", "--", "true"], 2, "cannot be direct"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_one_line(argv, code, why, capfd) -> None:
    assert by_click(argv) == code
    out, err = capfd.readouterr()
    assert out == ""
    assert why in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "options", "command"),
    [
        (["debian"], ["debian"], ()),
        (["debian", "--"], ["debian"], ()),
        (["--rm", "--", "ls", "--", "-l"], ["--rm"], ("ls", "--", "-l")),
        (["--", "--help"], [], ("--help",)),
    ],
)
def test_the_command_is_what_follows_the_first_two_dashes(words, options, command) -> None:
    assert split_command(words) == (options, command)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("vm:/etc", ("vm", "/etc")),
        ("vm:", ("vm", "")),
        ("vm:a:b", ("vm", "a:b")),
        ("/a:b", (None, "/a:b")),
        ("./a:b", (None, "./a:b")),
        (":b", (None, ":b")),
        ("file", (None, "file")),
    ],
)
def test_a_place_is_here_or_in_a_vm(text: str, parts: tuple[str | None, str]) -> None:
    assert guest._split(text) == parts


def test_an_image_without_the_agent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    old = MachineImage("old", "kernel", "initrd", "disk")
    monkeypatch.setattr(images, "machine_image", lambda name, make: old)
    with pytest.raises(ConfigError, match="image old was made without the agent"):
        run_command.for_image(["true"], "old")


def test_a_container_image_says_how_a_command_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    process = Process(("/entry",), ("default",), ("A=b",), "/srv", "7:8")
    image = MachineImage("box", "kernel", "initrd", "disk", has_agent=True, process=process)
    monkeypatch.setattr(images, "machine_image", lambda name, make: image)
    line = run_command.for_image(["own", "-x"], "box")
    assert line.argv == ("/entry", "own", "-x")
    assert (line.env, line.cwd, line.user) == (("A=b",), "/srv", "7:8")


def test_a_guest_for_a_command_has_vsock_and_a_root_disk_to_throw_away() -> None:
    disks = (DiskSpec("root"), DiskSpec("data"))
    spec = run_command.for_command(VmSpec("k", disks=disks, cmdline="loglevel=7"), rm=True)
    assert spec.devices == (Vsock(),)
    assert [disk.snapshot for disk in spec.disks] == [True, False]
    assert spec.cmdline.split() == ["quiet", "pyvmm.exec=agent", "loglevel=7"]
    assert spec.keeps, "the second disk is the user's"


@pytest.mark.parametrize(
    "disk",
    [
        DiskSpec("root", snapshot=True),
        DiskSpec("root", read_only=True),
        DiskSpec("root", overlay="changes"),
        DiskSpec("ram:1M"),
    ],
)
def test_a_root_disk_that_says_otherwise_stays_as_it_is(disk: DiskSpec) -> None:
    own = (Vsock(path="/run/x"),)
    spec = run_command.for_command(VmSpec("k", disks=(disk,), devices=own), rm=True)
    assert (spec.disks, spec.devices) == ((disk,), own)
    assert spec.keeps == (disk.overlay is not None)


def test_without_rm_nothing_is_thrown_away() -> None:
    spec = run_command.for_command(VmSpec("k", disks=(DiskSpec("root"),)), rm=False)
    assert not spec.disks[0].snapshot


def test_a_terminals_size_has_a_default() -> None:
    with open(os.devnull) as file:
        assert terminal_size(None, file.fileno()) == (24, 80)


# The program that `pyvmm exec` is, once it has its agent: joined to real streams and signals.
ATTACH = """
import sys
from pyvmm.agent import Agent
from pyvmm.monitor.attached import attach
from pyvmm.host import unix_sockets
path, *argv = sys.argv[1:]
process = Agent(lambda: unix_sockets.connect(path)).open(argv, stdin=True)
sys.exit(attach(process, 0, 1, tty=False))
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address at which an agent serves."""
    program = compile_agent(tmp_path_factory.mktemp("program"))
    with running(program, tmp_path_factory.mktemp("served")) as (_, path, _):
        yield str(path)


@needs_compiler
class TestAttached:
    def attach(self, path: str, *argv: str) -> subprocess.Popen[bytes]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, "-c", ATTACH, path, *argv], **pipes)

    def test_streams_and_code_are_the_commands(self, path: str) -> None:
        with self.attach(path, "sh", "-c", "cat; echo err >&2; exit 9") as client:
            out, err = client.communicate(bytes(range(256)) * 2000, timeout=60)
        assert (client.returncode, err) == (9, b"err\n")
        assert out == bytes(range(256)) * 2000

    @pytest.mark.parametrize(
        ("argv", "code"),
        [(["sh", "-c", "kill -9 $$"], 137), (["no-such-command"], 127), (["/etc"], 126)],
    )
    def test_ends_that_are_no_codes_of_its_own(self, path: str, argv, code: int) -> None:
        with self.attach(path, *argv) as client:
            client.communicate(timeout=60)
        assert client.returncode == code

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_signals_reach_the_command(self, path: str, number: signal.Signals) -> None:
        script = 'trap "echo caught; exit 5" INT TERM HUP; echo ready; while :; do sleep 0.1; done'
        with self.attach(path, "sh", "-c", script) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == b"ready\n"
            client.send_signal(number)
            assert client.stdout.readline() == b"caught\n"
            assert client.wait(60) == 5

    def test_a_reader_that_goes_away_ends_it(self, path: str) -> None:
        with self.attach(path, "cat", "/dev/zero") as client:
            assert client.stdout is not None
            client.stdout.read(1)
            client.stdout.close()
            assert client.wait(60) == 141


@needs_compiler
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["{}/reboot"], 0),
        (["{}/busybox", "poweroff", "-f"], 0),
        (["{}/systemctl", "--force", "reboot"], 0),
        (["{}/systemctl", "restart", "reboot"], 1),
        (["{}/other", "reboot"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_reboot_that_was_asked_for_is_no_failure(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, words: list[str], code: int
) -> None:
    argv = [word.format(tmp_path) for word in words]
    # As the guest's init does it: the agent ends before it can tell of the command. More than a
    # pipe holds is written first, so that the agent has told that the command has started.
    program = Path(argv[0])
    program.write_text("#!/bin/sh\nhead -c 200000 /dev/zero\nkill -9 $PPID\n")
    program.chmod(0o755)
    agent = Agent(lambda: unix_sockets.connect(path))
    monkeypatch.setattr(guest, "agent_of", lambda vm: agent)
    assert by_click(["exec", "vm", "--", *argv]) == code
    assert ("the guest's agent has ended" in capfd.readouterr().err) == bool(code)


def test_a_command_that_has_ended_already_is_attached_all_the_same(tmp_path: Path) -> None:
    from agent_rig import liar, saying

    from pyvmm.agent.protocol import EXIT, FrameType, frame

    with (
        liar(saying(frame(FrameType.EXIT, EXIT.pack(0, 4)), stay=True)) as agent,
        agent.open(["true"], stdin=True) as process,
    ):
        assert isinstance(agent, Agent)
        assert attach(process, None, None, tty=False) == 4


def test_a_nul_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match="a NUL"):
        guest.agent_of("vm").open(["a\0"])
