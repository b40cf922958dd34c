"""The disk of a Linux guest: fio in it, on pyvmm and on QEMU's microvm, load by load in turn.

    python benchmarks/guest_disk.py [--json FILE] [--rounds 5] [--seconds 1] [--cpus 1]

All monitors run in one emulated KVM host at the same time, with the same kernel, memory and vCPUs
and alike files on tmpfs; only one of them has work at a time, and they change after every load.
What is in there is 10 to 20 times slower than on real KVM, so the ratios are what counts.

Each is there with virtio-pci and with virtio-mmio (QEMU with `pcie=on` and without). QEMU has a
thread for the disk (an iothread) and comes twice, with aio=threads and aio=io_uring; which of the
two was better in the first round, which warms up, is compared with in the others. A part of it:

    python benchmarks/guest_disk.py --programs "pyvmm pci,qemu threads pci" \
        --loads "4k randread QD1,4k randread QD32"

"pyvmm poll=0 pci" is the monitor whose disk's thread never polls its ring; any other number is for
how many µs it does at most.

With `--arch arm64` all of it is in an emulated arm64 host, and QEMU's machine is `virt`, which is
the same for both transports. There fio takes seconds to start.

With `--back-end` the disk is qemu-storage-daemon's, one for each monitor, and both monitors are
vhost-user front ends of it. The default programs are "pyvmm pci,qemu threads pci" then; the word in
the middle is of no use, as both daemons have aio=threads.

Exits and interrupts are KVM's own counters, without those that fio needs to start.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import guest_lab
from guest_lab import Answer, Guest, Machine

DISK_MIB = 64
OURS, DAEMON = "pyvmm", "qemu-storage-daemon"
TIMEOUT = 1200.0
FIO = (
    "fio --name=l --filename=/dev/vdc --direct=1 --ioengine=libaio --thread --norandommap"
    " --minimal --terse-version=3"
)
# What of KVM's counters is shown, per request.
COUNTS = {"exits": "exits", "io_exits": "port", "mmio_exits": "MMIO", "halt_exits": "HLT"}
COUNTS |= {"irq_injections": "interrupts", "signal_exits": "signals"}
# Where terse output has its figures: milliseconds, requests a second, and the list of percentiles.
RUNTIME, RATE, PERCENTILES = 8, 7, 17
WRITE_OFFSET = 41


PROGRAMS = [
    *("pyvmm pci", "qemu threads pci", "qemu io_uring pci"),
    *("pyvmm mmio", "qemu threads mmio", "qemu io_uring mmio"),
]
BACK_END_PROGRAMS = ["pyvmm pci", "qemu threads pci"]
# The least ratio of our rate to QEMU's, by our transport and its.
WANTED = {("pci", "pci"): 1.0, ("pci", "mmio"): 1.2, ("mmio", "mmio"): 1.0}


class Load(NamedTuple):
    """One of fio's jobs."""

    name: str
    rw: str
    size: str
    depth: int

    @property
    def command(self) -> str:
        return f"{FIO} --rw={self.rw} --bs={self.size} --iodepth={self.depth}"


LOADS = (
    Load("4k randread QD1", "randread", "4k", 1),
    Load("4k randread QD32", "randread", "4k", 32),
    Load("4k randwrite QD1", "randwrite", "4k", 1),
    Load("4k randwrite QD32", "randwrite", "4k", 32),
    Load("128k read QD8", "read", "128k", 8),
    Load("128k write QD8", "write", "128k", 8),
    Load("1M read QD4", "read", "1M", 4),
    Load("1M write QD4", "write", "1M", 4),
)


class Setup(TypedDict):
    """The settings for the part inside the emulated host, as JSON."""

    kernel: str
    initrd: str
    root: str
    script: str
    cpus: int
    rounds: int
    seconds: float
    programs: list[str]
    loads: list[str]
    arch: str
    qemu: list[str]  # the beginnings of command lines
    python: list[str]
    back_end: list[str]  # the beginning of qemu-storage-daemon's command line; [] without it


class Run(TypedDict):
    """One load on one monitor."""

    rate: float  # requests a second
    p99_us: float
    requests: float
    counts: dict[str, float]


class Terse(NamedTuple):
    """The findings of fio: requests a second and in all, and percentiles of the latency in µs."""

    rate: float
    requests: float
    p50: float
    p99: float


def read_terse(line: str, *, write: bool) -> Terse:
    """The figures in a line of fio's terse output, of the reads or of the writes.

    Raises RuntimeError if it is not one, or tells of an error.
    """
    fields = line.split(";")
    if len(fields) < 2 * WRITE_OFFSET or fields[4] != "0":
        error = f", error {fields[4]}" if len(fields) > 4 else ""
        raise RuntimeError(f"fio failed{error}: {line[-500:]}")
    at = WRITE_OFFSET if write else 0
    rate, seconds = float(fields[RATE + at]), float(fields[RUNTIME + at]) / 1000
    listed = fields[PERCENTILES + at : PERCENTILES + at + 20]
    percentiles = dict(field.split("%=") for field in listed)
    p50, p99 = (float(percentiles[name]) for name in ("50.000000", "99.000000"))
    return Terse(rate, rate * seconds, p50, p99)


def measure(guest: Guest, load: Load, seconds: float, start: dict[str, int]) -> Run:
    """Run `load` in `guest`; `start` is what fio's start alone makes KVM count."""
    answer = guest.order(f"{load.command} --time_based --runtime={seconds * 1000:.0f}ms")
    found = read_terse(answer.text.splitlines()[-1], write="write" in load.rw)
    counts = {
        name: max(0, answer.counts.get(name, 0) - start.get(name, 0)) / max(found.requests, 1)
        for name in COUNTS
    }
    return Run(rate=found.rate, p99_us=found.p99, requests=found.requests, counts=counts)


def start_of_fio(guest: Guest) -> Answer:
    """fio with next to nothing to do."""
    return guest.order(f"{FIO} --rw=randread --bs=4k --iodepth=1 --number_ios=1 --size=4k")


def command_of(name: str, setup: Setup) -> list[str]:
    """The monitor called `name`, with a disk of its own: each locks it."""
    disk = disk_of(name)
    guest_lab.prepare_disk(disk, DISK_MIB)
    files = (setup["kernel"], setup["initrd"], setup["root"], setup["script"])
    served = bool(setup["back_end"])
    machine = Machine(*files, "" if served else disk, setup["cpus"], arch=setup["arch"])
    transport, socket = transport_of(name), socket_of(disk)
    if name.startswith(OURS):
        options = [f"--transport={transport}"]
        if served:
            options.append(f"--vhost-user=socket={socket},type=blk")
        python = [*setup["python"], "-P", *polling_of(name)]  # -P: not what lies here
        return guest_lab.pyvmm_command(machine, python, options)
    command = guest_lab.qemu_command(machine, name.split()[1], transport, setup["qemu"])
    if served:
        command += guest_lab.qemu_front_end(machine, "blk", transport, socket)
    return command


def socket_of(disk: str) -> str:
    """Where the back end of `disk` listens."""
    return f"{disk}.sock"


@contextmanager
def back_ends(command: list[str], disks: Iterable[str]) -> Iterator[None]:
    """A qemu-storage-daemon for each of `disks`, if `command` begins its command line."""
    with ExitStack() as stack:
        for disk in disks if command else ():
            export = "type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix"
            words = [*command, "--blockdev", f"driver=file,node-name=f,filename={disk},aio=threads"]
            words += ["--export", f"{export},addr.path={socket_of(disk)}"]
            process = stack.enter_context(subprocess.Popen(words))
            stack.callback(process.kill)
            for _ in range(600):
                if os.path.exists(socket_of(disk)):
                    break
                time.sleep(0.1)
        yield


def disk_of(name: str) -> str:
    """The file of the monitor called `name`."""
    return f"/dev/shm/{name.replace(' ', '-')}.img"


def transport_of(name: str) -> str:
    """The transport that a monitor's name ends with."""
    return name.split()[-1]


def polling_of(name: str) -> list[str]:
    """What comes between Python and the module of a monitor that polls for another time."""
    program = str(Path(__file__).with_name("polling.py"))
    words = [word.partition("=") for word in name.split()]
    return [part for key, _, value in words if key == "poll" for part in (program, value)]


def inside(setup: Setup) -> dict[str, Any]:
    """Runs in the emulated host. All of the monitors, load by load."""
    guest_lab.mount_debugfs()
    commands = {name: command_of(name, setup) for name in setup["programs"]}
    disks = [disk_of(name) for name in commands]
    found: dict[str, dict[str, list[Run]]] = {}
    with back_ends(setup["back_end"], disks), guest_lab.guests(commands) as guests:
        starts = {}
        for name, guest in guests.items():
            start_of_fio(guest)  # its files come into the guest's page cache
            starts[name] = start_of_fio(guest).counts
        for load in LOADS:
            if load.name not in setup["loads"]:
                continue

            def one(name: str, load: Load = load) -> Run:
                run = measure(guests[name], load, setup["seconds"], starts[name])
                tell(load, name, run)
                return run

            found[load.name] = in_turn(list(guests), one, setup["rounds"])
    return found


def in_turn(names: list[str], one: Callable[[str], Run], rounds: int) -> dict[str, list[Run]]:
    """Run `one` of each name, round after round. The first round warms up and does not count, but
    for each transport only the QEMU that was the quickest in it goes on: the others would not be
    compared with."""
    first = {name: one(name)["rate"] for name in names}
    best: dict[str, str] = {}
    for name in sorted(names, key=lambda name: first[name]):
        if not name.startswith(OURS):
            best[transport_of(name)] = name
    going_on = [name for name in names if name.startswith(OURS) or name in best.values()]
    found: dict[str, list[Run]] = {name: [] for name in going_on}
    for number in range(rounds):
        # Whoever comes first in a round, so that none always follows the other.
        for name in sorted(going_on, reverse=bool(number % 2)):
            found[name].append(one(name))
    return found


def tell(load: Load, name: str, run: Run) -> None:
    """Show that it goes on."""
    counts = " ".join(f"{COUNTS[key]} {value:.2f}" for key, value in run["counts"].items())
    line = f"{load.name:18} {name:18} {run['rate']:8.0f}/s p99 {run['p99_us']:6.0f} µs {counts}"
    print(line, file=sys.stderr, flush=True)


def summary(found: dict[str, dict[str, list[Run]]]) -> dict[str, Any]:
    """Medians and ratios by load."""
    rows = []
    for load in LOADS:
        if load.name not in found:
            continue
        programs = {name: median_of(runs) for name, runs in found[load.name].items()}
        row: dict[str, Any] = {"load": load.name, "programs": programs, "against": []}
        for ours, theirs in product(programs, programs):
            if not ours.startswith(OURS) or theirs.startswith(OURS):
                continue
            wanted = WANTED.get((transport_of(ours), transport_of(theirs)))
            if wanted is not None:
                row["against"].append(
                    compare(found[load.name], programs, ours, theirs) | {"wanted": wanted}
                )
        rows.append(row)
    return {"rows": rows}


def compare(
    found: dict[str, list[Run]], programs: dict[str, Any], ours: str, theirs: str
) -> dict[str, Any]:
    """Our rate divided by theirs: of the medians, and round by round."""
    pairs = zip(found[ours], found[theirs], strict=True)
    return {
        "ours": ours,
        "theirs": theirs,
        "ratio": round(programs[ours]["rate"] / programs[theirs]["rate"], 2),
        "ratios": [round(one["rate"] / other["rate"], 2) for one, other in pairs],
    }


def median_of(runs: list[Run]) -> dict[str, Any]:
    """The medians of each figure of `runs`, and every rate."""
    return {
        "rate": round(statistics.median(run["rate"] for run in runs), 1),
        "rates": [round(run["rate"], 1) for run in runs],
        "p99_us": round(statistics.median(run["p99_us"] for run in runs)),
        "counts": {
            name: round(statistics.median(run["counts"][name] for run in runs), 3)
            for name in COUNTS
        },
    }


def table(result: dict[str, Any]) -> str:
    """`result` as two Markdown tables."""
    lines = ["| load | | requests/s | against | requests/s | ratio | each round | wanted |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        for pair in row["against"]:
            ours, theirs = (row["programs"][pair[side]]["rate"] for side in ("ours", "theirs"))
            each = " ".join(f"{ratio:.2f}" for ratio in pair["ratios"])
            lines.append(
                f"| {row['load']} | {pair['ours']} | {ours:,.0f} | {pair['theirs']} |"
                f" {theirs:,.0f} | {pair['ratio']:.2f} | {each} | {pair['wanted']:.1f} |"
            )
    titles = " | ".join(COUNTS.values())
    lines += ["", f"| for each request | | requests/s | {titles} | p99, µs |"]
    lines.append("|---|---|" + "---|" * (len(COUNTS) + 2))
    for row in result["rows"]:
        for name, data in row["programs"].items():
            counts = " | ".join(f"{data['counts'][key]:.2f}" for key in COUNTS)
            rate, p99 = f"{data['rate']:,.0f}", f"{data['p99_us']:,}"
            lines.append(f"| {row['load']} | {name} | {rate} | {counts} | {p99} |")
    return "\n".join(lines)


def outside(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare the images and start the emulated host."""
    from pyvmm import images

    programs = options.programs or ",".join(BACK_END_PROGRAMS if options.back_end else PROGRAMS)
    with tempfile.TemporaryDirectory() as folder:
        files = guest_lab.files_for(options.arch, options.kernel, "test", folder)
        script = os.path.join(folder, "script")
        guest_lab.write_script(script)
        setup = Setup(
            kernel=files.kernel,
            initrd=files.initrd,
            root=files.root,
            script=script,
            cpus=options.cpus,
            rounds=options.rounds,
            seconds=options.seconds,
            programs=programs.split(","),
            loads=options.loads.split(","),
            arch=files.arch,
            qemu=files.qemu,
            python=files.python,
            back_end=images.storage_command(DAEMON, make=True) if options.back_end else [],
        )
        found = guest_lab.run_inside(
            __file__, dict(setup), memory_mib=3072, timeout=TIMEOUT, arch=files.arch
        )
    back_end = DAEMON if options.back_end else ""
    kernel = options.kernel or guest_lab.DEFAULT_KERNEL
    kinds = {"arch": options.arch, "kernel": kernel, "cpus": options.cpus, "back_end": back_end}
    return {**kinds, **summary(found)}


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each load")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--arch", choices=guest_lab.ARCHITECTURES, default=guest_lab.X86)
    parser.add_argument("--kernel", default="", help="the kernel image's name (6.12; default: 6.1)")
    parser.add_argument("--programs", default="", help="those to run, with commas between")
    parser.add_argument("--back-end", action="store_true", help="the disk is another process'")
    parser.add_argument(
        "--loads",
        default=",".join(load.name for load in LOADS),
        help="those to run, by name, with commas between",
    )
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments if arguments is None else list(arguments))
    if options.inside:
        print(json.dumps(inside(json.loads(options.inside))))
        return 0
    result = outside(options)
    print(table(result))
    guest_lab.keep(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
