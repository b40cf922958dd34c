"""The tutorial's first script does what its text says, and both scripts are what the texts show.

tests/guest/test_whole_vmm.py runs the other one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.kvm.system import Kvm

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial"
SCRIPT = TUTORIAL / "first_byte.py"
PAGES = pytest.mark.parametrize(
    ("page", "script"),
    [("01-first-byte.md", SCRIPT), ("04-a-whole-vmm.md", TUTORIAL / "whole_vmm.py")],
)


def test_the_script_prints_what_its_guest_sends(kvm: Kvm) -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("Hi\n", "", 0)


def test_the_script_has_under_60_lines() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 60


def test_a_whole_vmm_has_under_120_lines() -> None:
    assert len((TUTORIAL / "whole_vmm.py").read_text().splitlines()) < 120


@PAGES
def test_the_text_shows_the_whole_script(page: str, script: Path) -> None:
    text = (TUTORIAL / page).read_text()
    shown = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    # A piece from within a block stands at the margin, and blank lines between pieces are left out.
    assert _bare_lines(shown) == _bare_lines(script.read_text())


def _bare_lines(code: str) -> list[str]:
    return [line.strip() for line in code.splitlines() if line]


@PAGES
def test_what_the_text_points_to_exists(page: str, script: Path) -> None:
    text = (TUTORIAL / page).read_text()
    assert script.name in text
    for path in re.findall(r"`(pyvmm/[\w/.]+)`", text):
        assert (TUTORIAL.parents[1] / path).exists(), path
