"""A guest for arm64 on any machine: `pyvmm run --arch arm64`, in an emulated arm64 KVM host, with
Debian's kernel and a root disk on virtio-mmio.

One run has it all, as its host is emulated: the guest starts twice, by a reset in between, and what
it wrote the first time it reads the second time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from guest import tail

from pyvmm import images
from pyvmm.emulated_host.find import find_image
from pyvmm.errors import PyvmmError

PATIENCE = 900  # seconds; it takes 60 on an idle machine

INIT = """\
#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
if [ -e /token ]; then
    echo "again=$(busybox cat /token)"
    echo "clock=$(busybox date +%Y)"
    busybox poweroff -f
fi
echo "machine=$(busybox uname -m)"
echo "processors=$(busybox grep -c ^processor /proc/cpuinfo)"
echo "root=$(busybox awk '$2 == "/" && $1 != "rootfs" { print $1 }' /proc/mounts)"
echo "bus=$(busybox readlink /sys/block/vda/device/driver)"
echo "memory=$(busybox awk '$1 == "MemTotal:" { print ($2 > 800000) }' /proc/meminfo)"
echo "gic=$(busybox grep -c GICv3 /proc/interrupts)"
busybox dd if=/dev/urandom of=/data bs=64k count=64 2> /dev/null
busybox sync
echo 3 > /proc/sys/vm/drop_caches
busybox sha256sum /data | busybox cut -c1-16 > /token
busybox sync
echo "token=$(busybox cat /token)"
busybox reboot -f
"""


def root_disk(folder: Path, busybox: str) -> Path:
    """An ext4 file system with a busybox for arm64, and INIT as its first program."""
    tree, disk = folder / "tree", folder / "disk.img"
    for name in ("bin", "dev", "proc", "sbin", "sys"):
        (tree / name).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(Path(busybox).read_bytes())
    (tree / "sbin/init").write_text(INIT)
    for name in ("bin/busybox", "sbin/init"):
        (tree / name).chmod(0o755)
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(disk), "64M"]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(command, check=True, env=environment)
    return disk


@pytest.mark.timeout(PATIENCE + 100)
def test_a_guest_starts_twice_from_its_disk(tmp_path: Path) -> None:
    try:
        image = find_image(make=True, architecture="aarch64")
        images.boot_files("arm64", make=True)
    except PyvmmError as error:
        pytest.skip(f"arm64 cannot be emulated here: {error}")
    disk = root_disk(tmp_path, image.busybox)
    command = [sys.executable, "-m", "pyvmm", "run", "--arch", "arm64", "--disk", str(disk)]
    command += ["--cpus", "2", "--memory", "1G", "--cmdline", "quiet"]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
    )
    console, said = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    shown = tail(console) + said
    assert done.returncode == 0, shown
    values = dict(line.split("=", 1) for line in console.splitlines() if line.count("=") == 1)
    values = {name.strip(): value.strip() for name, value in values.items()}
    assert values["machine"] == "aarch64", shown
    assert values["processors"] == "2"
    assert values["root"] == "/dev/vda"
    assert values["bus"].endswith("virtio_blk")
    assert values["memory"] == "1"
    assert int(values["gic"]) > 0
    assert len(values["token"]) == 16
    assert values["again"] == values["token"], shown
    assert int(values["clock"]) >= 2026
    assert "no guests for arm64; running in an emulated KVM host" in said
