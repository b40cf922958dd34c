"""Many clones begin some at a time, and no more of them once one has failed."""

from __future__ import annotations

from threading import Event, Thread
from typing import Any

import pytest

from pyvmm.api import clones
from pyvmm.api.cancellation import Cancelled
from pyvmm.api.errors import VMError
from pyvmm.errors import HostError
from pyvmm.host import processors

NAMES = [f"copy-{number}" for number in range(60)]


@pytest.fixture(autouse=True)
def two_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "usable", lambda: 2.0)


def begun(begin: Any, over: Event | None = None) -> list[Any]:
    return clones._some_at_a_time(NAMES, begin, over or Event())


def test_no_more_than_eight_for_each_processor_begin_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[Thread] = []

    class Counted(Thread):
        def start(self) -> None:
            threads.append(self)
            super().start()

    monkeypatch.setattr(clones, "Thread", Counted)
    assert begun(lambda number: number) == list(range(60))
    assert len(threads) == 16


@pytest.mark.parametrize("most", [3, 0])
def test_where_the_host_has_no_more_threads(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    started: list[Thread] = []

    class Scarce(Thread):
        def start(self) -> None:
            if len(started) == most:
                raise RuntimeError("can't start new thread")
            started.append(self)
            super().start()

    monkeypatch.setattr(clones, "Thread", Scarce)
    if most:
        assert begun(lambda number: number) == list(range(60))
    else:
        with pytest.raises(HostError, match="thread for a clone: Resource temporarily unavail"):
            begun(lambda number: number)


def test_after_one_that_fails_no_more_begin() -> None:
    over, tried = Event(), []

    def begin(number: int) -> int:
        tried.append(number)
        if number == 3:
            raise ValueError("no room")
        assert over.wait(60)
        return number

    with pytest.raises(VMError, match=r"1 of 60 clones did not start, and none runs: copy-3: no r"):
        begun(begin, over)
    assert len(tried) < 60


def test_those_that_were_just_there_when_one_failed_are_no_failures() -> None:
    over = Event()

    def begin(number: int) -> int:
        if number == 3:
            raise ValueError("no room")
        assert over.wait(60)
        raise Cancelled

    with pytest.raises(VMError, match=r"^1 of 60 clones did not start, and none runs: copy-3: no"):
        begun(begin, over)


def test_those_that_are_called_off_do_not_begin() -> None:
    over = Event()

    def begin(number: int) -> int:
        over.set()
        return number

    assert len(begun(begin, over)) < 60


def test_one_alone_begins_here_and_its_error_is_its_own() -> None:
    def begin(number: int) -> Any:
        raise ValueError(number)

    with pytest.raises(ValueError, match="0"):
        clones._some_at_a_time(["one"], begin, Event())
