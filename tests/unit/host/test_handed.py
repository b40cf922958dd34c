"""Files that somebody else has opened, where we would open them: disks read and write by them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from pyvmm.errors import ConfigError
from pyvmm.host import handed, storage_daemon, virtiofsd
from pyvmm.host.files import open_image
from pyvmm.kinds import disk as disks
from pyvmm.kinds import net, registry
from pyvmm.kinds.disk import storage
from pyvmm.kinds.disk.storage import open_backend
from pyvmm.kinds.user_class import UserClass
from pyvmm.virtio.blk import nbd

SIZE = 1 << 16


@pytest.fixture
def image(tmp_path: Path) -> Path:
    made = tmp_path / "image"
    made.write_bytes(b"b" * SIZE)
    return made


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    ("options", "base", "changes"),
    [
        ("", b"n", None),
        (",direct", b"n", None),
        (",snapshot", b"b", None),
        (",overlay={}", b"b", b"n"),
    ],
)
def test_a_disk_of_descriptors_is_the_disk_of_its_names(
    image: Path, monkeypatch: pytest.MonkeyPatch, options: str, base: bytes, changes: bytes | None
) -> None:
    kept = image.with_name("kept")
    spec = disks.parse(f"{image}{options.format(kept)}")
    with ExitStack() as client, ExitStack() as monitor:
        asked, files = registry.hand_over(spec, client)
        owner = handed.Descriptors(os.dup(fd) for fd in files.values())
        client.close()  # the locks stay with the files
        with pytest.raises(ConfigError, match="in use"):
            open_image(str(image))
        # Nothing is opened by its name any more.
        os.rename(image, image.with_name("moved"))
        if kept.exists():
            os.rename(kept, kept.with_name("moved-too"))
        with handed.files(dict(zip(files, owner.fds, strict=True)), owner):
            assert isinstance(asked, type(spec))
            backend = open_backend(asked, monitor)
        assert not owner.fds
        import mmap

        page = memoryview(mmap.mmap(-1, 4096))  # direct I/O wants it aligned
        backend.readv([page], 4096, 0)
        assert bytes(page) == b"b" * 4096
        page[:] = b"n" * 4096
        backend.writev([page], 4096, 4096)
        backend.readv([page], 4096, 4096)
        assert bytes(page) == b"n" * 4096
        backend.flush()
    assert not image.exists() and not kept.exists()  # nothing was made by its name, either
    assert image.with_name("moved").read_bytes()[4096:8192] == base * 4096
    if changes is not None:
        assert changes * 4096 in kept.with_name("moved-too").read_bytes()
    open_image(str(image.with_name("moved"))).close()  # nobody has it any more


def a_pipe(image: Path) -> int:
    ours, theirs = os.pipe()
    os.close(theirs)
    return ours


WRONG: dict[str, tuple[Callable[[Path], int], str]] = {
    "only to be read": (lambda image: os.open(image, os.O_RDONLY), "cannot be written"),
    "only to be written": (lambda image: os.open(image, os.O_WRONLY), "cannot be written"),
    "a path": (lambda image: os.open(image, os.O_PATH), "cannot be written"),
    "a pipe": (a_pipe, "is a FIFO"),
    "a directory": (lambda image: os.open(image.parent, os.O_RDONLY), "is a directory"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_descriptor_is_refused_in_a_line_and_closed(image: Path, what: str) -> None:
    make, message = WRONG[what]
    fd = make(image)
    owner = handed.Descriptors([fd])
    with (
        handed.files({str(image): fd}, owner),
        pytest.raises(ConfigError, match=message) as told,
    ):
        open_image(str(image))
    assert "\n" not in str(told.value)
    assert not owner.fds and not is_open(fd)


def test_a_descriptor_that_only_appends_is_written_where_the_guest_writes(image: Path) -> None:
    fd = os.open(image, os.O_RDWR | os.O_APPEND)
    with handed.Descriptors([fd]) as owner, ExitStack() as closing:
        with handed.files({str(image): fd}, owner):
            backend = open_backend(disks.parse(str(image)), closing)
        backend.writev([memoryview(b"n" * 512)], 512, 0)
    assert image.read_bytes() == b"n" * 512 + b"b" * (SIZE - 512)


def test_an_open_file_that_comes_twice_is_refused(image: Path) -> None:
    """Its lock is its own, whoever asks."""

    def take(text: str, **flags: int) -> None:
        names = {name: os.dup(fd) for name, fd in flags.items()}
        names = {str(image) if name == "image" else name: fd for name, fd in names.items()}
        with handed.Descriptors(names.values()) as owner, handed.files(names, owner):
            open_backend(disks.parse(text), closing)

    before = len(os.listdir("/proc/self/fd"))
    with open(image, "r+b") as file, ExitStack() as closing:
        with pytest.raises(ConfigError, match="the file for changes is in use by another disk"):
            take(f"{image},snapshot", image=file.fileno(), scratch=file.fileno())
        closing.close()
        take(f"{image}", image=file.fileno())
        for more in ("", ",readonly", ",snapshot"):
            with pytest.raises(ConfigError, match="is in use by another disk of this VM"):
                take(f"{image}{more}", image=file.fileno())
        closing.close()
        for _ in range(2):
            take(f"{image},readonly", image=file.fileno())
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("what", WRONG)
def test_wrong_room_for_changes_is_refused_and_closed(image: Path, what: str) -> None:
    make, message = WRONG[what]
    fd = make(image)
    with handed.Descriptors([os.open(image, os.O_RDONLY), fd]) as owner, ExitStack() as closing:
        names = {str(image): owner.fds[0], "scratch": fd}
        with handed.files(names, owner), pytest.raises(ConfigError, match=message):
            open_backend(disks.parse(f"{image},snapshot"), closing)
        assert not owner.fds and not is_open(fd)


def test_too_little_room_for_changes_is_refused(image: Path, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"")
    fds = [os.open(image, os.O_RDONLY), os.open(tmp_path / "small", os.O_RDWR)]
    with handed.Descriptors(fds) as owner, ExitStack() as closing:
        names = dict(zip((str(image), "scratch"), fds, strict=True))
        with handed.files(names, owner), pytest.raises(ConfigError, match="has less than"):
            open_backend(disks.parse(f"{image},snapshot"), closing)


def a_listener(image: Path) -> int:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(image.with_name("listener")))
    listening.listen()
    return listening.detach()


@pytest.mark.parametrize(
    "make",
    [
        lambda image: os.open(image, os.O_RDWR),
        a_pipe,
        a_listener,
        lambda image: socket.socket(socket.AF_INET).detach(),
        lambda image: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].detach(),
    ],
)
def test_a_cable_that_is_none_is_refused_and_closed(
    image: Path, make: Callable[[Path], int]
) -> None:
    fd = make(image)
    with handed.Descriptors([fd]) as owner:
        with (
            handed.files({"passt": fd}, owner),
            pytest.raises(ConfigError, match="no stream socket that is connected"),
        ):
            net.start_passt(net.parse("user"))
        assert not owner.fds and not is_open(fd)


def test_descriptors_are_all_closed_whatever_one_of_them_says(image: Path) -> None:
    fds = [os.open(image, os.O_RDONLY) for _ in range(3)]
    os.close(fds[1])
    handed.Descriptors(fds).close()
    assert not any(map(is_open, fds))


def test_only_the_thread_that_was_handed_them_finds_them(image: Path) -> None:
    fd = os.open(image, os.O_RDWR)
    found: list[object] = []
    with handed.Descriptors([fd]) as owner, handed.files({"name": fd}, owner):
        thread = Thread(target=lambda: found.append((handed.present(), handed.take("name"))))
        thread.start()
        thread.join()
        assert handed.present() and handed.has("name")
        assert handed.take("another") is None
        assert handed.take("name") == fd and not handed.has("name")
        owner.fds.append(fd)
    assert found == [(False, None)]
    assert not handed.present() and not is_open(fd)


@pytest.mark.parametrize("what", ["fifo", "folder", "large", "closed to readers"])
def test_a_source_that_cannot_be_read_is_told_and_closed(tmp_path: Path, what: str) -> None:
    """Above all the beginning of one is not run for the whole."""
    path = tmp_path / "code.py"
    flags = os.O_RDONLY | os.O_NONBLOCK
    why = "not a regular file"
    if what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "large":
        path.write_bytes(b"#" * (16 << 20) + b"\nraise SystemExit\n")
        why = "more than 16 MiB"
    else:
        path.touch()
        flags, why = os.O_WRONLY, "Bad file descriptor"
    owner = handed.Descriptors([fd := os.open(path, flags)])
    wanted = UserClass(str(path), "Disk", (), "--disk")
    with owner, handed.files({str(path): fd}, owner):
        with pytest.raises(ConfigError, match=f"cannot read {path}: {why}"):
            wanted.load(object, "")
        assert not is_open(fd)


def test_a_server_that_says_nothing_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        nbd.load()
    except ConfigError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(storage, "_HANDSHAKE", 0.1)
    (tmp_path / "image.qcow2").touch()
    [disk] = registry.read("disk", f"{tmp_path}/image.qcow2,format=qcow2")
    ours, silent = socket.socketpair()
    (says, end), (other, life) = os.pipe(), os.pipe()
    os.close(end)
    process = os.open("/dev/null", os.O_RDONLY)
    owner = handed.Descriptors([ours.detach(), says, life, process])
    names = dict(zip(storage_daemon._NAMES, owner.fds, strict=True))
    with silent, owner, ExitStack() as closing, handed.files(names, owner):
        with pytest.raises(ConfigError, match="cannot be opened: qemu-storage-daemon ended"):
            open_backend(disk, closing)
        assert os.read(other, 1) == b""  # which ends it
    os.close(other)


@pytest.mark.parametrize("module", [storage_daemon, virtiofsd])
def test_who_keeps_the_other_end_of_a_servers_messages_keeps_nothing_of_ours(
    monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    before = len(os.listdir("/proc/self/fd"))
    (ours, theirs), (says, keeps), (held, life) = socket.socketpair(), os.pipe(), os.pipe()
    given = [ours.detach(), says, life, os.pidfd_open(os.getpid())]
    if module is virtiofsd:
        names = dict(zip((virtiofsd._SOCKET, virtiofsd._SAYS), given, strict=False))
    else:
        names = dict(zip(storage_daemon._NAMES, given, strict=True))
    with handed.Descriptors(given) as owner, handed.files(names, owner):
        server = module.take_over("image")
    server.socket.close()
    for _ in range(2):  # as its device is closed once more if it could not be opened
        server.close()
    assert not server._watcher._thread.is_alive()
    theirs.close()
    for fd in (keeps, held):
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
