"""The rows of docs/robustness.md that `pyvmm.testing`'s lawful and unlawful chains belong to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pyvmm.testing import illegal_chains, legal_chains
from pyvmm.testing.illegal import ILLEGAL, IllegalChain

# The beginning of a chain's name → its row.
_ILLEGAL_ROWS = {
    "available index jumps": 23,
    "available index goes back": 24,
    "head out of range": 26,
    "id out of range": 26,
    "id just out of range": 26,
    "loop": 27,
    "next": 27,
    "chain of the whole ring": 27,
    "list without an end": 27,
    "second of a list not available": 27,
    "more than 2^32 bytes": 28,
    "readable buffer": 29,
    "writable buffer": 29,
    "empty": 30,
    "table and NEXT": 31,
    "table in": 31,
    "table of": 32,
    "table longer than the queue": 32,
    "table outside RAM": 32,
    "table over the end of RAM": 32,
    "table that wraps 2^64": 32,
    "readable after writable": 34,
    "same": 36,
}


def row_of(illegal: IllegalChain) -> int:
    """Its row."""
    [row] = {
        row for start, row in _ILLEGAL_ROWS.items() if illegal.name.startswith(start)
    }  # fmt: skip
    return row


ROWS_OF_ILLEGAL_CHAINS = {
    ring: {row_of(illegal) for illegal in ILLEGAL if ring in illegal.rings}
    for ring in ("split", "packed")
}


def illegal_params(*before: Sequence[str]) -> list[object]:
    """Parameters (…, ring, illegal) for `pytest.mark.parametrize`, one for each choice from
    `before`, each ring and each illegal chain; with the row in the test's id."""
    return [
        pytest.param(
            *chosen, ring, one, id="-".join((*chosen, ring, f"row{row_of(one)}", str(one)))
        )
        for chosen in _choices(before)
        for ring in ("split", "packed")
        for one in illegal_chains(ring)
    ]


def legal_params(*before: Sequence[str]) -> list[object]:
    """The same of lawful chains: row 33 where a table is involved, else row 35."""
    return [
        pytest.param(
            *chosen,
            ring,
            one,
            id="-".join((*chosen, ring, f"row{33 if one.indirect else 35}", str(one))),
        )
        for chosen in _choices(before)
        for ring in ("split", "packed")
        for one in legal_chains(ring)
    ]


def _choices(before: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    choices: list[tuple[str, ...]] = [()]
    for values in before:
        choices = [(*chosen, value) for chosen in choices for value in values]
    return choices
