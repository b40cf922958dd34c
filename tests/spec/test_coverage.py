"""docs/spec-coverage.md and the tests in tests/spec agree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from compare_with_spec import musts_in
from requirements import SECTIONS, Section

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "spec-coverage.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text().splitlines()
    if re.match(r"\| *\d", line)
]


def names_in(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0].split()[0]}: {row[1]}")
def test_every_requirement_names_tests_that_exist(row: list[str]) -> None:
    assert len(row) == 3, "a row is: section | requirement | test"
    named = re.findall(r"`([^`]+)`", row[2])
    assert named or row[1].startswith(("no requirement", "binds drivers only"))
    for name in named:
        path, _, test = name.partition("::")
        assert test.partition("[")[0] in names_in(ROOT / path), name


def test_every_spec_test_is_named() -> None:
    page = PAGE.read_text()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path == Path(__file__):
            continue
        for test in sorted(names_in(path)):
            name = f"{path.relative_to(ROOT)}::{test}"
            assert name in page, f"{name} is not in docs/spec-coverage.md"


REQUIREMENTS = {(row[0].split()[0], row[1]): row[2] for row in ROWS}


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.number)
def test_no_must_is_left_out(section: Section) -> None:
    """Each MUST of chapters 2, 4.2 and 5.2 is a row, or binds with a feature only that a row shows
    not to be offered."""
    for must in section.musts:
        for row in must.split(" + "):
            assert (section.number, row) in REQUIREMENTS
            assert "::" in REQUIREMENTS[section.number, row], f"{row}: no test"
    for _, feature, row in section.unoffered:
        assert any(row == text for _, text in REQUIREMENTS), f"{feature}: {row}"


def test_musts_are_counted_in_the_specifications_source() -> None:
    source = r"""
        \subsection{One}
        The device MUST not be counted in prose.
        \devicenormative{\subsection}{One}{Basic / One}
        A device MUST NOT do this, and SHALL do that.
        % A comment MUST NOT count.
        \drivernormative{\subsection}{One}{Basic / One}
        A driver MUST NOT be counted.
        \devicenormative{\paragraph}{Two
        lines}{Basic / Two lines}
        MUST it?
        \subsection{Next} It MUST not.
    """
    assert musts_in(source) == {"One": 2, "Two lines": 1}
