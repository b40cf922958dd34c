"""The device of docs/tutorial/02 is short, and what the text shows (test_docs.py runs the rest)."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
SCRIPT = (ROOT / "examples" / "entropy.py").read_text()


def test_the_text_shows_the_whole_device() -> None:
    text = (ROOT / "docs" / "tutorial" / "02-a-device.md").read_text()
    assert SCRIPT in re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_it_has_at_most_30_lines() -> None:
    assert len(SCRIPT.splitlines()) <= 30
