"""A guest that asks for a reset starts again, but not for ever if it gets nowhere."""

from __future__ import annotations

import pytest

from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.monitor.restart import FRUITLESS, RebootPolicy

RESET = Outcome(Ending.RESET, "the guest asked for a reset")


class Guest:
    """Resets itself `seconds` after each start."""

    def __init__(self, seconds: float, wanted: bool = True) -> None:
        self._seconds = seconds
        self._now = 0.0
        self.policy = RebootPolicy(wanted, lambda: self._now)

    def reset(self, **what: bool) -> float | None:
        self.policy.started()
        self._now += self._seconds
        seen = {"panicked": False, "has_devices": False, "came_up": False, "printed": True}
        return self.policy.pause(RESET, **{**seen, **what})

    def resets(self, **what: bool) -> int:
        """The number of times that it starts again, of a hundred that it wants to."""
        return next((n for n in range(100) if self.reset(**what) is None), 100)


# How slow a machine is makes no difference to one that prints nothing or has no driver for any
# device.
@pytest.mark.parametrize("seconds", [0.1, 15.0, 1000.0])
@pytest.mark.parametrize("what", [{"printed": False}, {"has_devices": True}])
def test_it_gives_up_a_guest_that_gets_nowhere(seconds: float, what: dict[str, bool]) -> None:
    guest = Guest(seconds)
    assert guest.resets(**what) == FRUITLESS - 1
    assert guest.policy.gave_up


@pytest.mark.parametrize(
    ("seconds", "what", "starts"),
    [
        (0.1, {}, FRUITLESS - 1),
        (15.0, {}, 100),
        (0.1, {"has_devices": True, "came_up": True}, 100),
        (0.1, {"has_devices": True, "came_up": True, "printed": False}, 100),
    ],
)
def test_a_guest_that_gets_somewhere_may(seconds: float, what: dict[str, bool], starts) -> None:
    guest = Guest(seconds)
    assert guest.resets(**what) == starts
    assert guest.policy.gave_up == (starts < 100)


def test_only_fruitless_ones_in_a_row_count() -> None:
    guest = Guest(0.1)
    for _ in range(10):
        for _ in range(FRUITLESS - 1):
            assert guest.reset(has_devices=True) is not None
        assert guest.reset(has_devices=True, came_up=True) is not None
    assert not guest.policy.gave_up


def test_a_quick_loop_pauses_and_a_slow_one_does_not() -> None:
    quick = Guest(0.1)
    pauses = [quick.reset(has_devices=True, came_up=True) for _ in range(20)]
    assert pauses[:FRUITLESS] == [0.0] * FRUITLESS
    assert pauses[FRUITLESS:] == sorted(pauses[FRUITLESS:])
    assert (pauses[FRUITLESS], pauses[-1]) == (0.2, 5.0)
    slow = Guest(15.0)
    assert {slow.reset(has_devices=True, came_up=True) for _ in range(20)} == {0.0}


@pytest.mark.parametrize("ending", [e for e in Ending if e is not Ending.RESET])
def test_no_other_end_starts_again(ending: Ending) -> None:
    policy = RebootPolicy(True)
    seen = {"panicked": False, "has_devices": True, "came_up": True, "printed": True}
    assert policy.pause(Outcome(ending, ""), **seen) is None
    assert not policy.gave_up


def test_neither_after_a_panic_nor_where_it_is_not_wanted() -> None:
    assert Guest(15.0).reset(panicked=True) is None
    assert Guest(15.0, wanted=False).reset(came_up=True) is None
