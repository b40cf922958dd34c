"""A program's powers in a room of `pyvmm.host.confinement`, tried in one; and the kernel's
numbers against its headers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from c_claims import assert_in_c, needs_headers

from pyvmm.host import confinement
from pyvmm.host.confinement import Room

# Enters the room sys.argv[1], says what became of each expression in sys.argv[2:].
TRY = """
import ctypes, json, mmap, os, signal, socket, sys, threading
from pyvmm.host import confinement
room = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()}
libc = ctypes.CDLL(None, use_errno=True)
def syscall(*words):
    if libc.syscall(*map(ctypes.c_long, words)) < 0:
        raise OSError(ctypes.get_errno(), "syscall")
def thread():
    one = threading.Thread(target=len, args=("",)); one.start(); one.join()
if os.environ.get("USER_ID"):
    os.setgroups([]); os.setgid(int(os.environ["USER_ID"])); os.setuid(int(os.environ["USER_ID"]))
if os.environ.get("NO_LANDLOCK"):
    confinement.landlock_version = lambda: 0
confinement.enter(confinement.Room(**room))
for what in sys.argv[2:]:
    try:
        exec(what); print("done")
    except (OSError, MemoryError) as error:
        print(getattr(error, "errno", "memory"))
"""
pytestmark = pytest.mark.skipif(
    not confinement.landlock_version(), reason="this kernel has no Landlock"
)


def attempt(room: Room, *what: str, **env: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", TRY, json.dumps(room._asdict()), *what],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


NO, FORBIDDEN = str(errno.EPERM), str(errno.EACCES)


@pytest.mark.parametrize("user", ["", "65534"], ids=["as we are", "nobody"])
def test_files_are_those_of_the_room(tmp_path: Path, user: str) -> None:
    if user and os.geteuid():
        pytest.skip("only root can become somebody else")
    tmp_path = Path(shutil.copytree(tmp_path, f"/tmp/room-{os.getpid()}-{user}"))
    try:
        tmp_path.chmod(0o755)
        folder, mine, out = tmp_path / "folder", tmp_path / "mine", tmp_path / "out"
        folder.mkdir()
        (folder / "in").write_text("in")
        for file in (mine, out):
            file.write_text("")
            file.chmod(0o666)
        room = Room(read=(str(folder), "/does/not/exist"), write=(str(out),))
        found = attempt(
            room,
            f"assert open({str(folder / 'in')!r}).read() == 'in'",
            f"open({str(out)!r}, 'w').write('out')",
            f"open({str(folder / 'in')!r}, 'a')",
            f"open({str(folder / 'new')!r}, 'w')",
            f"open({str(mine)!r})",
            f"open({str(mine)!r}, 'w')",
            "open('/proc/self/mem', 'r+b')",
            "os.listdir('/')",
            USER_ID=user,
        )
        assert found == ["done", "done", *[FORBIDDEN] * 6]
        assert out.read_text() == "out"
    finally:
        shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    "what",
    [
        *("os.chmod({0}, 0)", "os.fchmod(os.open({0}, 0), 0)", "os.chown({0}, 1, 1)"),
        *("os.utime({0}, (1, 1))", "os.setxattr({0}, 'user.a', b'1')", "os.unlink({0})"),
        *("os.rename({0}, {0} + 'b')", "os.link({0}, {0} + 'b')", "os.mkdir({0} + 'b')"),
        *("os.symlink('a', {0} + 'b')", "os.mkfifo({0} + 'b')", "os.truncate({0}, 0)"),
        *(
            "os.chdir('/')",
            "os.chroot('/')",
            "syscall(165, 0, 0, 0, 0, 0)",
            "syscall(272, 1 << 28)",
        ),
        *("socket.socket()", "socket.socket(socket.AF_UNIX)", "socket.socketpair()"),
        *("socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)", "syscall(425, 1, 0)"),
        *("os.fork()", "os.posix_spawn('/bin/true', ['true'], {{}})", "syscall(58)"),
        *("os.kill(os.getppid(), 0)", "os.kill(os.getpid(), 0)", "syscall(234, 1, 1, 0)"),
        *("os.pidfd_open(os.getppid())", "syscall(101, 16, os.getppid(), 0, 0)"),
        *("syscall(310, os.getppid(), 0, 0, 0, 0, 0)", "syscall(302, os.getppid(), 7, 0, 0)"),
        *("syscall(321, 0, 0, 0)", "syscall(298, 0, 0, 0, 0, 0)", "syscall(250, 0, 0, 0)"),
        *("syscall(248, 0, 0, 0, 0, 0)", "syscall(600)", "syscall(0x40000000 + 39)"),
    ],
)
def test_calls_that_no_reader_of_files_needs_fail(tmp_path: Path, what: str) -> None:
    file = tmp_path / "file"
    file.write_text("whole")
    room = Room(read=(str(tmp_path),), write=(str(file),))
    assert attempt(room, what.format(repr(str(file)))) == [NO]
    assert file.read_text() == "whole" and os.listdir(tmp_path) == ["file"]


def test_what_a_program_needs_works(tmp_path: Path) -> None:
    assert (
        attempt(
            Room(),
            "thread()",
            "mmap.mmap(-1, 1 << 20)",
            "os.pipe()",
            "os.urandom(9)",
            "os.getpid()",
        )
        == ["done"] * 5
    )
    assert attempt(Room(), "os.execv('/bin/sh', ['sh', '-c', 'echo out'])") == [FORBIDDEN]
    with pytest.raises(AssertionError):
        attempt(Room(), "os.abort()")  # a signal to oneself ends it, as ever


def test_a_server_talks_on_the_sockets_that_it_was_given_and_makes_none(tmp_path: Path) -> None:
    given, ours = socket.socketpair()
    with given, ours:
        one = f"socket.socket(fileno=os.dup({given.fileno()}))"
        what = (f"{one}.sendmsg([b'x'])", "socket.socket()", "socket.socketpair()")
        for serves in (True, False):
            done = subprocess.run(
                [sys.executable, "-c", TRY, json.dumps(Room(serves=serves)._asdict()), *what],
                capture_output=True,
                text=True,
                pass_fds=[given.fileno()],
            )
            assert done.stdout.split() == ["done" if serves else NO, NO, NO], done.stderr
        assert ours.recv(10) == b"x"


def test_memory_and_written_files_are_bounded(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    room = Room(write=(str(tmp_path / "out"),), memory=1 << 30, size=1 << 20)
    assert attempt(room, "bytes(2 << 30)", "bytes(1 << 20)") == ["memory", "done"]
    write = f"f = open({str(tmp_path / 'out')!r}, 'wb', 0)"
    write += "; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    found = attempt(room, write, "f.write(bytes(1 << 20))", "f.write(b'1')")
    assert found == ["done", "done", str(errno.EFBIG)]


def test_without_landlock_nothing_is_opened_for_writing(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("whole")
    name = repr(str(file))
    found = attempt(
        Room(),
        f"open({name})",
        *(f"open({name}, {mode!r})" for mode in ("w", "a", "r+", "x")),
        f"os.open({name}, os.O_TRUNC)",
        "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
        "syscall(85, 0, 0)",
        NO_LANDLOCK="1",
    )
    assert found == ["done", *[NO] * 7]
    assert file.read_text() == "whole"
    with pytest.raises(AssertionError, match=r"it has no Landlock; use Linux 5\.13"):
        attempt(Room(write=(str(file),)), NO_LANDLOCK="1")


def test_a_program_becomes_another_one_in_the_room(tmp_path: Path) -> None:
    """It does not matter what the environment and the folder say, and nothing of them is used."""
    cat = shutil.which("cat")
    assert cat
    cat = os.path.realpath(cat)
    (tmp_path / "json.py").write_text("raise SystemExit('mine was imported')")
    room = confinement.for_system_program(cat, 1 << 30)._replace(env=(("A", "b"),))

    def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            confinement.command(room, [cat, *arguments]),
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PYTHONPATH": str(tmp_path), "SECRET": "x"},
            **options,  # type: ignore[call-overload]
        )

    assert run(input="through").stdout == "through"
    refused = run("/etc/passwd")
    assert refused.returncode == 1 and "/etc/passwd: Permission denied" in refused.stderr
    (tmp_path / "no program").touch()
    line = confinement.command(Room(), [str(tmp_path / "no program")])
    failed = subprocess.run(line, capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert "cannot run" in failed.stderr


@needs_headers(["linux/landlock.h"])
def test_the_kernel_s_numbers(tmp_path: Path) -> None:
    C = confinement
    others = {
        "open": C.OPEN,
        "openat": C.OPENAT,
        "clone": C.CLONE,
        "tgkill": C.TGKILL,
        "prlimit64": C.PRLIMIT64,
        "clone3": C.CLONE3,
        "seccomp": C._SECCOMP,
        "landlock_create_ruleset": C._CREATE_RULESET,
        "landlock_add_rule": C._ADD_RULE,
        "landlock_restrict_self": C._RESTRICT_SELF,
    }
    claims = [
        f"__NR_{name} == {number}" for name, number in {**C.CALLS, **C.SERVING, **others}.items()
    ]
    assert len({*C.CALLS.values(), *C.SERVING.values(), *others.values()}) == len(claims)
    claims += [
        f"PR_SET_NO_NEW_PRIVS == {C.PR_SET_NO_NEW_PRIVS}",
        f"SECCOMP_SET_MODE_FILTER == {C._SET_MODE_FILTER}",
        f"SECCOMP_FILTER_FLAG_TSYNC == {C.FILTER_TSYNC}",
        f"SECCOMP_FILTER_FLAG_SPEC_ALLOW == {C.FILTER_SPEC_ALLOW}",
        f"SECCOMP_RET_ALLOW == {C._RET_ALLOW}",
        f"SECCOMP_RET_ERRNO == {C._RET_ERRNO}",
        f"SECCOMP_RET_KILL_PROCESS == {C._RET_KILL}",
        *(f"AUDIT_ARCH_{name.upper()} == {one}" for name, one in C.AUDIT_ARCHES.items()),
        f"(BPF_LD | BPF_W | BPF_ABS) == {C._LOAD}",
        f"(BPF_JMP | BPF_JEQ | BPF_K) == {C.EQUAL}",
        f"(BPF_JMP | BPF_JSET | BPF_K) == {C.ANY}",
        f"(BPF_JMP | BPF_JGE | BPF_K) == {C._AT_LEAST}",
        f"(BPF_JMP | BPF_JA) == {C._SKIP}",
        f"__X32_SYSCALL_BIT == {C._X32}",
        f"(BPF_RET | BPF_K) == {C._RETURN}",
        f"LANDLOCK_ACCESS_FS_EXECUTE == {C.EXECUTE}",
        f"LANDLOCK_ACCESS_FS_WRITE_FILE == {C.WRITE_FILE}",
        f"LANDLOCK_ACCESS_FS_READ_FILE == {C.READ_FILE}",
        f"LANDLOCK_ACCESS_FS_READ_DIR == {C.READ_DIR}",
        f"LANDLOCK_CREATE_RULESET_VERSION == {C._RULESET_VERSION}",
        f"LANDLOCK_RULE_PATH_BENEATH == {C._PATH_BENEATH}",
        f"CLONE_THREAD == {C._CLONE_THREAD}",
        f"LANDLOCK_ACCESS_FS_TRUNCATE == {C.TRUNCATE}",
        f"LANDLOCK_ACCESS_FS_IOCTL_DEV == {C.IOCTL_DEV}",
    ]
    headers = [
        *("asm/unistd.h", "asm/unistd_64.h", "linux/prctl.h", "linux/seccomp.h", "linux/audit.h"),
        *("linux/filter.h", "linux/landlock.h", "linux/sched.h"),
    ]
    newer = ("LANDLOCK_ACCESS_FS_TRUNCATE", "LANDLOCK_ACCESS_FS_IOCTL_DEV")
    assert_in_c(tmp_path, headers, claims, optional=newer)
