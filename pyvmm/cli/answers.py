"""What monitors have said, in front of a user: a guest may have taken one of them over.

What it says is then anything, and must neither obey a terminal nor keep a command from showing
other VMs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from pyvmm.control.client import NoAnswer, no_sense
from pyvmm.host.log import harmless


@contextmanager
def of_monitor(vm: str) -> Iterator[None]:
    """In which an answer of `vm` is looked at: raises NoAnswer for one of another shape."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        raise NoAnswer(no_sense(vm)) from None


def show_table(lines: Sequence[Sequence[str]]) -> None:
    """Print lines of cells, in columns."""
    shown = [[harmless(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for line in shown:
        cells = (f"{cell:{width}}" for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
