"""The disk of docs/tutorial/03 is short, and what the text shows (test_docs.py runs the rest)."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
SCRIPT = (ROOT / "examples" / "squares.py").read_text()


def test_the_text_shows_the_whole_backend() -> None:
    text = (ROOT / "docs" / "tutorial" / "03-a-disk.md").read_text()
    assert SCRIPT in re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_it_has_15_lines_of_code() -> None:
    code = re.sub(r'"""(.|\n)*?"""', "", SCRIPT)
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
