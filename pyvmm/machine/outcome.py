"""How a run ended, as a value, and the exit code that says so."""

from __future__ import annotations

import enum
from typing import NamedTuple

STOP_SECONDS = 30.0
"""How long a guest that was asked to power off may take until its power is cut."""


class Ending(enum.Enum):
    """Why the guest no longer runs. The value is `pyvmm run`'s exit code."""

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
