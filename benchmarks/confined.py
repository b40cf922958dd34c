"""The cost of the monitor's box for exits and for requests, on this machine's KVM.

    python benchmarks/confined.py [--json FILE] [--rounds 60] [--exits 4000] [--seconds 0.2]

Two processes do the same, one of them in the box that a VM has by default. They take turns, other
two follow them, and what is told is the median of their ratios. Exits are those of native_kvm.py
(pyvmm's loop, a bare-metal guest), requests those of blk_mock.py (4 KiB reads, one at a time, a
driver in another process on the same processor, which is the cheapest there is): both in processor
time of the process that is measured.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from functools import partial
from threading import Event, Thread
from typing import NamedTuple

from blk_mock import DRIVER_OK, Bench, count_completions, image_on_tmpfs
from guest_lab import keep
from native_kvm import PythonLoop

from pyvmm.errors import PyvmmError
from pyvmm.kvm.system import Kvm
from pyvmm.monitor.confine import Confinement
from pyvmm.spec.surroundings import AUTO, OFF, Surroundings
from pyvmm.spec.vm import VmSpec

PAIRS = 6  # of processes: no two are alike
TARGET = 1.02  # with the box, of that without
_NUMBER = struct.Struct("d")

Round = Callable[[], float]
"""Microseconds for one of what is measured."""


class Limits(NamedTuple):
    exits: int
    seconds: float
    image: str


@contextmanager
def exits(kind: str, limits: Limits) -> Iterator[Round]:
    with Kvm.open() as kvm, ExitStack() as stack:
        yield PythonLoop(kvm, kind, limits.exits, stack).round


@contextmanager
def requests(limits: Limits) -> Iterator[Round]:
    bench = Bench(limits.image, read_only=True)  # one for both: no two files lie alike in memory
    go, went = os.pipe(), os.pipe()
    if not os.fork():  # the driver
        os.close(go[1])
        rates = count_completions(bench, 1, limits.seconds)
        while os.read(go[0], 1):
            rate = next(rates)
            os.write(went[1], _NUMBER.pack(rate * limits.seconds))
        os._exit(0)
    os.close(go[0])

    def round_() -> float:
        begin = time.process_time()
        os.write(go[1], b"g")
        (count,) = _NUMBER.unpack(os.read(went[0], _NUMBER.size))
        return (time.process_time() - begin) / float(count) * 1e6

    with closing(bench):
        bench.driver.add_status(DRIVER_OK)
        yield round_
        os.close(go[1])


WHAT: dict[str, Callable[[Limits], AbstractContextManager[Round]]] = {
    "exits to a port": partial(exits, "port"),
    "exits to a register": partial(exits, "mmio"),
    "requests": requests,
}


class Worker:
    """A process that measures when it is told, confined as `mode` says."""

    def __init__(self, what: str, mode: str, limits: Limits) -> None:
        go, told = os.pipe(), os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                os.close(go[1])
                # Or else it is chance whether a wake-up goes to another processor.
                os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
                with WHAT[what](limits) as measured:
                    Confinement(Surroundings(confine=mode)).enter(VmSpec(kernel="/dev/null"))
                    # A monitor has several, for which the kernel counts who uses a file.
                    Thread(target=Event().wait, daemon=True).start()
                    while os.read(go[0], 1):
                        os.write(told[1], _NUMBER.pack(measured()))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.close(go[0])
        os.close(told[1])
        self._go, self._told = go[1], told[0]

    def round(self) -> float:
        """Microseconds."""
        os.write(self._go, b"g")
        (found,) = _NUMBER.unpack(os.read(self._told, _NUMBER.size))
        return float(found)

    def close(self) -> None:
        os.close(self._go)
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        while os.read(self._told, 4096):  # until its driver, which has the image open, ends as well
            pass
        os.close(self._told)


def compare(what: str, rounds: int, limits: Limits) -> dict[str, float]:
    """Microseconds for one without the box and with it, and the ratio, in turn."""
    turns = []
    for _ in range(PAIRS):
        with (
            closing(Worker(what, OFF, limits)) as free,
            closing(Worker(what, AUTO, limits)) as confined,
        ):
            for number in range(rounds // PAIRS + 1):
                order = (free, confined) if number % 2 else (confined, free)
                found = {worker: worker.round() for worker in order}
                if number:  # the first warms up
                    turns.append((found[free], found[confined]))
    return {
        "off_us": round(statistics.median(turn[0] for turn in turns), 2),
        "auto_us": round(statistics.median(turn[1] for turn in turns), 2),
        "ratio": round(statistics.median(with_ / without for without, with_ in turns), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--exits", type=int, default=4000, help="of each round")
    parser.add_argument("--seconds", type=float, default=0.2, help="of each round of requests")
    options = parser.parse_args()
    results = {}
    with image_on_tmpfs() as image:
        limits = Limits(options.exits, options.seconds, image)
        print("| | off, µs | auto, µs | ratio |\n|---|---|---|---|")
        for what in WHAT:
            try:
                found = results[what] = compare(what, options.rounds, limits)
            except (PyvmmError, struct.error) as error:
                print(f"{what}: cannot be measured here: {error}", file=sys.stderr)
                return 1
            print(f"| {what} | {found['off_us']} | {found['auto_us']} | {found['ratio']:.3f} |")
    print(f"\nA ratio of {TARGET} at most is wanted.")
    keep(results, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
