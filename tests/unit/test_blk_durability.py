"""The order of system calls, as the kernel saw it: data is stable before its request completes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
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
