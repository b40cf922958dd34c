"""Guests for arm64 on any machine, in an emulated arm64 KVM host, with Debian's kernels.

Each start of a host costs half a minute, so that each shows many things: a guest on virtio-mmio
with Linux 6.1 starts twice, by a reset in between, with a shared directory, from which it runs fio;
one on PCI with 6.12 is saved, panics, goes on and is killed while it writes; one on PCI has a
GICv2, and is saved; one has a directory as its root and Debian's newest kernel, and one is
a container image; and in one host is all that needs no Linux guest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from threading import Timer

import pytest
from c_claims import ARM64, assembled, needs_arm64_headers
from container_archives import Layout, directory, layer, member, symlink
from guest import tail, wait_until

from pyvmm import VM, Disk, images
from pyvmm.emulated_host.find import find_image
from pyvmm.emulated_host.spec import HostImage
from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.images import debian_kernels
from pyvmm.machine.outcome import Ending

PATIENCE = 900  # seconds; it takes 60 on an idle machine
TAKES = 120.0  # seconds for a driver
NAMES = 600

INIT = """\
#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
if [ -e /token ]; then
    echo "again=$(busybox cat /token)"
    echo "share_again=$(busybox cat /mnt/shared/file)"
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
lib=/mnt/fio/usr/lib
libraries=$lib/aarch64-linux-gnu:$lib/aarch64-linux-gnu/ceph
if $lib/ld-linux-aarch64.so.1 --library-path $libraries /mnt/fio/usr/bin/fio \\
    --name=all --filename=/dev/vdb --direct=1 --ioengine=libaio --size=16M --rw=randwrite \\
    --bsrange=512-64k --iodepth=16 --verify=crc32c --do_verify=1 --verify_fatal=1 --randseed=7 \\
    --thread --eta=never > /fio 2>&1; then
    echo "fio=$(busybox sed -n 's/.*err= *\\([0-9]*\\).*/\\1/p' /fio)"
else
    busybox cat /fio
fi
cd /mnt/shared
echo "share=$(busybox awk '$2 == "/mnt/shared" { print $1, $3 }' /proc/mounts)"
echo "read=$(busybox cat file) $(busybox cat "$(busybox printf '\\377\\376')")"
echo "names=$(busybox ls many | busybox wc -l)"
echo "from the guest" > "$(busybox printf '\\376')"
busybox mkdir -p deep/er && busybox mv "$(busybox printf '\\376')" deep/er/
cd /
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
    *("awk", "cat", "cut", "date", "dd", "dmesg", "echo", "grep", "head", "id", "ls"),
    *("mkdir", "mount", "nproc", "printf", "readlink", "setsid", "sh", "sha256sum"),
    *("sleep", "sync", "tail", "taskset", "true", "umount", "uname", "wc"),
)
# What the machine is, a line each.
LOOK = """
echo "release=$(uname -r)"
echo "processors=$(nproc)"
echo "gigabytes=$(awk '$1 == "MemTotal:" { print int($2 / 1000000) }' /proc/meminfo)"
echo "bus=$(readlink /sys/block/vda/device/../driver)"
echo "messages=$(grep -c ITS-.*MSI /proc/interrupts)"
echo "controller=$(grep -oE 'GIC-0|GICv3' /proc/interrupts | head -n 1)"
echo "frame=$(dmesg | grep GICv2m: | grep -o 'SPI.*')"
echo "queues=$(awk '/MSI.*virtio.*-req/ { print $2 + $3 }' /proc/interrupts | head -n 1)"
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
# Each record is told once it is on the disk; a second writer keeps the queue busy.
ENOUGH = 20
RECORD_BYTES = 512
SYNCS = f"""
while :; do
    dd if=/dev/zero of=/dev/vdb bs=64k count=16 seek=16 conv=fsync,notrunc 2> /dev/null
done &
record=0
while :; do
    printf 'record %d\\n' $record |
        dd of=/dev/vdb bs={RECORD_BYTES} seek=$record conv=sync,fsync,notrunc 2> /dev/null &&
        echo "synced=$record" > /dev/console
    record=$((record + 1))
done
"""


def host(kernel: str) -> HostImage:
    """The emulated host's image; skips a test where that, or `kernel`, cannot be made."""
    try:
        images.boot_files(kernel, make=True)
        return find_image(make=True, architecture="aarch64")
    except PyvmmError as error:
        pytest.skip(f"arm64 cannot be emulated here: {error}")


def files(folder: Path, busybox: str) -> Path:
    """A directory with a busybox for arm64."""
    tree = folder / "tree"
    for name in ("bin", "dev", "mnt", "proc", "run", "sbin", "sys"):
        (tree / name).mkdir(parents=True)
    (tree / "bin/busybox").write_bytes(Path(busybox).read_bytes())
    (tree / "bin/busybox").chmod(0o755)
    for name in APPLETS:
        (tree / "bin" / name).symlink_to("busybox")
    return tree


def root_disk(folder: Path, busybox: str, init: str = INIT) -> Path:
    """An ext4 file system with those, and `init` as its first program."""
    tree, disk = files(folder, busybox), folder / "disk.img"
    [modules] = Path(images.path("kernel-arm64"), "lib/modules").iterdir()
    for name in ("keyboard/gpio_keys.ko", "evdev.ko"):
        module = modules / "kernel/drivers/input" / name
        (tree / module.name).write_bytes(module.read_bytes())
    (tree / "sbin/init").write_text(init)
    (tree / "sbin/init").chmod(0o755)
    command = ["mke2fs", "-q", "-t", "ext4", "-d", str(tree), str(disk), "64M"]
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    subprocess.run(command, check=True, env=environment)
    return disk


@pytest.mark.timeout(PATIENCE + 100)
def test_a_guest_starts_twice_from_its_disk(tmp_path: Path) -> None:
    disk = root_disk(tmp_path, host("arm64").busybox)
    [fio] = images.folders(["programs-fio-arm64"], make=True)
    data = tmp_path / "data"
    data.write_bytes(bytes(16 << 20))
    shared = tmp_path / "a,b"
    (shared / "many").mkdir(parents=True)
    for number in range(NAMES):  # more than one answer of a 9p server holds
        (shared / "many" / f"{number:0100}").touch()
    (shared / "file").write_text("hello")
    Path(os.fsdecode(os.fsencode(shared) + b"/\xff\xfe")).write_text("bytes")
    command = [sys.executable, "-m", "pyvmm", "run", "--arch", "arm64", "--disk", str(disk)]
    command += ["--disk", str(data), "--cpus", "2", "--memory", "1G", "--cmdline", "quiet"]
    command += ["--transport", "mmio", "--share", f"{str(shared).replace(',', ',,')}:/mnt/shared"]
    command += ["--share", f"{fio}/root:/mnt/fio,readonly"]
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
    assert values["fio"] == "0", "what it wrote is what it reads"
    assert len(values["token"]) == 16
    assert values["again"] == values["token"], shown
    assert int(values["clock"]) >= 2026
    assert values["event"].split() == ["1", "116", "1", "0"], "EV_KEY, KEY_POWER, pressed"
    assert values["share"] == "share0 virtiofs", shown
    assert values["read"] == "hello bytes"
    assert values["names"] == str(NAMES)
    assert values["share_again"] == "hello", "after a reset"
    [made] = os.listdir(os.fsencode(shared / "deep/er"))
    assert made == b"\xfe"
    assert (shared / "deep/er" / os.fsdecode(made)).read_text() == "from the guest\n"
    assert not processes_with(str(tmp_path)), "all went with the VM"
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
        check_box(vm)
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
        check_box(vm)
        vm.run(["sh", "-c", "setsid sh -c 'echo c > /proc/sysrq-trigger' > /dev/null 2>&1 &"])
        assert vm.wait(PATIENCE).ending is Ending.PANIC, vm.console.text
    with VM.restore("saved") as vm:
        vm.wait_ready(PATIENCE)
        found = told(vm, VERIFY)
        assert found["same"] == "/data: OK"
        assert found["writes"] == "yes"
        assert [found.get(f"cpu{n}") for n in range(4)] == ["runs"] * 4
        assert found["later"] == "1"
        assert found["complaints"] == "0"
        assert found["reseeded"] == "1", "it knows by VMGenID that it is a copy"
        written = tmp_path / "written"
        written.write_bytes(bytes(2 << 20))
        late = vm.add_disk(Disk(str(written)))
        assert vm.wait_for_driver("disk", late, timeout=TAKES) is None
        vm.run(["sh", "-c", f"setsid sh -c {shlex.quote(SYNCS)} > /dev/null 2>&1 &"])
        vm.console.expect_exact(f"synced={ENOUGH}", timeout=PATIENCE)
        check_box(vm)
        os.kill(vm.pid, signal.SIGKILL)
        vm.wait(PATIENCE)
        synced = 1 + max(map(int, re.findall(r"^synced=(\d+)\r?$", vm.console.text, re.MULTILINE)))
    assert synced > ENOUGH
    for number in range(synced):
        record = written.read_bytes()[number * RECORD_BYTES :][:RECORD_BYTES]
        assert record.rstrip(b"\0") == f"record {number}\n".encode()
    assert wait_until(lambda: not processes_with(str(tmp_path))), "all went with the monitor"


def check_box(vm: VM) -> None:
    """The monitor's box is there, and has had nothing to refuse."""
    box = vm.status()["confinement"]
    assert {"calls", "files", "capabilities"} <= set(box["on"])
    assert box["refused_calls"] == 0, vm.messages


# Read by every Python that starts; the one that starts QEMU needs it.
OLD_CONTROLLER = """
import pyvmm.emulated_host.arm64
pyvmm.emulated_host.arm64.GIC_VERSION = 2
"""


@pytest.mark.timeout(2 * PATIENCE + 100)
def test_a_guest_on_a_machine_with_a_gicv2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PCI devices' messages are shared interrupts there (GICv2m). Saved, it goes on."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "sitecustomize.py").write_text(OLD_CONTROLLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    disk = root_disk(tmp_path, host("arm64").busybox, WAITING)
    with VM(
        **{"kernel": "debian:6.1", "arch": "arm64", "transport": "pci", "cpus": 2},
        **{"memory": "1G", "cmdline": "quiet", "disks": [Disk(str(disk), snapshot=True)]},
    ) as vm:
        vm.wait_ready(PATIENCE)
        found = told(vm, LOOK)
        assert found["release"].startswith("6.1.")
        assert found["processors"] == "2"
        assert found["bus"].endswith("virtio-pci")
        assert found["controller"] == "GIC-0", "what Linux calls a GICv2"
        assert found["frame"] == "SPI[96:255]"
        assert int(found["queues"]) > 0, "the disk interrupts by a message"
        vm.run(["sh", "-c", WRITE], check=True)
        vm.snapshot("old")
        vm.run(["sh", "-c", "sha256sum -c /run/sum"], check=True)
        check_box(vm)
    with VM.restore("old") as vm:
        vm.wait_ready(PATIENCE)
        found = told(vm, VERIFY)
        assert found["same"] == "/data: OK"
        assert found["writes"] == "yes"
        assert [found.get(f"cpu{n}") for n in range(2)] == ["runs"] * 2
        assert found["later"] == "1"
        assert found["complaints"] == "0"


def processes_with(text: str) -> list[str]:
    """The command lines of this machine's processes that have `text` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found


ROOT_LOOK = """
echo "machine=$(uname -m)"
echo "release=$(uname -r)"
echo "root=$(awk '$2 == "/" { print $3 }' /proc/mounts | tail -n 1)"
echo "who=$(id -u)"
echo "where=$(pwd)"
echo lost > /lost
echo kept > /work/kept
mkdir -p "/lib/modules/$(uname -r)" && echo "modules=$(ls "/lib/modules/$(uname -r)" | wc -l)"
for device in /sys/bus/virtio/devices/*; do
    driver=$(readlink $device/driver)
    echo "device $(cat $device/device)=${driver##*/}"
done
echo "random=$(head -c 16 /dev/hwrng | wc -c)"
echo "pages=$(sha256sum < /dev/pmem0 | cut -d' ' -f1)"
exit 7
"""
# By their types (<linux/virtio_ids.h>), each with the driver that it needs in Linux.
DRIVERS = {
    **{"device 0x0001": "virtio_net", "device 0x0002": "virtio_blk"},
    **{"device 0x0003": "virtio_console", "device 0x0004": "virtio_rng"},
    **{"device 0x0005": "virtio_balloon", "device 0x0013": "vmw_vsock_virtio_transport"},
    **{"device 0x001a": "virtiofs", "device 0x001b": "virtio_pmem"},
}


@pytest.mark.timeout(PATIENCE + 100)
def test_a_directory_is_the_root(tmp_path: Path) -> None:
    """With programs for arm64 in it; what is written there stays only where that was said. Its
    kernel is Debian's newest, if unstable is not in pieces; and it has a device of each kind, on
    PCI, whose modules are in an initramfs that is made at the start."""
    tree = files(tmp_path, host("arm64").busybox)
    kernel = "debian:sid"
    try:
        debian_kernels.find(kernel, arch="arm64")
    except ConfigError:
        kernel = "debian:6.12"
    release = os.path.basename(debian_kernels.find(kernel, arch="arm64").modules)
    (tree / "work").mkdir()
    memory = tmp_path / "memory"
    memory.write_bytes(os.urandom(4 << 20))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pyvmm", "run", "--arch", "arm64", "--root", str(tree)),
            *("--kernel", kernel, "--rw", "/work", "--transport", "pci", "--disk", "ram:4M"),
            *("--net", "user", "--rng", "--balloon", "size=0", "--pmem", str(memory)),
            *("--port", f"name=port,path={tmp_path}/port", "--", "sh", "-c", ROOT_LOOK),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=tree / "work",
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
        timeout=PATIENCE,
    )
    shown = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    assert done.returncode == 7, shown
    found = told_by(done.stdout.decode())
    modules = found.pop("modules")
    assert found == DRIVERS | {
        "machine": "aarch64",
        "release": release,
        "random": "16",
        "pages": hashlib.sha256(memory.read_bytes()).hexdigest(),
        "root": "overlay",
        "who": str(os.geteuid()),
        "where": "/work",
    }, shown
    assert int(modules) > 1, "the kernel's modules are there for modprobe"
    assert (tree / "work/kept").read_text() == "kept\n" and not (tree / "lost").exists()


@pytest.mark.timeout(PATIENCE + 100)
def test_a_container_image(tmp_path: Path) -> None:
    """Of an index for two architectures the one for arm64; its init is a busybox for that."""
    busybox = Path(host("arm64").busybox).read_bytes()
    layout = Layout()
    for architecture, data in (("amd64", b"of no use"), ("arm64", busybox)):
        layout.add(
            [
                layer(
                    directory("bin"),
                    member("bin/busybox", data=data, mode=0o755),
                    *(symlink(f"bin/{name}", "busybox") for name in APPLETS),
                    directory("srv", uid=1234, gid=1234),
                )
            ],
            config={"User": "1234", "WorkingDir": "/srv", "Env": ["GREETING=hello"]},
            architecture=architecture,
            platform={"os": "linux", "architecture": architecture},
        )
    name = f"test-container-{os.getpid()}"
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}

    def pyvmm(*arguments: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "pyvmm", *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=PATIENCE,
        )

    archive = f"oci-archive:{layout.archive(tmp_path / 'image.tar')}"
    try:
        made = pyvmm("image", "build", "--arch", "arm64", "--from", archive, name)
        assert made.returncode == 0, made.stderr.decode()
        rows = {row["name"]: row for row in json.loads(pyvmm("image", "list", "--json").stdout)}
        assert rows[name]["kernel"] == "6.1 arm64"
        script = 'echo "machine=$(uname -m)"; echo "who=$(id -u)"; echo "where=$(pwd) $GREETING"'
        done = pyvmm("run", "--rm", "--memory", "512M", name, "--", "sh", "-c", f"{script}; exit 7")
    finally:
        pyvmm("image", "rm", "--force", name)
    shown = done.stdout.decode(errors="replace") + done.stderr.decode(errors="replace")
    assert done.returncode == 7, shown
    assert told_by(done.stdout.decode()) == {
        **{"machine": "aarch64", "who": "1234", "where": "/srv hello"}
    }, shown


def told_by(text: str) -> dict[str, str]:
    """The lines NAME=VALUE in it."""
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def told(vm: VM, script: str) -> dict[str, str]:
    """The lines NAME=VALUE that `script` prints in the guest."""
    done = vm.run(["sh", "-c", script])
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, text + done.stderr.decode(errors="replace")
    return told_by(text)


# --- without Linux --------------------------------------------------------------------------------

# What an Image begins with (Linux: Documentation/arch/arm64/booting.rst).
BEGIN = r"""
    b start
    .word 0
    .quad 0, 0x100000, 0xa, 0, 0, 0
    .ascii "ARM\x64"
    .word 0
start:
"""
# What the processors of a machine may do to each other by PSCI (Arm DEN 0022), and then its end, of
# which two ask at once: CPU 0 is off then, and CPU 3 leaves KVM all the time.
RACE = r"""
.macro psci function
    ldr w0, =\function
    hvc #0
.endm
    adr x20, shared
    ldr w1, [x0]                 // the device tree's magic number, big-endian
    ldr w2, =0xedfe0dd0
    mov w25, #'t'
    cmp w1, w2
    b.ne wrong
    mov w25, #'a'
    mov x19, #1
off:mov x1, x19                  // AFFINITY_INFO: the others are off
    mov x2, #0
    psci 0xc4000004
    cmp x0, #1
    b.ne wrong
    add x19, x19, #1
    cmp x19, #4
    b.ne off
    mov w25, #'o'
    mov x1, #0                   // CPU_ON of itself: ALREADY_ON
    adr x2, second
    psci 0xc4000003
    cmn x0, #4
    b.ne wrong
    mov w25, #'n'
    mov x1, #0x7700              // of one that is not there: INVALID_PARAMETERS
    adr x2, second
    psci 0xc4000003
    cmn x0, #2
    b.ne wrong
    mov w25, #'2'
    mov x19, #1
on: mov x1, x19
    adr x2, second
    mov x3, x19
    psci 0xc4000003
    cbnz x0, wrong
    add x19, x19, #1
    cmp x19, #3
    b.ne on
both:
    ldr x1, [x20, #0x48]         // what CPU_ON of CPU 3 gave CPU 1 and CPU 2, plus 5
    ldr x2, [x20, #0x50]
    cbz x1, both
    cbz x2, both
    mov w25, #'1'
    add x1, x1, x2
    cmp x1, #6                   // 0 once, and ALREADY_ON
    b.ne wrong
three:
    ldr x1, [x20, #0x18]
    cbz x1, three
    mov w1, #'r'
    bl say
    mov x1, #1
    str x1, [x20]
    psci 0x84000002              // CPU_OFF
second:
    adr x20, shared
    mov x19, x0
    str x19, [x20, x19, lsl #3]
meet:
    ldr x1, [x20, #8]
    ldr x2, [x20, #16]
    cbz x1, meet
    cbz x2, meet
    mov x1, #3
    adr x2, third
    psci 0xc4000003
    add x0, x0, #5
    add x1, x20, #0x40
    str x0, [x1, x19, lsl #3]
alone:
    mov x1, #0
    mov x2, #0
    psci 0xc4000004              // until CPU 0 is off
    cmp x0, #1
    b.ne alone
    add x1, x20, #0x80
    str x19, [x1, x19, lsl #3]
again:
    ldr x2, [x1, #8]
    ldr x3, [x1, #16]
    cbz x2, again
    cbz x3, again
    psci ENDING
    mov w25, #'e'
wrong:
    mov w1, w25
    bl say
    mov w1, #'!'
    bl say
    psci 0x84000008
say:ldr x2, =0x09000000
    strb w1, [x2]
    ret
third:
    adr x20, shared
    str x20, [x20, #0x18]
    ldr x2, =0x09000000
out:ldrb w1, [x2, #5]
    b out
    .ltorg
    .balign 64
shared:
    .fill 32, 8, 0
"""
# Accesses to where nothing is, nothing that fits, or nothing but what KVM has: they are all ones or
# nothing, and the guest goes on.
WILD = r"""
    ldr x20, =0x09000000
    mov w21, #'n'
    ldr x1, =0x30000000          // behind the window of BARs, before the RAM
    bl nobody
    mov w21, #'r'
    ldr x1, =0x44000000          // the end of the RAM
    bl nobody
    mov w21, #'m'
    ldr x1, =0x0a01f000          // the last place of a virtio-mmio device
    bl nobody
    mov w21, #'h'
    ldr x1, =0x7ff0000000        // far behind all
    bl nobody
    mov w21, #'g'
    ldr x1, =0x08000000          // the distributor, a byte and eight of them at a time
    ldrb w2, [x1, #1]
    str x2, [x1, #0xff8]
    ldr x2, [x1, #0xff8]
    mov w21, #'i'
    ldr x1, =0x08080000          // the ITS: a command queue of nowhere
    mov x2, #-1
    str x2, [x1, #0x80]
    str x2, [x1, #0x88]
    mov w2, #1
    str w2, [x1]
    mov w21, #'s'
    ldr x2, [x20]                // eight bytes of the serial port, and two of the clock
    ldr x1, =0x09010000
    ldrh w2, [x1]
    strh w2, [x1, #2]
    mov w21, #'.'
    strb w21, [x20]
    ldr w0, =0x84000008
    hvc #0
nobody:
    str x1, [x1]
    ldr x2, [x1]
    cmn x2, #1
    b.ne wrong
    ldrb w2, [x1, #1]
    cmp w2, #0xff
    b.ne wrong
    ret
wrong:
    strb w21, [x20]
    ldr w0, =0x84000008
    hvc #0
    .ltorg
"""
# Two registers at a time, of which the processor tells KVM nothing (no syndrome).
PAIR = r"""
    ldr x20, =0x09000000
    ldp x1, x2, [x20]
    .ltorg
"""
SYSTEM_OFF, SYSTEM_RESET = 0x84000008, 0x84000009
TOLD = [
    f"the box refused {call} in the thread MainThread"
    for call in ("clone (system call 220)", "setpriority (system call 140)")
]


@needs_arm64_headers
@pytest.mark.timeout(PATIENCE + 100)
def test_what_needs_no_linux_guest(tmp_path: Path) -> None:
    """Refused calls are told; a keeper sleeps and wakes; the doctor finds KVM; processors that
    switch each other on, and end the machine at once; the litmus test of the rings in arm64's code
    (docs/decisions/0648)."""
    host("arm64")
    kernels = []
    sources = {
        "resets": RACE.replace("ENDING", hex(SYSTEM_RESET)),
        "off": RACE.replace("ENDING", hex(SYSTEM_OFF)),
        **{"wild": WILD, "pair": PAIR},
    }
    for name, source in sources.items():
        kernel = tmp_path / name
        kernel.write_bytes(assembled(tmp_path, BEGIN + source))
        kernels.append(str(kernel))
    program = str(Path(__file__).with_name("arm64_inside.py"))
    command = [sys.executable, "-m", "pyvmm.emulated_host", "--arch", "aarch64"]
    litmus = tmp_path / "litmus"
    driver = Path(__file__).parents[1] / "litmus_driver.c"
    subprocess.run([ARM64, "-O2", "-static", "-o", litmus, driver], check=True)
    command += ["--", "/usr/bin/python3", "-P", program, *kernels, str(litmus)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["machine"] == "aarch64"
    code, said, errors = found["alone"]
    assert code == 0, errors
    assert set(said.split()) <= {"encodings", "encodings.aliases", "encodings.utf_8"}, said
    assert found["refused"][:2] == [0, f"True 5006 2051 {TOLD}\n"], "a pipe holds 2,048 of them"
    told = ["asleep", "", 1, "asleep", '{"method": "disk.add"}\n', 1]
    told_before = "['before', 'other']"
    assert found["keeper"][:2] == [0, f"{told_before} {told} ['web.log']\n"], found["keeper"]
    assert found["last"] == [True, []], found["last"]
    code, said, _ = found["doctor"]
    assert code == 0, said
    assert "✓ probe guest: runs unmodified kernels" in said
    assert "✓ monitor: namespaces, network, root, user, limits, capabilities" in said
    code, said, errors = found["resets"]
    assert (code, said) == (10, "rrr"), errors
    assert errors.count("starts again") == 2
    assert found["powers off"] == [[0, "r", ""]] * 4
    assert found["64 vCPUs"] == [0, "r", ""]
    assert found["wild"] == [0, ".", ""], "what it was at is said"
    code, said, errors = found["pair"]
    assert (code, said) == (13, "") and "an access to 0x9000000 by an instruction that" in errors
    assert "pc" in errors and "esr_el1" in errors, "the crash report"
    for code, said, errors in found["rings"]:
        assert code == 0, errors
        seen = json.loads(said)
        assert [seen[name] for name in seen if name.startswith(("lost", "stale"))] == [0] * 4, seen
        assert min(*seen["kicks"], *seen["interrupts"]) > 0, f"they never met: {seen}"
