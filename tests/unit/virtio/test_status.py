"""The device status machine against the rules of 2.1 and 3.1.1, written down a second time."""

from __future__ import annotations

import pytest

from pyvmm.virtio import status

NEXT_BITS = {0: {1, 1 | 2}, 1: {2}, 3: {8}, 11: {4}, 15: set[int]()}


def expected(current: int, written: int) -> int | None:
    """The rules in words: what follows `current` when the driver writes `written`."""
    if written == 0:
        return 0
    if current & 0x3F not in NEXT_BITS:
        return None  # not a status that a device can be in
    if written & 0x30:
        return None  # undefined bits
    ours = current & 0xBF
    theirs = written & 0xBF  # DEVICE_NEEDS_RESET is the device's to set, not the driver's
    if ours & ~theirs:
        return None  # never clears a bit
    added = theirs & ~ours
    if added in (0, 0x80):
        return current | added  # nothing new, or the driver gives up
    if current & (0x40 | 0x80):
        return None  # no further step without a reset
    return current | added if added in NEXT_BITS[current] else None


@pytest.mark.parametrize("current", range(256))
def test_every_pair_of_status_values(current: int) -> None:
    for written in range(256):
        assert status.next_status(current, written) == expected(current, written), hex(written)


def test_only_zero_leads_away_from_driver_ok_and_failed() -> None:
    for written in range(1, 256):
        following = status.next_status(15, written)
        assert following is None or following & 15 == 15
        following = status.next_status(3 | 128, written)
        assert following in (None, 3 | 128)


@pytest.mark.parametrize("wide", [0x100, 0x10F, 0xFFFF_FFFF, 1 << 31])
def test_a_value_of_more_than_eight_bits_is_no_status(wide: int) -> None:
    assert status.next_status(3, wide | 11) is None


@pytest.mark.parametrize(
    ("current", "written", "words"),
    [
        (11, 3, "clears FEATURES_OK without resetting"),
        (3, 7, "ACKNOWLEDGE|DRIVER|DRIVER_OK cannot follow ACKNOWLEDGE|DRIVER"),
        (3 | 128, 11 | 128, "needs a reset first, the status is ACKNOWLEDGE|DRIVER|FAILED"),
        (15, 31, "sets undefined bits 0x10"),
        (0, 4, "DRIVER_OK cannot follow RESET"),
    ],
)
def test_a_refusal_says_why(current: int, written: int, words: str) -> None:
    assert status.next_status(current, written) is None
    assert status.explain_refusal(current, written) == words


GATES = {
    "always": (status.ALWAYS, {0, 1, 3, 11, 15}),
    "features": (status.FEATURES_GATE, {3}),
    "queue setup": (status.QUEUE_SETUP_GATE, {11}),
    "configuration": (status.CONFIG_GATE, {11, 15}),
    "notify": (status.NOTIFY_GATE, {15}),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_is_open_on_just_these_rungs(name: str) -> None:
    gate, rungs = GATES[name]
    assert {rung for rung in NEXT_BITS if gate.open(rung)} == rungs


@pytest.mark.parametrize("name", [name for name in GATES if name != "always"])
def test_no_gate_is_open_once_the_device_needs_a_reset(name: str) -> None:
    gate, rungs = GATES[name]
    assert not any(gate.open(rung | 64) for rung in rungs)


@pytest.mark.parametrize("name", ["features", "queue setup", "configuration"])
def test_a_driver_that_gave_up_sets_nothing_up(name: str) -> None:
    gate, rungs = GATES[name]
    assert not any(gate.open(rung | 128) for rung in rungs)


def test_bits_without_a_name_are_shown_as_a_number() -> None:
    assert status.describe(0x31) == "ACKNOWLEDGE|0x30"
