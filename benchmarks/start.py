"""From exec of `pyvmm run` to the guest's first byte on standard output, on this machine's KVM.

    python benchmarks/start.py [--json FILE] [--rounds 15] [--confine]

The whole way of a plain run: options, a kernel of 14 MB, an initial RAM disk and a root disk. Only
the kernel's first instructions are replaced: they write a byte to the serial port and halt, which
any KVM can run. Between the first KVM_RUN and that byte lie a few microseconds.

With --confine it says how much more each of the ways to confine takes: one start of each in turn,
the median of the differences.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from guest_lab import keep, pyvmm_program

TARGET_MS = 120
CONFINED_TARGET_MS = 8  # more than without a box
MODES = ("off", "auto", "strict")
GUEST_RAM = "pyvmm-guest-ram"
# mov dx, 0x3f8; mov al, '!'; out dx, al; hlt
FIRST_BYTE = bytes.fromhex("66baf803 b021 ee f4")
# Documentation/arch/x86/boot.rst: setup_sects; the 64-bit entry in the protected-mode part
SETUP_SECTS, ENTRY_64 = 0x1F1, 0x200


class Start(NamedTuple):
    """One start: by the clock, in processor time of all threads and children, and the monitor's
    memory at that moment."""

    wall_ms: float
    processor_ms: float
    private_dirty_kib: int


def first_byte_kernel(bzimage: str, target: str, code: bytes = FIRST_BYTE) -> None:
    """Write a copy of `bzimage` whose 64-bit entry is `code`: it writes one byte and halts."""
    kernel = bytearray(Path(bzimage).read_bytes())
    entry = (kernel[SETUP_SECTS] + 1) * 512 + ENTRY_64
    kernel[entry : entry + len(code)] = code
    Path(target).write_bytes(kernel)


def measure_start(command: list[str]) -> Start:
    """Start `command`, wait for its first byte of output, and end it."""
    begin = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    try:
        byte = process.stdout.read(1)
        wall = time.monotonic() - begin
        if byte != b"!":
            raise RuntimeError(f"{command[0]} ended before its guest wrote anything")
        proc = Path(f"/proc/{process.pid}")
        used = sum(map(processor_ms, (proc, *children(proc))))
        return Start(wall * 1e3, used, private_dirty_kib(proc))
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def processor_ms(proc: Path) -> float:
    """Milliseconds that the threads of a process have run."""
    threads = proc.glob("task/*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e6


def children(proc: Path) -> list[Path]:
    """Those of a process, where the kernel tells (CONFIG_PROC_CHILDREN)."""
    lists = proc.glob("task/*/children")
    return [proc.with_name(pid) for one in lists for pid in one.read_text().split()]


def private_dirty_kib(proc: Path) -> int:
    """Private dirty KiB of a process, without its guest's RAM."""
    total, counted = 0, True
    for line in (proc / "smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            counted = GUEST_RAM not in line  # a mapping's first line
        elif words[0] == "Private_Dirty:" and counted:
            total += int(words[1])
    return total


@contextmanager
def plain_run() -> Iterator[list[str]]:
    """The command line of a plain run."""
    import compileall

    import pyvmm
    from pyvmm import images

    compileall.compile_dir(os.path.dirname(pyvmm.__file__), quiet=1)  # as after a first run
    files = images.artifacts(make=True)
    with tempfile.TemporaryDirectory() as folder:
        kernel, disk = os.path.join(folder, "bzImage"), os.path.join(folder, "root.img")
        first_byte_kernel(files.bzimage, kernel)
        with open(disk, "wb") as file:
            file.truncate(1 << 30)
        command = [*pyvmm_program(), "run", "--kvm=host"]
        yield [*command, "--kernel", kernel, "--initrd", files.initramfs, "--disk", disk]


def measure(rounds: int) -> dict[str, Any]:
    """Medians of `rounds` starts; the first, which fills the page cache, does not count."""
    with plain_run() as command:
        starts = [measure_start(command) for _ in range(rounds + 1)][1:]
    return {
        "wall_ms": round(statistics.median(start.wall_ms for start in starts), 1),
        "wall_ms_min": round(min(start.wall_ms for start in starts), 1),
        "processor_ms": round(statistics.median(start.processor_ms for start in starts), 1),
        "private_dirty_kib": round(statistics.median(s.private_dirty_kib for s in starts)),
        "target_ms": TARGET_MS,
    }


def compare(rounds: int) -> dict[str, Any]:
    """How much more a start takes with each of MODES than with the first: medians of the
    differences in `rounds` turns, of which the first does not count."""
    with plain_run() as command:
        turns = [
            [measure_start([*command, "--confine", mode]) for mode in MODES]
            for _ in range(rounds + 1)
        ][1:]
    found: dict[str, Any] = {"target_ms": CONFINED_TARGET_MS}
    for place, mode in enumerate(MODES):
        more = {
            field: round(
                statistics.median(
                    getattr(turn[place], field) - getattr(turn[0], field) for turn in turns
                ),
                1,
            )
            for field in Start._fields
        }
        whole = {
            field: round(statistics.median(getattr(turn[place], field) for turn in turns), 1)
            for field in Start._fields
        }
        found[mode] = {"more": more, "whole": whole}
    return found


def comparison(result: dict[str, Any]) -> str:
    """The result of `compare` as a Markdown table."""
    lines = [
        f"| `--confine` | by the clock | processor time | private dirty memory |\n|---|{'---|' * 3}"
    ]
    for mode in MODES:
        more, whole = result[mode]["more"], result[mode]["whole"]
        lines.append(
            f"| {mode} | {whole['wall_ms']} ms | {whole['processor_ms']} ms "
            f"| {whole['private_dirty_kib'] / 1024:.1f} MiB |"
            if mode == MODES[0]
            else f"| {mode} | {more['wall_ms']:+} ms | {more['processor_ms']:+} ms "
            f"| {more['private_dirty_kib']:+} KiB |"
        )
    return "\n".join((*lines, f"\nAt most {result['target_ms']} ms more are wanted."))


def table(result: dict[str, Any]) -> str:
    """`result` as a Markdown table."""
    return (
        "| `pyvmm run`, exec → first byte of the guest | |\n|---|---|\n"
        f"| by the clock, median | {result['wall_ms']} ms |\n"
        f"| by the clock, fastest | {result['wall_ms_min']} ms |\n"
        f"| processor time, median | {result['processor_ms']} ms |\n"
        f"| private dirty memory without guest RAM | {result['private_dirty_kib'] / 1024:.1f} MiB |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--confine", action="store_true", help="compare the ways to confine the monitor"
    )
    options = parser.parse_args()
    result = compare(options.rounds) if options.confine else measure(options.rounds)
    print(comparison(result) if options.confine else table(result))
    keep(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
