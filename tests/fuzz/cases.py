"""What is fuzzed without a device of ours, by name."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from fuzz.both_ends import both_ends_case
from fuzz.peers import back_end_case, front_end_case, server_case
from fuzz.queues import queue_case
from fuzz.storage import storage_case

from pyvmm.testing.mmio_driver import Ring


class Cases(NamedTuple):
    """`run` does one, for a kind of ring, and says how many steps it had; `share` are as many as
    take about the time of one case of a device."""

    run: Callable[[Random, Ring], int]
    share: int


CASES = {
    "back-end": Cases(back_end_case, 16),
    "both-ends": Cases(both_ends_case, 1),
    "front-end": Cases(front_end_case, 1),
    "server": Cases(server_case, 1),
    "queue": Cases(queue_case, 128),
    "storage": Cases(storage_case, 4),
}
