"""Guests for arm64 on any machine, in an emulated arm64 KVM host, with Debian's kernels.

Each start of a host costs a minute, so that each guest shows many things: one on virtio-mmio with
Linux 6.1 starts twice, by a reset in between, and one on PCI with 6.12 is saved and goes on.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest
from guest import tail

from pyvmm import VM, Disk, images
from pyvmm.emulated_host.find import find_image
from pyvmm.emulated_host.spec import HostImage
from pyvmm.errors import PyvmmError

PATIENCE = 900  # seconds; it takes 60 on an idle machine
TAKES = 120.0  # seconds for a driver

INIT = """\
#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
if [ -e /token ]; then
    echo "again=$(busybox cat /token)"
    echo "clock=$(busybox date +%Y)"
    busybox insmod /gpio_keys.ko && busybox insmod /evdev.ko
    until [ -e /dev/input/event0 ]; do busybox sleep 0.1; done
    busybox dd if=/dev/input/event0 of=/pressed bs=24 count=1 2> /dev/null &
    echo "asked for"
    wait
    # struct input_event: type EV_KEY, code KEY_POWER, value 1
    echo "event=$(busybox hexdump -s 16 -e '/2 "%d "' /pressed)"
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


WAITING = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
while :; do sleep 1; done
"""
APPLETS = (
    *(
        "awk",
        "cat",
        "cut",
        "date",
        "dd",
        "dmesg",
        "echo",
        "grep",
        "ls",
        "mount",
        "nproc",
        "readlink",
    ),
    *("sh", "sha256sum", "sleep", "sync", "tail", "taskset", "true", "uname"),
)
# What the machine is, a line each.
LOOK = """
echo "release=$(uname -r)"
echo "processors=$(nproc)"
echo "gigabytes=$(awk '$1 == "MemTotal:" { print int($2 / 1000000) }' /proc/meminfo)"
echo "bus=$(readlink /sys/block/vda/device/../driver)"
echo "messages=$(grep -c ITS-.*MSI /proc/interrupts)"
"""
# What is on the disk, read past the page cache; the sum is in memory.
WRITE = """
dd if=/dev/urandom of=/data bs=64k count=64 2> /dev/null
sync
sha256sum /data > /run/sum
cut -d. -f1 /proc/uptime > /run/before
dmesg | tail -n 1 > /run/said
"""
VERIFY = """
echo 3 > /proc/sys/vm/drop_caches
echo "same=$(sha256sum -c /run/sum)"
dd if=/dev/urandom of=/more bs=64k count=16 2> /dev/null && sync && echo "writes=yes"
echo "processors=$(grep -c ^processor /proc/cpuinfo)"
for cpu in 0 1 2 3; do taskset $((1 << cpu)) true && echo "cpu$cpu=runs"; done
now=$(cut -d. -f1 /proc/uptime) before=$(cat /run/before)
[ $now -ge $before ] && [ $now -lt $((before + 600)) ] && echo "later=1"
echo "reseeded=$(dmesg | grep -c 'virtual machine fork')"
echo "complaints=$(dmesg | grep -ciE 'BUG|oops|stall|hung|lockup|call trace')"
"""


def host(kernel: str) -> HostImage:
    """The emulated host's image; skips a test where that, or `kernel`, cannot be made."""
    try:
        images.boot_files(kernel, make=True)
        return find_image(make=True, architecture="aarch64")
    except PyvmmError as error:
        pytest.skip(f"arm64 cannot be emulated here: {error}")


def root_disk(folder: Path, busybox: str, init: str = INIT) -> Path:
    """An ext4 file system with a busybox for arm64, and `init` as its first program."""
    tree, disk = folder / "tree", folder / "disk.img"
    for name in ("bin", "dev", "proc", "run", "sbin", "sys"):
        (tree / name).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(Path(busybox).read_bytes())
    [modules] = Path(images.path("kernel-arm64"), "lib/modules").iterdir()
    for name in ("keyboard/gpio_keys.ko", "evdev.ko"):
        module = modules / "kernel/drivers/input" / name
        (tree / module.name).write_bytes(module.read_bytes())
    for name in APPLETS:
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "sbin/init").write_text(init)
    for name in ("bin/busybox", "sbin/init"):
        (tree / name).chmod(0o755)
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(disk), "64M"]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(command, check=True, env=environment)
    return disk


@pytest.mark.timeout(PATIENCE + 100)
def test_a_guest_starts_twice_from_its_disk(tmp_path: Path) -> None:
    disk = root_disk(tmp_path, host("arm64").busybox)
    command = [sys.executable, "-m", "pyvmm", "run", "--arch", "arm64", "--disk", str(disk)]
    command += ["--cpus", "2", "--memory", "1G", "--cmdline", "quiet"]
    errors = tmp_path / "errors"
    with errors.open("wb") as stderr:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
        )
    assert process.stdout is not None
    killer = Timer(PATIENCE, process.kill)
    killer.start()
    lines = []
    for line in process.stdout:
        lines.append(line.decode(errors="replace"))
        if b"asked for" in line:
            process.send_signal(signal.SIGTERM)  # there is no agent: by the power button
    process.wait()
    killer.cancel()
    console, said = "".join(lines), errors.read_text(errors="replace")
    shown = tail(console) + said
    assert process.returncode in (0, 143), shown
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
    assert values["event"].split() == ["1", "116", "1", "0"], "EV_KEY, KEY_POWER, pressed"
    assert "asked the guest to power off, by its power button" in said
    assert "no guests for arm64; running in an emulated KVM host" in said


@pytest.mark.timeout(2 * PATIENCE + 100)
def test_a_guest_is_saved_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four vCPUs and 5 GiB on PCI, whose interrupts are messages through the ITS; devices come and
    go by its agent. What goes on has its vCPUs, its time, its interrupts and its disk."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    disk = root_disk(tmp_path, host("arm64-6.12").busybox, WAITING)
    data = tmp_path / "data"
    data.write_bytes(os.urandom(1 << 20))
    with VM(
        **{"kernel": "debian:6.12", "arch": "arm64", "transport": "pci", "cpus": 4},
        **{"memory": "5G", "cmdline": "quiet", "disks": [Disk(str(disk), snapshot=True)]},
    ) as vm:
        vm.wait_ready(PATIENCE)
        found = told(vm, LOOK)
        assert found["release"].startswith("6.12.")
        assert found["processors"] == "4"
        assert found["gigabytes"] == "5"
        assert found["bus"].endswith("virtio-pci")
        assert int(found["messages"]) > 1
        assert {"calls", "files", "capabilities"} <= set(vm.status()["confinement"]["on"])
        rng = vm.add_rng()
        assert vm.wait_for_driver("rng", rng, timeout=TAKES) is None
        vm.remove_rng(rng, timeout=TAKES)
        late = vm.add_disk(Disk(str(data), read_only=True))
        assert vm.wait_for_driver("disk", late, timeout=TAKES) is None
        read = told(vm, 'echo "sum=$(sha256sum < /dev/vdb | cut -d" " -f1)"')
        assert read["sum"] == hashlib.sha256(data.read_bytes()).hexdigest()
        vm.remove_disk(late, timeout=TAKES)
        vm.run(["sh", "-c", WRITE], check=True)
        vm.snapshot("saved")
        vm.run(["sh", "-c", "sha256sum -c /run/sum"], check=True)  # it goes on itself
    with VM.restore("saved") as vm:
        vm.wait_ready(PATIENCE)
        found = told(vm, VERIFY)
        assert found["same"] == "/data: OK"
        assert found["writes"] == "yes"
        assert [found.get(f"cpu{n}") for n in range(4)] == ["runs"] * 4
        assert found["later"] == "1"
        assert found["complaints"] == "0"
        assert found["reseeded"] == "1", "it knows by VMGenID that it is a copy"


def told(vm: VM, script: str) -> dict[str, str]:
    """The lines NAME=VALUE that `script` prints in the guest."""
    done = vm.run(["sh", "-c", script])
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, text + done.stderr.decode(errors="replace")
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
