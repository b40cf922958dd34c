"""The bus: which range an access belongs to, and what becomes of one that nobody answers."""

from __future__ import annotations

import pytest

from pyvmm.bus import Action, Bus


class Handler:
    """Remembers accesses; answers reads with their size."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return size

    def write(self, offset: int, size: int, value: int) -> Action | None:
        self.seen.append((offset, size, value))
        return Action.RESET


START, SIZE = 0x100, 0x10
ALL_ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
def bus(handler: Handler) -> Bus:
    bus = Bus("test")
    bus.register(START, SIZE, handler)
    return bus


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("offset", [0, 5, "last"])
def test_a_handler_sees_offsets(bus: Bus, handler: Handler, size: int, offset: int | str) -> None:
    place = SIZE - size if isinstance(offset, str) else offset
    assert bus.read(START + place, size) == size
    assert bus.write(START + place, size, 7) is Action.RESET
    assert handler.seen == [(place, size), (place, size, 7)]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("address", [0, START - 1, START + SIZE, 2**64 - 1])
def test_reads_that_nobody_answers_are_all_ones_and_writes_go_nowhere(
    bus: Bus, handler: Handler, size: int, address: int
) -> None:
    assert bus.read(address, size) == ALL_ONES[size]
    assert bus.write(address, size, 7) is None
    assert handler.seen == []


@pytest.mark.parametrize("size", [2, 4, 8])
def test_an_access_over_the_end_of_a_range_is_nobodys(
    bus: Bus, handler: Handler, size: int
) -> None:
    bus.register(START + SIZE, SIZE, handler)
    assert bus.read(START + SIZE - 1, size) == ALL_ONES[size]
    assert bus.write(START + SIZE - 1, size, 7) is None
    assert handler.seen == []


def test_an_empty_bus_answers_nothing() -> None:
    bus = Bus("test")
    assert bus.read(0, 1) == 0xFF and bus.write(0, 1, 0) is None and bus.find(0) is None


def test_ranges_may_touch_and_come_in_any_order() -> None:
    bus = Bus("test")
    handlers = {start: Handler() for start in (0x30, 0x10, 0x20, 0x00, 0x50)}
    for start, handler in handlers.items():
        bus.register(start, 0x10, handler)
    for start, handler in handlers.items():
        for address in (start, start + 0xF):
            assert bus.find(address) == (start, handler)
    assert bus.find(0x40) is None and bus.find(0x4F) is None and bus.find(0x60) is None


@pytest.mark.parametrize(
    ("start", "size"),
    [
        (START, SIZE), (START, 1), (START + SIZE - 1, 1), (START + SIZE - 1, 100),
        (START - 1, 2), (START - 1, 1000), (0, START + 1), (START + 4, 4),
    ],
)  # fmt: skip
def test_ranges_do_not_overlap(bus: Bus, handler: Handler, start: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"test range {start:#x} .* overlaps another"):
        bus.register(start, size, Handler())
    bus.register(START - 1, 1, Handler())  # a refused one has left nothing
    bus.register(START + SIZE, 1, Handler())
    assert bus.find(START) == (START, handler)


@pytest.mark.parametrize("size", [0, -1])
def test_a_range_has_a_size(bus: Bus, size: int) -> None:
    with pytest.raises(ValueError):
        bus.register(0x1000, size, Handler())


def test_a_range_of_one_byte_is_one() -> None:
    bus = Bus("test")
    bus.register(5, 1, handler := Handler())
    assert bus.find(5) == (5, handler) and bus.find(4) is None and bus.find(6) is None
