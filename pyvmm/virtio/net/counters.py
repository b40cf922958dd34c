"""The counters of a network device, and a frame in a trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass
class Counters:
    """Frames and bytes of one direction of one pair of queues, headers of ours not counted.

    `dropped` says how many frames went nowhere, by reason. Only the queue's own thread adds to it.
    """

    frames: int = 0
    bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        """Count a frame that went nowhere; there are few reasons, all of them fixed texts."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


class NetEvent(NamedTuple):
    """One frame as `--trace` shows it; `size` in bytes, `why` "" unless it was dropped."""

    device: str
    direction: str
    size: int
    why: str = ""

    def __str__(self) -> str:
        ending = f": dropped, {self.why}" if self.why else ""
        return f"{self.device}: {self.direction} frame of {self.size} bytes{ending}"
