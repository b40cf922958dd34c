"""One large request to a disk, in a process of its own, and what it costs: prints a JSON object.

    python request_cost.py KIND read|write FOLDER

`grown` is by how many bytes the peak of this process's memory rose, `daemon` that of the storage
daemon; `beside` how many requests another device served meanwhile, whose driver sent them one by
one; `calls` how often the backend was called. All parts of the request are one place in guest
memory, so that the guest's own memory does not count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import blk_rig

from pyvmm.kinds.disk.storage import open_backend
from pyvmm.spec.vm import DiskSpec
from pyvmm.testing import Buffer, attached
from pyvmm.testing.blk_driver import IN, OUT, UNTOUCHED, header
from pyvmm.virtio.blk.backend import Backend
from pyvmm.virtio.rng.device import EntropyDevice

PART = 3 << 20
COUNT = 64
SIZE = PART * COUNT
KINDS = ("raw", "direct", "snapshot", "overlay", "qcow2", "ram", "python")
PYTHON = f"""
import pyvmm.virtio.blk.backend as b
class Copies(b.Backend):
    size_sectors = {SIZE // 512}
    def readv(self, views, size, offset):
        b.scatter(bytes(size), views)
    def writev(self, views, size, offset):
        b"".join(views)
"""


def disk_of(kind: str, folder: Path) -> DiskSpec:
    path = folder / "disk.img"
    if kind == "qcow2":
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
        return DiskSpec(str(path), format="qcow2")
    if kind == "ram":
        return DiskSpec(f"ram:{SIZE >> 20}M", id="ram")
    if kind == "python":
        path = folder / "copies.py"
        path.write_text(PYTHON)
        return DiskSpec(f"{path}:Copies")
    with path.open("wb") as file:
        if kind == "direct":  # holes are read without the buffer's alignment being looked at
            for _ in range(COUNT):
                file.write(bytes(PART))
        file.truncate(SIZE)
    overlay = str(folder / "changes") if kind == "overlay" else None
    return DiskSpec(
        str(path), direct=kind == "direct", snapshot=kind == "snapshot", overlay=overlay
    )


def peak(pid: str | int = "self") -> int:
    """The most memory the process has had, in bytes (proc(5), VmHWM)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise AssertionError("no VmHWM")


def daemon_peak() -> int:
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if Path(f"/proc/{pid}/comm").read_text().startswith("qemu-storage"):
                return peak(pid)
    return 0


def count_calls(backend: Backend, calls: list[int]) -> None:
    for name in ("readv", "writev"):
        real = getattr(backend, name)

        def counted(views, size, offset, real=real):  # type: ignore[no-untyped-def]
            calls.append(size)
            real(views, size, offset)

        setattr(backend, name, counted)


def main() -> None:
    kind, operation, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    blk_rig.RAM_END = 16 << 20
    blk_rig.traced = False
    calls: list[int] = []
    with ExitStack() as closing:
        backend = open_backend(disk_of(kind, folder), closing)
        closing.pop_all()  # the rig closes it; what else there is ends with us
        count_calls(backend, calls)
        rig = closing.enter_context(blk_rig.running(backend, queue_size=256))
        rng = closing.enter_context(attached(EntropyDevice()))
        beat = Buffer(4096 * 128, 64)  # one place, however often
        odd = 1 if kind == "direct" else 0  # what no O_DIRECT takes
        part = Buffer(blk_rig.RAM_END - 4096 - PART + odd, PART)
        rig.memory.view(*part)[:] = b"\1" * PART
        rng.request([], [beat])
        status = Buffer(part.addr - 4096, 1)
        rig.memory.write(status.addr, bytes([UNTOUCHED]))
        before, daemon_before = peak(), daemon_peak()
        if operation == "read":
            chain = rig.driver.submit(0, [header(IN, 0)], [*[part] * COUNT, status])
        else:
            chain = rig.driver.submit(0, [header(OUT, 0), *[part] * COUNT], [status])
        beside = 0
        while not rig.driver.irq.count:
            rng.request([], [beat])
            beside += 1
        rig.driver.wait_used(0, chain)
        cost = {
            "grown": peak() - before,
            "daemon": daemon_peak() - daemon_before,
            "beside": beside,
            "calls": len(calls),
            "largest": max(calls),
            "status": rig.memory.read(*status)[0],
            "lines": rig.lines,
        }
    print(json.dumps(cost))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
