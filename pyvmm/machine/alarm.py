"""How a device ends the run: made before the machine is, and joined to it when it runs."""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.machine.outcome import Ending, Outcome


class Alarm:
    """Devices tell it from any thread; whoever runs the machine connects it."""

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
