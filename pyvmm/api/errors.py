"""Errors of a VM, as exceptions. Each has the end of the guest's console with it."""

from __future__ import annotations

import os
from typing import NamedTuple

from pyvmm.errors import PyvmmError
from pyvmm.machine.outcome import Ending

TAIL_LINES = 40


class Outcome(NamedTuple):
    """The end of a VM. `exit_code` is what `pyvmm run` exits with (negative for a signal that
    killed the monitor; None for a VM that was only attached to, and did not tell); `line` is its
    last message, or ""."""

    exit_code: int | None
    line: str = ""

    @property
    def ending(self) -> Ending | None:
        """The meaning of `exit_code`, if it is one of a VM that ran."""
        try:
            return Ending(self.exit_code)
        except ValueError:
            return None


class VMError(PyvmmError):
    """Something went wrong with a VM. `console` is the end of what its guest said, `outcome` how it
    ended, if it has. Python shows the console below the traceback."""

    def __init__(self, message: str, *, console: str = "", outcome: Outcome | None = None) -> None:
        self.console = console
        self.outcome = outcome
        super().__init__(message)
        add_console(self, console)


class GuestEnded(VMError):
    """The guest powered off, reset or was stopped while something was wanted of it."""


class GuestPanic(GuestEnded):
    """The guest's kernel panicked."""


class MonitorDied(VMError):
    """The monitor or the host failed, or the monitor was killed."""


class VMTimeout(VMError, TimeoutError):
    """Something did not happen in time."""


def add_console(error: BaseException, console: str) -> None:
    """Have Python show the end of the console with `error`."""
    if console:
        error.add_note(f"--- the guest's console ends:\n{console}")


def check_owner(owner: int, what: str) -> None:
    """Raise VMError in a process that was forked from `owner`, which `what` belongs to: the thread
    that fills it is not here, and its locks may be held for ever."""
    if os.getpid() != owner:
        raise VMError(
            f"{what} belongs to process {owner}, which this one was forked from; VM.attach makes "
            "one for here"
        )


def ended(name: str, outcome: Outcome, console: str) -> VMError:
    """The error for a VM that has ended."""
    message = f"{name} has ended: {outcome.line or f'exit code {outcome.exit_code}'}"
    return _kind(outcome)(message, console=console, outcome=outcome)


def _kind(outcome: Outcome) -> type[VMError]:
    if outcome.ending is Ending.PANIC:
        return GuestPanic
    failed = (None, Ending.FAILED, Ending.KVM_ERROR, Ending.DISK_ERROR)
    return MonitorDied if outcome.ending in failed else GuestEnded
