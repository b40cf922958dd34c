"""What fuzzing has done so far: in one run, or in all that had the same file."""

from __future__ import annotations

import json
import os
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple


class Share(NamedTuple):
    """What one process did: its cases by target and ring, their steps, the seconds of processor
    time by target, the number of the case that comes next, and whether the last one failed."""

    cases: Counter[str]
    steps: int
    seconds: dict[str, float]
    following: int
    failed: bool


class Totals:
    """The sums, and where each process goes on. With a file, what it has is added to, and its seed
    is used unless another one is given: then the cases of that seed begin at their first."""

    def __init__(self, path: Path | None, seed: int | None) -> None:
        self._path = path
        known = json.loads(path.read_text()) if path is not None and path.exists() else {}
        self.seed: int = known.get("seed", 0)
        self._following: dict[str, int] = known.get("following", {})
        if seed is not None and seed != self.seed:
            self.seed, self._following = seed, {}
        elif not known:
            self.seed = random.SystemRandom().getrandbits(32)
        self.steps: int = known.get("steps", 0)
        self.failures: int = known.get("failures", 0)
        self.cases: Counter[str] = Counter(known.get("cases", {}))
        self.seconds: dict[str, float] = defaultdict(float, known.get("seconds", {}))

    def begin(self, process: int | str, first: int) -> int:
        """The number of the case with which `process` goes on, `first` at its beginning."""
        return self._following.get(str(process), first)

    def add(self, process: int | str, share: Share) -> None:
        """What `process` has done."""
        self._following[str(process)] = share.following
        self.steps += share.steps
        self.failures += share.failed
        self.cases += share.cases
        for name, more in share.seconds.items():
            self.seconds[name] += more

    def keep(self) -> None:
        """Write the file, if there is one: whole, or not at all."""
        if self._path is None:
            return
        new = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        known = {
            "seed": self.seed,
            "following": self._following,
            "steps": self.steps,
            "failures": self.failures,
            "cases": dict(sorted(self.cases.items())),
            "seconds": {name: round(one, 3) for name, one in sorted(self.seconds.items())},
        }
        new.write_text(json.dumps(known, indent=1) + "\n")
        new.replace(self._path)

    def counts(self) -> str:
        """All cases, by target and ring."""
        return ", ".join(f"{name} {count}" for name, count in sorted(self.cases.items()))

    def rates(self) -> list[str]:
        """Lines that say how many cases each target had in a second of processor time."""
        of_target: Counter[str] = Counter()
        for name, count in self.cases.items():
            of_target[name.partition("/")[0]] += count
        spent = sum(self.seconds.values())
        lines = [f"{self.cases.total() / spent:.0f} in a second of processor time:"]
        for name, seconds in sorted(self.seconds.items()):
            count = of_target[name]
            lines.append(f"  {name:10} {count:9} cases, {count / max(seconds, 1e-9):6.0f}")
        return lines
