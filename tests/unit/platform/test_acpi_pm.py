"""Power-off and reset by ACPI's registers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.bus import Action, Bus
from pyvmm.machine.board.x86 import layout
from pyvmm.platform.x86.acpi_pm import PORTS, AcpiPm

SLP_EN = 0x20
S5 = layout.ACPI_SLEEP_TYPE_S5 << 2


@pytest.fixture
def bus() -> Bus:
    ports = Bus("port")
    ports.register(layout.ACPI_SLEEP_CONTROL_PORT, PORTS, AcpiPm())
    return ports


def test_poweroff_as_linux_does_it(bus: Bus) -> None:
    """acpi_hw_extended_sleep: clear WAK_STS, then the sleep type together with SLP_EN."""
    assert bus.write(layout.ACPI_SLEEP_STATUS_PORT, 1, 0x80) is None
    assert bus.write(layout.ACPI_SLEEP_CONTROL_PORT, 1, S5 | SLP_EN) is Action.POWEROFF


def test_sleep_type_alone_does_nothing(bus: Bus) -> None:
    assert bus.write(layout.ACPI_SLEEP_CONTROL_PORT, 1, S5) is None


@pytest.mark.parametrize("sleep_type", sorted(set(range(8)) - {layout.ACPI_SLEEP_TYPE_S5}))
def test_other_sleep_states_are_not_there(bus: Bus, sleep_type: int) -> None:
    value = sleep_type << 2 | SLP_EN
    assert bus.write(layout.ACPI_SLEEP_CONTROL_PORT, 1, value) is None


def test_reset_value_only(bus: Bus) -> None:
    outcomes = {value: bus.write(layout.ACPI_RESET_PORT, 1, value) for value in range(256)}
    assert outcomes.pop(layout.ACPI_RESET_VALUE) is Action.RESET
    assert set(outcomes.values()) == {None}


def test_nothing_ever_woke_the_machine(bus: Bus) -> None:
    bus.write(layout.ACPI_SLEEP_STATUS_PORT, 1, 0xFF)
    assert bus.read(layout.ACPI_SLEEP_STATUS_PORT, 1) == 0


def test_wide_access_is_ignored(bus: Bus) -> None:
    """A 16-bit write to the control port must not be taken for its low byte."""
    assert bus.write(layout.ACPI_SLEEP_CONTROL_PORT, 2, S5 | SLP_EN) is None


@given(st.integers(0, 3), st.sampled_from((1, 2, 4, 8)), st.integers(0, 2**64 - 1))
def test_any_access_is_survived(offset: int, size: int, value: int) -> None:
    assert AcpiPm().read(offset, size) == 0
    assert AcpiPm().write(offset, size, value) in (None, Action.POWEROFF, Action.RESET)
