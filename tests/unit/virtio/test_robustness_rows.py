"""docs/robustness.md promises a test for each of its rows; this looks whether they are there.

The ring rows are tested for each ring, over mmio for every device and over vhost-user: by the
chains of `pyvmm.testing`, whose rows `robustness_rows` knows.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from robustness_rows import ROWS_OF_ILLEGAL_CHAINS

ROOT = Path(__file__).resolve().parents[3]


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
    rows = rows_of_the_document()
    assert rows[:58] == list(range(1, 59))
    assert rows == sorted(set(rows))


@pytest.mark.parametrize("row", rows_of_the_document())
def test_row_is_tested(row: int) -> None:
    assert row in rows_with_tests(), f"no test has row{row} in its name"


def test_the_tests_that_the_document_names_are_there() -> None:
    text = (ROOT / "docs/robustness.md").read_text()
    named = set(re.findall(r"`(test_row\w+)`", text))
    assert len(named) > 30
    paths = (ROOT / "tests").rglob("test_*.py")
    there = {name for path in paths for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named - there == set()


def other_rows_of_the_document() -> list[str]:
    """Those of one kind of device or stream: V1, S3 and so on."""
    text = (ROOT / "docs/robustness.md").read_text()
    return re.findall(r"^\| ([A-Z]\d+) \|", text, re.MULTILINE)


@pytest.mark.parametrize("row", other_rows_of_the_document())
def test_row_with_a_letter_is_tested(row: str) -> None:
    start = f"def test_{row.lower()}_"
    tests = (ROOT / "tests").rglob("test_*.py")
    assert any(start in path.read_text() for path in tests), f"no {start}..."


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_every_ring_row_has_chains_for_either_ring(ring: str) -> None:
    """Those that a chain, wrong in itself, can break. Of the others, 25, 37 and 38 are tests of the
    queues, 33 and 35 are lawful chains."""
    rows = {23, 24, 26, 27, 28, 29, 30, 31, 32, 34, 36}
    # In a packed ring there is no index to jump; what stands for rows 23 and 24 are tests of it.
    assert ROWS_OF_ILLEGAL_CHAINS[ring] == (rows - {23, 24} if ring == "packed" else rows)
