"""The disk's latency while a vCPU spins and the serial port is busy, against the quiet case.

    python benchmarks/disk_latency.py [--json FILE] [--rounds 7] [--pythons python3.11,python3.13]

Everything in a monitor shares Python's interpreter lock: the thread of a vCPU that makes an exit
for each byte of output, the console's writer, and the disk's worker. So this measures what the
first two do to the third, in turn with the quiet case. Two ways:

"monitor": on this machine's KVM, without Linux. A bare guest writes to the serial port for ever;
another process is the disk's driver, one 4 KiB read at a time, and its clock counts: from before
the kick to after the interrupt. For each Python, and for two of the intervals after which a thread
has to give up the lock: pyvmm's, and Python's own.

"guest": in the emulated KVM host, a Linux guest of two vCPUs: fio on the first, one 4 KiB read at a
time, while the second spins and writes to the serial port as fast as it can. QEMU's microvm too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import guest_disk
import guest_lab
import pythons
from guest_lab import Guest, Machine

WANTED = 2.0
GUEST_TIMEOUT = 420.0
MONITOR_TIMEOUT = 60.0
INTERVALS = {"50 µs": 50e-6, "5 ms": 5e-3}
PERCENTILES = ("p50", "p99")
FIO = f"taskset 1 {guest_disk.FIO} --rw=randread --bs=4k --iodepth=1 --time_based"
# Linux sends from the serial port's interrupt, which is to be the second processor's too.
NOISE = """\
for irq in $(sed -n 's/^ *\\([0-9]*\\):.*ttyS0.*/\\1/p' /proc/interrupts);
do echo 2 > /proc/irq/$irq/smp_affinity; done;
taskset 2 sh -c 'while :; do :; done' & spin=$!;
taskset 2 yes 'what a guest has to say' > /dev/ttyS0 & say=$!;
{fio};
kill -9 $spin $say; wait"""


Rounds = dict[str, list[dict[str, float]]]  # "quiet" and "busy": p50 and p99 in µs, a round each


# --- the monitor alone ----------------------------------------------------------------------------


def measure_monitor(rounds: int, seconds: float, found: Sequence[pythons.Python]) -> list[Any]:
    """A row for each Python and interval. Raises PyvmmError without a usable KVM."""
    from pyvmm.kvm.system import Kvm
    from pyvmm.machine.board.registry import board_of_host

    with Kvm.open() as kvm:
        kvm.check_required(board_of_host().requirements)
    rows = []
    for python in found:
        for name, interval in INTERVALS.items():
            order = {"rounds": rounds, "seconds": seconds, "interval": interval}
            done = subprocess.run(
                [python.program, str(pythons.ROOT / "benchmarks/latency_monitor.py")],
                input=json.dumps(order),
                env={**os.environ, "PYTHONPATH": str(pythons.ROOT)},
                stdout=subprocess.PIPE,
                text=True,
                timeout=MONITOR_TIMEOUT,
            )
            if done.returncode:
                raise RuntimeError(f"the monitor with {python.name} ended with {done.returncode}")
            said = json.loads(done.stdout)
            row = summary(f"{python.name}, {name}", said["latencies"])
            rows.append({**row, "bytes_per_second": said["bytes_per_second"]})
            tell("monitor", row)
    return rows


# --- a Linux guest --------------------------------------------------------------------------------


def measure_guest(guest: Guest, seconds: float, *, busy: bool) -> dict[str, float]:
    """fio's percentiles in µs."""
    fio = f"{FIO} --runtime={seconds * 1000:.0f}ms"
    answer = guest.order(NOISE.format(fio=fio).replace("\n", " ") if busy else fio)
    [line] = [line for line in answer.text.splitlines() if line.startswith("3;")]
    result = guest_disk.read_terse(line, write=False)
    return {"p50": result.p50, "p99": result.p99}


def inside(setup: dict[str, Any]) -> dict[str, Rounds]:
    """Runs in the emulated host: all monitors, quiet and busy, in turn."""
    guest_lab.mount_debugfs()
    found: dict[str, Rounds] = {}
    with guest_lab.guests({name: guest_command(name, setup) for name in setup["names"]}) as guests:
        for number in range(setup["rounds"] + 1):
            for name, guest in guests.items():
                for case in ("quiet", "busy"):
                    figures = measure_guest(guest, setup["seconds"], busy=case == "busy")
                    print(name, case, figures, file=sys.stderr, flush=True)
                    if number:  # the first round warms up
                        found.setdefault(name, {}).setdefault(case, []).append(figures)
    return found


def guest_command(name: str, setup: dict[str, Any]) -> list[str]:
    """The monitor called `name`, with a disk of its own."""
    disk = f"/dev/shm/{list(setup['names']).index(name)}.img"
    guest_lab.prepare_disk(disk, guest_disk.DISK_MIB)
    files = {key: setup[key] for key in ("kernel", "initrd", "root", "script")}
    machine = Machine(**files, disk=disk, cpus=2)
    program = setup["names"][name]
    if not program:
        return guest_lab.qemu_command(machine, "threads")
    environment = ["env", f"PYTHONPATH={pythons.ROOT}"]
    return [*environment, *guest_lab.pyvmm_command(machine, [program])]


def measure_guests(options: argparse.Namespace, found: Sequence[pythons.Python]) -> list[Any]:
    """A row for each monitor."""
    from pyvmm import images

    files = images.artifacts(options.kernel, "test", make=True)
    names = {f"pyvmm, {python.name}": python.program for python in found} | {"QEMU microvm": ""}
    with tempfile.TemporaryDirectory() as folder:
        script = os.path.join(folder, "script")
        guest_lab.write_script(script)
        setup = {
            "kernel": files.bzimage,
            "initrd": files.initramfs,
            "root": files.rootfs,
            "script": script,
            "names": names,
            "rounds": options.guest_rounds,
            "seconds": options.guest_seconds,
        }
        result = guest_lab.run_inside(__file__, setup, memory_mib=3072, timeout=GUEST_TIMEOUT)
    return [summary(name, rounds) for name, rounds in result.items()]


# --- the result -----------------------------------------------------------------------------------


def summary(name: str, rounds: Rounds) -> dict[str, Any]:
    """Medians over the rounds; the ratio is the median of the rounds' own."""
    row: dict[str, Any] = {"name": name, "wanted": WANTED}
    for case, figures in rounds.items():
        for key in PERCENTILES:
            row[f"{case}_{key}_us"] = round(statistics.median(one[key] for one in figures), 1)
    pairs = zip(rounds["quiet"], rounds["busy"], strict=True)
    ratios = [busy["p99"] / quiet["p99"] for quiet, busy in pairs]
    row["ratio"] = round(statistics.median(ratios), 2)
    row["ratios"] = [round(ratio, 2) for ratio in ratios]
    return row


def tell(where: str, row: dict[str, Any]) -> None:
    """Show that it goes on."""
    line = f"{where} {row['name']}: p99 {row['quiet_p99_us']} µs quiet, {row['busy_p99_us']} busy"
    print(line, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """`result` as Markdown."""
    lines = [
        "| one 4 KiB read at a time, µs | quiet p50 | p99 | busy p50 | p99 | p99 busy : quiet |"
        " each round | at most |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for where in ("monitor", "guest"):
        for row in result[where]:
            keys = [f"{case}_{key}_us" for case in ("quiet", "busy") for key in PERCENTILES]
            cells = [f"{row[key]:,.0f}" for key in keys]
            each = " ".join(f"{ratio:.2f}" for ratio in row["ratios"])
            cells += [f"{row['ratio']:.2f}", each, f"{row['wanted']:.1f}"]
            lines.append(f"| {where}: {row['name']} | " + " | ".join(cells) + " |")
    for program, reason in result["unusable"]:
        lines.append(f"\nnot measured: {program}: {reason}")
    for where, reason in result["skipped"].items():
        lines.append(f"\n{where} skipped: {reason}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=7, help="of the monitor alone")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each half of one")
    parser.add_argument("--guest-rounds", type=int, default=5, help="of Linux guests")
    parser.add_argument("--guest-seconds", type=float, default=1.0)
    parser.add_argument(
        "--pythons", default="", help="programs, with commas between (default: all)"
    )
    parser.add_argument("--only", choices=["monitor", "guest"])
    parser.add_argument("--kernel", default="6.1")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(inside(json.loads(options.inside))))
        return 0
    from pyvmm.errors import PyvmmError

    found, unusable = pythons.find([name for name in options.pythons.split(",") if name])
    result: dict[str, Any] = {"monitor": [], "guest": [], "unusable": unusable, "skipped": {}}
    parts: dict[str, Callable[[], list[Any]]] = {
        "monitor": lambda: measure_monitor(options.rounds, options.seconds, found),
        "guest": lambda: measure_guests(options, found),
    }
    for where, part in parts.items():
        if options.only in (None, where):
            try:
                result[where] = part()
            except (PyvmmError, RuntimeError, subprocess.TimeoutExpired) as error:
                result["skipped"][where] = str(error)
    print(table(result))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["monitor"] or result["guest"] else 1


if __name__ == "__main__":
    sys.exit(main())
