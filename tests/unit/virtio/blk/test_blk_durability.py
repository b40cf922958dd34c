"""The order of system calls, as the kernel saw it: data is stable before its request completes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent.parent.parent
SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[2])
from blk_rig import file_backend, running
from pyvmm.testing.blk_driver import F_FLUSH, OK

null = os.open("/dev/null", os.O_WRONLY)
EVENT_IDX = 1 << 29

with running(file_backend(sys.argv[1]), start=False) as rig:
    rig.transport._irq = lambda: os.write(null, b"interrupt")
    for mode, without in (("write back", EVENT_IDX), ("write through", EVENT_IDX | F_FLUSH)):
        rig.driver.start(features=rig.driver.offered_features() & ~without)
        os.write(null, mode.encode() + b": write")
        assert rig.disk.write(8, b"w" * 512).status == OK
        rig.device.reset()  # the interrupt is out
        rig.driver.start(features=rig.driver.offered_features() & ~without)
        os.write(null, mode.encode() + b": flush")
        assert rig.disk.flush().status == OK
        rig.device.reset()
"""


def strace_works() -> bool:
    if shutil.which("strace") is None:
        return False
    return (
        subprocess.run(["strace", "-o", "/dev/null", "true"], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not strace_works(), reason="strace is not installed or may not trace here")
def test_fdatasync_returns_before_the_request_completes(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(64 << 10))
    log = tmp_path / "strace.log"
    calls = "trace=pwritev,pwritev2,fdatasync,write"
    subprocess.run(
        ["strace", "-f", "-e", calls, "-o", log, sys.executable, "-c", SCRIPT, image, TESTS],
        check=True,
        timeout=120,
    )
    steps: dict[str, list[str]] = {}
    step = steps.setdefault("", [])
    for line in log.read_text().splitlines():
        if mark := re.search(r'write\(\d+, "(write (?:back|through): \w+)"', line):
            step = steps.setdefault(mark[1], [])
        elif re.search(r"(fdatasync\(\d+\)|fdatasync resumed>\)) += 0", line):
            step.append("stable")
        elif re.search(r"pwritev.* = 512$", line):
            step.append("write")
        elif '"interrupt"' in line:
            step.append("complete")
    assert steps["write back: write"] == ["write", "complete"]
    assert steps["write back: flush"] == ["stable", "complete"]
    assert steps["write through: write"] == ["write", "stable", "complete"]
    assert steps["write through: flush"] == ["stable", "complete"]


# As above, with the writes of an overlay's bitmap told from those of data by their place.
LAYERS = """
import os, sys
sys.path.insert(0, sys.argv[2])
from blk_rig import file_backend, running
from pyvmm.testing.blk_driver import OK, WRITEBACK
from pyvmm.virtio.blk.overlay_file import open_overlay

null = os.open("/dev/null", os.O_WRONLY)
EVENT_IDX = 1 << 29
base = file_backend(sys.argv[1], read_only=True)

def step(rig, name, request, *, writeback):
    rig.driver.start(features=rig.driver.offered_features() & ~EVENT_IDX)
    rig.driver.registers.write(0x100 + WRITEBACK, 1, writeback)
    os.write(null, b"step: " + name.encode())
    assert request().status == OK
    rig.device.reset()  # the interrupt is out

for name, backend in (
    ("file", file_backend(sys.argv[3])), ("overlay", open_overlay(base, sys.argv[4]))
):
    with running(backend, start=False) as rig:
        rig.transport._irq = lambda: os.write(null, b"interrupt")
        disk = rig.disk
        step(rig, f"{name} write", lambda: disk.write(8, b"w" * 512), writeback=1)
        step(rig, f"{name} flush", disk.flush, writeback=1)
        step(rig, f"{name} again", lambda: disk.write(8, b"w" * 512), writeback=1)
        step(rig, f"{name} flush again", disk.flush, writeback=1)
        step(rig, f"{name} through", lambda: disk.write(64, b"w" * 512), writeback=0)
        os.write(null, b"step: closing")
"""


@pytest.mark.skipif(not strace_works(), reason="strace is not installed or may not trace here")
def test_write_through_and_overlay_complete_after_fdatasync(tmp_path: Path) -> None:
    for name in ("base.img", "disk.img"):
        (tmp_path / name).write_bytes(bytes(64 << 10))
    log = tmp_path / "strace.log"
    calls = "trace=pwritev,pwritev2,fdatasync,write"
    paths = [tmp_path / "base.img", TESTS, tmp_path / "disk.img", tmp_path / "changes"]
    subprocess.run(
        ["strace", "-f", "-e", calls, "-o", log, sys.executable, "-c", LAYERS, *paths],
        check=True,
        timeout=120,
    )
    steps: dict[str, list[str]] = {}
    step = steps.setdefault("", [])
    for line in log.read_text().splitlines():
        if mark := re.search(r'write\(\d+, "step: ([\w ]+)"', line):
            step = steps.setdefault(mark[1], [])
        elif re.search(r"(fdatasync\(\d+\)|fdatasync resumed>\)) += 0", line):
            step.append("stable")
        elif re.search(r"pwritev.*, 1, 4096(, 0)?\) += 4096$", line):
            step.append("bitmap")  # an overlay's, at its place
        elif re.search(r"pwritev.* = 512$", line):
            step.append("write")
        elif '"interrupt"' in line:
            step.append("complete")
    assert steps["file write"] == ["write", "complete"]
    assert steps["file through"] == ["write", "stable", "complete"]
    assert steps["overlay write"] == ["write", "complete"]
    assert steps["overlay flush"] == ["stable", "bitmap", "stable", "complete"]
    assert steps["overlay again"] == ["write", "complete"]
    assert steps["overlay flush again"] == ["stable", "complete"]
    assert steps["overlay through"] == ["write", "stable", "bitmap", "stable", "complete"]
