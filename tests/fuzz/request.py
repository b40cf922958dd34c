"""The requests of a lawful driver."""

from __future__ import annotations

import itertools
from random import Random
from typing import NamedTuple

from pyvmm.testing import Buffer


class Request(NamedTuple):
    """A lawful driver's request in queue `queue`: contents to read, lengths to write."""

    queue: int
    readable: list[bytes]
    writable: list[int | Buffer]

    def __str__(self) -> str:
        start = b"".join(self.readable)[:48].hex(" ", 4)
        sizes = [len(part) for part in self.readable]
        return f"queue {self.queue}: {start} in {sizes} bytes to read, {self.writable} to write"


def pieces(rng: Random, data: bytes) -> list[bytes]:
    """`data` cut into a few parts, empty ones among them."""
    cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.choice((0, 0, 1, 2, 3))))
    edges = [0, *cuts, len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]
