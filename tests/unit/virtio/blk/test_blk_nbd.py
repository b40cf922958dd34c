"""qcow2 images behind qemu-storage-daemon: served, locked, and gone when we are."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from blk_rig import running

from pyvmm.errors import ConfigError
from pyvmm.kinds.disk.storage import open_backend
from pyvmm.spec.vm import DiskSpec
from pyvmm.testing.blk_driver import IOERR, OK, UNMAP
from pyvmm.virtio.blk import nbd
from pyvmm.virtio.blk.backend import Backend


def why_not() -> str:
    for program, package in (
        ("qemu-storage-daemon", "qemu-system-common"),
        ("qemu-img", "qemu-utils"),
        ("setpriv", "util-linux"),
    ):
        if shutil.which(program) is None:
            return f"{program} is not installed (package {package})"
    try:
        ctypes.CDLL(nbd.LIBRARY)
    except OSError:
        return "libnbd is not installed (package libnbd0)"
    return ""


pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
SIZE = 8 << 20


def qemu_img(*arguments: object) -> str:
    done = subprocess.run(
        ["qemu-img", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", path, SIZE)
    return path


def content(path: Path) -> bytes:
    raw = path.with_suffix(".check")
    qemu_img("convert", "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def opened(path: Path, closing: ExitStack, **options: object) -> Backend:
    return open_backend(DiskSpec(str(path), **options), closing)  # type: ignore[arg-type]


def daemons() -> list[int]:
    """The storage daemons that are our children."""
    children: list[int] = []
    for task in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
            children += map(int, task.read_text().split())
    return [p for p in children if Path(f"/proc/{p}/comm").read_text().startswith("qemu-storage")]


def test_random_requests_against_a_model(image: Path) -> None:
    rng, model = random.Random(2), bytearray(SIZE)
    with ExitStack() as closing:
        disk = opened(image, closing)
        assert (disk.size_sectors, disk.read_only) == (SIZE // 512, False)
        for _ in range(120):
            size = 512 * rng.choice([1, 3, 8, 128, 1000])
            offset = rng.randrange(0, SIZE - size + 1, 512)
            end, half = offset + size, size // 3
            match rng.randrange(4):
                case 0 | 1:
                    model[offset:end] = data = rng.randbytes(size)
                    views = [memoryview(data)[:half], memoryview(data)[half:]]
                    disk.writev(views, size, offset)
                case 2:
                    model[offset:end] = bytes(size)
                    disk.write_zeroes(offset, size, rng.random() < 0.5)
                case 3:
                    into = bytearray(size)
                    views = [memoryview(into)[:half], memoryview(into)[half:]]
                    disk.readv(views if rng.random() < 0.5 else [memoryview(into)], size, offset)
                    assert into == model[offset:end]
        disk.flush()
    assert content(image) == model
    assert daemons() == []


def test_large_requests_are_cut(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd, "_LARGEST", 100_000)
    data = random.Random(4).randbytes(1 << 20)
    with ExitStack() as closing:
        disk = opened(image, closing)
        disk.writev([memoryview(data)], len(data), 512)
        back = bytearray(len(data))
        disk.readv([memoryview(back)], len(back), 512)
        assert back == data


def test_discard_gives_back_the_space(image: Path, closing: ExitStack) -> None:
    disk = opened(image, closing)
    disk.writev([memoryview(b"x" * SIZE)], SIZE, 0)
    with running(disk) as rig:
        assert rig.disk.flush().status == OK
        before = image.stat().st_blocks
        assert rig.disk.discard((0, SIZE // 512, 0)).status == OK
        assert rig.disk.flush().status == OK
        assert image.stat().st_blocks < before // 2
        assert rig.disk.write_zeroes((0, 64, UNMAP)).status == OK
        assert rig.disk.read(0, 32768).data == bytes(32768)


def test_read_only(image: Path, closing: ExitStack) -> None:
    disk = opened(image, closing, read_only=True)
    assert disk.read_only
    with running(disk) as rig:
        assert rig.disk.write(0, b"x" * 512).status == IOERR
        assert rig.disk.read(0, 512).data == bytes(512)


@pytest.mark.parametrize("option", ["snapshot", "overlay"])
def test_changes_beside_it(image: Path, tmp_path: Path, option: str) -> None:
    before = image.read_bytes()
    value = True if option == "snapshot" else str(tmp_path / "changes")
    with ExitStack() as closing:
        disk = opened(image, closing, **{option: value})
        disk.writev([memoryview(b"x" * 4096)], 4096, 0)
    with ExitStack() as closing:
        disk = opened(image, closing, **{option: value})
        data = bytearray(4096)
        disk.readv([memoryview(data)], 4096, 0)
        assert data == (bytes(4096) if option == "snapshot" else b"x" * 4096)
    assert image.read_bytes() == before


def refusal(path: Path, **options: object) -> str:
    with ExitStack() as closing, pytest.raises(ConfigError) as caught:
        opened(path, closing, **options)
    text = str(caught.value)
    assert text.startswith("--disk: ") and "\n" not in text
    assert daemons() == []
    return text


def test_what_is_no_qcow2(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(bytes(65536))
    assert "is not a qcow2 image; add ,format=raw" in refusal(path)
    path.write_bytes(b"QFI\xfb" + bytes(65536))
    assert "nobody can read: version 0; qemu-img check" in refusal(path)
    path.write_bytes(b"")
    assert "is not a qcow2 image; add ,format=raw" in refusal(path)
    head = struct.pack(">4sIQIIQI", b"QFI\xfb", 3, 0, 0, 16, 1 << 20, 0)
    path.write_bytes(head.ljust(72, b"\0") + bytes(28) + struct.pack(">I", 104) + bytes(65536))
    assert "cannot be opened: " in refusal(path)
    assert "check the path" in refusal(tmp_path / "missing.qcow2")


def test_the_format_goes_by_name_or_option_never_by_content(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "disk.img"
    shutil.copy(image, other)
    for path, format, size in (
        (other, "", other.stat().st_size // 512),
        (other, "qcow2", SIZE // 512),
        (image, "raw", image.stat().st_size // 512),
    ):
        with ExitStack() as closing:
            assert opened(path, closing, format=format).size_sectors == size


def test_it_is_locked_as_qemu_locks(image: Path, closing: ExitStack) -> None:
    opened(image, closing)
    qemu = subprocess.run(
        ["qemu-io", "-c", "read 0 512", str(image)], capture_output=True, text=True
    )
    assert "lock" in qemu.stderr
    assert "is in use by another disk of this VM" in refusal_while_open(image)


def refusal_while_open(path: Path) -> str:
    with ExitStack() as closing, pytest.raises(ConfigError) as caught:
        opened(path, closing)
    return str(caught.value)


def test_a_missing_program_or_library(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert "needs qemu-storage-daemon; apt-get install" in refusal(image)
    monkeypatch.setattr(nbd, "LIBRARY", "libnbd-is-not-here.so")
    assert "needs libnbd; apt-get install libnbd0" in refusal(image)


def test_s11_a_daemon_that_dies_is_an_io_error(image: Path, closing: ExitStack) -> None:
    with running(opened(image, closing)) as rig:
        assert rig.disk.read(0, 512).status == OK
        [pid] = daemons()
        ended = os.pidfd_open(pid)
        os.kill(pid, signal.SIGKILL)
        assert select.select([ended], [], [], 60)[0]
        os.close(ended)
        assert rig.disk.read(0, 512).status == IOERR
        assert rig.disk.write(0, b"x" * 512).status == IOERR
        assert rig.disk.flush().status == IOERR
        assert len(rig.lines) == 3


MONITOR = """
import sys, time
from contextlib import ExitStack
from pyvmm.kinds.disk.storage import open_backend
from pyvmm.spec.vm import DiskSpec
with ExitStack() as closing:
    disk = open_backend(DiskSpec(sys.argv[1]), closing)
    disk.writev([memoryview(b"x" * 512)], 512, 0)
    print("open", flush=True)
    time.sleep(1000)
"""


def test_it_ends_with_the_monitor_and_leaves_nothing(image: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", MONITOR, image],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    ) as monitor:
        assert monitor.stdout is not None and monitor.stdout.readline() == "open\n"
        assert list(scratch.iterdir()) == []
        monitor.kill()
    # It writes what it held back, and then the lock is free.
    deadline = time.monotonic() + 60
    while True:
        try:
            assert content(image)[:512] == b"x" * 512
            break
        except subprocess.CalledProcessError:
            assert time.monotonic() < deadline, "the daemon lives on"
            time.sleep(0.05)
    assert list(scratch.iterdir()) == []
