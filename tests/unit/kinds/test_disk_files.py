"""Opening, sizing and locking disk images: other files get one line that says what to do."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.host import files, locks
from pyvmm.host.files import open_image

needs_qemu_io = pytest.mark.skipif(
    shutil.which("qemu-io") is None, reason="qemu-io is not installed (package qemu-utils)"
)
as_root = os.geteuid() == 0


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 16)
    return str(path)


def refusal(path: str | Path, **options: bool) -> str:
    with pytest.raises(ConfigError) as caught:
        open_image(str(path), **options)
    text = str(caught.value)
    assert text.startswith("--disk: ") and "\n" not in text
    assert caught.value.cure
    return text


class Holder:
    """Another process that has an image open until the `with` block ends."""

    def __init__(self, *argv: str, ready: str | None = None) -> None:
        self.argv, self.ready = argv, ready

    def __enter__(self) -> int:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(self.argv, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdin and self.process.stdout
        if self.ready is None:  # qemu-io answers its first command once the image is open
            self.process.stdin.write("length\n")
            self.process.stdin.flush()
        assert self.process.stdout.readline()
        return self.process.pid

    def __exit__(self, *_: object) -> None:
        self.process.communicate(timeout=60)


def pyvmm_holder(path: str, read_only: bool) -> Holder:
    script = (
        "import sys; from pyvmm.host.files import open_image;"
        f"image = open_image({path!r}, read_only={read_only}); print('open', flush=True);"
        "sys.stdin.read()"
    )
    return Holder(sys.executable, "-c", script, ready="open")


def qemu_holder(path: str, read_only: bool) -> Holder:
    return Holder("qemu-io", *(["-r"] if read_only else []), "-f", "raw", path)


def test_a_whole_image_opens_with_its_size(image: str) -> None:
    disk = open_image(image)
    assert (disk.size, disk.read_only, disk.hints) == (4096, False, ())
    disk.close()
    disk.close()  # a second time is harmless


def test_the_file_descriptor_is_not_inherited(image: str) -> None:
    disk = open_image(image)
    assert not os.get_inheritable(disk.fd)
    disk.close()


def test_row51_an_odd_tail_is_hidden_and_said(image: str) -> None:
    with open(image, "ab") as file:
        file.write(b"tail")
    disk = open_image(image, read_only=True)
    assert disk.size == 4096
    assert "4 bytes" in disk.hints[0]
    disk.close()


def test_row51_an_empty_image(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.touch()
    assert "is empty" in refusal(path)
    path.write_bytes(bytes(511))
    assert "511 bytes" in refusal(path)


def test_row51_missing(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "nowhere.img")
    assert "Not a directory" in refusal(Path(__file__) / "disk.img")


def test_row51_no_path_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        open_image("")
    with pytest.raises(ConfigError):
        open_image("a\0b")


def test_row51_a_directory(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)


def test_row51_a_fifo_is_refused_without_waiting_for_its_other_end(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    assert "is a FIFO" in refusal(path)
    assert "is a FIFO" in refusal(path, read_only=True)


def test_row51_a_file_that_becomes_a_fifo_after_the_look_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str
) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    real_stat, seen = os.stat, []

    def stat_of_the_old_file(target: str) -> os.stat_result:
        seen.append(target)
        return real_stat(image)

    monkeypatch.setattr(files.os, "stat", stat_of_the_old_file)
    assert "is a FIFO" in refusal(path, read_only=True)
    assert seen


def test_row51_a_character_device() -> None:
    assert "is a character device" in refusal("/dev/zero")


def test_row51_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert "is a socket" in refusal(path)


def test_row51_no_permission_to_write_suggests_readonly(image: str) -> None:
    # Root may read and write anything, so the question is asked by an ordinary user's process.
    if not as_root:
        os.chmod(image, 0o444)
        assert ",readonly" in refusal(image)
        os.chmod(image, 0)
        assert "Permission denied" in refusal(image)
        return
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.chmod(image, 0o444)
            for directory in list(Path(image).parents)[:-2]:
                os.chmod(directory, 0o755)
            os.setuid(65534)
            if ",readonly" in refusal(image):
                status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def test_row51_a_read_only_file_opens_readonly(image: str) -> None:
    os.chmod(image, 0o444)
    disk = open_image(image, read_only=True)
    with pytest.raises(OSError):
        os.pwrite(disk.fd, b"x", 0)
    disk.close()


@pytest.mark.parametrize(
    ("theirs", "ours", "both"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
    ids=["writer-writer", "writer-reader", "reader-writer", "reader-reader"],
)
def test_row51_locked_by_another_pyvmm(image: str, theirs: bool, ours: bool, both: bool) -> None:
    with pyvmm_holder(image, read_only=theirs) as pid:
        if both:
            open_image(image, read_only=ours).close()
        else:
            assert f"(PID {pid})" in refusal(image, read_only=ours)
    open_image(image, read_only=ours).close()  # the lock went with the process


@needs_qemu_io
@pytest.mark.parametrize(
    ("theirs", "ours", "both"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
    ids=["writer-writer", "writer-reader", "reader-writer", "reader-reader"],
)
def test_row51_locked_by_qemu(image: str, theirs: bool, ours: bool, both: bool) -> None:
    with qemu_holder(image, read_only=theirs) as pid:
        if both:
            open_image(image, read_only=ours).close()
        else:
            assert f"qemu-io (PID {pid})" in refusal(image, read_only=ours)
    open_image(image, read_only=ours).close()


@needs_qemu_io
@pytest.mark.parametrize("ours", [False, True], ids=["writer", "reader"])
def test_qemu_notices_our_lock(image: str, ours: bool) -> None:
    disk = open_image(image, read_only=ours)
    write = ["qemu-io", "-f", "raw", "-c", "write 0 512", image]
    read = ["qemu-io", "-r", "-f", "raw", "-c", "read 0 512", image]
    refused = subprocess.run(write, capture_output=True, text=True)
    assert refused.returncode != 0 and "lock" in refused.stderr
    assert (subprocess.run(read, capture_output=True).returncode == 0) is ours
    disk.close()
    assert subprocess.run(write, capture_output=True).returncode == 0


def test_row51_one_image_as_two_disks_of_one_vm(image: str) -> None:
    first = open_image(image)
    assert "another disk of this VM" in refusal(image)
    first.close()
    readers = [open_image(image, read_only=True) for _ in range(2)]
    for reader in readers:
        reader.close()


def test_a_refused_open_leaves_no_lock_behind(image: str) -> None:
    reader = open_image(image, read_only=True)
    refusal(image)
    open_image(image, read_only=True).close()
    reader.close()
    open_image(image).close()


def test_an_ordinary_posix_lock_of_another_program_counts_too(image: str) -> None:
    script = (
        f"import fcntl, sys; file = open({image!r}, 'r+b'); fcntl.lockf(file, fcntl.LOCK_EX);"
        "print('locked', flush=True); sys.stdin.read()"
    )
    with Holder(sys.executable, "-c", script, ready="locked") as pid:
        assert f"(PID {pid})" in refusal(image)


def test_a_file_system_without_locks_is_a_hint_not_an_error(
    image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")  # ENOLCK

    monkeypatch.setattr(locks.fcntl, "fcntl", no_locks)
    disk = open_image(image)
    assert "no locks" in disk.hints[0]
    disk.close()


def test_row52_a_raw_disk_that_begins_like_qcow2_stays_raw(image: str) -> None:
    with open(image, "r+b") as file:
        file.write(b"QFI\xfb\0\0\0\3")
    disk = open_image(image)
    assert disk.size == 4096  # not the size that a QCOW2 header would name
    assert "served raw" in disk.hints[0]
    view = memoryview(bytearray(8))
    assert files.preadv_all(disk.fd, [view], 0) == 8
    assert bytes(view) == b"QFI\xfb\0\0\0\3"
    disk.close()


def loop_device(path: str) -> str:
    made = subprocess.run(["losetup", "-f", "--show", path], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    return made.stdout.strip()


@pytest.mark.skipif(not as_root, reason="only root may set up a loop device")
def test_a_block_device_is_a_disk_of_its_own_size(image: str) -> None:
    node = loop_device(image)
    try:
        disk = open_image(node)
        assert disk.size == 4096
        view = memoryview(bytearray(16))
        files.preadv_all(disk.fd, [view], 512)
        assert bytes(view) == bytes(range(16))
        assert "in use" in refusal(node) or "busy" in refusal(node)
        disk.close()
        open_image(node).close()
    finally:
        subprocess.run(["losetup", "-d", node], check=True)


def test_transfers_longer_than_iov_max_and_short_ones(image: str) -> None:
    disk = open_image(image)
    data = os.urandom(4096)
    source = [memoryview(bytearray(data))[i : i + 2] for i in range(0, 4096, 2)]
    assert files.pwritev_all(disk.fd, source, 0) == 4096
    target = bytearray(4096)
    views = [memoryview(target)[i : i + 2] for i in range(0, 4096, 2)]
    assert files.preadv_all(disk.fd, views, 0) == 4096
    assert target == data
    assert files.preadv_all(disk.fd, views, 4090) == 6  # the end of the file
    disk.close()


def test_a_transfer_goes_on_after_any_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(100))

    def at_most_seven(_fd: int, views: list[memoryview], offset: int) -> int:
        done = 0
        for view in views:
            count = min(len(view), 7 - done)
            view[:count] = data[offset + done : offset + done + count]
            done += count
        return done

    monkeypatch.setattr(files.os, "preadv", at_most_seven)
    target = bytearray(100)
    whole = memoryview(target)
    assert files.preadv_all(-1, [whole[:10], whole[10:10], whole[10:13], whole[13:]], 0) == 100
    assert target == data
