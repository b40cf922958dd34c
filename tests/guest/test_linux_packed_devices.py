"""Linux's own drivers on packed rings, whatever the device: each is used, none misses a byte."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from disks import artifacts, root_disk
from guest import HANG_SECONDS, Guest, GuestResult, wait_until
from test_linux_net import DIGEST, Server
from test_linux_vsock import ask

from pyvmm.control import protocol
from pyvmm.host.programs import find_program

pytestmark = [
    pytest.mark.usefixtures("linux_guests"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (package gcc)"),
    pytest.mark.skipif(find_program("passt") is None, reason="needs passt (package passt)"),
]

ROOT = Path(__file__).resolve().parents[2]
BULK = random.Random(52).randbytes(1 << 20)
DIGEST_PORT = 1025
BALLOON = 32 << 20

SCRIPT = """\
set -e
for device in /sys/bus/virtio/devices/*; do
    driver=$(basename "$(readlink $device/driver)")
    echo "ring-$driver-${{device##*/}}=$(cut -c35 $device/features)" # bit 34: RING_PACKED
done
cat /dev/vdb > /run/peer
chmod +x /run/peer
/run/peer listen {digest} sha256sum

for rng in virtio_rng.0 virtio_rng.1; do
    echo $rng > /sys/devices/virtual/misc/hw_random/rng_current
    dd if=/dev/hwrng of=/run/random bs=64 count=64 iflag=fullblock status=none
    echo "$rng=$(od -An -v -tx1 -w1 /run/random | sort -u | wc -l)"
done

busybox wget -q -O /dev/shm/data http://10.0.2.2:{port}/data
echo "download=$(sha256sum < /dev/shm/data | cut -d' ' -f1)"
busybox nc 10.0.2.2 {upload} < /dev/shm/data > /dev/null

port=/dev/$(basename $(dirname $(grep -l agent /sys/class/virtio-ports/*/name)))
exec 5<> $port
echo "ready" >&5 # the host has connected, or a read would find the port's end
read -r line <&5
echo "got $line" >&5
read -r line <&5
[ "$line" = "the end" ]
"""


@dataclass
class Run:
    """The observations on both sides."""

    result: GuestResult
    uploaded: str = ""
    digest: str = ""
    reply: bytes = b""
    balloon: list[int] = field(default_factory=list)


def talk(folder: Path, kernel: str) -> Run:
    """One boot with a device of each kind."""
    files = artifacts(kernel, "test")
    peer = folder / "peer.img"
    source = Path(__file__).with_name("vsock_peer.c")
    subprocess.run(["cc", "-static", "-O1", "-o", peer, source], check=True)
    os.truncate(peer, -(-peer.stat().st_size // 512) * 512)
    server = Server("127.0.0.1")
    script = SCRIPT.format(
        digest=DIGEST_PORT, port=server.web.getsockname()[1], upload=server.upload.getsockname()[1]
    )
    run = Run(GuestResult((), 0, "", ""))
    with root_disk(folder, "test") as disk, socket.socket(socket.AF_UNIX) as agent:
        guest = Guest(
            files.bzimage,
            files.initramfs,
            [f"{disk},packed", f"{peer},readonly,packed"],
            cpus=2,
            options=[
                *("--net", "user,host,packed"),
                *("--port", f"name=agent,path={folder / 'agent'},packed"),
                *("--rng-limit", "packed"),
                *("--device", f"{ROOT}/examples/entropy.py:Entropy,packed"),
                *("--balloon", "packed"),
                *("--vsock", f"path={folder / 'v'},packed"),
            ],
        ).start(script, folder=folder)
        agent.settimeout(HANG_SECONDS)
        assert wait_until((folder / "agent").exists)
        agent.connect(str(folder / "agent"))
        lines = agent.makefile("rb")
        assert lines.readline() == b"ready\n", guest.kill().ending()
        run.uploaded = server.upload_digest()
        run.digest = ask(folder / "v", DIGEST_PORT, BULK).split()[0].decode()
        agent.sendall(b"question\n")
        run.reply = lines.readline()
        run.balloon = [inflated(guest, size) for size in (BALLOON, 0)]
        agent.sendall(b"the end\n")
        run.result = guest.wait()
    return run


def inflated(guest: Guest, size: int) -> int:
    """The balloon's size once the guest has done as it was told."""
    guest.pyvmm("balloon", "vm", str(size >> 20)).check_returncode()
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(HANG_SECONDS)
        control.connect(f"{guest.runtime.name}/pyvmm/vm.sock")
        answers = control.makefile("rb")

        def actual() -> int:
            control.sendall(protocol.request_line(1, "balloon.stats", {}))
            return int(json.loads(answers.readline())["result"]["actual"])

        wait_until(lambda: actual() == size)
        return actual()


@pytest.mark.parametrize(
    "kernel", [pytest.param("6.12", marks=pytest.mark.boot.with_args(talk, "6.12"))]
)
def test_every_device_on_packed_rings(kernel: str, boot: Run) -> None:
    result = boot.result.check()
    rings = [line for line in result.console.splitlines() if line.startswith("ring-")]
    drivers = sorted(line.split("-")[1] for line in rings)
    assert drivers == [
        *("virtio_balloon", "virtio_blk", "virtio_blk", "virtio_blk"),
        *("virtio_console", "virtio_net", "virtio_rng", "virtio_rng"),
        "vmw_vsock_virtio_transport",
    ]
    # The script's disk is the one that was not asked for packed rings.
    assert sorted(line[-1] for line in rings) == ["0"] + ["1"] * (len(rings) - 1)
    assert result.value("download") == boot.uploaded == DIGEST
    assert boot.digest == hashlib.sha256(BULK).hexdigest()
    assert boot.reply == b"got question\n"
    assert int(result.value("virtio_rng.0")) == int(result.value("virtio_rng.1")) == 256
    assert boot.balloon == [BALLOON, 0]
    assert result.messages == []
