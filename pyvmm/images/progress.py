"""The progress of a build: a line for each step, with the seconds it took.

On a terminal a step is shown while it runs, with a bar (by rich, which is imported only then).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]


class Progress:
    """Writes to standard error."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = not quiet and sys.stderr is not None and sys.stderr.isatty()

    @contextlib.contextmanager
    def step(self, text: str) -> Iterator[None]:
        """`text` says what is being done, such as "kernel-6.1: fetching linux-image-6.1.0-50"."""
        with self._timed(text), self._shown(text, None):
            yield

    @contextlib.contextmanager
    def bar(self, text: str, total: int) -> Iterator[Advance]:
        """A step of `total` bytes (0: nobody knows); the function tells how many more are done."""
        with self._timed(text), self._shown(text, total or None) as advance:
            yield advance

    def notice(self, text: str) -> None:
        self._write(f"pyvmm: {text}\n")

    def waiting(self) -> None:
        """Somebody else holds the cache's lock."""
        self.notice("another build is running; waiting for it")

    @contextlib.contextmanager
    def _timed(self, text: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._write(f"pyvmm: {text}: {time.monotonic() - start:.1f} s\n")

    @contextlib.contextmanager
    def _shown(self, text: str, total: int | None) -> Iterator[Advance]:
        if not self._live:
            yield lambda size: None
            return
        from rich import progress
        from rich.console import Console

        columns: list[progress.ProgressColumn] = [
            progress.TextColumn("pyvmm: {task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.TimeElapsedColumn(),
        ]
        if total is not None:
            columns.append(progress.DownloadColumn(binary_units=True))
        console = Console(stderr=True, highlight=False)
        # transient: the bar makes room for the line that says how long it took.
        with progress.Progress(*columns, console=console, transient=True) as shown:
            task = shown.add_task(text, total=total)
            yield lambda size: shown.advance(task, size)

    def _write(self, text: str) -> None:
        if not self._quiet and sys.stderr is not None:
            sys.stderr.write(text)
            sys.stderr.flush()
