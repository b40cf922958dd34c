"""Clones on this machine's KVM: how soon they run, and what each costs.

    python benchmarks/clones.py [--json FILE] [--rounds 30] [--clones 100]

The guest has 512 MiB, and Debian's kernel and initramfs in them. Only the kernel's first
instructions are replaced: they wait until VMGenID has another number, as it has in a copy, then
write a byte to the serial port and halt. So a copy says that it runs as soon as it does.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from start import first_byte_kernel, measure_start

from pyvmm import VM, Pool, images
from pyvmm.api.clones import clone
from pyvmm.api.monitor import Monitor

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


def make_snapshot(folder: str) -> None:
    files = images.artifacts(make=True)
    kernel = os.path.join(folder, "bzImage")
    first_byte_kernel(files.bzimage, kernel, WAITS_TO_BE_COPIED)
    options: dict[str, Any] = {"initrd": files.initramfs, "vsock": False, "memory": MEMORY}
    with VM(kernel=kernel, kvm="host", **options) as vm:
        vm.console.expect_exact("r", timeout=PATIENCE)
        vm.snapshot(NAME)


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


def clones(count: int) -> tuple[float, float]:
    """Seconds until that many have written a byte; the median of their private memory in MiB."""
    begin = time.perf_counter()
    monitors = clone(NAME, count, kvm="host")
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
        pyvmm = os.path.join(os.path.dirname(sys.executable), "pyvmm")
        command = [pyvmm, "run", "--kvm=host", "--restore", NAME]
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
    options = parser.parse_args()
    result = measure(options.rounds, options.clones)
    print(table(result))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
