"""Arm's real-time clock."""

from __future__ import annotations

import pytest

from pyvmm.errors import ConfigError
from pyvmm.host.saved import Saved
from pyvmm.platform.arm64.pl031 import SIZE, Pl031

DATA, MATCH, LOAD, CONTROL, MASK, RAW, CLEAR = 0x00, 0x04, 0x08, 0x0C, 0x10, 0x14, 0x1C


def test_it_tells_the_hosts_time_and_says_what_it_is() -> None:
    clock = Pl031(lambda: 1_800_000_000.9)
    assert clock.read(DATA, 4) == 1_800_000_000
    assert clock.read(CONTROL, 4) == 1
    parts = [clock.read(offset, 4) for offset in range(0xFE0, 0x1000, 4)]
    # Linux' <linux/amba/bus.h>: the cell id 0xb105f00d, the part 0x031 of designer 0x41
    assert sum(byte << 8 * n for n, byte in enumerate(parts[4:])) == 0xB105_F00D
    assert sum(byte << 8 * n for n, byte in enumerate(parts[:4])) & 0xF_FFFF == 0x4_1031


def test_what_the_guest_sets_goes_on_from_there() -> None:
    now = [1000.0]
    clock = Pl031(lambda: now[0])
    clock.write(LOAD, 4, 5_000)
    now[0] += 7
    assert clock.read(DATA, 4) == 5_007
    assert clock.read(LOAD, 4) == 5_000
    clock.write(DATA, 4, 1)
    clock.write(CONTROL, 4, 0)
    assert (clock.read(DATA, 4), clock.read(CONTROL, 4)) == (5_007, 1)
    clock.write(LOAD, 4, 0xFFFF_FFFF)
    now[0] += 2
    assert clock.read(DATA, 4) == 1  # it has 32 bits


def test_an_alarm_never_rings() -> None:
    clock = Pl031(lambda: 1000.0)
    clock.write(MATCH, 4, 1000)
    clock.write(MASK, 4, 0xFF)
    assert (clock.read(MATCH, 4), clock.read(MASK, 4), clock.read(RAW, 4)) == (1000, 1, 0)
    clock.write(CLEAR, 4, 1)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_other_widths_are_nobodys(size: int) -> None:
    clock = Pl031(lambda: 1000.0)
    clock.write(LOAD, size, 5)
    assert clock.read(DATA, 4) == 1000
    assert clock.read(DATA, size) == (1 << 8 * size) - 1


def test_every_offset_is_answered() -> None:
    clock = Pl031(lambda: 1000.0)
    for offset in range(SIZE):
        clock.write(offset, 4, 0xFFFF_FFFF)
        assert 0 <= clock.read(offset, 4) < 1 << 32


def test_saved_and_restored() -> None:
    clock, other = Pl031(lambda: 1000.0), Pl031(lambda: 3000.0)
    clock.write(LOAD, 4, 500)
    clock.write(MATCH, 4, 77)
    other.restore(Saved(clock.save(), "the clock"))
    assert (other.read(DATA, 4), other.read(MATCH, 4)) == (2500, 77)
    with pytest.raises(ConfigError, match="the clock"):
        other.restore(Saved({**clock.save(), "offset": 1 << 60}, "the clock"))
