"""Looking at a ring for a while before its worker sleeps: a processor's time for two wake-ups less,
the worker's own and, as the driver need not kick meanwhile, an exit of the guest's.

It pays where requests come one at a time, soon after the answer to the last one, and a processor is
there for it. See docs/decisions/0590-disks-poll.md.
"""

from __future__ import annotations

from threading import Lock
from time import perf_counter_ns

from pyvmm.virtio.queue.protocol import Queue

# At least: longer than some looks at a ring take.
PATIENCE_NS = 20_000
# At least: longer than other threads of ours are at work.
HELD_UP_NS = 100_000
# The longest rests, for another thread of ours and for another program.
REST_NS = 20_000_000
LONG_REST_NS = 1_000_000_000
STEPS = 3
GROWTH = 4

# Held while one polls. A second one of the process would only keep the first from Python's lock.
_polling = Lock()


class Polling:
    """When the worker of one queue looks at its ring before it sleeps, and for how long: as KVM
    does for a vCPU that halts (halt_poll_ns).

    It does if it was woken within `limit_ns` nanoseconds the last time, counted from where it
    began to look: one success begins it, and one failure ends it, so that a queue at rest costs no
    time. One worker of a process polls at a time.

    Where another thread of ours had work meanwhile, which was slowed down, it rests for up to 20
    ms; where another program had the processor, for up to a second.
    """

    def __init__(self, limit_ns: int) -> None:
        self._limit = limit_ns
        self._patience = max(PATIENCE_NS, limit_ns // 10)
        self._held_up = limit_ns + max(HELD_UP_NS, limit_ns // 2)
        self._is_worth_it = False
        self._waits_since = 0  # on the clock; 0 while it does not wait
        self._for_ours = Rest(REST_NS)
        self._for_others = Rest(LONG_REST_NS)
        self._rests_until = 0

    def finds(self, queue: Queue) -> bool:
        """Called when `queue` is empty: whether it had new buffers within the time that is worth
        waiting for them. If not, `woke` is to be called after the sleep that follows."""
        began = self._waits_since = perf_counter_ns()
        if not self._is_worth_it or began < self._rests_until or not _polling.acquire(False):
            return False
        try:
            found = queue.poll(began + self._limit, self._patience)
        finally:
            _polling.release()
        now = perf_counter_ns()
        took = now - began
        if took > self._held_up:
            self._rests_until = self._for_others.end_of_one_from(now)
        elif took < self._limit and not found:
            self._rests_until = self._for_ours.end_of_one_from(now)
        return found

    def woke(self) -> None:
        """The sleep has ended, by a kick or otherwise."""
        if self._waits_since:
            self._is_worth_it = perf_counter_ns() - self._waits_since < self._limit
            self._waits_since = 0


class Rest:
    """How long nothing is polled for one reason: a 64th of `longest_ns` nanoseconds at first, and
    four times the last rest where the reason comes again within `longest_ns` after it. What happens
    now and then costs little so, and what goes on is given way to."""

    def __init__(self, longest_ns: int) -> None:
        self._longest = longest_ns
        self._last = 0
        self._grows_until = 0

    def end_of_one_from(self, now: int) -> int:
        """The end of the rest that begins `now`, on the same clock in nanoseconds."""
        grows = now < self._grows_until
        rest = self._last * GROWTH if grows else self._longest // GROWTH**STEPS
        self._last = min(rest, self._longest)
        self._grows_until = now + self._last + self._longest
        return now + self._last
