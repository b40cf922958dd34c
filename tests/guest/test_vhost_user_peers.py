"""QEMU's own programs at the other end of our vhost-user: qemu-img and qemu-io with libblkio.

They need no guest, but the image programs-storage (QEMU 10's).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import images
from pyvmm.errors import PyvmmError
from pyvmm.testing.vhost_user_driver import connect

MIB = 1 << 20
SECONDS = 600


@pytest.fixture(scope="module")
def programs() -> None:
    try:
        images.storage_command("qemu-io", make=True)
    except PyvmmError as error:
        pytest.skip(f"QEMU's storage programs cannot be had: {error}")


class Served:
    """An image of 64 MiB behind `pyvmm vhost-user-blk`."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.image = folder / "disk.img"
        self.image.write_bytes(os.urandom(64 * MIB))
        self.socket = folder / "disk.sock"
        command = [sys.executable, "-m", "pyvmm", "vhost-user-blk", "--socket", str(self.socket)]
        self.process = subprocess.Popen(
            [*command, "--disk", str(self.image), *options], stderr=subprocess.PIPE, text=True
        )
        connect(self.socket).close()

    @property
    def options(self) -> str:
        return f"driver=virtio-blk-vhost-user,path={self.socket},cache.direct=on"

    def run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [*images.storage_command(program), *arguments, "--image-opts", self.options],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def end(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        _, text = self.process.communicate(timeout=SECONDS)
        assert self.process.returncode == 0
        return text


@pytest.fixture(params=[(), ("--poll", "0"), ("--queues", "4")], ids=str)
def served(programs: None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    served = Served(tmp_path, *request.param)
    yield served
    if served.process.poll() is None:
        served.process.kill()
        served.process.communicate()


def test_qemu_io_reads_and_writes_what_is_in_the_file(served: Served) -> None:
    commands = ("write -P 0xa5 64k 128k", "flush", "read -P 0xa5 64k 128k", "write -z 1M 64k")
    served.run("qemu-io", *(word for one in commands for word in ("-c", one)))
    # Each run is a front end of its own.
    served.run("qemu-io", "-c", "read -P 0xa5 64k 128k", "-c", "read -P 0 1M 64k")
    data = served.image.read_bytes()
    assert data[64 << 10 : 192 << 10] == b"\xa5" * (128 << 10)
    assert data[MIB : MIB + (64 << 10)] == bytes(64 << 10)
    text = served.end()
    assert "needs a reset" not in text and "given up" not in text


@pytest.mark.parametrize(
    "how", [("-d", "1"), ("-d", "64"), ("-d", "32", "-w"), ("-d", "8", "-s", "128k")], ids=" ".join
)
def test_qemu_img_bench(served: Served, how: tuple[str, ...]) -> None:
    before = served.image.read_bytes()
    text = served.run("qemu-img", "bench", "-t", "none", "-c", "3000", *how)
    assert "Run completed" in text
    if "-w" not in how:
        assert served.image.read_bytes() == before
    assert "given up" not in served.end()
