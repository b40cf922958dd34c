"""The registers by which a guest learns of its slots, and ejects what is in them."""

from __future__ import annotations

import pytest

from pyvmm.pci import slots
from pyvmm.pci.slots import ARRIVED, EJECT, LEAVING, Slots


class Bench:
    def __init__(self) -> None:
        self.pulses = 0
        self.ejected: list[int] = []
        self.slots = Slots(self.pulse, self.ejected.append)

    def pulse(self) -> None:
        self.pulses += 1

    def read(self, register: int) -> int:
        return self.slots.read(register, 4)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_is_told_stays_until_it_is_cleared(bench: Bench) -> None:
    bench.slots.tell(ARRIVED, 3)
    bench.slots.tell(ARRIVED, 31)
    bench.slots.tell(LEAVING, 5)
    assert bench.pulses == 3
    assert bench.read(ARRIVED) == bench.read(ARRIVED) == 1 << 3 | 1 << 31
    bench.slots.write(ARRIVED, 4, 1 << 3)
    assert bench.read(ARRIVED) == 1 << 31 and bench.read(LEAVING) == 1 << 5
    bench.slots.write(LEAVING, 4, 0xFFFF_FFFF)
    assert bench.read(ARRIVED) == 1 << 31 and bench.read(LEAVING) == 0
    assert bench.pulses == 3 and bench.ejected == []


def test_what_comes_between_a_guests_read_and_its_clearing_is_not_lost(bench: Bench) -> None:
    bench.slots.tell(ARRIVED, 3)
    seen = bench.read(ARRIVED)
    bench.slots.tell(ARRIVED, 4)
    bench.slots.write(ARRIVED, 4, seen)
    assert bench.read(ARRIVED) == 1 << 4


def test_a_guest_is_reminded_of_what_it_has_not_seen(bench: Bench) -> None:
    bench.slots.remind()
    assert bench.pulses == 0
    bench.slots.tell(LEAVING, 1)
    bench.slots.remind()
    assert bench.pulses == 2
    bench.slots.withdraw(1)
    bench.slots.remind()
    assert bench.pulses == 2 and bench.read(LEAVING) == 0


def test_each_slot_that_is_ejected_is_told_once(bench: Bench) -> None:
    bench.slots.write(EJECT, 4, 1 << 0 | 1 << 7 | 1 << 31)
    assert bench.ejected == [0, 7, 31]
    assert bench.read(EJECT) == 0


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", range(slots.SIZE))
def test_only_whole_registers_mean_something(bench: Bench, size: int, offset: int) -> None:
    bench.slots.tell(ARRIVED, 3)
    bench.slots.tell(LEAVING, 3)
    whole = size == 4 and offset in (ARRIVED, LEAVING, EJECT)
    assert bench.slots.read(offset, size) == (1 << 3 if whole and offset != EJECT else 0)
    assert bench.slots.write(offset, size, 1 << 3) is None
    left = {register for register in (ARRIVED, LEAVING) if bench.read(register)}
    assert left == {ARRIVED, LEAVING} - ({offset} if whole else set())
    assert bench.ejected == ([3] if whole and offset == EJECT else [])
