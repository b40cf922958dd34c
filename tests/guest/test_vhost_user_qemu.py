"""A QEMU guest that boots from a disk which we serve over vhost-user, and writes to another whose
back end is killed again and again meanwhile. Its processor is emulated here, so no KVM is needed.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from disks import artifacts
from front_end_rig import listens_at
from guest import HANG_SECONDS, pump_into, tail, text, wait_until

from pyvmm import images
from pyvmm.images.programs import qemu_command

MIB = 1 << 20
DATA_MIB = 16
KILLS = 4

IN_THE_GUEST = """\
set -e
echo "root=$(sed -n 's:^\\(/dev/[^ ]*\\) / .*:\\1:p' /proc/mounts)"
echo "serial=$(cat /sys/block/vdb/serial)"
until bash -c 'read -t 0 < /dev/ttyS0'; do # somebody has typed
    echo "round=begins"
    dd if=/dev/urandom of=/dev/vdb bs=1M count=8 oflag=direct status=none
    dd if=/dev/urandom of=/dev/vdb bs=4k count=512 seek=2048 conv=fsync status=none
done
echo "written=$(sha256sum < /dev/vdb | cut -d' ' -f1)"
"""


class BackEnd:
    """`pyvmm vhost-user-blk`, with a process for each connection; killed, it comes back."""

    def __init__(self, folder: Path, name: str, disk: str) -> None:
        self.socket = folder / f"{name}.sock"
        self.said = bytearray()
        self._disk = disk
        self.start()
        assert wait_until(lambda: listens_at(self.socket)), text(self.said)

    def start(self) -> None:
        argv = [sys.executable, "-m", "pyvmm", "vhost-user-blk"]
        self.process = subprocess.Popen(
            [*argv, "--socket", str(self.socket), "--disk", self._disk],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        self._pump = pump_into(self.said, self.process.stderr.fileno())

    def kill(self) -> None:
        """It and its connection's process, at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._pump.join(HANG_SECONDS)
        assert self.process.stderr is not None
        self.process.stderr.close()

    @property
    def connections(self) -> int:
        return self.said.count(b"front end connected")


def test_a_qemu_guest_boots_from_our_disk_and_writes_to_another_that_is_killed(
    tmp_path: Path,
) -> None:
    made = artifacts()
    [emulator] = images.folders(["programs-emulator"], make=True)
    data = tmp_path / "data.img"
    data.write_bytes(bytes(DATA_MIB * MIB))
    root = BackEnd(tmp_path, "root", f"{made.rootfs},readonly")
    back_end = BackEnd(tmp_path, "data", f"{data},id=data")
    script = base64.b64encode(IN_THE_GUEST.encode()).decode()
    argv = [
        *qemu_command(emulator),
        *("-accel", "tcg", "-cpu", "max", "-m", "384M", "-M", "q35,memory-backend=ram"),
        *("-object", "memory-backend-memfd,id=ram,size=384M,share=on"),
        *("-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio", "-no-reboot"),
        *("-chardev", f"socket,id=root,path={root.socket}"),
        *("-device", "vhost-user-blk-pci,chardev=root"),
        *("-chardev", f"socket,id=data,path={back_end.socket},reconnect-ms=100"),
        *("-device", "vhost-user-blk-pci,chardev=data,num-queues=1"),
        *("-kernel", made.bzimage, "-initrd", made.initramfs),
        *("-append", f"console=ttyS0 quiet panic=-1 root=/dev/vda ro pyvmm.exec={script}"),
    ]
    console = bytearray()
    try:
        with subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as qemu:
            assert qemu.stdin is not None and qemu.stdout is not None
            pump = pump_into(console, qemu.stdout.fileno())

            def report(what: str) -> str:
                return f"{what}\n{tail(text(console))}\n--- the back end:\n{text(back_end.said)}"

            def in_round(number: int) -> bool:
                return console.count(b"round=begins") >= number or qemu.poll() is not None

            try:
                number = 2
                for kill in range(KILLS):
                    assert wait_until(lambda: in_round(number)), report(f"before kill {kill}")  # noqa: B023
                    assert qemu.poll() is None, report(f"before kill {kill}")
                    before = back_end.connections
                    back_end.kill()
                    back_end.start()
                    assert wait_until(lambda: back_end.connections > before), report("alone")  # noqa: B023
                    # QEMU gives its device up if a back end dies before it is set up again, which
                    # it was when a whole round has been written since.
                    number = console.count(b"round=begins") + 2
                assert wait_until(lambda: in_round(number)), report("after the last kill")
                qemu.stdin.write(b"enough\n")
                qemu.stdin.flush()
                code = qemu.wait(HANG_SECONDS)
            finally:
                qemu.kill()
        pump.join(HANG_SECONDS)
    finally:
        for one in (root, back_end):
            one.kill()
    found = dict(re.findall(r"^(root|serial|written)=(.*)$", text(console), re.MULTILINE))
    assert code == 0, report("QEMU failed")
    assert found["root"] == "/dev/vda", report("no root")
    assert found["serial"] == "data"
    # Back ends died in the middle of what the guest wrote; it has noticed nothing.
    assert found["written"] == hashlib.sha256(data.read_bytes()).hexdigest(), report("data differ")
    assert back_end.connections == 1 + KILLS
