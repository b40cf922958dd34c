"""A failure of the host becomes IOERR for the guest, or the end of the VM."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from blk_rig import MIB, file_backend, running

from pyvmm.errors import HostError
from pyvmm.kinds.disk import parse as parse_disk
from pyvmm.kinds.disk.storage import open_disk
from pyvmm.machine.outcome import Alarm, Ending, Outcome
from pyvmm.spec.vm import DiskSpec
from pyvmm.testing.blk_driver import IN, IOERR, OK, header
from pyvmm.virtio.blk.backend import FileBackend

TESTS = Path(__file__).parent.parent.parent.parent


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


class Failing(FileBackend):
    """A real disk whose sector 8 is broken."""

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        if offset == 8 * 512:
            raise HostError(errno.EIO, "read of a bad sector")
        super().readv(views, size, offset)


def failing(image: Path) -> Failing:
    return Failing(file_backend(image)._image)


def test_report_answers_ioerr_and_goes_on(image: Path) -> None:
    with running(failing(image)) as rig:
        assert rig.disk.read(8, 512).status == IOERR
        assert rig.disk.read(0, 512).status == OK
        [line] = rig.lines
        assert line == ("IN at sector 8 answered IOERR: read of a bad sector: Input/output error")


def test_stop_tells_once_and_answers_nothing_more(image: Path) -> None:
    told: list[str] = []
    with running(failing(image), stop=told.append) as rig:
        queue = rig.driver.queues[0]
        assert rig.disk.read(0, 512).status == OK
        before = queue.used_idx
        for sector in (8, 0, 8):
            queue.add([header(IN, sector)], [512, 1])
        queue.publish()
        rig.driver.kick()
        deadline = time.monotonic() + 60
        while not told and time.monotonic() < deadline:
            time.sleep(0.001)
        queue.add([header(IN, 0)], [512, 1])
        queue.publish()
        rig.driver.kick()
        rig.driver.reset()  # waits for the worker, and must not wait for ever
        assert told == ["disk vda: read of a bad sector: Input/output error"]
        assert queue.used_idx == before
        assert not rig.driver.needs_reset


def test_a_guests_own_mistake_stops_nothing(image: Path) -> None:
    told: list[str] = []
    with running(file_backend(image), stop=told.append) as rig:
        assert rig.disk.read(2**40, 512).status == IOERR
        assert rig.disk.read(0, 512).status == OK
    assert told == []


def test_the_alarm_ends_the_run_also_if_it_came_first() -> None:
    for early in (True, False):
        alarm, ended = Alarm(), []
        if early:
            alarm.disk_failed("disk root: read: Input/output error")
        alarm.connect(ended.append)
        if not early:
            alarm.disk_failed("disk root: read: Input/output error")
        line = "disk root: read: Input/output error; stopped (on-error=stop)"
        assert ended == [Outcome(Ending.DISK_ERROR, line)]
        assert ended[0].exit_code == 15


def test_the_option_reaches_the_device(image: Path) -> None:
    spec = parse_disk(f"{image},on-error=stop,id=root")
    assert spec.on_error == "stop" and DiskSpec("x").on_error == "report"
    with ExitStack() as closing:
        alarm = Alarm()
        assert open_disk(spec, None, closing, alarm)._stop == alarm.disk_failed


# A real limit of the kernel's: no file of this process may grow past 512 KiB.
LIMITED = """
import resource, signal, sys
sys.path.insert(0, sys.argv[2])
from blk_rig import file_backend, running
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with running(file_backend(sys.argv[1])) as rig:
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 10, 512 << 10))
    print(rig.disk.write(0, b"x" * 4096).status, rig.disk.write(1024, b"x" * 4096).status)
    print(rig.disk.read(1024, 4096).status, *rig.lines)
"""


def test_row49_a_write_that_the_kernel_refuses(tmp_path: Path) -> None:
    image = tmp_path / "sparse.img"
    with image.open("wb") as file:
        file.truncate(MIB)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, image, TESTS], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[0] == "0 1", done.stderr
    assert done.stdout.splitlines()[1].startswith("0 OUT at sector 1024 answered IOERR: ")
    assert os.strerror(errno.EFBIG) in done.stdout


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A folder with 256 KiB of room."""
    folder = tmp_path / "full"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_row49_a_full_file_system(full: Path) -> None:
    image = full / "sparse.img"
    with image.open("wb") as file:
        file.truncate(MIB)
    with running(file_backend(image)) as rig:
        statuses = [rig.disk.write(n * 128, b"x" * 65536).status for n in range(8)]
        assert statuses[0] == OK and statuses[-1] == IOERR
        assert os.strerror(errno.ENOSPC) in rig.lines[0]
        # What is discarded makes room again.
        assert rig.disk.discard((0, 128, 0)).status == OK
        assert rig.disk.write(7 * 128, b"y" * 32768).status == OK
        assert rig.disk.read(7 * 128, 512).data == b"y" * 512
