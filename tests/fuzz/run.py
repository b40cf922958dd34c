"""`make fuzz`: random cases against every device, then damaged snapshots, until the time is up.

    make fuzz                          # a minute, a seed of its own
    make fuzz SEED=7 SECONDS=600
    make fuzz SEED=7 CASE=12345        # this case only, the way a failure says
    make fuzz DEVICE=snapshot          # snapshots alone, for which a fifth of the time is otherwise

Case N of seed S is drawn from the random numbers of "S/N" and no other: it runs alone as well.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "kvm"))

from fuzz.cases import CASES
from fuzz.harness import run_case
from fuzz.targets import TARGETS
from rings import RINGS

HANG_SECONDS = 60  # of one case, which takes milliseconds
APART = 10**9  # numbers of cases, of two processes that draw them
SNAPSHOT = "snapshot"
DEVICES = (*sorted(TARGETS), *sorted(CASES))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--case", type=int, help="run this case only")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--device", choices=[*DEVICES, SNAPSHOT], action="append")
    options = parser.parse_args()
    names = options.device or [*DEVICES, SNAPSHOT]
    devices = [name for name in names if name != SNAPSHOT]
    with_snapshots = SNAPSHOT in names and (options.case is None or not devices)
    if SNAPSHOT in names and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        print("snapshots are left out: they need a /dev/kvm")
        with_snapshots = False
    share = 0.8 if with_snapshots else 1.0
    ended = 0
    if devices:
        ended = _fuzz_devices(devices, options, options.seconds * share)
    if not ended and with_snapshots:
        ended = _fuzz_snapshots(options, options.seconds * (1 - share if devices else 1.0))
    return ended


def _fuzz_devices(names: list[str], options: argparse.Namespace, seconds: float) -> int:
    print(f"seed {options.seed}, devices {' '.join(names)}, rings {' '.join(RINGS)}", flush=True)
    end = time.monotonic() + seconds
    jobs = options.jobs if options.case is None else 1
    if jobs == 1:
        found = [_share_of_devices(names, options, end, 0)]
    else:
        with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
            shares = [
                pool.submit(_share_of_devices, names, options, end, job) for job in range(jobs)
            ]
            found = [share.result() for share in shares]
    cases: Counter[str] = Counter()
    seconds_of: dict[str, float] = defaultdict(float)
    for share in found:
        if share.cases is None:
            return 1
        cases += share.cases
        for name, seconds_more in share.seconds.items():
            seconds_of[name] += seconds_more
    steps = sum(share.steps for share in found)
    spent = sum(seconds_of.values())
    print(f"{cases.total()} cases, {steps} steps, no failure: {_counts(cases)}")
    if options.case is None:
        print(f"{cases.total() / sum(seconds_of.values()):.0f} in a second of processor time:")
        for name, spent in seconds_of.items():
            count = sum(cases[f"{name}/{ring}"] for ring in RINGS)
            print(f"  {name:10} {count:9} cases, {count / spent:6.0f}")
    return 0


class _Share(NamedTuple):
    """What one process did: its cases (None after one that failed), their steps, and the seconds of
    processor time for each target."""

    cases: Counter[str] | None
    steps: int
    seconds: dict[str, float]


def _share_of_devices(
    names: list[str], options: argparse.Namespace, end: float, job: int
) -> _Share:
    """The cases of one of so many processes."""
    pairs = [
        (name, ring)
        for name, ring in itertools.product(names, RINGS)
        for _ in range(CASES[name].share if name in CASES else 1)
    ]
    steps = 0
    seconds: dict[str, float] = defaultdict(float)

    def run(rng: random.Random, number: int) -> str:
        nonlocal steps
        name, ring = pairs[number % len(pairs)]
        began = time.process_time()
        steps += CASES[name].run(rng, ring) if name in CASES else run_case(rng, name, ring)
        seconds[name] += time.process_time() - began
        return f"{name}/{ring}"

    chosen = "".join(f" DEVICE={one}" for one in options.device or ())
    cases = _run(run, options, end, chosen, job)
    return _Share(cases, steps, seconds)


def _fuzz_snapshots(options: argparse.Namespace, seconds: float) -> int:
    from fuzz.snapshots import Snapshots

    with tempfile.TemporaryDirectory() as folder:
        snapshots = Snapshots(Path(folder))
        print(f"seed {options.seed}, snapshots {' '.join(snapshots.names)}", flush=True)

        def run(rng: random.Random, number: int) -> str:
            return "restored" if snapshots.run_case(rng) else "refused"

        cases = _run(run, options, time.monotonic() + seconds, f" DEVICE={SNAPSHOT}")
        if cases is None:
            return 1
        print(f"{sum(cases.values())} snapshots, no failure: {_counts(cases)}")
        return 0


def _run(
    run: Callable[[random.Random, int], str],
    options: argparse.Namespace,
    end: float,
    chosen: str,
    job: int = 0,
) -> Counter[str] | None:
    """Cases until `end`, counted by what `run` calls them; None after one that failed."""
    numbers = itertools.count(job * APART) if options.case is None else [options.case]
    cases: Counter[str] = Counter()
    watched_until = 0.0
    try:
        for number in numbers:
            if options.case is None and time.monotonic() >= end:
                break
            if time.monotonic() >= watched_until:  # not for each: it costs a thread
                faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
                watched_until = time.monotonic() + 1
            try:
                cases[run(random.Random(f"{options.seed}/{number}"), number)] += 1
            except Exception:
                traceback.print_exc()
                print(f"\nagain: make fuzz SEED={options.seed} CASE={number}{chosen}", flush=True)
                return None
    finally:
        faulthandler.cancel_dump_traceback_later()
    return cases


def _counts(cases: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(cases.items()))


if __name__ == "__main__":
    sys.exit(main())
