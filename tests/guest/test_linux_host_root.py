"""`pyvmm run --root`: a guest on this machine's own files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from disks import artifacts
from guest import HANG_SECONDS, PYVMM, text

from pyvmm.images.kernel import modules_folder

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
echo "build=$(cat /lib/modules/$(uname -r)/build/include/config/kernel.release)"
read line && echo "read=$line"
exit 7
"""


def just_built(tree: Path) -> str:
    """Debian's kernel where a build would have left it in `tree`, with its modules; its release."""
    files = artifacts("6.1")
    image = Path(files.bzimage).parent
    installed = Path(modules_folder(str(image)))
    for folder in ("arch/x86/boot", "include/config"):
        (tree / folder).mkdir(parents=True)
    (tree / "include/config/kernel.release").write_text(f"{installed.name}\n")
    shutil.copy(image / "config", tree / ".config")
    shutil.copy(image / "vmlinux", tree)  # which the bzImage is made of, so that is younger
    shutil.copytree(installed / "kernel", tree, dirs_exist_ok=True)
    order = (installed / "modules.order").read_text()
    objects = re.sub(r"^(?:kernel/)?(.*)\.ko$", r"\1.o", order, flags=re.MULTILINE)
    (tree / "modules.order").write_text(objects)
    for name in ("modules.builtin", "modules.builtin.modinfo"):
        shutil.copy(installed / name, tree)
    shutil.copyfile(files.bzimage, tree / "arch/x86/boot/bzImage")
    return installed.name


def test_a_command_on_a_kernel_that_was_just_built_and_this_machines_files(tmp_path: Path) -> None:
    """As it would run here, but for the kernel; and nothing here changes, apart from what may."""
    release = just_built(tmp_path / "linux, 6:1")
    folder = tmp_path / "in here"
    (folder / "part").mkdir(parents=True)
    (folder / "a file").write_text("mine")
    (tmp_path / "gone").write_text("here")
    (tmp_path / "many").mkdir()
    for number in range(500):  # more than one answer has, so the guest asks on from a place
        (tmp_path / "many" / f"one-of-the-files-{number:03}").touch()
    argument = "$(touch /tmp/never) `'\" ä\n%s"
    words = ["--kernel", "../linux, 6:1", "--root", "/", "--rw", "part", "--memory=256M"]
    words += ["--", "sh", "-c", USE, "sh", argument]
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
        "kernel": release,
        "zone": "Asia/Tokyo",
        "file": "mine",
        "argument": argument.split("\n")[0],
        "now": "changed",
        "kinds": "overlayfs tmpfs proc",
        "many": "500",
        "module": "/sys/module/dummy",
        "build": release,
        "read": "a line",
    }
    assert release != os.uname().release
    assert "modprobe" not in text(done.stderr) and "lacks" not in text(done.stderr)
    assert (folder / "a file").read_text() == "mine" and (tmp_path / "gone").exists()
    assert not (tmp_path / "new").exists()
    assert (folder / "part/kept").read_text() == "kept\n"
