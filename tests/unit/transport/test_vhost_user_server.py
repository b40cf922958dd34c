"""`pyvmm vhost-user-blk` and `pyvmm vhost-user` as processes: front ends that come, go and
misbehave in turn."""

from __future__ import annotations

import errno
import os
import re
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from vhost_user_rig import UnsealedMemory

from pyvmm.host.named_listener import NamedListener
from pyvmm.testing.blk_driver import OK, BlockDriver
from pyvmm.testing.ring import Buffer
from pyvmm.testing.vhost_user_driver import ADD_MEM_REG, USER_BASE, Gone, VhostUserDriver, connect
from pyvmm.transport.vhost_user import server as server_module

MIB = 1 << 20


class Server:
    """`pyvmm vhost-user-blk` on an image of one MiB."""

    def __init__(self, folder, *options, image="disk.img", extra=""):
        self.path = folder / "disk.sock"
        self.image = folder / image
        if not self.image.exists():
            self.image.write_bytes(bytes(range(256)) * (MIB // 256))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pyvmm", "vhost-user-blk", "--socket", str(self.path),
             "--disk", f"{self.image}{extra}", *options],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def front_end(self):
        return VhostUserDriver(connect(self.path), UnsealedMemory([(0, MIB)]))

    def reads(self):
        """True if a new front end can read the disk."""
        with self.front_end() as driver:
            driver.start()
            answer = BlockDriver(driver).read(0, 512)
            return answer.status == OK and answer.data == bytes(range(256)) * 2

    def end(self, number=signal.SIGTERM):
        """Its exit code and what it said."""
        self.process.send_signal(number)
        _, text = self.process.communicate(timeout=60)
        return self.process.returncode, text


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    if server.process.poll() is None:
        server.process.kill()
    server.process.communicate()


def test_only_its_owner_may_connect(tmp_path):
    before = os.umask(0)
    try:
        server = Server(tmp_path)
        assert server.reads()
    finally:
        os.umask(before)
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600
    assert server.end()[0] == 0


def test_a_front_end_for_which_there_is_no_descriptor_is_served_later(server):
    assert "waiting for a vhost-user front end" in server.process.stderr.readline()
    held = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    before = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (held, before[1]))
    with connect(server.path):
        assert "cannot be served: accept: Too many open files" in server.process.stderr.readline()
    resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, before)
    assert server.reads()
    assert server.end()[0] == 0


def test_front_ends_come_and_go(server):
    for _ in range(3):
        assert server.reads()
    code, text = server.end()
    assert code == 0
    assert len(re.findall("front end connected", text)) == 3
    assert not server.path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_a_front_end_connected(server, number):
    with server.front_end() as driver:
        driver.start()
        assert BlockDriver(driver).read(0, 512).status == OK
        assert server.end(number)[0] == 0
        driver.wait_gone()
    assert not server.path.exists()


def test_a_front_end_that_truncates_its_memory_loses_only_its_connection(server):
    with server.front_end() as driver:
        driver.start()
        os.ftruncate(driver.memory.fd, 0)
        driver.kick()
        driver.wait_gone()
    assert server.reads()
    code, text = server.end()
    assert code == 0
    assert "took memory away that it had lent" in text


def test_a_front_end_that_truncates_its_buffers_gets_an_error(server):
    """The kernel notices: EFAULT, not SIGBUS."""
    with server.front_end() as driver:
        driver.start()
        late = UnsealedMemory([(0, MIB)])
        row = struct.pack("=5Q", 0, 16 * MIB, MIB, USER_BASE + 16 * MIB, 0)
        driver.tell(ADD_MEM_REG, row, [late.fd])
        os.ftruncate(late.fd, 0)
        chain = driver.submit(0, [struct.pack("<LLQ", 0, 0, 0)], [Buffer(16 * MIB, 512), 1])
        driver.wait_used(0, chain)
        assert driver.memory.read(*chain.writable[1]) == b"\x01", "not VIRTIO_BLK_S_IOERR"
        assert BlockDriver(driver).read(0, 512).status == OK
    assert server.end()[0] == 0


def test_a_front_end_that_is_gone_in_the_middle_of_its_requests_comes_back(server):
    with server.front_end() as driver:
        driver.start()
        for sector in range(16):
            driver.submit(0, [sector.to_bytes(4, "little") + bytes(12)], [4096, 1])
    assert server.reads()


def test_s12_nonsense_ends_one_connection(server):
    with server.front_end() as driver:
        driver.connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        driver.wait_gone()
    assert server.reads()
    assert "connection given up" in server.end()[1]


def test_a_flood_of_connections_leaves_a_short_log(server):
    for _ in range(100):
        with server.front_end() as driver:
            driver.connection.sendall(b"nonsense" * 8)
            driver.wait_gone()
    code, text = server.end()
    assert code == 0
    assert len(text.splitlines()) < 100


@pytest.mark.parametrize("kind", ["overlay", "snapshot"])
def test_what_one_front_end_wrote_to_an_overlay_the_next_one_reads(tmp_path, kind):
    """Each is served by a process of its own, which may be killed; the clusters that count are
    known to all of them, and to the file at the end."""
    extra = f",overlay={tmp_path / 'changes'}" if kind == "overlay" else ",snapshot"
    server = Server(tmp_path, extra=extra)
    with server.front_end() as driver:
        driver.start()
        disk = BlockDriver(driver)
        assert disk.write(0, b"a" * 512).status == OK
        assert disk.flush().status == OK
        assert disk.write(256, b"b" * 512).status == OK  # in another cluster, and not flushed
        os.ftruncate(driver.memory.fd, 0)
        driver.kick()
        driver.wait_gone()
    with server.front_end() as driver:
        driver.start()
        disk = BlockDriver(driver)
        assert disk.read(0, 512).data == b"a" * 512
        assert disk.read(256, 512).data == b"b" * 512
        assert disk.write(512, b"c" * 512).status == OK
        assert disk.flush().status == OK
    assert server.end()[0] == 0
    assert server.image.read_bytes() == bytes(range(256)) * (MIB // 256)
    if kind == "overlay":
        again = Server(tmp_path, extra=extra)
        with again.front_end() as driver:
            driver.start()
            disk = BlockDriver(driver)
            for sector, byte in ((0, b"a"), (256, b"b"), (512, b"c")):
                assert disk.read(sector, 512).data == byte * 512
        assert again.end()[0] == 0


@pytest.mark.parametrize("size", [128, 512, 1024])
def test_rings_of_the_sizes_that_front_ends_use(server, size):
    """QEMU's and SPDK's, and the most that others serve; a chain as long as the guest may make one
    fits into the smallest."""
    with server.front_end() as driver:
        driver.start(sizes=(size,))
        [seg_max] = struct.unpack("<I", driver.config(12, 4))
        assert 64 <= seg_max <= 126
        header = struct.pack("<LLQ", 0, 0, 0)
        written, data = driver.request(0, [header], [*[512] * seg_max, 1], indirect=True)
        assert written == seg_max * 512 + 1
        assert data[-1] == OK


def test_a_server_that_was_killed_leaves_no_connection_behind(server):
    """Neither its front end nor the image's lock waits for somebody who never comes back."""
    with server.front_end() as driver:
        driver.start()
        assert BlockDriver(driver).read(0, 512).status == OK
        server.process.kill()
        server.process.wait()
        driver.wait_gone()
    again = Server(server.path.parent)
    try:
        assert again.reads()
    finally:
        assert again.end()[0] == 0


def test_a_socket_of_somebody_who_died_is_replaced(server):
    wait_for_socket(server)
    server.process.kill()
    server.process.wait()
    assert server.path.exists()
    again = Server(server.path.parent)
    try:
        again.process.stderr.readline()
        assert again.reads()
    finally:
        assert again.end()[0] == 0


def test_a_socket_where_somebody_listens_is_left_alone(server, tmp_path):
    wait_for_socket(server)
    second = Server(tmp_path, image="other.img")
    _, text = second.process.communicate(timeout=60)
    assert second.process.returncode == 2
    assert (
        text.count("\n") == 1
        and "in use by a process that listens there" in text
        and "--socket" in text
    )
    assert server.reads()


@pytest.mark.parametrize(
    ("name", "what"), [("file", "not a socket"), ("none/s", "No such"), ("x" * 300, "too long")]
)
def test_a_path_that_cannot_be_is_one_line(tmp_path, name, what):
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "disk.img").write_bytes(bytes(512))
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "vhost-user-blk", "--socket", str(tmp_path / name),
         "--disk", str(tmp_path / "disk.img")],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert what in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "file").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "options", [["--disk", "disk.img,on-error=stop"], ["--disk", "disk.img", "--queues", "0"]]
)
def test_what_cannot_be_had_is_one_line(tmp_path, options):
    (tmp_path / "disk.img").write_bytes(bytes(512))
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "vhost-user-blk", "--socket", "s", *options],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


ROOT = Path(__file__).parents[3]


class AnyServer:
    """`pyvmm vhost-user` with those options, or another command."""

    def __init__(self, folder, *options, command=(sys.executable, "-m", "pyvmm", "vhost-user")):
        self.path = folder / "any.sock"
        argv = [*command, "--socket", str(self.path), *options]
        self.process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=folder)

    def front_end(self):
        return VhostUserDriver(connect(self.path), UnsealedMemory([(0, MIB)]))

    def end(self):
        self.process.send_signal(signal.SIGTERM)
        _, text = self.process.communicate(timeout=60)
        return self.process.returncode, text


@pytest.mark.parametrize(
    "options", [["--rng"], ["--rng-limit", "iops=1000000"],
                ["--device", f"{ROOT}/examples/entropy.py:Entropy"]], ids=" ".join
)  # fmt: skip
def test_a_device_of_another_kind_serves_one_front_end_after_the_other(tmp_path, options):
    server = AnyServer(tmp_path, *options)
    answers = set()
    for size in (64, 1024):
        with server.front_end() as driver:
            driver.start(sizes=(size,))
            written, data = driver.request(0, [], [32])
            assert written == 32
            answers.add(data)
    assert len(answers) == 2
    assert server.end()[0] == 0
    assert not server.path.exists()


def test_a_vsock_device_lets_programs_reach_the_guest(tmp_path):
    server = AnyServer(tmp_path, "--vsock", "cid=77,path=guest.sock")
    for _ in range(2):
        with server.front_end() as driver:
            driver.start(sizes=(64, 64))
            assert driver.config(0, 8) == (77).to_bytes(8, "little")
            incoming = driver.submit(0, [], [4096])
            with connect(tmp_path / "guest.sock") as program:
                program.sendall(b"CONNECT 7000\n")
                driver.wait_used(0, incoming)
            header = driver.memory.read(*incoming.writable[0])[:44]
            assert struct.unpack_from("<QQIIIHH", header)[1::2] == (77, 7000, 1), "no request"
    assert server.end()[0] == 0


COUNTING = """\
import sys
import threading
import time
from contextlib import contextmanager
from pyvmm.errors import ConfigError
from pyvmm.transport.vhost_user import serve_each
from vhost_user_rig import Echo

opened = []

@contextmanager
def open_device():
    opened.append(None)
    if len(opened) in (2, 3):
        raise ConfigError("the cable is being moved")
    device = Echo()
    device.space = bytearray([len(opened)])
    yield device
    print(f"closed {len(opened)}", file=sys.stderr, flush=True)

serve_each(open_device, sys.argv[2])
"""


def test_each_front_end_finds_a_device_of_its_own(tmp_path):
    """One that cannot be opened costs a front end its connection, and no more."""
    program = tmp_path / "counting.py"
    program.write_text(COUNTING)
    path = f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    server = AnyServer(
        tmp_path, command=("env", f"PYTHONPATH={path}", sys.executable, str(program))
    )
    seen = []
    while len(seen) < 3:
        with server.front_end() as driver:
            try:
                driver.start()
            except Gone:
                continue  # the second, for which there was none
            seen += driver.config(0, 1)
    code, text = server.end()
    assert (code, seen) == (0, [1, 4, 5])
    assert text.count("cannot be served: the cable is being moved") == 2
    assert re.findall("closed [0-9]", text) == ["closed 1", "closed 4", "closed 5", "closed 6"]


WRONG_DEVICES = {
    "none": ([], "no device for the socket; give one of --net"),
    "two": (["--rng", "--net", "user"], "2 devices at one socket"),
    "two cards": (["--net", "user", "--net", "user"], "2 devices at one socket"),
    "packed": (["--net", "user,packed"], "rings are split"),
    "vhost": (["--net", "tap=none,vhost=on"], "leave out vhost"),
    "vhost-user": (["--net", "user,vhost-user"], "leave out vhost-user"),
    "deaf": (["--vsock"], "add path=PATH"),
    "limit": (["--rng-limit", "bps=x"], "--rng-limit"),
    "class": (["--device", "none.py:Nobody"], "none.py"),
    "tap": (["--net", "tap=" + "x" * 40], "not a name of an interface"),
    "disk": (["--disk", "x.img"], "No such option"),
}


@pytest.mark.parametrize(("options", "why"), WRONG_DEVICES.values(), ids=WRONG_DEVICES)
def test_a_device_that_cannot_be_served_is_one_line(tmp_path, options, why):
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "vhost-user", "--socket", "s", *options],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert why in done.stderr and done.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_front_ends_tap_is_never_the_kernels():
    """The kernel could not reach its memory."""
    from pyvmm.cli.vhost_user import _spec

    assert _spec({"net": ("tap=t",)}).vhost is False


def test_its_help_is_about_a_device_that_is_served():
    done = subprocess.run(
        [sys.executable, "-m", "pyvmm", "vhost-user", "--help"],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    for word in ("Add ", "repeated", "packed", "control socket", "as for disks"):
        assert word not in done.stdout


def wait_for_socket(server):
    with connect(server.path):
        return str(server.path)


def test_a_child_that_cannot_be_watched_is_ended(monkeypatch):
    """Else it would go on with the image beside the next one."""

    def no_room(pid):
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_room)
    one, other = socket.socketpair()
    with one, other, server_module._Ended() as ended, subprocess.Popen(["sleep", "1000"]) as child:
        with pytest.raises(OSError, match="too many open files"):
            server_module._await_child(child.pid, one, ended)
        try:
            with pytest.raises(ProcessLookupError):
                os.kill(child.pid, 0)
        finally:
            child.kill()


def test_a_signal_that_comes_to_a_child_as_it_begins_ends_it(monkeypatch, tmp_path):
    monkeypatch.setattr(
        server_module.parent, "end_with", lambda _: os.kill(os.getpid(), signal.SIGTERM)
    )
    said = []
    one, other = socket.socketpair()
    with NamedListener(str(tmp_path / "socket")) as listener, server_module._Ended() as ended:
        with one:
            other.close()  # a child that goes on finds no front end, and ends
            server_module._serve_in_child(None, one, listener, ended, said.append, None)
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []), "the parent hears no signals"
    assert said[-1] == "connection ended by SIGTERM"


def test_a_signal_that_no_python_code_sees_ends_the_wait():
    """One that comes to another thread, or just before the sleep: its handler has yet to run."""
    ready, woken, waiting = threading.Event(), threading.Event(), os.pipe()

    def send():
        ready.wait(60)
        time.sleep(0.05)  # sleeping or not by now, the main thread does not get the signal
        os.kill(os.getpid(), signal.SIGTERM)
        if not woken.wait(30):
            os.write(waiting[1], b"give up")

    sender = threading.Thread(target=send)  # which has no signal blocked
    sender.start()
    with server_module._Ended() as ended:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        try:
            ready.set()
            assert not ended.sleep((waiting[0], select.POLLIN))
        finally:
            woken.set()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    sender.join()
    for fd in waiting:
        os.close(fd)
