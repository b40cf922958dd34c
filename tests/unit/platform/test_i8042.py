"""The keyboard controller: reset works, and nothing else is found there quickly."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pyvmm.bus import Action
from pyvmm.machine.board.x86.layout import I8042_COMMAND_PORT, I8042_DATA_PORT
from pyvmm.platform.x86.i8042 import I8042, PORTS

DATA, COMMAND = 0, I8042_COMMAND_PORT - I8042_DATA_PORT
INPUT_FULL, OUTPUT_FULL = 0x02, 0x01


def test_range_covers_both_ports() -> None:
    assert COMMAND == PORTS - 1


def test_reboot_as_linux_does_it() -> None:
    """reboot=k: machine_real_restart waits for the input buffer, then pulses the reset line."""
    controller = I8042()
    assert not controller.read(COMMAND, 1) & INPUT_FULL
    assert controller.write(COMMAND, 1, 0xFE) is Action.RESET


def test_reset_through_the_output_port() -> None:
    controller = I8042()
    assert controller.write(COMMAND, 1, 0xD1) is None
    assert controller.write(DATA, 1, 0xFE) is Action.RESET


def test_gate_a20_is_not_a_reset() -> None:
    controller = I8042()
    controller.write(COMMAND, 1, 0xD1)
    assert controller.write(DATA, 1, 0xDF) is None
    assert controller.write(DATA, 1, 0x00) is None  # the parameter is one byte


def test_another_command_ends_the_wait_for_a_parameter() -> None:
    controller = I8042()
    controller.write(COMMAND, 1, 0xD1)
    controller.write(COMMAND, 1, 0x20)
    assert controller.write(DATA, 1, 0x00) is None


def test_linux_probe_gives_up_before_it_waits() -> None:
    """i8042_flush: an output buffer that is still full after 16 bytes means no controller."""
    controller = I8042()
    for _ in range(17):
        assert controller.read(COMMAND, 1) & OUTPUT_FULL
        controller.read(DATA, 1)


@given(st.integers(0, 7), st.sampled_from((1, 2, 4, 8)), st.integers(0, 2**64 - 1))
def test_any_access_is_survived(offset: int, size: int, value: int) -> None:
    controller = I8042()
    assert controller.write(offset, size, value) in (None, Action.RESET)
    assert 0 <= controller.read(offset, size) < 1 << 8 * size
