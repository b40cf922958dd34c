"""examples/keyboard.py: what its driver reads and hears."""

from __future__ import annotations

import struct
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvmm.kinds import registry as devices
from pyvmm.kinds.interface import Context
from pyvmm.testing import attached

FILE = Path(__file__).parents[3] / "examples" / "keyboard.py"
CONFIG = 0x100


def selected(driver, select, subsel):
    driver.transport.write(CONFIG, 1, select)
    driver.transport.write(CONFIG + 1, 1, subsel)
    size = driver.config(2, 1)[0]
    return driver.config(8, size)


def events(driver, count):
    queue = driver.queues[0]
    chains = [queue.add([], [8]) for _ in range(count)]
    queue.publish()
    driver.kick()
    used = [driver.mmio.wait_used(0, chain) for chain in chains]
    assert all(one.written == 8 for one in used)
    return [struct.unpack("<HHL", queue.contents(chain)) for chain in chains]


@pytest.fixture
def driver():
    with ExitStack() as closing:
        context = Context("vm", None, closing)
        spec = devices.parse("user", f"{FILE}:Keyboard,text=Hi,pause=0.001")
        yield closing.enter_context(attached(devices.open_device(spec, context)))


def test_it_says_what_it_is_and_which_keys_it_has(driver):
    assert driver.mmio.read(0x008) == 18
    assert selected(driver, 1, 0) == b"pyvmm keyboard"
    keys = int.from_bytes(selected(driver, 0x11, 1), "little")
    assert {code for code in range(64) if keys >> code & 1} == set(
        sys.modules[type(driver.device).__module__].KEYS.values()
    )
    assert keys >> 28 & 1 and keys >> 57 & 1  # Enter, space


@pytest.mark.parametrize("select, subsel", [(0, 0), (2, 0), (0x11, 2), (0x12, 0), (255, 255)])
def test_what_it_does_not_have_is_of_size_zero(driver, select, subsel):
    selected(driver, 1, 0)
    assert selected(driver, select, subsel) == b""
    assert driver.config(8, 16) == bytes(16)


@pytest.mark.parametrize("offset, size", [(0, 4), (0, 8), (2, 1), (8, 8), (200, 8), (3, 2)])
def test_writes_elsewhere_change_nothing_else(driver, offset, size):
    driver.transport.write(CONFIG + offset, size, 0x0101_0101_0101_0001)
    assert len(driver.device.config) == 136
    assert selected(driver, 1, 0) == b"pyvmm keyboard"
    assert not driver.needs_reset


def test_it_types(driver):
    h, i, enter = 35, 23, 28  # KEY_H, KEY_I, KEY_ENTER
    expected = []
    for code in (h, i, enter, h):
        expected += [(1, code, 1), (0, 0, 0), (1, code, 0), (0, 0, 0)]
    assert events(driver, 16) == expected


def test_a_key_waits_until_there_is_room_for_all_of_it(driver):
    queue = driver.queues[0]
    first = [queue.add([], [8]) for _ in range(3)]
    queue.publish()
    driver.kick()
    last = queue.add([], [8])
    assert not queue.has_used()
    queue.publish()
    driver.kick()
    for chain in (*first, last):
        driver.mmio.wait_used(0, chain)


def test_leds_are_taken_and_it_types_again_after_a_reset(driver):
    assert driver.request([struct.pack("<HHL", 0x11, 0, 1)], [], queue=1).written == 0
    events(driver, 4)
    driver.restart()
    assert events(driver, 4)[0] == (1, 35, 1)
