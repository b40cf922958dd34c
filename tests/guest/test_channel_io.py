"""A big-endian guest, Linux on QEMU's s390x machine, whose network card is on channel I/O and whose
disks and random numbers are on zPCI; all are served by us over vhost-user.

Its processor is emulated here, so no KVM is needed. QEMU has one front end of vhost-user on channel
I/O for which we have a device: virtio-net-ccw.
"""

from __future__ import annotations

import hashlib
import random
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest
from guest import HANG_SECONDS, pump_into, tail, wait_until
from guest import text as console_text

from pyvmm import images
from pyvmm.errors import PyvmmError
from pyvmm.host import cpio
from pyvmm.host.passt import GATEWAY, GUEST, PREFIX
from pyvmm.images.programs import qemu_command

MIB = 1 << 20
ENTROPY = Path(__file__).parents[2] / "examples" / "entropy.py"

IN_THE_GUEST = """\
#!/bin/sh
sum() { busybox sha256sum | busybox cut -d' ' -f1; }
if [ "$1" = talk ]; then # with a connection for both streams, of which none ends early
    busybox dd if=/dev/vda bs=64k count=16 2> /dev/null
    busybox head -c 1048576 | sum > /came_back
    exit
fi
echo "machine=$(busybox uname -m)"
echo "one=$(printf '\\0\\1' | busybox od -An -d | busybox tr -d ' ')" # as a number of two bytes
for name in net blk rng; do
    for device in /sys/bus/virtio/drivers/virtio_$name/virtio*; do
        echo "$name=$(busybox readlink -f $device)"
    done
done
echo "serial=$(cat /sys/block/vda/serial) $(cat /sys/block/vdb/serial)"
echo "read=$(busybox dd if=/dev/vda bs=64k iflag=direct 2> /dev/null | sum)"
busybox dd if=/dev/urandom of=/dev/vdb bs=64k count=64 conv=fsync 2> /dev/null
echo "written=$(sum < /dev/vdb)"
echo 3 > /proc/sys/vm/drop_caches
echo "reread=$(sum < /dev/vdb)"
for number in 0 1; do
    echo virtio_rng.$number > /sys/class/misc/hw_random/rng_current
    busybox dd if=/dev/hwrng bs=64 count=8 iflag=fullblock 2> /dev/null | busybox wc -c |
        busybox sed "s/^/random$number=/"
done
echo_back() { # NAME: what comes back of the first megabyte of the disk
    busybox ip link set eth0 up
    busybox ip addr add ADDRESS dev eth0
    busybox nc GATEWAY PORT -e /script talk
    echo "$1=$(cat /came_back)"
    busybox rm /came_back
}
echo_back echo
device=/sys/bus/ccw/devices/0.0.0000
echo 0 > $device/online
echo "offline=$(ls /sys/class/net)"
echo 1 > $device/online
until [ -e /sys/class/net/eth0 ]; do busybox sleep 0.1; done
echo_back again
busybox awk '$1 == "VAI:" { print "adapter=" $2 } $1 == "MSI:" { print "messages=" $2 }' \\
    /proc/interrupts
echo "complaints=$(busybox dmesg | busybox grep -ciE 'virtio.*(fail|error|unexpected)')"
echo "done=yes"
"""


class Echo(Thread):
    """Gives back the megabyte that a client sends; `taken` are their checksums. The client closes
    first: passt (of May 2025) throws away what is under way when both sides have said all."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.taken: list[str] = []
        self.start()

    def run(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            with connection, connection.makefile("rb") as stream:
                data = stream.read(MIB)
                self.taken.append(hashlib.sha256(data).hexdigest())
                connection.sendall(data)
                stream.read()


class Served:
    """A device at the socket `path`, by a process of its own."""

    def __init__(self, path: Path, command: str, *options: str) -> None:
        self.path = path
        self.said = path.with_suffix(".log")
        argv = [sys.executable, "-m", "pyvmm", command, "--socket", str(path), *options]
        with self.said.open("wb") as log:
            self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stderr=log)

    def log(self) -> str:
        return self.said.read_text()

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(HANG_SECONDS)


@contextmanager
def serving(folder: Path) -> Iterator[dict[str, Served]]:
    """All devices of the guest, by name."""
    served = {
        "net": Served(folder / "net.sock", "vhost-user", "--net", "user,host"),
        "rng": Served(folder / "rng.sock", "vhost-user", "--rng"),
        "own": Served(folder / "own.sock", "vhost-user", "--device", f"{ENTROPY}:Entropy"),
        **{
            name: Served(folder / f"{name}.sock", "vhost-user-blk", "--disk", disk)
            for name, disk in {
                "in": f"{folder / 'in.img'},readonly,id=in",
                "out": f"{folder / 'out.img'},id=out",
            }.items()
        },
    }
    try:
        for one in served.values():
            ready = wait_until(
                lambda one=one: "waiting for" in one.log() or one.process.poll() is not None
            )
            assert ready and one.process.poll() is None, one.log()
        yield served
    finally:
        for one in served.values():
            if one.process.poll() is None:
                one.process.kill()
                one.process.wait()


def qemu(kernel: str, initramfs: str, emulator: str, script: Path, folder: Path) -> list[str]:
    """The command line of the s390x machine."""

    def socket_of(name: str) -> list[str]:
        return ["-chardev", f"socket,id={name},path={folder / name}.sock"]

    archive = folder / "initramfs.cpio"
    archive.write_bytes(
        Path(initramfs, "initramfs.cpio").read_bytes()
        + cpio.archive([cpio.regular("script", script.read_bytes(), 0o755)])
    )
    # Two vectors are what Linux needs of a device with one queue where there is no INTx.
    front_ends = [
        *socket_of("net"), "-netdev", "vhost-user,id=net,chardev=net",
        "-device", "virtio-net-ccw,netdev=net,devno=fe.0.0000",
        *socket_of("in"), "-device", "vhost-user-blk-pci,chardev=in",
        *socket_of("out"), "-device", "vhost-user-blk-pci,chardev=out",
        *socket_of("rng"), "-device", "vhost-user-rng-pci,chardev=rng,vectors=2",
        *socket_of("own"), "-device", "vhost-user-rng-pci,chardev=own,vectors=2",
    ]  # fmt: skip
    return [
        *qemu_command(emulator, "s390x"),
        *("-machine", "s390-ccw-virtio,memory-backend=ram", "-cpu", "max", "-m", "256M"),
        *("-object", "memory-backend-memfd,id=ram,size=256M,share=on"),
        *("-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio", "-no-reboot"),
        *("-kernel", str(Path(kernel, "bzImage")), "-initrd", str(archive)),
        *("-append", "quiet panic=-1 pyvmm.initramfs=/script"),
        *front_ends,
    ]


def run(argv: list[str]) -> tuple[int | None, str]:
    """The exit code, None for one that had to be killed, and the console."""
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        console = bytearray()
        pump = pump_into(console, process.stdout.fileno())
        code: int | None = None
        try:
            code = process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        pump.join(HANG_SECONDS)
    return code, console_text(console)


def test_a_big_endian_guest_uses_our_devices_on_channel_io_and_zpci(tmp_path: Path) -> None:
    try:
        names = ["kernel-s390x", "initramfs-s390x", "programs-emulator"]
        kernel, initramfs, emulator = images.folders(names, make=True)
        images.passt_command(make=True)
    except PyvmmError as error:
        pytest.skip(f"what it takes cannot be had: {error}")
    data = random.Random(15).randbytes(4 * MIB)
    (tmp_path / "in.img").write_bytes(data)
    (tmp_path / "out.img").write_bytes(bytes(4 * MIB))
    echo = Echo()
    script = tmp_path / "script"
    text = IN_THE_GUEST.replace("ADDRESS", f"{GUEST}/{PREFIX}").replace("GATEWAY", GATEWAY)
    script.write_text(text.replace("PORT", str(echo.port)))
    with serving(tmp_path) as served:
        code, console = run(qemu(kernel, initramfs, emulator, script, tmp_path))
        ends = {name: one.end() for name, one in served.items()}
    logs = "\n".join(one.log() for one in served.values())
    why = f"{tail(console)}\n--- the servers:\n{logs}"
    assert code == 0 and "done=yes" in console, why
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", console, re.MULTILINE):
        found.setdefault(key, []).append(value.strip())
    assert (found["machine"], found["one"]) == (["s390x"], ["1"]), why
    # A subchannel of the channel subsystem; functions of a PCI bus each.
    assert all(place.startswith("/sys/devices/css0/") for place in found["net"]), why
    assert all("/pci" in place for name in ("blk", "rng") for place in found[name]), why
    assert [len(found[name]) for name in ("net", "blk", "rng")] == [1, 2, 2], why
    assert found["serial"] == ["in out"], why
    assert found["read"] == [hashlib.sha256(data).hexdigest()], why
    written = hashlib.sha256((tmp_path / "out.img").read_bytes()).hexdigest()
    assert found["written"] == found["reread"] == [written], why
    assert written != hashlib.sha256(bytes(4 * MIB)).hexdigest(), why
    assert (found["random0"], found["random1"]) == (["512"], ["512"]), why
    sent = hashlib.sha256(data[:MIB]).hexdigest()
    assert found["echo"] == found["again"] == [sent], why
    assert echo.taken == [sent, sent], why
    assert found["offline"] == ["lo"], why
    assert all(int(found[name][0]) > 0 for name in ("adapter", "messages")), why
    assert found["complaints"] == ["0"], why
    assert set(ends.values()) == {0}, logs
    assert "given up" not in logs and "needs a reset" not in logs, logs
