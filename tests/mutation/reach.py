"""The lines that each test reaches: a mutant meets the tests that execute its statement."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

import pytest
from mutation.mutate import Mutant


class Test(NamedTuple):
    """A test that passed, as it was seen without a fault."""

    name: str  # pytest's node ID
    seconds: float
    forks: bool  # what its children execute is not seen
    lines: dict[str, set[int]]  # by module, as a path below the root

    def reaches(self, mutant: Mutant) -> bool:
        everywhere = self.forks or not mutant.lines
        return everywhere or not self.lines.get(mutant.file, set()).isdisjoint(mutant.lines)


class Recorder:
    """A plug-in for pytest that records the lines that each test executes in some modules."""

    def __init__(self, root: Path, files: Sequence[str]) -> None:
        self._files = {str(root / file): file for file in files}
        self._lines: dict[CodeType, set[int]] = {}  # executed by this test, with its fixtures
        self._unseen: dict[CodeType, set[int]] = {}
        self._forks = 0
        self.tests: list[Test] = []
        os.register_at_fork(after_in_parent=self._count_fork)

    def _count_fork(self) -> None:
        self._forks += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        self._lines, self._unseen = {}, {}
        forks, began = self._forks, time.monotonic()
        threading.settrace(self._on_call)
        sys.settrace(self._on_call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            lines: dict[str, set[int]] = {}
            for code, numbers in list(self._lines.items()):
                lines.setdefault(self._files[code.co_filename], set()).update(numbers)
            seconds = time.monotonic() - began
            self.tests.append(Test(item.nodeid, seconds, self._forks > forks, lines))

    def _on_call(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if code.co_filename not in self._files:
            return None
        if code not in self._lines:
            self._unseen[code] = {line for _, _, line in code.co_lines() if line is not None}
            self._lines[code] = {code.co_firstlineno}
        return self._on_line if self._unseen[code] else None

    def _on_line(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        # A thread of an earlier test, where the code is not known in this one, counts for none.
        if code in self._lines:
            self._lines[code].add(frame.f_lineno)
            self._unseen[code].discard(frame.f_lineno)
        return self._on_line

    def save(self, path: Path) -> None:
        rows = [
            [test.name, test.seconds, test.forks, {f: sorted(n) for f, n in test.lines.items()}]
            for test in self.tests
        ]
        path.write_text(json.dumps(rows))


def load(path: Path) -> list[Test]:
    """The records of a Recorder."""
    return [
        Test(name, seconds, forks, {file: set(numbers) for file, numbers in lines.items()})
        for name, seconds, forks, lines in json.loads(path.read_text())
    ]


class Choice:
    """A plug-in for pytest that runs the tests of these names only, the quickest first."""

    def __init__(self, tests: Sequence[Test]) -> None:
        self._order = {test.name: test.seconds for test in tests}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self._order]
        items.sort(key=lambda item: self._order[item.nodeid])
