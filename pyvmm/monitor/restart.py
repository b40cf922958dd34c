"""The choice to start a guest again that has asked for a reset: as a machine would, but not without
end if it gets nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pyvmm.machine.outcome import Ending, Outcome

FRUITLESS = 3
"""So many times in a row a guest may ask for a reset before any of its drivers is up."""

_SHORT = 10.0  # seconds
_LONGEST_PAUSE = 5.0


class RebootPolicy:
    """Decides at each end of the guest. `wanted` is whether it may start again at all."""

    def __init__(self, wanted: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._wanted = wanted
        self._clock = clock
        self._started = clock()
        self._fruitless = 0  # in a row
        self._short = 0  # in a row
        self.gave_up = False

    def started(self) -> None:
        """The guest runs from now on."""
        self._started = self._clock()

    def pause(
        self, outcome: Outcome, *, panicked: bool, has_devices: bool, came_up: bool, printed: bool
    ) -> float | None:
        """The seconds to wait until it starts again; None if it does not.

        `panicked`: its kernel has panicked, and the reset is the end of that. `has_devices`: it was
        given virtio devices, and `came_up`: a driver has brought up one. A guest without any is
        judged by the clock, and by whether it has `printed` anything: how long a kernel takes to
        fail in silence depends on the machine.
        """
        if outcome.ending is not Ending.RESET or panicked or not self._wanted:
            return None
        short = self._clock() - self._started < _SHORT
        fruitless = not came_up and (has_devices or short or not printed)
        self._fruitless = self._fruitless + 1 if fruitless else 0
        self._short = self._short + 1 if short else 0
        if self._fruitless >= FRUITLESS:
            self.gave_up = True
            return None
        # A loop of a guest that does come up is its own affair, and must not cost a processor.
        if self._short <= FRUITLESS:
            return 0.0
        return float(min(_LONGEST_PAUSE, 0.1 * 2 ** min(self._short - FRUITLESS, 10)))
