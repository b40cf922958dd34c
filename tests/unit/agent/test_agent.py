"""The guest's agent and its client: the C program itself, with sanitizers, at a Unix socket."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import select
import signal
import socket
import stat
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_rig import compile_agent, needs_compiler, running

from pyvmm.agent import Agent, AgentError, CommandTimeout, NoAgent
from pyvmm.agent.process import run_request, window_size
from pyvmm.agent.protocol import HEADER, RUN, WANTS_STDIN, WINDOW, WINDOW_SIZE, FrameType, frame
from pyvmm.errors import ConfigError, HostError
from pyvmm.monitor.attached import attach

pytestmark = needs_compiler
BULK = random.Random(9).randbytes(1_000_003)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Agent, Path, Path]]:
    program = compile_agent(tmp_path_factory.mktemp("program"))
    with running(program, tmp_path_factory.mktemp("served")) as parts:
        yield parts
        log = parts[2].read_text()
        assert "Sanitizer" not in log and "runtime error" not in log, log


@pytest.fixture
def agent(served: tuple[Agent, Path, Path]) -> Agent:
    return served[0]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int) -> None:
    for _ in range(600):
        if not alive(pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} still runs")


@pytest.mark.parametrize(
    "said",
    [
        HEADER.pack(FrameType.RUN | 0xFFFFFF << 8),
        frame(FrameType.MORE_STDIN),
        b"GET / HTTP/1.0\r\n\r\n",
    ],
    ids=["too long", "not a request", "no frame"],
)
def test_s8_a_bad_frame_ends_its_own_session(served: tuple[Agent, Path, Path], said: bytes) -> None:
    agent, path, _ = served
    with agent.open(["cat"], stdin=True) as other, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(said)
        client.shutdown(socket.SHUT_WR)
        while client.recv(4096):
            pass  # its greeting, and why it ends
        other.write(b"still there")
        said_back = other.read(60)
        assert said_back is not None and said_back[1] == b"still there"
        other.close_stdin()
        assert other.wait(60) == 0
    assert agent.run(["true"]).returncode == 0


# --- commands ------------------------------------------------------------------------------------


def test_output_errors_and_exit_code_come_apart(agent: Agent) -> None:
    done = agent.run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    with pytest.raises(AgentError, match="sh exited with 3: err"):
        agent.run(["sh", "-c", "echo err >&2; exit 3"], check=True)


def test_much_input_and_output_goes_through_unchanged(agent: Agent) -> None:
    assert agent.run(["cat"], input=BULK).stdout == BULK


def test_without_input_a_command_reads_none(agent: Agent) -> None:
    assert agent.run(["cat"]).stdout == b""


def test_input_that_nobody_reads_does_not_hold_up_the_end(agent: Agent) -> None:
    assert agent.run(["true"], input=BULK).returncode == 0
    assert agent.run(["sh", "-c", "exec <&-; sleep 0.1; echo done"], input=BULK).stdout == b"done\n"


def test_a_command_takes_input_until_it_or_its_input_has_ended(agent: Agent) -> None:
    with agent.open(["sleep", "1000"]) as none:
        assert (none.room, none.write(b"x")) == (0, 0)
    with agent.open(["sleep", "1000"], stdin=True) as closed:
        assert closed.room == WINDOW and closed.write(b"x") == 1
        assert closed.room == WINDOW - 1
        closed.close_stdin()
        assert (closed.room, closed.write(b"x")) == (0, 0)
    with agent.open(["echo", "out"], stdin=True) as ended:
        assert ended.read() == (1, b"out\n") and ended.read() is None
        assert (ended.returncode, ended.room, ended.write(b"x")) == (0, 0, 0)
        assert (ended.receive(), ended.read()) == ([], None)
        ended.close_stdin()
        ended.kill(signal.SIGTERM)
        ended.resize(1, 1)


def test_the_environment_is_a_plain_one_and_what_is_asked_for(agent: Agent, tmp_path: Path) -> None:
    show = 'echo "$A|$HOME|$PATH|$PWD|${PYTEST_CURRENT_TEST-unset}"'
    done = agent.run(["sh", "-c", show], env={"A": "b=c d", "HOME": "/x"}, cwd=str(tmp_path))
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert done.stdout.decode() == f"b=c d|/x|{path}|{tmp_path}|unset\n"


def test_a_signal_is_negative_as_in_subprocess(agent: Agent) -> None:
    assert agent.run(["sh", "-c", "kill -USR1 $$"]).returncode == -signal.SIGUSR1


@pytest.mark.parametrize(
    ("argv", "options", "number", "why"),
    [
        (["no-such-command"], {}, errno.ENOENT, "no-such-command: No such file"),
        (["/etc"], {}, errno.EACCES, "/etc: Permission denied"),
        (["true"], {"cwd": "/no/where"}, errno.ENOENT, "/no/where: No such file"),
        (["true"], {"user": "no-such-user"}, errno.ENOENT, "no such user: 'no-such-user'$"),
        (
            ["true"],
            {"user": "root:no-such-group"},
            errno.ENOENT,
            "no such group: 'root:no-such-group'$",
        ),
    ],
)
def test_what_cannot_be_started_is_one_line_with_its_errno(agent, argv, options, number, why):
    with pytest.raises(AgentError, match=why) as caught:
        agent.run(argv, **options)
    assert caught.value.errno == number
    assert "\n" not in str(caught.value)


PASSWD = """root:x:0:0:root:/root:/bin/sh
web:x:1234:44:web:/srv:/bin/sh
7000:x:5:6:a name of digits:/odd:/bin/sh
"""
GROUP = """root:x:0:
web:x:44:
log:x:4:web,root
extra:x:77:web
8000:x:8:web
""" + "".join(f"many{number}:x:{number}:crowd\n" for number in range(20000, 20100))
WHO = ["sh", "-c", 'echo "$(id -u) $(id -g) $(id -G | tr " " "\n" | sort -n | xargs) $HOME"']
needs_accounts = pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"]).returncode != 0,
    reason="only root becomes somebody else, and mounts other files over /etc/passwd",
)


@pytest.fixture(scope="module")
def among_accounts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Agent, list[str]]]:
    """An agent where PASSWD and GROUP are /etc's, and the command that runs others there."""
    folder = tmp_path_factory.mktemp("accounts")
    (folder / "passwd").write_text(PASSWD + "crowd:x:99:99::/:/bin/sh\n")
    (folder / "group").write_text(GROUP)
    mounts = "".join(
        f"mount --bind {folder}/{name} /etc/{name} && " for name in ("passwd", "group")
    )
    wrapped = ["unshare", "-m", "sh", "-c", f'{mounts} exec "$@"', "sh"]
    program = compile_agent(folder)
    with running(program, tmp_path_factory.mktemp("served"), wrapped=wrapped) as parts:
        yield parts[0], [*wrapped, str(program)]


# As container engines do it (moby/sys/user, GetExecUser).
ACCOUNTS = [
    ("web", "1234 44 4 8 44 77 /srv"),
    ("1234", "1234 44 4 8 44 77 /srv"),
    ("web:", "1234 44 4 8 44 77 /srv"),
    ("1234:extra", "1234 77 77 /srv"),
    ("web:web", "1234 44 44 /srv"),
    ("web:77", "1234 77 77 /srv"),
    ("web:9999", "1234 9999 9999 /srv"),
    ("12345", "12345 0 0 /"),
    ("12345:log", "12345 4 4 /"),
    ("root", "0 0 0 4 /root"),
    ("0:0", "0 0 0 /root"),
    (":log", "0 4 4 /root"),
    ("7000", "7000 0 0 /"),
    ("web:8000", "1234 8000 8000 /srv"),
    ("web:log:77,44", "1234 4 4 44 77 /srv"),
    ("crowd", " ".join(map(str, ["99 99 99", *range(20000, 20100), "/"]))),
]


@needs_accounts
@pytest.mark.parametrize(("user", "who"), ACCOUNTS, ids=lambda value: value[:20])
def test_a_command_runs_as_whom_it_is_to_and_in_no_other_group(among_accounts, user, who) -> None:
    assert among_accounts[0].run(WHO, user=user, check=True).stdout.decode().strip() == who


@needs_accounts
@pytest.mark.parametrize(("user", "who"), ACCOUNTS, ids=lambda value: value[:20])
def test_what_a_container_image_runs_has_the_same_groups(among_accounts, user, who) -> None:
    done = subprocess.run(
        [*among_accounts[1], "--as", user, *WHO],
        env={"PATH": os.environ["PATH"], "HOME": who.split()[-1]},
        capture_output=True,
        text=True,
    )
    assert (done.stdout.strip(), done.stderr) == (who, "")


@needs_accounts
@pytest.mark.parametrize(
    ("user", "words", "code", "why"),
    [
        ("nobody-here", ["true"], 126, "no such user"),
        ("web:none", ["true"], 126, "no such group"),
        ("web:log:none", ["true"], 126, "no such group"),
        ("web:log:", ["true"], 126, "no such group"),
        ("-1", ["true"], 126, "no such user"),
        ("4294967295", ["true"], 126, "no such user"),
        ("99999999999999999999", ["true"], 126, "no such user"),
        ("web", ["no-such-command"], 127, "no-such-command: No such file"),
        ("web", ["/etc"], 126, "/etc: Permission denied"),
    ],
)
def test_whoever_cannot_be_is_one_line(among_accounts, user, words, code, why) -> None:
    argv = [*among_accounts[1], "--as", user, *words]
    env = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_timeout_kills_the_whole_group_and_keeps_the_output(agent: Agent) -> None:
    for seconds in (0.5, 4, 30):  # on a busy machine a shell takes its time to begin
        with pytest.raises(CommandTimeout, match=f"sh took longer than {seconds} s") as caught:
            agent.run(["sh", "-c", "sleep 1000 & echo $!; wait"], timeout=seconds)
        if caught.value.stdout:
            break
    wait_until_gone(int(caught.value.stdout))


def test_a_client_that_vanishes_ends_its_command(agent: Agent) -> None:
    with agent.open(["sh", "-c", "sleep 1000 & echo $!; wait"]) as process:
        first = process.read()
    assert first is not None
    wait_until_gone(int(first.data))


def test_what_a_command_leaves_in_the_background_runs_on(agent: Agent) -> None:
    done = agent.run(["sh", "-c", "sleep 1000 & echo $!"])
    pid = int(done.stdout)
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


def test_a_signal_reaches_the_whole_group_also_while_input_waits(agent: Agent) -> None:
    with agent.open(["sh", "-c", "echo ready; sleep 1000"], stdin=True) as process:
        assert process.read() is not None
        while process.room:
            assert process.write(bytes(process.room))
        assert process.write(b"more") == 0, "nobody has read yet"
        process.kill(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_a_terminal_has_a_size_which_changes_and_an_end(agent: Agent) -> None:
    script = "stty size; trap 'stty size' WINCH; echo ready; while read x; do :; done; echo ended"
    with agent.open(["bash", "-c", script], stdin=True, tty=(33, 44)) as process:
        said = b""
        while b"ready" not in said:
            said += getattr(process.read(60), "data", b"")
        process.resize(50, 60)
        process.write(b"\n")
        while b"50 60" not in said:
            said += getattr(process.read(60), "data", b"")
        process.close_stdin()
        said += b"".join(piece.data for piece in process.events())
    assert said.startswith(b"33 44\r\n")
    assert said.endswith(b"ended\r\n")
    assert process.returncode == 0


def test_a_change_of_size_before_anybody_listens_is_not_lost(agent: Agent) -> None:
    script = 'until [ "$(stty size)" = "50 60" ]; do sleep 0.01; done'
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 60, 0, 0))
    try:
        with agent.open(["sh", "-c", script], stdin=True, tty=(33, 44), timeout=60) as process:
            assert attach(process, theirs, theirs, tty=True) == 0
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_terminals_job_is_its_foreground(agent: Agent) -> None:
    with agent.open(["cat"], stdin=True, tty=(24, 80)) as process:
        process.write(b"\x03")
        assert process.wait(60) == -signal.SIGINT


def test_many_commands_run_at_once(agent: Agent) -> None:
    script = ["sh", "-c", "read x; echo got $x"]
    processes = [agent.open(script, stdin=True) for _ in range(20)]
    for number, process in reversed(list(enumerate(processes))):
        process.write(b"%d\n" % number)
    for number, process in enumerate(processes):
        assert b"".join(piece.data for piece in process.events()) == b"got %d\n" % number
        process.close()


def test_more_sessions_than_there_may_be_wait_for_their_turn(agent: Agent) -> None:
    held = [agent.open(["sh", "-c", "echo ready; sleep 1000"]) for _ in range(64)]
    for process in held:
        assert process.read(60) is not None
    with agent.open(["echo", "at last"]) as waiting:
        with pytest.raises(CommandTimeout):
            waiting.read(0.3)
        for process in held:
            process.close()
        assert waiting.read(60) == (1, b"at last\n")


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ([], {}),
        ("ls -l", {}),
        (["a\0b"], {}),
        (["true"], {"env": {"": "x"}}),
        (["true"], {"env": {"A=B": "x"}}),
        (["x" * (1 << 20)], {}),
        (["true"] * 70000, {}),
        ([b"true"], {}),
        (["true", 3], {}),
        (["\ud800"], {}),
        (["true"], {"env": {"A": 1}}),
        (["true"], {"cwd": 1}),
    ],
)
def test_what_no_guest_could_run_is_refused_here(argv, options) -> None:
    def connect():
        raise AssertionError("nobody is asked")

    with pytest.raises(ConfigError):
        Agent(connect).run(argv, **options)


def test_a_path_is_a_word_and_a_timeout_may_be_endless(agent: Agent) -> None:
    done = agent.run(["cat", Path("/dev/null")], cwd=Path("/"), timeout=float("inf"))
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("timeout", "milliseconds"), [(None, 0), (1e-9, 1), (0.0015, 2), (2.5, 2500), (1e12, 2**31 - 1)]
)
def test_the_least_limit_is_one_all_the_same(timeout: float | None, milliseconds: int) -> None:
    options = dict.fromkeys(("env", "cwd", "user", "tty"))
    request = run_request(["x"], **options, stdin=False, timeout=timeout)
    assert RUN.unpack_from(request)[1] == milliseconds


def test_a_terminal_may_be_of_any_size() -> None:
    sizes = [(24, 80), (1 << 20, 1 << 20), (-1, -1), (65535, 65535)]
    packed = [WINDOW_SIZE.unpack(window_size(*size)) for size in sizes]
    assert packed == [(24, 80), (65535, 65535), (0, 0), (65535, 65535)]
    options = dict.fromkeys(("env", "cwd", "user", "timeout"))
    for size, wanted in zip(sizes, packed, strict=True):
        assert RUN.unpack_from(run_request(["x"], **options, stdin=False, tty=size))[2:4] == wanted


def test_a_long_command_line_is_none_too_long(agent: Agent) -> None:
    assert agent.run(["sh", "-c", 'echo "$#"', "sh", *["word"] * 60000]).stdout == b"60000\n"


def test_a_guest_without_agent_is_said_to_be_one() -> None:
    def connect():
        raise HostError(errno.ECONNREFUSED, "port 1023")

    with pytest.raises(NoAgent, match="no agent answers in the guest; pyvmm's own images"):
        Agent(connect).run(["true"])
    with pytest.raises(NoAgent, match=r"after 0\.05 s"):
        Agent(connect).wait_ready(0.05)


# --- files ---------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    (top / "a/b/empty").mkdir(parents=True)
    (top / "a/bulk").write_bytes(BULK)
    (top / "a/nothing").touch()
    (top / "a/b/odd\nname \udcff").write_bytes(b"x")
    (top / "link").symlink_to("a/bulk")
    (top / "broken").symlink_to("/no/where")
    (top / "a/bulk").chmod(0o751)
    (top / "a/b").chmod(0o500)
    os.utime(top / "a/bulk", ns=(1, 1_500_000_000_123_456_789))
    os.utime(top / "a", ns=(1, -5_000_000_001))
    return top


def listing(top: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in [top, *sorted(top.rglob("*"))]:
        about = path.lstat()
        name = str(path.relative_to(top))
        if stat.S_ISLNK(about.st_mode):
            found[name] = os.readlink(path)
        else:
            content = path.read_bytes() if path.is_file() else None
            found[name] = (about.st_mode, about.st_mtime_ns, content)
    return found


def test_a_tree_goes_there_and_back_unchanged(agent: Agent, tree: Path, tmp_path: Path) -> None:
    sizes: list[int] = []
    pushed = agent.push(tree, str(tmp_path / "there"), progress=sizes.append)
    assert listing(tmp_path / "there") == listing(tree)
    assert (pushed.files, pushed.bytes, pushed.skipped) == (3, len(BULK) + 1, [])
    assert sizes == sorted(sizes)
    assert sizes[-1] == pushed.bytes
    pulled = agent.pull(str(tmp_path / "there"), tmp_path / "back")
    assert listing(tmp_path / "back") == listing(tree)
    assert (pulled.files, pulled.bytes) == (pushed.files, pushed.bytes)


@pytest.mark.parametrize("copy", ["push", "pull"])
@pytest.mark.parametrize(
    "seconds", [-(1 << 33), -(1 << 31) - 1, -1, 1 << 31, (1 << 32) + 1, (1 << 33) - 1, 1 << 34]
)
def test_times_before_1970_and_after_2038(
    agent: Agent, tmp_path: Path, copy: str, seconds: int
) -> None:
    """A file's time is a number of nanoseconds in 64 bits: from 1678 to 2262. Beyond that it is as
    near as it goes."""
    source, target = tmp_path / "from", tmp_path / "to"
    source.write_text("x")
    os.utime(source, (0, seconds))
    had = source.stat().st_mtime_ns
    # What a file system cannot say, it makes the nearest that it can: 2^34 seconds are its last.
    getattr(agent, copy)(str(source), str(target))
    expected = min(had, (1 << 63) - 1)
    assert abs(target.stat().st_mtime_ns - expected) < 10**9


@pytest.mark.parametrize("copy", ["push", "pull"])
def test_the_target_is_a_directory_or_a_name(agent: Agent, tmp_path: Path, copy: str) -> None:
    do = getattr(agent, copy)
    source = tmp_path / "file"
    source.write_text("new")
    target = tmp_path / "target"
    target.mkdir()
    do(str(source), str(target))
    assert (target / "file").read_text() == "new"
    do(str(source), str(target / "other"))
    assert (target / "other").read_text() == "new"
    source.write_text("newer")
    do(str(source), str(target / "other"))
    assert (target / "other").read_text() == "newer"
    assert sorted(os.listdir(target)) == ["file", "other"], "nothing half-written is left"


@pytest.mark.parametrize("copy", ["push", "pull"])
def test_a_named_link_is_followed_and_those_below_are_not(agent, tmp_path, copy) -> None:
    (tmp_path / "real").write_text("content")
    (tmp_path / "link").symlink_to("real")
    getattr(agent, copy)(str(tmp_path / "link"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_text() == "content"
    assert not (tmp_path / "copy").is_symlink()


@pytest.mark.parametrize("copy", ["push", "pull"])
def test_what_is_no_file_is_skipped_and_named(agent: Agent, tmp_path: Path, copy: str) -> None:
    (tmp_path / "tree").mkdir()
    os.mkfifo(tmp_path / "tree/fifo")
    done = getattr(agent, copy)(str(tmp_path / "tree"), str(tmp_path / "copy"))
    assert [os.path.basename(name) for name in done.skipped] == ["fifo"]
    assert os.listdir(tmp_path / "copy") == []


@pytest.mark.parametrize("copy", ["push", "pull"])
def test_what_is_neither_file_nor_directory_is_neither_copied_nor_replaced(agent, tmp_path, copy):
    do = getattr(agent, copy)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "file").write_text("content")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/fifo").write_text("content")
    for source, target in [
        ("fifo", "copy"),
        ("file", "fifo"),
        ("file", "link"),
        ("tree/fifo", "."),
    ]:
        with pytest.raises((ConfigError, AgentError), match=r"neither a file nor|File exists"):
            do(f"{tmp_path}/{source}", f"{tmp_path}/{target}")
    assert stat.S_ISFIFO((tmp_path / "fifo").lstat().st_mode)
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file", "link", "tree"]


@pytest.mark.parametrize("path", [".", "./", "../tree", "b/..", "b/../", "../tree/."])
@pytest.mark.parametrize("copy", ["push", "pull"])
def test_a_directory_keeps_its_name_however_it_is_named(agent, tmp_path, copy, path) -> None:
    (tmp_path / "tree/b").mkdir(parents=True)
    (tmp_path / "tree/file").write_text("content")
    (tmp_path / "into").mkdir()
    getattr(agent, copy)(f"{tmp_path}/tree/{path}", f"{tmp_path}/into")
    assert (tmp_path / "into/tree/file").read_text() == "content"


@pytest.mark.parametrize("copy", ["push", "pull"])
def test_holes_stay_holes(agent: Agent, tmp_path: Path, copy: str) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(8 << 20)
        file.write(b"end")
        file.truncate(12 << 20)
    getattr(agent, copy)(str(tmp_path / "sparse"), str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "sparse").read_bytes()
    assert (tmp_path / "copy").stat().st_blocks * 512 < 1 << 20


def test_set_user_id_does_not_come_out_of_a_guest(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "program").touch()
    (tmp_path / "program").chmod(0o4755)
    agent.push(tmp_path / "program", str(tmp_path / "in"))
    assert stat.S_IMODE((tmp_path / "in").stat().st_mode) == 0o4755
    agent.pull(str(tmp_path / "program"), tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("source", "target", "why"),
    [
        ("none", "x", "none: No such file"),
        ("file", "none/x", "No such file"),
        ("file", "file/", "not a directory|Not a directory"),
        ("folder", "file", "Not a directory|File exists"),
    ],
)
@pytest.mark.parametrize("copy", ["push", "pull"])
def test_copies_that_cannot_be_are_one_line(agent, tmp_path, copy, source, target, why) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "folder").mkdir()
    with pytest.raises((AgentError, ConfigError), match=why) as caught:
        getattr(agent, copy)(f"{tmp_path}/{source}", f"{tmp_path}/{target}")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == "content"
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_copy_cut_short_leaves_nothing_half_done(agent, served, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(served[1]))
        from pyvmm.agent.protocol import Entry, entry_frame

        client.sendall(frame(FrameType.PUT, str(tmp_path / "file").encode()))
        client.sendall(entry_frame(FrameType.REGULAR, Entry(0o644, 0, 10, b"file")))
        client.sendall(frame(FrameType.DATA, b"half"))
        wait_for(lambda: os.listdir(tmp_path) != [])
    wait_for(lambda: os.listdir(tmp_path) == [])


def wait_for(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it never came to that")


# --- clock, power, and clients that break the rules ----------------------------------------------


def test_outside_of_a_guest_clock_and_power_are_left_alone(agent: Agent) -> None:
    assert abs(agent.clock().offset) < 5
    with pytest.raises(AgentError, match="only a guest's clock"):
        agent.set_clock()
    with pytest.raises(AgentError, match="only a guest is powered off"):
        agent.power_off()


RUN_SLEEP = frame(FrameType.RUN, RUN.pack(WANTS_STDIN, 0, 0, 0, 2, 0) + b"\0\0sleep\0" + b"1000\0")


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 64,
        HEADER.pack(FrameType.RUN | ((1 << 20) + 1) << 8),
        frame(FrameType.RUN, b""),
        frame(FrameType.RUN, RUN.pack(0, 0, 0, 0, 0, 0) + b"\0\0"),
        frame(FrameType.RUN, RUN.pack(0, 0, 0, 0, 9, 0) + b"\0\0x\0"),
        frame(FrameType.RUN, RUN.pack(0, 0, 0, 0, 65535, 65535) + b"\0\0x\0"),
        frame(FrameType.RUN, RUN.pack(0, 0, 0, 0, 1, 1) + b"\0\0true\0=x\0"),
        frame(FrameType.GET, b""),
        frame(FrameType.GET, b"/etc\0/passwd"),
        frame(FrameType.GET, b"/" * 5000),
        frame(FrameType.PUT, b"\0"),
        frame(FrameType.CLOCK, b"123"),
        frame(FrameType.STDIN, b"x"),
        frame(FrameType.HELLO, b""),
        RUN_SLEEP
        + frame(FrameType.STDIN, bytes(WINDOW))
        + frame(FrameType.STDIN, bytes(WINDOW)) * 2,
        RUN_SLEEP + frame(FrameType.SIGNAL, b"x"),
        RUN_SLEEP + frame(FrameType.STDIN_END) + frame(FrameType.STDIN, b"x"),
        RUN_SLEEP + HEADER.pack(FrameType.STDIN | 0xFFFFFF << 8),
        RUN_SLEEP + frame(FrameType.EXIT, bytes(8)),
    ],
    ids=lambda data: f"{len(data)}-{data[:6].hex()}",
)
def test_a_client_that_breaks_the_rules_loses_its_session_only(agent, served, data) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(served[1]))
        client.settimeout(60)
        try:
            client.sendall(data)
            while client.recv(1 << 16):
                pass
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert agent.run(["echo", "still here"]).stdout == b"still here\n"


@pytest.mark.parametrize("seed", range(8))
def test_random_frames_end_a_session_and_no_more(agent, served, seed: int, tmp_path: Path) -> None:
    """Kept from doing harm: no command has a name that exists, all that is put goes below tmp_path,
    and at a Unix socket the agent sets no clock and powers nothing off."""
    random_ = random.Random(seed)
    for _ in range(25):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(served[1]))
            client.settimeout(60)
            try:
                client.sendall(mutate(random_, opening(random_, tmp_path)))
                client.shutdown(socket.SHUT_WR)
                while client.recv(1 << 16):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                pass
    assert agent.run(["echo", "still here"]).stdout == b"still here\n"


def opening(random_: random.Random, folder: Path) -> tuple[bytes, bytes]:
    """A request that is left as it is, and what follows, which is not."""
    if random_.random() < 0.5:
        request = frame(FrameType.PUT, os.fsencode(folder))
        kinds = [*range(FrameType.DIRECTORY, FrameType.END + 1)]
    else:
        request = frame(FrameType.RUN, RUN.pack(3, 500, 0, 0, 1, 0) + b"\0\0cat\0")
        kinds = [*range(FrameType.STDIN, FrameType.RESIZE + 1)]
    parts = []
    for _ in range(random_.randrange(12)):
        head = bytes(random_.randrange(20, 22)) + random_.choice([b"a", b"b\0c", b"..", b"x" * 255])
        payload = random_.choice([head, head[:8], random_.randbytes(random_.randrange(64)), b""])
        parts.append(frame(FrameType(random_.choice(kinds)), payload))
    return request, b"".join(parts)


def mutate(random_: random.Random, parts: tuple[bytes, bytes]) -> bytes:
    request, rest = parts
    data = bytearray(rest)
    for _ in range(random_.randrange(4)):
        if data:
            data[random_.randrange(len(data))] = random_.randrange(256)
    return request + bytes(data)


def test_a_slow_reader_holds_up_only_itself(agent: Agent) -> None:
    with agent.open(["sh", "-c", "head -c 3000000 /dev/zero; echo end >&2"]) as process:
        assert agent.run(["echo", "quick"]).stdout == b"quick\n"
        poll = select.poll()
        poll.register(process.fileno(), select.POLLIN)
        assert poll.poll(60000)
        sizes = {1: 0, 2: 0}
        for stream, data in process.events():
            sizes[stream] += len(data)
    assert sizes == {1: 3_000_000, 2: 4}
