"""Limits on how fast a device serves a queue: operations and bytes a second, with bursts.

Plain arithmetic on integers; the time is passed in, in nanoseconds. A bucket holds tokens up to its
burst and gets `rate` new ones a second. What is larger than the burst goes when the bucket is full
and leaves a debt behind, so that it goes at all and the rate holds over time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Lock

from pyvmm.virtio.queue.chain import DescriptorChain, Usual
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import Rest, Serve

_SECOND = 1_000_000_000  # nanoseconds
DEFAULT_BURST = 10  # the burst is what comes in one such part of a second, if nobody says it


class TokenBucket:
    """`rate` tokens a second, of which up to `burst` can be saved up; full at first."""

    def __init__(self, rate: int, burst: int = 0) -> None:
        """A `burst` of 0 is a tenth of a second's worth. Raises ValueError for a rate below 1."""
        if rate < 1 or burst < 0:
            raise ValueError(f"a bucket with a rate of {rate} and a burst of {burst}")
        self.rate = rate
        self.burst = burst or max(1, rate // DEFAULT_BURST)
        # In tokens times nanoseconds, so that nothing is ever rounded away.
        self._level = self.burst * _SECOND
        self._then: int | None = None

    def wait_for(self, count: int, now: int) -> int:
        """In how many nanoseconds from `now` on there will be enough to take `count`; 0 is now."""
        if self._then is not None and now > self._then:
            full = self.burst * _SECOND
            self._level = min(full, self._level + (now - self._then) * self.rate)
        if self._then is None or now > self._then:
            self._then = now
        missing = min(count, self.burst) * _SECOND - self._level
        return -(-missing // self.rate) if missing > 0 else 0

    def take(self, count: int) -> None:
        """Take `count` tokens, after `wait_for` said 0."""
        self._level -= count * _SECOND


class RateLimiter:
    """The limits of one device, shared by its queues: a bucket of bytes, one of operations."""

    def __init__(self, bytes: TokenBucket | None, operations: TokenBucket | None) -> None:
        self._bytes = bytes
        self._operations = operations
        self._lock = Lock()

    def take(self, size: int, now: int) -> int:
        """0 if one operation of `size` bytes may go ahead at `now`, and is counted; else in how
        many nanoseconds to ask again. Any thread may ask."""
        with self._lock:
            wait = 0
            if self._operations is not None:
                wait = self._operations.wait_for(1, now)
            if self._bytes is not None:
                wait = max(wait, self._bytes.wait_for(size, now))
            if wait:
                return wait
            if self._operations is not None:
                self._operations.take(1)
            if self._bytes is not None:
                self._bytes.take(size)
        return 0

    def ready(self, now: int) -> int:
        """In how many nanoseconds from `now` on something may go that is counted by `charge` when
        its size is known; 0 is now."""
        with self._lock:
            buckets = (self._operations, self._bytes)
            waits = (bucket.wait_for(1, now) for bucket in buckets if bucket is not None)
            return max(waits, default=0)

    def charge(self, size: int, operations: int = 1) -> None:
        """Count what went anyway, be it on credit; negative numbers give back what was taken."""
        with self._lock:
            if self._operations is not None:
                self._operations.take(operations)
            if self._bytes is not None:
                self._bytes.take(size)

    def lift(self) -> None:
        """See worker.Limits."""
        with self._lock:
            self._bytes = self._operations = None

    def around(self, serve: Serve, size_of: Callable[[DescriptorChain], int]) -> Serve:
        """See worker.Limits."""
        return limited(serve, self, size_of)


def limiter(*, bps: int, iops: int, bps_burst: int, iops_burst: int) -> RateLimiter | None:
    """A limiter of bytes and operations a second; 0: without limit. None if neither is limited."""
    if not bps and not iops:
        return None
    return RateLimiter(
        TokenBucket(bps, bps_burst) if bps else None,
        TokenBucket(iops, iops_burst) if iops else None,
    )


class LimitedQueue:
    """A queue for a `serve` that knows nothing of limits: chains that may not go yet stay in it.

    `size_of` says how many bytes a chain counts for. `wait` is, after an iteration, in how many
    nanoseconds the next chain may go; 0 if none is held back.
    """

    def __init__(
        self,
        queue: Queue,
        limits: RateLimiter,
        size_of: Callable[[DescriptorChain], int],
        clock: Callable[[], int],
    ) -> None:
        self._queue = queue
        self._limits = limits
        self._size_of = size_of
        self._clock = clock
        self.wait = 0
        self._last: DescriptorChain | None = None
        self.index = queue.index
        self.size = queue.size
        self.add_used = queue.add_used

    @property
    def halt(self) -> bool:
        """See Queue."""
        return self._queue.halt

    def pop(self) -> DescriptorChain | None:
        """See Queue; None also for a chain that may not go yet."""
        chain = self._queue.pop()
        if chain is None:
            return None
        self.wait = self._limits.take(self._size_of(chain), self._clock())
        if self.wait:
            self._queue.step_back(chain)
            return None
        self._last = chain
        return chain

    def step_back(self, chain: DescriptorChain | None = None) -> None:
        """See Queue; the chain counts when it is taken again."""
        self._queue.step_back(chain)
        chain = chain or self._last
        if chain is not None:
            self._limits.charge(-self._size_of(chain), -1)

    def peek_usual(self, first: int, last: int, most: int) -> tuple[list[Usual], bool]:
        """See Queue; none, as each chain is counted when it is popped."""
        return [], True

    def __iter__(self) -> Iterator[DescriptorChain]:
        """See Queue."""
        for _ in range(self.size):
            if self._queue.halt or not self._queue.ready:
                return
            chain = self.pop()
            if chain is None:
                return
            yield chain

    def __getattr__(self, name: str) -> object:
        return getattr(self._queue, name)


def limited(
    serve: Serve,
    limits: RateLimiter,
    size_of: Callable[[DescriptorChain], int],
    clock: Callable[[], int] = time.monotonic_ns,
) -> Serve:
    """`serve` within `limits`: while chains are held back its worker sleeps, and kicks are off."""
    wrapped: LimitedQueue | None = None

    def serve_limited(queue: Queue) -> Rest | None:
        nonlocal wrapped
        if wrapped is None:  # it stays the same queue
            wrapped = LimitedQueue(queue, limits, size_of, clock)
        wrapped.wait = 0
        rest = serve(wrapped)  # type: ignore[arg-type]  # the rest of Queue is by __getattr__
        if wrapped.wait:
            return Rest(kicks=False, seconds=wrapped.wait / _SECOND, sources=False)
        return rest

    return serve_limited
