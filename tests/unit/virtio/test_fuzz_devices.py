"""A short run, always the same, of what `make fuzz` does at length; hypothesis shrinks failures."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.cases import CASES
from fuzz.harness import run_case
from fuzz.targets import TARGETS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rings import RINGS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("ring", RINGS)
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_no_driver_breaks_a_device(name: str, ring: str) -> None:
    @settings(
        max_examples=40,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(rng=st.randoms(use_true_random=False))
    def fuzz(rng: random.Random) -> None:
        run_case(rng, name, ring, most_steps=6)

    fuzz()


@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_no_peer_breaks_us(name: str, ring: str) -> None:
    for number in range(30 * min(CASES[name].share, 32)):
        CASES[name].run(random.Random(f"17/{number}"), ring)  # type: ignore[arg-type]


def fuzz_command(*options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(ROOT / "tests/fuzz/run.py"), *options]
    return subprocess.run(argv, capture_output=True, text=True)


def test_a_case_is_repeated_by_seed_and_number() -> None:
    again = [fuzz_command("--seed=7", "--case=3") for _ in range(2)]
    assert again[0].returncode == 0, again[0].stderr
    assert again[0].stdout == again[1].stdout
    assert "seed 7," in again[0].stdout and "1 cases, " in again[0].stdout
