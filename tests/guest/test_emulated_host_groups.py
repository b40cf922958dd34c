"""Limits of `--cgroup` in a machine that has all controllers, as not each has that tests run on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from guest import HANG_SECONDS, tail

pytestmark = pytest.mark.usefixtures("linux_guests")

SCRIPT = """
mount -t cgroup2 none /sys/fs/cgroup || exit
echo "+memory +pids +cpu" > /sys/fs/cgroup/cgroup.subtree_control || exit
exec "$0" -m pytest -q -rs -p no:cacheprovider tests/kvm/test_cgroup.py -k "$1"
"""


def test_a_vm_has_no_more_than_its_group() -> None:
    chosen = "who_takes or of_its_own"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pyvmm.emulated_host", "--memory", "1200", "--"),
            *("sh", "-c", SCRIPT, sys.executable, chosen),
        ],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, tail(done.stdout) + done.stderr
    assert "skipped" not in done.stdout, tail(done.stdout)
