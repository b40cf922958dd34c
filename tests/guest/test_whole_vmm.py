"""The VMM of docs/tutorial/04, which is all public parts and no `pyvmm run`, boots Debian."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from guest import HANG_SECONDS, tail

from pyvmm import images
from pyvmm.machine.host_kvm import why_unusable

SCRIPT = Path(__file__).parents[2] / "docs/tutorial/whole_vmm.py"


def test_it_boots_debian_to_a_shell_on_its_root_disk(tmp_path: Path, linux_guests: None) -> None:
    kernel, initramfs = images.folders(["kernel-6.1", "initramfs-6.1"], make=True)
    disk = tmp_path / "root.img"
    images.fresh_disk(str(disk))
    command = [sys.executable, SCRIPT, f"{kernel}/vmlinux", f"{initramfs}/initramfs.cpio", disk]
    if why_unusable() is not None:
        host = ["pyvmm.emulated_host", "--memory", "1200", "--disk", disk, "--"]
        command = [sys.executable, "-m", *host, *command]
    done = subprocess.run(
        command,
        input="echo written by $(uname -s) >/left; cat /proc/mounts; sync; exit\n",
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, tail(done.stdout) + done.stderr
    assert "/dev/vda / ext4 rw" in done.stdout
    # What the guest has written is in the image.
    left = subprocess.run(
        ["debugfs", "-R", "cat /left", disk], capture_output=True, text=True, timeout=60
    )
    assert left.stdout == "written by Linux\n"
