"""`pyvmm run --root`: a guest on this machine's own files."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from guest import HANG_SECONDS, PYVMM, text

pytestmark = pytest.mark.usefixtures("linux_guests")

USE = """\
echo "user=$(id -u):$(id -g)"
echo "directory=$(pwd)"
echo "kernel=$(uname -r)"
echo "zone=$TZ$SECRET"
echo "file=$(cat 'a file')"
echo "argument=$1"
echo "changed" > 'a file'
echo "now=$(cat 'a file')"
echo "new" > ../new && rm ../gone
ls -di / /run /proc > /dev/null && echo "kinds=$(stat -fc %T / /run /proc | paste -sd ' ')"
echo kept > part/kept
echo "many=$(ls -U ../many | wc -l)"
modprobe dummy && echo "module=$(ls -d /sys/module/dummy)"
read line && echo "read=$line"
exit 7
"""


def test_a_command_on_this_machines_files(tmp_path: Path) -> None:
    """As it would run here, but for the kernel; and nothing here changes, apart from what may."""
    folder = tmp_path / "in here"
    (folder / "part").mkdir(parents=True)
    (folder / "a file").write_text("mine")
    (tmp_path / "gone").write_text("here")
    (tmp_path / "many").mkdir()
    for number in range(500):  # more than one answer has, so the guest asks on from a place
        (tmp_path / "many" / f"one-of-the-files-{number:03}").touch()
    argument = "$(touch /tmp/never) `'\" ä\n%s"
    words = ["--root", "/", "--rw", "part", "--memory=256M", "--", "sh", "-c", USE, "sh", argument]
    done = subprocess.run(
        [*PYVMM, "run", *words],
        cwd=folder,
        env={**os.environ, "TZ": "Asia/Tokyo", "SECRET": "unknown there"},
        input=b"a line\n",
        capture_output=True,
        timeout=HANG_SECONDS + 60,
    )
    said = text(done.stdout)
    assert done.returncode == 7, said + text(done.stderr)
    found = dict(re.findall(r"^(\w+)=(.*)$", said, re.MULTILINE))
    assert found == {
        "user": f"{os.getuid()}:{os.getgid()}",
        "directory": str(folder),
        "kernel": found["kernel"],
        "zone": "Asia/Tokyo",
        "file": "mine",
        "argument": argument.split("\n")[0],
        "now": "changed",
        "kinds": "overlayfs tmpfs proc",
        "many": "500",
        "module": "/sys/module/dummy",
        "read": "a line",
    }
    assert found["kernel"] != os.uname().release
    assert (folder / "a file").read_text() == "mine" and (tmp_path / "gone").exists()
    assert not (tmp_path / "new").exists()
    assert (folder / "part/kept").read_text() == "kept\n"
