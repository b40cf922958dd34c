"""docs/robustness.md promises a test for each of its rows; this looks whether they are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def rows_of_the_document() -> list[int]:
    text = (ROOT / "docs/robustness.md").read_text()
    return [int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)]


def rows_with_tests() -> set[int]:
    found: set[int] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path != Path(__file__):
            for name in re.findall(r"def (test_\w+)", path.read_text()):
                found |= {int(number) for number in re.findall(r"row(\d+)", name)}
    return found


def test_the_document_has_all_rows() -> None:
    assert rows_of_the_document() == list(range(1, 59))


@pytest.mark.parametrize("row", rows_of_the_document())
def test_row_is_tested(row: int) -> None:
    assert row in rows_with_tests(), f"no test has row{row} in its name"
