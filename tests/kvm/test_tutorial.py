"""The tutorial's script does what the tutorial says, and is what the tutorial shows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from pyvmm.kvm.system import Kvm

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial"
SCRIPT = TUTORIAL / "first_byte.py"


def test_the_script_prints_what_its_guest_sends(kvm: Kvm) -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("Hi\n", "", 0)


def test_the_script_has_under_60_lines() -> None:
    assert len(SCRIPT.read_text().splitlines()) < 60


def test_the_text_shows_the_whole_script() -> None:
    text = (TUTORIAL / "01-first-byte.md").read_text()
    shown = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    # A piece from within a block stands at the margin, and blank lines between pieces are left out.
    assert _bare_lines(shown) == _bare_lines(SCRIPT.read_text())


def _bare_lines(code: str) -> list[str]:
    return [line.strip() for line in code.splitlines() if line]


def test_what_the_text_points_to_exists() -> None:
    text = (TUTORIAL / "01-first-byte.md").read_text()
    for path in re.findall(r"`(pyvmm/[\w/.]+)`", text):
        assert (TUTORIAL.parents[1] / path).exists(), path
