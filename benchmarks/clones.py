"""Clones on this machine's KVM: how soon they run, and what each costs.

    python benchmarks/clones.py [--json FILE] [--rounds 30] [--clones 100] [--growth]

The guest has 512 MiB, and Debian's kernel and initramfs in them. Only the kernel's first
instructions are replaced: they wait until VMGenID has another number, as it has in a copy, then
write a byte to the serial port and halt. So a copy says that it runs as soon as it does.

With --growth it is told instead how snapshot, restore and clone grow: with the size of memory, with
how much of it is dirty (the guest writes to each page first), with the number of disks, and with a
shared directory, for which memory that is not zero is copied.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from guest_lab import keep, pyvmm_program
from start import first_byte_kernel, measure_start

from pyvmm import VM, Pool, images
from pyvmm.api.clones import clone
from pyvmm.api.monitor import Monitor
from pyvmm.control import snapshot_store

NAME, MEMORY = "moment", "512M"
TARGETS = {
    "take_ms": 5.0,
    "take_p99_ms": 10.0,
    "restore_ms": 80.0,
    "clones_seconds": 1.0,
    "private_mib": 4.0,
}
PATIENCE = 60.0  # seconds
# mov rbx, [GENERATION_ID]; mov dx, 0x3f8; mov al, 'r'; out dx, al
# wait: cmp rbx, [GENERATION_ID]; je wait
# mov al, '!'; out dx, al; halt: hlt; jmp halt
WAITS_TO_BE_COPIED = bytes.fromhex(
    "488b1c2500fe0900 66baf803 b072 ee 483b1c2500fe0900 74f6 b021 ee f4 ebfd"
)


@contextmanager
def folders() -> Iterator[str]:
    """Snapshots and sockets are in a directory of ours meanwhile."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_RUNTIME_DIR"] = folder
        os.environ["XDG_STATE_HOME"] = folder
        os.chmod(folder, 0o700)
        yield folder


def writes_to_pages(count: int) -> bytes:
    """A guest's instructions that write to so many pages from 64 MiB on."""
    if not count:
        return b""
    # mov rdi, 64 MiB; mov rcx, count
    begin = bytes.fromhex("48c7c700000004 48c7c1") + count.to_bytes(4, "little")
    # next: mov [rdi], rdi; add rdi, 4096; dec rcx; jnz next
    return begin + bytes.fromhex("48893f 4881c700100000 48ffc9 75f1")


def make_snapshot(
    folder: str,
    name: str = NAME,
    memory: str = MEMORY,
    dirty: int = 0,
    disks: int = 0,
    shares: int = 0,
) -> float:
    """Seconds for which the guest stood still. `dirty` is in MiB."""
    files = images.artifacts(make=True)
    kernel = os.path.join(folder, "bzImage")
    code = writes_to_pages(dirty << 8) + WAITS_TO_BE_COPIED
    first_byte_kernel(files.bzimage, kernel, code)
    options: dict[str, Any] = {"initrd": files.initramfs, "vsock": False, "memory": memory}
    options["disks"] = []
    for number in range(disks):
        path = os.path.join(folder, f"disk{number}")
        Path(path).write_bytes(bytes(1 << 20))
        options["disks"].append(f"{path},snapshot")
    options["shares"] = [f"{folder},tag=share{number}" for number in range(shares)]
    with VM(kernel=kernel, kvm="host", **options) as vm:
        vm.console.expect_exact("r", timeout=PATIENCE)
        return min(vm.snapshot(name), *(_snapshot_again(vm, name, n) for n in range(2)))


def _snapshot_again(vm: VM, name: str, number: int) -> float:
    again = f"{name}-{number}"
    paused = vm.snapshot(again)
    snapshot_store.remove(again)
    return paused


def growth(rounds: int) -> list[dict[str, Any]]:
    """A row for each size: fastest pause, restore and clone, in milliseconds."""
    sizes: list[dict[str, Any]] = [
        *({"memory": memory} for memory in ("256M", "512M", "1G", "2G", "4G", "8G")),
        *({"memory": "1G", "dirty": dirty} for dirty in (64, 128, 256, 512)),
        *({"memory": "512M", "disks": disks} for disks in (1, 4, 8, 14)),
        *({"memory": "1G", "dirty": dirty, "shares": 1} for dirty in (0, 128, 512)),
    ]
    rows = []
    with folders() as folder:
        for number, size in enumerate(sizes):
            name = f"{NAME}{number}"
            paused = make_snapshot(folder, name, **size)
            command = [*pyvmm_program(), "run", "--kvm=host", "--restore", name]
            restores = [measure_start(command).wall_ms for _ in range(rounds)]
            clones_ms = [1e3 * clones(1, name)[0] for _ in range(rounds)]
            snapshot_store.remove(name)
            row = {"paused_ms": 1e3 * paused, "restore_ms": min(restores)}
            row["clone_ms"] = min(clones_ms)
            rows.append(size | {key: round(value, 1) for key, value in row.items()})
            print(rows[-1], flush=True)
    return rows


def await_byte(monitor: Monitor) -> None:
    """Return once the guest has written something."""
    data, _ = monitor.transcript.read(0, 1, PATIENCE)
    if data != b"!":
        raise RuntimeError(f"{monitor.name} has ended: {monitor.messages}")


def takes(rounds: int) -> list[float]:
    """Milliseconds from `take` to the guest's byte; the pool is full each time, and at rest."""
    found = []
    with Pool(NAME, 2, kvm="host") as pool:
        for _ in range(rounds + 1):
            while pool.ready < pool.size:
                time.sleep(0.01)
            begin = time.perf_counter()
            with pool.take() as vm:
                await_byte(vm._running())
                found.append(1e3 * (time.perf_counter() - begin))
    return found[1:]


def private_kib(pid: int) -> int:
    """The memory of a monitor that no other process shares, its guest's RAM included."""
    total = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(("Private_Dirty:", "Private_Clean:")):
            total += int(line.split()[1])
    return total


def clones(count: int, name: str = NAME) -> tuple[float, float]:
    """Seconds until that many have written a byte; the median of their private memory in MiB."""
    begin = time.perf_counter()
    monitors = clone(name, count, kvm="host")
    try:
        for monitor in monitors:
            await_byte(monitor)
        seconds = time.perf_counter() - begin
        private = statistics.median(private_kib(monitor.pid) for monitor in monitors) / 1024
    finally:
        for monitor in monitors:
            monitor.end()
    return seconds, private


def measure(rounds: int, count: int) -> dict[str, Any]:
    with folders() as folder:
        make_snapshot(folder)
        of_takes = sorted(takes(rounds))
        command = [*pyvmm_program(), "run", "--kvm=host", "--restore", NAME]
        restores = [measure_start(command).wall_ms for _ in range(rounds // 2 + 1)][1:]
        several = [clones(count) for _ in range(max(1, rounds // 10))]
    return {
        "take_ms": round(statistics.median(of_takes), 2),
        "take_p99_ms": round(of_takes[min(len(of_takes) - 1, int(0.99 * len(of_takes)))], 2),
        "take_ms_min": round(of_takes[0], 2),
        "restore_ms": round(statistics.median(restores), 1),
        "restore_ms_min": round(min(restores), 1),
        "clones": count,
        "clones_seconds": round(min(seconds for seconds, _ in several), 2),
        "private_mib": round(statistics.median(private for _, private in several), 2),
        "load": os.getloadavg()[0],
        "targets": TARGETS,
    }


def table(result: dict[str, Any]) -> str:
    """`result` as a Markdown table."""
    targets = result["targets"]
    rows = (
        ("`pool.take()` → the guest's next byte, median", "take_ms", "ms"),
        ("the same, 99th percentile", "take_p99_ms", "ms"),
        ("exec of `pyvmm run --restore` → the guest's next byte, median", "restore_ms", "ms"),
        (f"{result['clones']} clones, all of which run, fastest", "clones_seconds", "s"),
        ("private memory of each of them", "private_mib", "MiB"),
    )
    lines = [
        f"| {text} | {result[key]} {unit} | {targets[key]:g} {unit} |" for text, key, unit in rows
    ]
    head = f"| guest of {MEMORY}, load {result['load']:.1f} | measured | bar |\n|---|---|---|\n"
    return head + "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clones", type=int, default=100)
    parser.add_argument("--growth", action="store_true", help="how they grow, and nothing else")
    options = parser.parse_args()
    result: Any
    if options.growth:
        result = growth(options.rounds)
    else:
        result = measure(options.rounds, options.clones)
        print(table(result))
    keep(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
