"""vhost-user: our virtio-blk against QEMU's storage daemon, with a client that is neither.

    python benchmarks/vhost_user.py [--json FILE] [--rounds 5] [--seconds 0.8] [--poll US] [--fifo]

The client is QEMU 10's `qemu-img bench` over libblkio, the daemon has an iothread and aio=io_uring.
Both serve the same file on tmpfs, in turn, from one thread. Nobody is bound to a processor: in a
virtual machine that makes each wake-up an interrupt between processors, which is dear. Each figure
is the median of the rounds. `--poll` is given to `pyvmm vhost-user-blk`. `--fifo`, for root, is for
a machine that others use: all three run under SCHED_FIFO, and nobody's work comes between them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pyvmm import images

IMAGE_MIB = 256
PROGRESS = sys.stderr


class Load(NamedTuple):
    """The client's load: `depth` requests of `size` bytes at a time. `wanted` is the least ratio
    of our rate to the daemon's."""

    name: str
    depth: int
    size: int
    write: bool
    wanted: float


LOADS = (
    Load("4k read QD1", 1, 4096, False, 1.25),  # 0.8 of the latency
    Load("4k read QD32", 32, 4096, False, 2.0),
    Load("4k read QD64", 64, 4096, False, 2.0),
    Load("4k write QD32", 32, 4096, True, 1.5),
    Load("128k read QD8", 8, 131072, False, 1.0),
)


class Place(NamedTuple):
    """The place of a run: its folder and the image."""

    folder: Path
    image: Path


def in_front() -> None:
    """Have what this process starts go before all that is not under a real-time scheduler."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


@contextlib.contextmanager
def serving(command: list[str], socket: Path) -> Iterator[None]:
    """`command` as a back end at `socket`."""
    server = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 30
        while not socket.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} does not serve")
            time.sleep(0.02)
        yield
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)


def ours(place: Place, socket: Path, options: list[str]) -> list[str]:
    return [
        sys.executable, "-m", "pyvmm", "vhost-user-blk",
        "--socket", str(socket), "--disk", str(place.image), *options,
    ]  # fmt: skip


def theirs(place: Place, socket: Path, options: list[str]) -> list[str]:
    return [
        *images.storage_command("qemu-storage-daemon", make=True),
        "--blockdev",
        f"driver=file,filename={place.image},node-name=disk,aio=io_uring",
        "--object", "iothread,id=thread",
        "--export",
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,iothread=thread,"
        f"addr.type=unix,addr.path={socket}",
    ]  # fmt: skip


BACK_ENDS = {"pyvmm": ours, "qemu-storage-daemon": theirs}


def rate(place: Place, kind: str, load: Load, count: int, options: list[str]) -> float:
    """Requests a second."""
    socket = place.folder / f"{kind}.sock"
    with serving(BACK_ENDS[kind](place, socket, options), socket):
        client = [
            *images.storage_command("qemu-img"), "bench", "-t", "none",
            "-d", str(load.depth), "-s", str(load.size), "-c", str(count),
            *(["-w"] if load.write else []),
            "--image-opts", f"driver=virtio-blk-vhost-user,path={socket},cache.direct=on",
        ]  # fmt: skip
        done = subprocess.run(
            client,
            capture_output=True,
            text=True,
            timeout=120,
        )
    found = re.search(r"completed in ([\d.]+) seconds", done.stdout)
    if found is None:
        raise SystemExit(f"qemu-img bench failed: {done.stderr.strip()}")
    return count / float(found[1])


def measure(
    place: Place, load: Load, rounds: int, seconds: float, options: list[str]
) -> dict[str, Any]:
    """One row: both back ends in turn."""
    # Few requests at first, to see how many make a run of the wanted length.
    first = rate(place, "qemu-storage-daemon", load, 2000, options)
    count = max(1000, int(first * seconds))
    rates: dict[str, list[float]] = {kind: [] for kind in BACK_ENDS}
    for number in range(rounds):
        # Whoever comes first in a round, so that neither always follows the other.
        for kind in sorted(BACK_ENDS, reverse=bool(number % 2)):
            rates[kind].append(rate(place, kind, load, count, options))
    medians = {kind: statistics.median(found) for kind, found in rates.items()}
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    row = {
        "load": load.name,
        "requests": count,
        "rates": {kind: [round(one) for one in found] for kind, found in rates.items()},
        "medians": {kind: round(median) for kind, median in medians.items()},
        "ratio": round(medians["pyvmm"] / medians["qemu-storage-daemon"], 2),
        "ratios": [round(one, 2) for one in ratios],
        "wanted": load.wanted,
    }
    print(f"{load.name}: {row['ratio']} x (wanted {load.wanted})", file=PROGRESS, flush=True)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| load | pyvmm, requests/s | qemu-storage-daemon | ratio | each round | wanted |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        medians, rounds = row["medians"], " ".join(f"{ratio:.2f}" for ratio in row["ratios"])
        lines.append(
            f"| {row['load']} | {medians['pyvmm']:,} | {medians['qemu-storage-daemon']:,} "
            f"| {row['ratio']:.2f} | {rounds} | {row['wanted']} |"
        )
    return "\n".join(lines)


def make_image(path: Path) -> None:
    with open(path, "wb") as file:
        for _ in range(IMAGE_MIB):
            file.write(os.urandom(1 << 20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8, help="for each run, about")
    parser.add_argument("--load", action="append", help="only this one; may be repeated")
    parser.add_argument("--poll", help="microseconds, as pyvmm vhost-user-blk --poll has it")
    parser.add_argument("--fifo", action="store_true", help="before all other work (root only)")
    options = parser.parse_args()
    if options.fifo:
        in_front()
    extra = ["--poll", options.poll] if options.poll is not None else []
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    images.storage_command("qemu-img", make=True)
    with tempfile.TemporaryDirectory(dir=memory, prefix="pyvmm-bench-") as folder:
        place = Place(Path(folder), Path(folder) / "disk.img")
        make_image(place.image)
        rows = [
            measure(place, load, options.rounds, options.seconds, extra)
            for load in LOADS
            if not options.load or load.name in options.load
        ]
    print(table(rows))
    if options.json:
        options.json.write_text(
            json.dumps({"benchmark": "vhost_user", "fifo": options.fifo, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    main()
