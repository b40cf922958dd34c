"""Addresses that no driver may give a queue, by name, for tests to be parametrised over.

@pytest.mark.parametrize("bad", placements("packed"), ids=str)
def test_set_up(bad):
    enabled = driver.place_queue(0, queue.size, *bad.addresses(queue))  # before DRIVER_OK
    assert enabled == (bad.outcome == "contained")
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyvmm.testing.chains import BOTH
from pyvmm.testing.illegal import Outcome
from pyvmm.testing.ring import MockDriver

Areas = tuple[int, int, int]  # guest-physical: Descriptor Area, Driver Area, Device Area
_WRAP = 1 << 64


@dataclass(frozen=True)
class BadPlacement:
    """One area of a queue in the wrong place. "Refused" is what must not be enabled; "contained"
    may be, as long as nothing changes but the device area and buffers for the device to write."""

    name: str
    move: Callable[[MockDriver, Areas], Areas]
    outcome: Outcome = "refused"
    rings: tuple[str, ...] = BOTH

    def __str__(self) -> str:
        return self.name

    def addresses(self, queue: MockDriver) -> Areas:
        """The addresses to give the device instead of those of `queue`."""
        return self.move(queue, (queue.desc_addr, queue.driver_addr, queue.device_addr))


def placements(ring: str) -> list[BadPlacement]:
    """Those of PLACEMENTS that fit a ``"split"`` or a ``"packed"`` ring."""
    return [placement for placement in PLACEMENTS if ring in placement.rings]


def _moved(
    part: int, where: Callable[[MockDriver, int], int]
) -> Callable[[MockDriver, Areas], Areas]:
    def move(queue: MockDriver, good: Areas) -> Areas:
        moved = [*good]
        moved[part] = where(queue, good[part])
        return moved[0], moved[1], moved[2]

    return move


def _ram_end(queue: MockDriver) -> int:
    return queue.memory.regions[0].end


def _of(part: int, area: str) -> tuple[BadPlacement, ...]:
    # A packed ring's event suppression structures are as long as they are aligned: they cannot
    # straddle anything.
    rings = BOTH if part == 0 else ("split",)
    fits = 16 if part == 0 else 4  # less than any queue's area has, and aligned for all of them
    return (
        BadPlacement(f"{area} misaligned", _moved(part, lambda queue, addr: addr + 1)),
        BadPlacement(f"{area} outside RAM", _moved(part, lambda queue, addr: _ram_end(queue))),
        BadPlacement(
            f"{area} over the end of RAM",
            _moved(part, lambda queue, addr: _ram_end(queue) - fits),
            rings=rings,
        ),
        BadPlacement(
            f"{area} that wraps 2^64",
            _moved(part, lambda queue, addr: _WRAP - fits),
            rings=rings,
        ),
    )


PLACEMENTS = (
    *_of(0, "descriptor area"),
    *_of(1, "driver area"),
    *_of(2, "device area"),
    BadPlacement(
        "device area over the descriptors",
        lambda queue, good: (good[0], good[1], good[0]),
        "contained",
    ),
    BadPlacement(
        "device area over the driver area",
        lambda queue, good: (good[0], good[1], good[1] & ~3),
        "contained",
    ),
)
"""Queues that cannot be, of at least four descriptors."""
