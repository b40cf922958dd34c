"""A timer for the serial port whose time a test makes."""

from __future__ import annotations

from pyvmm.host.timer import Ring


class FakeTimer:
    """`Timer` without a thread or a clock: `advance` lets time pass, and rings."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._now = 0.0
        self._times: list[float] = []
        self.sets = 0

    def now(self) -> float:
        return self._now

    def set(self, when: float) -> None:
        self._times.append(when)
        self.sets += 1

    def close(self) -> None:
        self._times.clear()

    @property
    def left(self) -> float | None:
        """The seconds until it rings; None if it is not set."""
        return max(0.0, self._times[0] - self._now) if self._times else None

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        end = self._now + seconds
        while self._times and self._times[0] <= end:
            self._now = max(self._now, self._times[0])
            again = self._ring()
            self._times[:1] = [] if again is None else [again]
        self._now = end

    def ring(self) -> None:
        """Let time pass until there is nothing to ring for."""
        while self.left is not None:
            self.advance(self.left)
