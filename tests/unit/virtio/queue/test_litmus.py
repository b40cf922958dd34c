"""The fences of the rings, with a driver in C on another processor (tests/litmus_driver.c).

Each round the two sides do at the same time what would lose a kick or an interrupt if a load came
before a store, and read what the other one wrote (docs/decisions/0648).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from queue_rig import LAYOUTS

TESTS = Path(__file__).parents[3]
ROUNDS = 5_000
PATIENCE = 300  # seconds
FORBIDDEN = ("lost kicks", "lost interrupts", "stale requests", "stale replies")

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two processors"),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("litmus") / "driver"
    subprocess.run(["cc", "-O2", "-Wall", "-o", made, TESTS / "litmus_driver.c"], check=True)
    return made


def outcomes(driver: Path, layout: str, *more: str) -> dict[str, Any]:
    command = [sys.executable, TESTS / "litmus_device.py", driver, layout, str(ROUNDS), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_lost_between_two_processors(driver: Path, layout: str) -> None:
    for _ in range(10):  # on a busy machine they may not meet
        found = outcomes(driver, layout)
        assert {name: found[name] for name in FORBIDDEN} == dict.fromkeys(FORBIDDEN, 0)
        if min(*found["kicks"], *found["interrupts"]) > 0:
            break
    assert min(*found["kicks"], *found["interrupts"]) > 0, f"they never met: {found}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loads_before_stores_lose_both_signals(driver: Path, layout: str) -> None:
    """So the test sees it where a processor does that."""
    lost = dict.fromkeys(FORBIDDEN, 0)
    for _ in range(10):
        found = outcomes(driver, layout, "early")
        lost = {name: lost[name] + found[name] for name in FORBIDDEN}
        if lost["lost kicks"] and lost["lost interrupts"]:
            break
    assert lost["lost kicks"] and lost["lost interrupts"], lost
    assert not lost["stale requests"] and not lost["stale replies"]
