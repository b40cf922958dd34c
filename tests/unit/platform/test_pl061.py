"""Arm's GPIO controller, and the power button on it; the test is the drivers of Linux."""

from __future__ import annotations

import pytest

from pyvmm.errors import ConfigError
from pyvmm.host.saved import Saved
from pyvmm.platform.arm64.pl061 import BUTTON, SIZE, Pl061

DIR, IS, IBE, IEV, IE, RIS, MIS, IC = range(0x400, 0x420, 4)
BIT = 1 << BUTTON
DATA = BIT << 2  # the address that is about that line alone


class Guest:
    """A driver that hears of both edges, and looks at the line when it is interrupted."""

    def __init__(self) -> None:
        self.level = False
        self.lines: list[bool] = []
        self.gpio = Pl061(self.drive)

    def drive(self, level: bool) -> None:
        if level != self.level:
            self.lines.append(level)
        self.level = level

    def watch(self) -> None:
        for register, value in ((DIR, 0), (IS, 0), (IBE, BIT), (IE, BIT)):
            self.gpio.write(register, 1, value)

    def interrupted(self) -> bool:
        """What the button is, after an interrupt."""
        assert self.level and self.gpio.read(MIS, 1) == BIT
        self.gpio.write(IC, 1, BIT)
        return bool(self.gpio.read(DATA, 1))


def test_it_says_what_it_is() -> None:
    gpio = Guest().gpio
    parts = [gpio.read(offset, 4) for offset in range(0xFE0, 0x1000, 4)]
    # Linux' <linux/amba/bus.h>: the cell id 0xb105f00d, the part 0x061 of designer 0x41
    assert sum(byte << 8 * n for n, byte in enumerate(parts[4:])) == 0xB105_F00D
    assert sum(byte << 8 * n for n, byte in enumerate(parts[:4])) & 0xF_FFFF == 0x4_1061


def test_a_press_is_seen_and_ends() -> None:
    guest = Guest()
    guest.gpio.press()
    assert not guest.gpio.is_watched() and guest.lines == []
    guest = Guest()
    guest.watch()
    assert guest.gpio.is_watched()
    for _ in range(2):
        guest.gpio.press()
        assert guest.interrupted() is True
        assert guest.interrupted() is False, "it is up again once the guest has seen it down"
        assert not guest.level
    guest.gpio.write(IE, 1, 0)
    assert not guest.gpio.is_watched()


def test_one_that_is_pressed_twice_at_once_is_pressed_once() -> None:
    guest = Guest()
    guest.watch()
    guest.gpio.press()
    guest.gpio.press()
    assert (guest.interrupted(), guest.interrupted()) == (True, False)
    assert not guest.level


def test_a_level_interrupts_as_long_as_it_is_there() -> None:
    guest = Guest()
    for register, value in ((IS, BIT), (IEV, BIT), (IE, BIT)):
        guest.gpio.write(register, 1, value)
    guest.gpio.press()
    guest.gpio.write(IC, 1, BIT)
    assert guest.level, "no clearing helps against a level"
    assert guest.gpio.read(RIS, 1) == BIT
    assert guest.gpio.read(DATA, 1) == BIT
    assert not guest.level


def test_outputs_are_what_the_guest_wrote() -> None:
    gpio = Guest().gpio
    gpio.write(DIR, 1, 0x81)
    gpio.write(0x3FC, 1, 0xFF)
    assert gpio.read(0x3FC, 1) == 0x81
    gpio.write(0x01 << 2, 1, 0)
    assert gpio.read(0x3FC, 1) == 0x80
    assert gpio.read(0x01 << 2, 1) == 0


def test_every_offset_is_answered() -> None:
    guest = Guest()
    for offset in range(SIZE):
        for size in (1, 2, 4, 8):
            guest.gpio.write(offset, size, (1 << 8 * size) - 1)
            assert 0 <= guest.gpio.read(offset, size) < 256


def test_a_button_that_was_saved_while_it_was_down() -> None:
    guest, other = Guest(), Guest()
    guest.watch()
    guest.gpio.press()
    state = guest.gpio.save()
    other.gpio.restore(Saved(state, "the VM"))
    assert other.gpio.save() == state
    assert (other.interrupted(), other.interrupted()) == (True, False)


@pytest.mark.parametrize("name", ["dir", "is", "ibe", "iev", "ie", "afsel", "inputs", "edges"])
@pytest.mark.parametrize("value", [-1, 256, "1", None, True])
def test_state_that_cannot_be(name: str, value: object) -> None:
    guest = Guest()
    state = {**guest.gpio.save(), name: value}
    with pytest.raises(ConfigError, match=f"{name} is"):
        guest.gpio.restore(Saved(state, "the VM"))
