"""The CMOS clock tells the time and never says that it is about to change."""

from __future__ import annotations

import calendar

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.platform.x86.cmos import Cmos, DelayPort

INDEX, DATA = 0, 1


def read_register(cmos: Cmos, index: int) -> int:
    cmos.write(INDEX, 1, index)
    return cmos.read(DATA, 1)


def read_time(cmos: Cmos) -> tuple[int, ...]:
    """(year, month, day, hour, minute, second), from BCD as a driver reads it."""
    order = {"second": 0, "minute": 2, "hour": 4, "day": 7, "month": 8, "year": 9, "century": 0x32}
    bcd = {name: read_register(cmos, index) for name, index in order.items()}
    number = {name: (value >> 4) * 10 + (value & 0x0F) for name, value in bcd.items()}
    year = number["century"] * 100 + number["year"]
    return (year, *(number[name] for name in ("month", "day", "hour", "minute", "second")))


def test_time_of_day() -> None:
    moment = (2031, 12, 9, 23, 58, 7)
    cmos = Cmos(lambda: calendar.timegm((*moment, 0, 0, 0)))
    assert read_time(cmos) == moment


def test_weekday_counts_from_sunday() -> None:
    cmos = Cmos(lambda: calendar.timegm((2024, 9, 1, 0, 0, 0, 0, 0, 0)))  # a Sunday
    assert read_register(cmos, 6) == 1


def test_never_in_the_middle_of_an_update() -> None:
    cmos = Cmos()
    assert not read_register(cmos, 0x0A) & 0x80
    assert read_register(cmos, 0x0B) & 0x06 == 0x02  # 24 hours, BCD: what read_time assumes
    assert read_register(cmos, 0x0D) & 0x80


def test_one_reading_is_one_moment() -> None:
    """The clock passes midnight on new year's eve between two registers."""
    seconds = iter([0, calendar.timegm((1999, 12, 31, 23, 59, 59, 0, 0, 0))])
    cmos = Cmos(lambda: next(seconds))
    assert read_time(cmos) == (1999, 12, 31, 23, 59, 59)


def test_nmi_bit_is_not_part_of_the_index() -> None:
    cmos = Cmos(lambda: 42)
    assert read_register(cmos, 0x80) == 0x42


def test_guest_cannot_set_it() -> None:
    cmos = Cmos(lambda: 42)
    cmos.write(INDEX, 1, 0)
    cmos.write(DATA, 1, 0x11)
    assert read_register(cmos, 0) == 0x42


@given(st.integers(0, 3), st.sampled_from((1, 2, 4, 8)), st.integers(0, 2**64 - 1))
def test_any_access_is_survived(offset: int, size: int, value: int) -> None:
    for device in (Cmos(), DelayPort()):
        device.write(offset, size, value)
        assert 0 <= device.read(offset, size) < 1 << 8 * size
