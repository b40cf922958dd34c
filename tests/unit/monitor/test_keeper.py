"""The keeper of a confined monitor does its few things for one VM, and believes nothing else."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hotplug_rig import until

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import box
from pyvmm.host.call_names import number_of
from pyvmm.host.other_user import OtherUser
from pyvmm.monitor import asleep
from pyvmm.monitor.awake import Serving
from pyvmm.monitor.cgroup import Group
from pyvmm.monitor.keeper import Keeper
from pyvmm.monitor.keeper_state import REMOVE, State

SAFETY_TIMEOUT = 60


@pytest.fixture(params=[False, True], ids=["", "asleep"])
def sleepy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether it sleeps after each message, and is Python anew for the next one."""
    if request.param:
        monkeypatch.setattr("pyvmm.monitor.keeper.AWAKE", 0.0)
    found: bool = request.param
    return found


@pytest.fixture
def keeper(tmp_path: Path, sleepy: bool) -> Iterator[Keeper]:
    made = Keeper(str(tmp_path), "web")
    yield made
    assert end(made) == 0


def end(keeper: Keeper) -> int:
    """Have its monitor end; how it ends then."""
    assert keeper._socket is not None
    keeper._socket.close()
    return os.waitpid(keeper.pid, 0)[1]


def test_it_opens_the_log(keeper: Keeper, tmp_path: Path) -> None:
    keeper.enter_box()
    for rotate in (False, True):
        fd = keeper.open_log(rotate)
        assert not os.get_inheritable(fd)
        os.write(fd, b"said")
        os.close(fd)
    logs = tmp_path / "logs"
    assert sorted(os.listdir(logs)) == ["web.log", "web.old"]


@pytest.mark.parametrize("awake", [False, True])
def test_it_removes_what_was_announced_and_is_the_same(
    keeper: Keeper, tmp_path: Path, awake: bool
) -> None:
    """With Python, or without."""
    files = [tmp_path / name for name in ("one", "two", "three", "four", "later")]
    for file in files[:4]:
        file.touch()
    for number in (0, 1, 3, 4):
        keeper.announce(str(files[number]))
    keeper.enter_box()
    if awake:
        os.close(keeper.open_log(False))
    files[1].rename(tmp_path / "two-before")
    files[1].touch()  # somebody else's by now
    files[3].unlink()
    files[4].touch()
    for number in (0, 1, 4):
        keeper.remove(str(files[number]))
    for number in (2, 3):
        with pytest.raises(FileNotFoundError):
            keeper.remove(str(files[number]))
    assert [file.exists() for file in files] == [False, True, True, False, True]
    assert awake or Path(f"/proc/{keeper.pid}/exe").readlink().name.startswith("memfd:")


def test_it_removes_more_than_there_is_room_for_without_python(
    keeper: Keeper, tmp_path: Path
) -> None:
    files = [tmp_path / f"{number}" for number in range(asleep.MOST_FILES + 2)]
    for file in files:
        file.touch()
        keeper.announce(str(file))
    keeper.enter_box()
    for file in files:
        keeper.remove(str(file))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "message",
    [
        *(b"del7", b"del\0\0\0\0\1", b"del\0\0\0", REMOVE.pack(b"del", 7), b"xyz", b"x"),
        *(REMOVE.pack(b"del", (1 << 32) - 1), b"con0", b"con5 5", b"con" + b"9" * 10_000),
        *(b"dev/etc/passwd", b'plg["/run/pyvmm-plug/1", "x"]'),
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
    until_asleep(keeper.pid)
    before = filters_of(keeper.pid)
    for _ in range(3):
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
            keeper.remove(f"{tmp_path}/way/vsock")  # where it was
            assert (secret / "vsock").exists() and not (tmp_path / "before/vsock").exists()
    assert end(keeper) == 0


def test_a_descriptor_that_cannot_be_sent_is_an_error_and_no_more(tmp_path: Path) -> None:
    class Full(socket.socket):
        """As where this user's processes have too many on their way."""

        def sendmsg(self, buffers: Any, ancillary: Any = (), *more: Any) -> int:
            if ancillary:
                raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
            return super().sendmsg(buffers)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    known = (
        str(tmp_path),
        "web",
        None,
        False,
        0,
        5.0,
        -1,
        theirs.detach(),
        "",
        [],
        (),
        [],
        [],
        [],
        [],
    )
    state = State(*known)
    with ours:
        for _ in range(2):
            ours.send(b"log\0")
        ours.shutdown(socket.SHUT_WR)
        serving = Serving(state, os.open(os.devnull, os.O_RDONLY), sleeps=False)
        with Full(fileno=serving._socket.detach()) as full:
            serving._socket = full
            serving.run()
        assert [int.from_bytes(ours.recv(8), sys.byteorder) for _ in range(2)] == [
            errno.ETOOMANYREFS,
            errno.ETOOMANYREFS,
        ]


def test_it_imports_nothing_that_a_guest_may_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python may have been told to look in the current directory, and that may be shared."""
    for name in ("json", "marshal", "select", "pyvmm", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("open('mark', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = Keeper(str(tmp_path), "web")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made.enter_box()
    monkeypatch.undo()
    os.close(made.open_log(False))
    imported = Path(f"/proc/{made.pid}/maps").read_text()
    assert end(made) == 0
    assert "python" in imported and not (tmp_path / "mark").exists()


# A monitor. argv: the folder, the keeper's patience, a group of processes or "", a user to be or 0.
# It prints its keeper's number, and then tries for each line, at some moment, to take a connection
# away from it.
MONITOR = """
import os, random, signal, sys, time
from pyvmm.host import unix_sockets
from pyvmm.monitor import keeper
from pyvmm.monitor.cgroup import Group
keeper.AWAKE = float(sys.argv[2])
made = keeper.Keeper(sys.argv[1], "web")
if sys.argv[3]:
    group = Group.__new__(Group)
    group._before, group._made = sys.argv[1], sys.argv[3]
    made.leave(group)
for name in ("one", "two"):
    made.announce(sys.argv[1] + "/" + name)
listener = unix_sockets.listen(sys.argv[1] + "/socket")
channel = made.listen(listener, owner_only=True)
made.enter_box()
if keeper.AWAKE:
    os.close(made.open_log(False))
if user := int(sys.argv[4]):
    os.setresuid(user, user, user)
patient = True
def too_late(*args):
    global patient
    if not patient:
        patient = True
        raise InterruptedError
signal.signal(signal.SIGALRM, too_late)
print(made.pid, flush=True)
for line in sys.stdin:
    if line == "tell\\n":
        os.set_inheritable(made._socket.fileno(), True)
        other = os.posix_spawn("/bin/sleep", ["sleep", "3600"], os.environ)
        for name in ("one", "two"):
            path = sys.argv[1] + "/" + name
            made._socket.send(keeper.REMOVE.pack(b"del", made._removable[path]))
        print(other, flush=True)
        continue
    until = time.perf_counter() + random.random() / 2000
    while time.perf_counter() < until:
        pass
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    os.set_blocking(listener.fileno(), True)  # which it changes when it becomes Python
    try:
        patient = False
        os.close(listener._accept()[0])
        patient = True
    except (InterruptedError, BlockingIOError):
        pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(flush=True)
"""


class Monitor:
    """The end of it is the end of its process."""

    def __init__(self, folder: Path, *, sleepy: bool, group: str = "", user: int = 0) -> None:
        for name in ("one", "two"):
            (folder / name).touch()
        command = [sys.executable, "-c", MONITOR, str(folder), "0" if sleepy else "3600"]
        self.process = subprocess.Popen(
            [*command, group, str(user)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.keeper = int(self.process.stdout.readline())
        self._keeper = os.pidfd_open(self.keeper)

    def ask(self, line: str) -> str:
        """Say `line`; what it answers, when it does."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        return self.process.stdout.readline()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.end()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._keeper, signal.SIGKILL)
        os.close(self._keeper)

    def has_no_keeper(self) -> bool:
        """It is awaited."""
        return bool(select.select([self._keeper], [], [], SAFETY_TIMEOUT)[0])


@pytest.mark.parametrize(("group", "user"), [(False, 0), (True, 0), (False, 61001)])
def test_it_ends_with_a_monitor_that_has_made_it_wait(
    tmp_path: Path, sleepy: bool, group: bool, user: int
) -> None:
    """A listener without O_NONBLOCK, of which the monitor takes all connections, has it wait in
    accept(2). The kernel tells no child of another user's end."""
    if user and os.geteuid():
        pytest.skip("only root can be somebody else")
    made = tmp_path / "group"
    made.mkdir()
    accept4 = str(number_of("accept4"))
    monitor = Monitor(tmp_path, sleepy=sleepy, group=str(made) if group else "", user=user)
    with contextlib.closing(monitor):
        syscall = Path(f"/proc/{monitor.keeper}/syscall")
        while syscall.read_text().split()[0] != accept4:
            with (
                socket.socket(socket.AF_UNIX) as client,
                contextlib.suppress(BlockingIOError),  # it is not that quick
            ):
                client.setblocking(False)
                client.connect(str(tmp_path / "socket"))
                monitor.ask("")
        monitor.end()
        assert monitor.has_no_keeper() and made.exists() is not group


@pytest.mark.parametrize("group", [False, True], ids=["", "group"])
def test_what_the_monitor_has_said_last_is_done_though_somebody_has_its_socket(
    tmp_path: Path, sleepy: bool, group: bool
) -> None:
    """A descriptor may be on its way to another process, or back to the keeper's own sockets."""
    made = tmp_path / "group"
    made.mkdir()
    monitor = Monitor(tmp_path, sleepy=sleepy, group=str(made) if group else "")
    with contextlib.closing(monitor):
        os.kill(monitor.keeper, signal.SIGSTOP)
        other = int(monitor.ask("tell"))
        try:
            monitor.end()
            os.kill(monitor.keeper, signal.SIGCONT)
            assert monitor.has_no_keeper() and made.exists() is not group
        finally:
            os.kill(other, signal.SIGKILL)
    assert not [name for name in ("one", "two") if (tmp_path / name).exists()]


@pytest.mark.parametrize("reads", [False, True])
def test_files_go_though_the_monitor_has_gone(tmp_path: Path, sleepy: bool, reads: bool) -> None:
    """Whether it has read an answer or not."""
    files = [tmp_path / name for name in ("one", "two", "three")]
    made = Keeper(str(tmp_path), "web")
    for file in files:
        file.touch()
        made.announce(str(file))
    made.enter_box()
    assert made._socket is not None
    if not sleepy:
        os.close(made.open_log(False))
    if not reads:
        made._socket.send(REMOVE.pack(b"del", 0))
        assert select.select([made._socket], [], [], SAFETY_TIMEOUT)[0]
    os.kill(made.pid, signal.SIGSTOP)
    for number in range(3):
        made._socket.send(REMOVE.pack(b"del", number))
    made._socket.close()
    os.kill(made.pid, signal.SIGCONT)
    assert end(made) == 0 and not [file for file in files if file.exists()]


def files_of(pid: int) -> list[str]:
    """What its descriptors are, but for those that lead nowhere."""
    links = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it has been closed
            links.append(os.readlink(entry.path))
    return [
        link.partition(":[")[0] if "socket" in link else link
        for link in links
        if link != "/dev/null"
    ]


def test_it_has_no_other_descriptor_and_ends_with_the_monitor(tmp_path: Path) -> None:
    made = Keeper(str(tmp_path), "web")
    made.announce(str(tmp_path / "disk"))
    inherited = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    other = os.dup(inherited)
    os.set_inheritable(inherited, True)
    try:
        made.enter_box()
    finally:
        os.close(inherited)
        os.close(other)
    until_asleep(made.pid)
    own = ["/memfd:pyvmm-keeper-state (deleted)", str(tmp_path), "anon_inode:[pidfd]", "socket"]
    assert sorted(files_of(made.pid)) == own
    os.kill(made.pid, signal.SIGINT)
    os.kill(made.pid, signal.SIGTERM)
    os.close(made.open_log(False))
    awake = sorted([*own, "anon_inode:[eventpoll]"])
    until(lambda: sorted(files_of(made.pid)) == awake, lambda: str(files_of(made.pid)))
    os.kill(made.pid, signal.SIGINT)
    os.kill(made.pid, signal.SIGTERM)
    os.close(made.open_log(False))
    assert end(made) == 0


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
    assert made._socket is not None
    os.kill(made.pid, signal.SIGSTOP)
    made._socket.send(b"log\0")
    if when == "after":
        os.kill(made.pid, signal.SIGCONT)
        assert select.select([made._socket], [], [], SAFETY_TIMEOUT)[0]
    made._socket.close()
    os.kill(made.pid, signal.SIGCONT)
    assert end(made) == 0 and not os.path.exists(group._made)


@pytest.mark.parametrize(
    "message",
    [
        *(b"dev/etc/passwd", b"dev/dev/null", b"dev/dev", b"dev/dev/ptmx", b"dev\0", b"log\0"),
        *(b'plg["/run/x", "y"]', b'plg["/run/pyvmm-plug/../x", "y"]', b"plg[1]", b"plg{"),
        *(b"plg1", REMOVE.pack(b"del", 0)),
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
        end(made)
    assert not os.listdir(tmp_path)


def test_without_it_the_monitor_goes_on(tmp_path: Path) -> None:
    made = Keeper(str(tmp_path), "web")
    made.enter_box()
    os.kill(made.pid, signal.SIGKILL)
    os.waitpid(made.pid, 0)
    with pytest.raises(OSError):
        made.open_log(False)


def until_asleep(pid: int) -> None:
    until(lambda: Path(f"/proc/{pid}/comm").read_text() == "pyvmm-keeper\n")


def private_kib(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if "Private_D" in line)


def test_asleep_it_has_next_to_no_memory_and_ends_with_the_monitor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.monitor.keeper.AWAKE", 0.0)
    made = Keeper(str(tmp_path), "web")
    made.enter_box()
    until_asleep(made.pid)
    assert private_kib(made.pid) < 256  # pages may have 64 KiB
    held = sorted(link for link in files_of(made.pid) if "memfd" not in link)
    assert held == ["anon_inode:[pidfd]", "socket"], held
    assert Path(f"/proc/{made.pid}/cmdline").read_bytes() == b"pyvmm: keeper of web\0"
    status = Path(f"/proc/{made.pid}/status").read_text()
    if box.filters_calls():
        assert "\nNoNewPrivs:\t1\n" in status and "\nSeccomp:\t2\n" in status
    os.kill(made.pid, signal.SIGINT)
    os.kill(made.pid, signal.SIGTERM)
    os.close(made.open_log(False))
    until_asleep(made.pid)
    assert end(made) == 0


@pytest.mark.parametrize("prevents", ["memfd", "exec"])
def test_where_it_cannot_sleep_it_is_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prevents: str
) -> None:
    monkeypatch.setattr("pyvmm.monitor.keeper.AWAKE", 0.0)
    create, spawn = os.memfd_create, os.posix_spawn

    def create_no_program(name: str, flags: int) -> int:
        """As with vm.memfd_noexec=2."""
        if not flags & 8:  # MFD_NOEXEC_SEAL
            raise PermissionError(errno.EACCES, "refused")
        return create(name, flags)

    def spawn_no_memory(path: str, *args: Any, **more: Any) -> int:
        if path.startswith("/proc"):
            raise PermissionError(errno.EACCES, "refused")
        return spawn(path, *args, **more)

    replaced = {
        "memfd": ("os.memfd_create", create_no_program),
        "exec": ("os.posix_spawn", spawn_no_memory),
    }
    monkeypatch.setattr(*replaced[prevents])
    made = Keeper(str(tmp_path), "web")
    (tmp_path / "file").touch()
    made.announce(str(tmp_path / "file"))
    made.enter_box()
    monkeypatch.undo()
    for _ in range(2):
        os.close(made.open_log(False))
    made.remove(str(tmp_path / "file"))
    assert not (tmp_path / "file").exists()
    if box.filters_calls():
        assert filters_of(made.pid)[0] == "Seccomp:\t2"
    assert Path(f"/proc/{made.pid}/comm").read_text() != "pyvmm-keeper\n"
    assert end(made) == 0


def test_without_a_python_to_become_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "")
    with pytest.raises(ConfigError, match="does not say where its own program is"):
        Keeper(str(tmp_path), "web").enter_box()
