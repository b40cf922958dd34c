"""Linux's own vsock driver and programs of the host, across `pyvmm run --vsock`."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import stat
import subprocess
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from disks import artifacts
from guest import HANG_SECONDS, Guest, GuestResult

pytestmark = [
    pytest.mark.usefixtures("linux_guests"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (package gcc)"),
]

KERNELS = ("6.1", "6.12")
BULK = random.Random(51).randbytes(4 << 20)
STREAMS = 24
UPLOAD, ECHO, DIGEST, HOLD, REPORT = 5000, 1024, 1025, 1026, 5001

SCRIPT = f"""\
set -e
cat /dev/vdb > /run/peer
chmod +x /run/peer
/run/peer listen {ECHO} cat
/run/peer listen {DIGEST} sha256sum
# Says on the console how its stream ended.
/run/peer listen {HOLD} sh -c 'echo held; cat > /dev/null; echo released > /dev/console'

head -c {len(BULK)} /dev/urandom > /dev/shm/bulk
echo "upload=$(sha256sum < /dev/shm/bulk | cut -d' ' -f1)"
echo "answer=$(/run/peer connect {UPLOAD} < /dev/shm/bulk)"
if /run/peer connect 9999 < /dev/null 2> /run/error; then echo nobody=reached; fi
echo "nobody=$(cat /run/error)"

# One stream is killed on this side, then the host may go on.
sleep 1000 | /run/peer connect {UPLOAD} &
killed=$!
echo "waits" > /dev/console
/run/peer connect {REPORT} < /dev/null
kill $killed
/run/peer connect {REPORT} < /dev/null  # until the host has seen all it wants to see
"""


@dataclass
class Run:
    """The observations of the host's programs."""

    result: GuestResult
    mode: int
    greeting: bytes = b""
    upload: str = ""
    digest: bytes = b""
    echoes: list[bool] = field(default_factory=list)
    refused: bytes = b"?"
    held: bytes = b""
    end_of_killed: bytes = b"?"
    left_over: list[str] = field(default_factory=list)


def connect(path: Path, port: int) -> tuple[socket.socket, bytes]:
    """A stream to the guest's `port`, and what answered CONNECT."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(HANG_SECONDS)
    client.connect(str(path))
    client.sendall(f"CONNECT {port}\n".encode())
    line = b""
    while not line.endswith(b"\n") and (byte := client.recv(1)):
        line += byte
    return client, line


def read_all(stream: socket.socket) -> bytes:
    data = bytearray()
    while more := stream.recv(1 << 16):
        data += more
    return bytes(data)


def ask(path: Path, port: int, data: bytes) -> bytes:
    """Send `data` to the guest's `port`, half-close, and read the answer to its end."""
    stream, _ = connect(path, port)
    with stream:
        sender = threading.Thread(target=send_all, args=(stream, data))
        sender.start()
        answer = read_all(stream)
        sender.join()
    return answer


def send_all(stream: socket.socket, data: bytes) -> None:
    stream.sendall(data)
    stream.shutdown(socket.SHUT_WR)


def listen(path: Path, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(HANG_SECONDS)
    listener.bind(f"{path}_{port}")
    listener.listen()
    return listener


def talk(folder: Path, kernel: str) -> Run:
    """One boot, in which everything happens that the tests look at."""
    made = artifacts(kernel)
    peer = folder / "peer.img"
    source = Path(__file__).with_name("vsock_peer.c")
    subprocess.run(["cc", "-static", "-O1", "-o", peer, source], check=True)
    os.truncate(peer, -(-peer.stat().st_size // 512) * 512)
    path = folder / "v"
    guest = Guest(
        made.vmlinux,
        made.initramfs,
        disks=[f"{made.rootfs},readonly", f"{peer},readonly"],
        options=["--vsock", f"cid=77,path={path}"],
    )
    with listen(path, UPLOAD) as uploads, listen(path, REPORT) as reports:
        guest.start(SCRIPT, folder=folder)
        run = Run(GuestResult((), 0, "", ""), 0)
        stream, _ = uploads.accept()
        with stream:
            run.upload = hashlib.sha256(read_all(stream)).hexdigest()
            stream.sendall(run.upload[:16].encode())
        held, _ = uploads.accept()  # the one that the guest will kill
        first, _ = reports.accept()
        run.mode = stat.S_IMODE(path.stat().st_mode)
        from_the_host(run, path, guest)
        first.close()
        run.end_of_killed = read_all(held)
        held.close()
        last, _ = reports.accept()
        with last:
            read_all(last)
        run.result = guest.wait()
    run.left_over = sorted(entry.name for entry in folder.iterdir() if entry.name == path.name)
    return run


def from_the_host(run: Run, path: Path, guest: Guest) -> None:
    stream, run.greeting = connect(path, ECHO)
    stream.close()
    run.digest = ask(path, DIGEST, BULK)
    refused, run.refused = connect(path, 9999)
    refused.close()
    streams = [connect(path, ECHO)[0] for _ in range(STREAMS)]
    for number, stream in enumerate(streams):
        send_all(stream, b"%d " % number * 1000)
    run.echoes = [read_all(stream) == b"%d " % n * 1000 for n, stream in enumerate(streams)]
    for stream in streams:
        stream.close()
    stream, _ = connect(path, HOLD)
    while len(run.held) < 5 and (more := stream.recv(5)):
        run.held += more
    stream.close()
    guest.wait_for("released")


@pytest.mark.parametrize(
    "kernel", [pytest.param(k, marks=pytest.mark.boot.with_args(talk, k)) for k in KERNELS]
)
def test_streams_of_linux(boot: Run, kernel: str) -> None:
    result = boot.result.check()
    assert result.value("upload") == boot.upload, "from the guest to the host"
    assert result.value("answer") == boot.upload[:16], "after the guest had half-closed"
    assert boot.digest.split()[0].decode() == hashlib.sha256(BULK).hexdigest(), "to the guest"
    assert boot.echoes == [True] * STREAMS, "many streams at once"
    assert boot.greeting.startswith(b"OK ")
    assert boot.refused == b"", "nobody listens in the guest"
    assert "reset by peer" in result.value("nobody"), "nobody listens on the host"
    assert boot.held == b"held\n" and "released" in result.console, "the host cut a stream"
    assert boot.end_of_killed == b"", "the guest killed its end"
    assert boot.mode == 0o600, "only its owner may connect"
    assert boot.left_over == [], "the socket is gone with the monitor"
    assert not result.messages
