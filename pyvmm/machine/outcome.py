"""The end of a run, as a value, and the exit code that says so."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import NamedTuple


class Ending(enum.Enum):
    """The reason why the guest no longer runs. The value is `pyvmm run`'s exit code."""

    POWEROFF = 0
    FAILED = 1  # the monitor or the host failed
    RESET = 10
    PANIC = 11
    TRIPLE_FAULT = 12
    KVM_ERROR = 13  # KVM_EXIT_INTERNAL_ERROR, FAIL_ENTRY or an exit nobody knows
    QUIT = 14  # Ctrl-A x
    DISK_ERROR = 15  # a disk with on-error=stop failed on the host
    INTERRUPTED = 130  # SIGINT, as a shell counts: 128 + signal number
    TERMINATED = 143  # SIGTERM
    HUNG_UP = 129  # SIGHUP


class Outcome(NamedTuple):
    """An ending and one line that explains it; `report` is longer text for a crashed vCPU."""

    ending: Ending
    line: str = ""
    report: str = ""

    @property
    def exit_code(self) -> int:
        return self.ending.value


class Alarm:
    """A device's means to end the run: made before the machine is, and connected by whoever runs
    that. Devices tell it from any thread."""

    def __init__(self) -> None:
        self._end: Callable[[Outcome], None] | None = None
        self._early: Outcome | None = None

    def connect(self, end: Callable[[Outcome], None]) -> None:
        """From now on, and for what was raised before, `end` ends the run."""
        self._end = end
        if self._early is not None:
            end(self._early)

    def disk_failed(self, line: str) -> None:
        """The host cannot serve a disk any more that was asked for with on-error=stop."""
        outcome = Outcome(Ending.DISK_ERROR, f"{line}; stopped (on-error=stop)")
        self._early = self._early or outcome
        if self._end is not None:
            self._end(outcome)
