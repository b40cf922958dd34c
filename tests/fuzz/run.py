"""`make fuzz`: random cases against every device until the time is up.

    make fuzz                          # a minute, a seed of its own
    make fuzz SEED=7 SECONDS=600
    make fuzz SEED=7 CASE=12345        # this case only, the way a failure says

Case N of seed S is drawn from the random numbers of "S/N" and no other: it runs alone as well.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.harness import run_case
from fuzz.targets import TARGETS
from rings import RINGS

HANG_SECONDS = 60  # of one case, which takes milliseconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--case", type=int, help="run this case only")
    parser.add_argument("--device", choices=sorted(TARGETS), action="append")
    options = parser.parse_args()
    names = options.device or sorted(TARGETS)
    pairs = list(itertools.product(names, RINGS))
    print(f"seed {options.seed}, devices {' '.join(names)}, rings {' '.join(RINGS)}", flush=True)
    numbers = itertools.count() if options.case is None else [options.case]
    end = time.monotonic() + options.seconds
    cases: Counter[str] = Counter()
    steps = 0
    for number in numbers:
        if options.case is None and time.monotonic() >= end:
            break
        name, ring = pairs[number % len(pairs)]
        faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
        try:
            steps += run_case(random.Random(f"{options.seed}/{number}"), name, ring)
        except Exception:
            traceback.print_exc()
            chosen = "".join(f" DEVICE={one}" for one in options.device or ())
            print(f"\nagain: make fuzz SEED={options.seed} CASE={number}{chosen}")
            return 1
        finally:
            faulthandler.cancel_dump_traceback_later()
        cases[f"{name}/{ring}"] += 1
    counts = ", ".join(f"{pair} {count}" for pair, count in sorted(cases.items()))
    print(f"{sum(cases.values())} cases, {steps} steps, no failure: {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
