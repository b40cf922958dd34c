"""The limits of one direction of a network card, in seconds: how fast frames may go.

What is sent has a size that is known before; what is received only once it was read, so it goes
when the buckets have anything at all, and is paid for afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pyvmm.virtio.rate_limit import RateLimiter

_SECOND = 1_000_000_000  # nanoseconds


class Limits:
    """A `RateLimiter` of frames and bytes, and the clock (nanoseconds) that it goes by."""

    def __init__(self, limiter: RateLimiter, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._limiter = limiter
        self._clock = clock

    def take(self, length: int) -> float:
        """0 if a frame of `length` bytes may go, and it is counted; else in how many seconds to
        ask again. One that is longer than the burst goes when the bucket is full."""
        return self._limiter.take(max(length, 0), self._clock()) / _SECOND

    def give_back(self, length: int) -> None:
        """The frame that was counted last did not go."""
        self._limiter.charge(-max(length, 0), -1)

    def ready(self) -> float:
        """In how many seconds the next frame may be read; 0 is now."""
        return self._limiter.ready(self._clock()) / _SECOND

    def charge(self, length: int) -> None:
        """A frame of `length` bytes was read."""
        self._limiter.charge(length)
