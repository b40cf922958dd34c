"""The counters of a queue. They change once for each batch, which costs a request nearly nothing.

Plain integers that one thread adds to at a time (whoever holds the queue's lock, or the device's
for `interrupts`) and any thread reads. They live as long as the device, through all its resets.
"""

from __future__ import annotations


class QueueStats:
    """`requests` are chains given back to the driver, `interrupts` the notifications that it got.

    `latency[n]` counts those that took from 2^(n-1) up to, not including, 2^n nanoseconds: from
    when the device's thread turned to a batch until it was given back, the same for all in it.
    `nanoseconds` is what all took together.
    """

    __slots__ = ("interrupts", "latency", "nanoseconds", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.interrupts = 0
        self.nanoseconds = 0
        self.latency = [0] * 64  # every number of nanoseconds that there is has its place
