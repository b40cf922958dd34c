"""`make fuzz`: random cases against every device, then damaged snapshots, until the time is up.

    make fuzz                          # a minute, a seed of its own
    make fuzz SEED=7 SECONDS=600
    make fuzz SEED=7 CASE=12345        # this case only, the way a failure says
    make fuzz DEVICE=snapshot          # snapshots alone, for which a fifth of the time is otherwise
    make fuzz STATE=FILE CASES=10000000    # so many, in as many runs as it takes; Ctrl-C ends one

Case N of seed S is drawn from the random numbers of "S/N" and no other: it runs alone as well.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[1] / "kvm"))

from fuzz.cases import CASES
from fuzz.harness import run_case
from fuzz.targets import TARGETS
from fuzz.totals import Share, Totals
from rings import RINGS

HANG_SECONDS = 60  # of one case, which takes milliseconds
APART = 10**9  # numbers of cases, of two processes that draw them
ROUND_SECONDS = 20.0  # between two times that the totals are kept
SNAPSHOT = "snapshot"
DEVICES = (*sorted(TARGETS), *sorted(CASES))


class _Ended:
    """Whether somebody has asked for the end; the second time it comes at once."""

    asked = False

    def ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


_ended = _Ended()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--case", type=int, help="run this case only")
    parser.add_argument("--cases", type=int, help="end when there were so many in all")
    parser.add_argument("--state", type=Path, help="go on with what is in this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--device", choices=[*DEVICES, SNAPSHOT], action="append")
    options = parser.parse_args()
    names = options.device or [*DEVICES, SNAPSHOT]
    devices = [name for name in names if name != SNAPSHOT]
    with_snapshots = SNAPSHOT in names and (options.case is None or not devices)
    if with_snapshots and devices and options.cases is not None:
        with_snapshots = False  # which take time, and come to few cases
    if SNAPSHOT in names and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        print("snapshots are left out: they need a /dev/kvm")
        with_snapshots = False
    seconds = options.seconds or (60.0 if options.cases is None else float("inf"))
    totals = Totals(options.state, options.seed)
    signal.signal(signal.SIGINT, _ended.ask)
    share = 0.8 if with_snapshots else 1.0
    ended = 0
    if devices:
        ended = _fuzz_devices(devices, options, totals, seconds * share)
    if not ended and with_snapshots:
        ended = _fuzz_snapshots(options, totals, seconds * (1 - share if devices else 1.0))
    return ended


def _fuzz_devices(
    names: list[str], options: argparse.Namespace, totals: Totals, seconds: float
) -> int:
    print(f"seed {totals.seed}, devices {' '.join(names)}, rings {' '.join(RINGS)}", flush=True)
    end = time.monotonic() + seconds
    jobs = options.jobs if options.case is None else 1
    most = 1 if options.case is not None else options.cases or sys.maxsize
    failed = False
    with ExitStack() as closing:
        pool = None
        if jobs > 1:
            pool = closing.enter_context(ProcessPoolExecutor(jobs, get_context("fork")))
        while not failed and not _ended.asked and (left := end - time.monotonic()) > 0:
            now = min(left, ROUND_SECONDS)
            each = -(-(most - totals.cases.total()) // jobs)
            if each <= 0:
                break
            work = [
                (names, options, totals.seed, totals.begin(job, job * APART), now, each)
                for job in range(jobs)
            ]
            if pool is None:
                found = [_share_of_devices(*one) for one in work]
            else:
                found = [one.result() for one in [pool.submit(_share_of_devices, *w) for w in work]]
            for job, share in enumerate(found):
                totals.add(job, share)
                failed |= share.failed
            if options.case is not None:
                break
            totals.keep()
    if failed:
        return 1
    failures = f"{totals.failures} failed before" if totals.failures else "no failure"
    print(f"{totals.cases.total()} cases, {totals.steps} steps, {failures}: {totals.counts()}")
    if options.case is None and totals.cases:
        print("\n".join(totals.rates()))
    return 0


def _share_of_devices(
    names: list[str],
    options: argparse.Namespace,
    seed: int,
    begin: int,
    seconds: float,
    most: int,
) -> Share:
    """The cases of one of so many processes from number `begin` on, for `seconds`."""
    pairs = [
        (name, ring)
        for name, ring in itertools.product(names, RINGS)
        for _ in range(CASES[name].share if name in CASES else 1)
    ]
    steps = 0
    spent: dict[str, float] = defaultdict(float)

    def run(rng: random.Random, number: int) -> str:
        nonlocal steps
        name, ring = pairs[number % len(pairs)]
        began = time.process_time()
        steps += CASES[name].run(rng, ring) if name in CASES else run_case(rng, name, ring)
        spent[name] += time.process_time() - began
        return f"{name}/{ring}"

    chosen = "".join(f" DEVICE={one}" for one in options.device or ())
    done = _run(run, options, seed, time.monotonic() + seconds, chosen, begin, most)
    return Share(done.cases, steps, dict(spent), done.following, done.failed)


def _fuzz_snapshots(options: argparse.Namespace, totals: Totals, seconds: float) -> int:
    from fuzz.snapshots import Snapshots

    with tempfile.TemporaryDirectory() as folder:
        snapshots = Snapshots(Path(folder))
        print(f"seed {totals.seed}, snapshots {' '.join(snapshots.names)}", flush=True)

        def run(rng: random.Random, number: int) -> str:
            return f"{SNAPSHOT}/{'restored' if snapshots.run_case(rng) else 'refused'}"

        end, began = time.monotonic() + seconds, time.process_time()
        begin, most = totals.begin(SNAPSHOT, 0), options.cases or sys.maxsize
        done = _run(run, options, totals.seed, end, f" DEVICE={SNAPSHOT}", begin, most)
        spent = {SNAPSHOT: time.process_time() - began}
        totals.add(SNAPSHOT, Share(done.cases, 0, spent, done.following, done.failed))
        totals.keep()
        if done.failed:
            return 1
        print(f"{done.cases.total()} snapshots, no failure: {_counts(done.cases)}")
        return 0


class _Done(NamedTuple):
    cases: Counter[str]
    following: int
    failed: bool


def _run(
    run: Callable[[random.Random, int], str],
    options: argparse.Namespace,
    seed: int,
    end: float,
    chosen: str,
    begin: int = 0,
    most: int = sys.maxsize,
) -> _Done:
    """Cases until `end`, `most` of them, counted by what `run` calls them; the number of the next
    one, and whether the last has failed."""
    numbers = range(begin, begin + most) if options.case is None else [options.case]
    cases: Counter[str] = Counter()
    watched_until = 0.0
    number = begin - 1
    try:
        for number in numbers:
            if options.case is None and (_ended.asked or time.monotonic() >= end):
                return _Done(cases, number, False)
            if time.monotonic() >= watched_until:  # not for each: it costs a thread
                faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
                watched_until = time.monotonic() + 1
            try:
                cases[run(random.Random(f"{seed}/{number}"), number)] += 1
            except Exception:
                traceback.print_exc()
                print(f"\nagain: make fuzz SEED={seed} CASE={number}{chosen}", flush=True)
                return _Done(cases, number + 1, True)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return _Done(cases, number + 1, False)


def _counts(cases: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(cases.items()))


if __name__ == "__main__":
    sys.exit(main())
