"""The keeper of a confined monitor does its four things for one VM, and believes nothing else."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.control import vm_log
from pyvmm.errors import HostError
from pyvmm.host import box
from pyvmm.host.other_user import OtherUser
from pyvmm.monitor.cgroup import Group
from pyvmm.monitor.keeper import Keeper, _Serving, _State

SAFETY_TIMEOUT = 60


@pytest.fixture(params=[False, True], ids=["", "asleep"])
def sleepy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether it sleeps after each message, and is Python anew for the next one."""
    if request.param:
        monkeypatch.setattr("pyvmm.monitor.keeper._AWAKE", 0.0)
    found: bool = request.param
    return found


@pytest.fixture
def keeper(tmp_path: Path, sleepy: bool) -> Iterator[Keeper]:
    made = Keeper(str(tmp_path), "web")
    yield made
    made._socket.close()
    os.waitpid(made.pid, 0)


def test_it_opens_the_log_and_remembers_the_end(keeper: Keeper, tmp_path: Path) -> None:
    keeper.enter_box()
    for rotate in (False, True):
        fd = keeper.open_log(rotate)
        assert not os.get_inheritable(fd)
        os.write(fd, b"said")
        os.close(fd)
    logs = tmp_path / "logs"
    assert sorted(os.listdir(logs)) == ["web.log", "web.old"]
    keeper.note_end(11, message="x" * 10_000, ending="panic", other=[1])
    [end] = vm_log.ended(str(tmp_path))
    assert (end["exit_code"], end["ending"], len(end["message"])) == (11, "panic", 4096)
    assert "other" not in end


def test_it_removes_what_was_announced_and_is_the_same(keeper: Keeper, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "two", "three")]
    for file in files:
        file.touch()
    for file in files[:2]:
        keeper.announce(str(file))
    keeper.enter_box()
    files[1].rename(tmp_path / "two-before")
    files[1].touch()  # somebody else's by now
    for file in files[:2]:
        keeper.remove(str(file))
    with pytest.raises(FileNotFoundError):
        keeper.remove(str(files[2]))
    assert [file.exists() for file in files] == [False, True, True]


@pytest.mark.parametrize(
    "message",
    [
        *(b"add/etc/passwd", b"box", b"del7", b"del-9", b"delx", b"xyz", b"x", b"con0", b"con5 5"),
        *(b"end[]", b'end{"exit_code": "1"}', b"end{", b"end" + b"[" * 50_000),
        *(b'grp["/", "/tmp/x"]', b"lis\0", b"dev/etc/passwd", b'plg["/run/pyvmm-plug/1", "x"]'),
    ],
)
def test_it_believes_nothing(keeper: Keeper, tmp_path: Path, message: bytes) -> None:
    keeper.enter_box()
    with pytest.raises(OSError, match=rf"\[Errno {errno.EINVAL}\]"):
        keeper._ask(message)
    os.close(keeper.open_log(False))  # it is still there
    assert os.listdir(tmp_path) == ["logs"] and os.listdir(tmp_path / "logs") == ["web.log"]


def filters_of(pid: int) -> list[str]:
    """Those of calls."""
    status = Path(f"/proc/{pid}/status").read_text()
    return [line for line in status.splitlines() if line.startswith("Seccomp")]


def test_it_gives_up_rights_once(keeper: Keeper) -> None:
    """Each filter more would make calls slower, and leave less room for those of what it starts."""
    keeper.enter_box()
    os.close(keeper.open_log(False))
    before = filters_of(keeper.pid)
    for _ in range(3):
        with pytest.raises(OSError, match="Invalid argument"):
            keeper._ask(b"box")
    os.close(keeper.open_log(False))
    assert filters_of(keeper.pid) == before


def test_it_connects_to_ports_of_the_vm_only(keeper: Keeper, tmp_path: Path) -> None:
    keeper.announce(str(tmp_path / "vsock"))
    keeper.announce(str(tmp_path / "back-end"), removes=False)
    keeper.enter_box()
    with socket.socket(socket.AF_UNIX) as program, socket.socket(socket.AF_UNIX) as other:
        program.bind(str(tmp_path / "vsock_7"))
        other.bind(str(tmp_path / "other_7"))
        for one in (program, other):
            one.listen(1)
        connection = keeper.reach(f"{tmp_path}/vsock_7")
        assert program.accept()[0].send(b"x") == 1
        connection.close()
        program.close()
        with socket.socket(socket.AF_UNIX) as back_end:  # one that comes later
            back_end.bind(str(tmp_path / "back-end"))
            back_end.listen(1)
            keeper.reach(f"{tmp_path}/back-end").close()
            keeper.remove(f"{tmp_path}/back-end")
            assert (tmp_path / "back-end").exists()
        for path in ("vsock_8", "other_7", "vsock_x", "vsock"):
            with pytest.raises(HostError):
                keeper.reach(f"{tmp_path}/{path}")


@pytest.mark.parametrize("link", ["socket", "folder"])
def test_for_another_user_it_follows_no_link_that_came_later(tmp_path: Path, link: str) -> None:
    keeper = Keeper(str(tmp_path), "web", user=OtherUser(os.geteuid(), os.getegid()))
    his, secret = tmp_path / "his", tmp_path / "secret"
    for folder in (his, secret):
        folder.mkdir()
    (tmp_path / "way").symlink_to("his")  # one that was there
    with socket.socket(socket.AF_UNIX) as roots, socket.socket(socket.AF_UNIX) as program:
        for one, place in ((roots, secret / "vsock_7"), (program, his / "vsock_5")):
            one.bind(str(place))
            one.listen(4)
        (his / "vsock").touch()
        keeper.announce(f"{tmp_path}/way/vsock")
        keeper.enter_box()
        keeper.reach(f"{tmp_path}/way/vsock_5").close()
        if link == "socket":
            (his / "vsock_7").symlink_to("../secret/vsock_7")
        else:
            his.rename(tmp_path / "before")
            os.link(tmp_path / "before/vsock", secret / "vsock")
            his.symlink_to("secret")
        with pytest.raises(HostError):
            keeper.reach(f"{tmp_path}/way/vsock_7")
        if link == "folder":
            with pytest.raises(OSError):
                keeper.remove(f"{tmp_path}/way/vsock")
            assert (secret / "vsock").exists()
    keeper._socket.close()
    os.waitpid(keeper.pid, 0)


def test_a_descriptor_that_cannot_be_sent_is_an_error_and_no_more(tmp_path: Path) -> None:
    class Full(socket.socket):
        """As where this user's processes have too many on their way."""

        def sendmsg(self, buffers: Any, ancillary: Any = (), *more: Any) -> int:
            if ancillary:
                raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
            return super().sendmsg(buffers)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, Full(fileno=theirs.detach()) as full:
        ours.send(b"log\0")
        ours.send(b'end{"exit_code": 3}')
        ours.shutdown(socket.SHUT_WR)
        _Serving(full, _State(str(tmp_path), "web", None, False, 0, 5.0)).run()
        assert [int.from_bytes(ours.recv(8), sys.byteorder) for _ in range(2)] == [
            errno.ETOOMANYREFS,
            0,
        ]
    assert [one["exit_code"] for one in vm_log.ended(str(tmp_path))] == [3]


def test_it_imports_nothing_that_a_guest_may_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python may have been told to look in the current directory, and that may be shared."""
    (tmp_path / "json.py").write_text("open('mark', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "json"]:
        monkeypatch.delitem(sys.modules, name)
    made = Keeper(str(tmp_path), "web")
    monkeypatch.undo()
    made.note_end(3)
    made._socket.close()
    os.waitpid(made.pid, 0)
    assert not (tmp_path / "mark").exists()
    assert [one["exit_code"] for one in vm_log.ended(str(tmp_path))] == [3]


def test_it_ends_with_a_monitor_that_has_made_it_wait(tmp_path: Path, sleepy: bool) -> None:
    """A listener without O_NONBLOCK, of which the monitor takes all connections, has it wait in
    accept(2); here it is stopped."""
    code = """
import sys
from pyvmm.monitor import keeper
keeper._AWAKE = float(sys.argv[2])
made = keeper.Keeper(sys.argv[1], "web")
made.enter_box()
made.note_end(0)  # so it has done all that comes with the box
print(made.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "0" if sleepy else "5"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as monitor:
        assert monitor.stdout is not None
        pid = int(monitor.stdout.readline())
        if sleepy:
            until_asleep(pid)
        process = os.pidfd_open(pid)
        os.kill(pid, signal.SIGSTOP)
        monitor.kill()
    has_ended = select.select([process], [], [], SAFETY_TIMEOUT)[0]
    os.close(process)
    if not has_ended:
        os.kill(pid, signal.SIGKILL)
    assert has_ended


def files_of(pid: int) -> list[str]:
    """What its descriptors are, but for those that lead nowhere."""
    links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")]
    return [
        link.partition(":[")[0] if "socket" in link else link
        for link in links
        if link != "/dev/null"
    ]


def test_it_has_no_other_descriptor_and_ends_with_the_monitor(tmp_path: Path) -> None:
    with open(tmp_path / "disk", "w"):
        made = Keeper(str(tmp_path), "web")
        made.announce(str(tmp_path / "disk"))  # so it has begun
        held = files_of(made.pid)
        assert sorted(held) == ["anon_inode:[eventpoll]", "socket"], held
        os.kill(made.pid, signal.SIGINT)
        os.kill(made.pid, signal.SIGTERM)
        made.announce(str(tmp_path / "disk"))
    made._socket.close()
    _, status = os.waitpid(made.pid, 0)
    assert status == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_group_goes_though_the_monitor_has_read_no_answer(
    tmp_path: Path, sleepy: bool, when: str
) -> None:
    group = Group.__new__(Group)
    group._before, group._made = str(tmp_path), str(tmp_path / "made")
    os.mkdir(group._made)  # no real one, but removed as one
    made = Keeper(str(tmp_path), "web")
    made.leave(group)
    made.enter_box()
    os.kill(made.pid, signal.SIGSTOP)
    made._socket.send(b"log\0")
    if when == "after":
        os.kill(made.pid, signal.SIGCONT)
        assert select.select([made._socket], [], [], SAFETY_TIMEOUT)[0]
    made._socket.close()
    os.kill(made.pid, signal.SIGCONT)
    _, status = os.waitpid(made.pid, 0)
    assert status == 0 and not os.path.exists(group._made)


@pytest.mark.parametrize(
    "message",
    [
        *(b"dev/etc/passwd", b"dev/dev/null", b"dev/dev", b"dev/dev/ptmx", b"dev\0", b"log\0"),
        *(b'plg["/run/x", "y"]', b'plg["/run/pyvmm-plug/../x", "y"]', b"plg[1]", b"plg{"),
        b"plg1",
        b'end{"exit_code": 1}',
    ],
)
def test_in_an_emulated_host_it_opens_disks_and_ports_only(tmp_path: Path, message: bytes) -> None:
    made = Keeper(str(tmp_path), "web", is_inside=True)
    try:
        made.enter_box()
        with pytest.raises(OSError, match=rf"\[Errno {errno.EINVAL}\]"):
            made._ask(message)
        with pytest.raises(FileNotFoundError):
            made.plug("/run/pyvmm-plug/1/disk", "no such serial number")
        with pytest.raises(FileNotFoundError):
            made.open_device("/dev/vport0p99")
    finally:
        made._socket.close()
        os.waitpid(made.pid, 0)
    assert not os.listdir(tmp_path)


def test_without_it_the_monitor_goes_on(tmp_path: Path) -> None:
    made = Keeper(str(tmp_path), "web")
    made.enter_box()
    os.kill(made.pid, signal.SIGKILL)
    os.waitpid(made.pid, 0)
    with pytest.raises(OSError):
        made.open_log(False)
    made.note_end(0)
    assert time.monotonic() and json.dumps(vm_log.ended(str(tmp_path))) == "[]"


def until_asleep(pid: int) -> None:
    give_up_at = time.monotonic() + SAFETY_TIMEOUT
    while Path(f"/proc/{pid}/comm").read_text() != "pyvmm-keeper\n":
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def private_kib(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if "Private_D" in line)


def test_asleep_it_has_next_to_no_memory_and_ends_with_the_monitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.monitor.keeper._AWAKE", 0.0)
    made = Keeper(str(tmp_path), "web")
    made.enter_box()
    until_asleep(made.pid)
    assert private_kib(made.pid) < 256  # pages may have 64 KiB
    held = sorted(link for link in files_of(made.pid) if "memfd" not in link)
    assert held == ["socket"], held
    assert Path(f"/proc/{made.pid}/cmdline").read_bytes() == b"pyvmm: keeper of web\0"
    status = Path(f"/proc/{made.pid}/status").read_text()
    if box.filters_calls():
        assert "\nNoNewPrivs:\t1\n" in status and "\nSeccomp:\t2\n" in status
    os.kill(made.pid, signal.SIGINT)
    os.kill(made.pid, signal.SIGTERM)
    os.close(made.open_log(False))
    until_asleep(made.pid)
    made._socket.close()
    _, status_ = os.waitpid(made.pid, 0)
    assert status_ == 0


@pytest.mark.parametrize("prevents", ["memfd", "exec", "Python"])
def test_where_it_cannot_sleep_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prevents: str
) -> None:
    monkeypatch.setattr("pyvmm.monitor.keeper._AWAKE", 0.0)

    def refuse(*args: object) -> None:
        raise OSError(errno.EACCES, "refused")

    place = {"memfd": "os.memfd_create", "exec": "os.execve", "Python": "sys.executable"}[prevents]
    monkeypatch.setattr(place, "" if prevents == "Python" else refuse)
    made = Keeper(str(tmp_path), "web")
    monkeypatch.undo()
    made.enter_box()
    for _ in range(2):
        os.close(made.open_log(False))
    made._socket.close()
    _, status = os.waitpid(made.pid, 0)
    assert status == 0
