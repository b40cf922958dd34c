"""The device status field as a table: which value may follow which (virtio 1.3, 2.1 and 3.1.1).

The driver climbs ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK and may give up (FAILED) on any rung.
It never clears a bit, except by writing 0, which resets the device. DEVICE_NEEDS_RESET belongs to
the device: the driver's writes neither set nor clear it. This holds on every transport.
"""

from __future__ import annotations

from typing import NamedTuple

from pyvmm.virtio import constants

ACKNOWLEDGE = constants.VIRTIO_CONFIG_S_ACKNOWLEDGE
DRIVER = constants.VIRTIO_CONFIG_S_DRIVER
DRIVER_OK = constants.VIRTIO_CONFIG_S_DRIVER_OK
FEATURES_OK = constants.VIRTIO_CONFIG_S_FEATURES_OK
NEEDS_RESET = constants.VIRTIO_CONFIG_S_NEEDS_RESET
FAILED = constants.VIRTIO_CONFIG_S_FAILED

NAMES = {
    ACKNOWLEDGE: "ACKNOWLEDGE",
    DRIVER: "DRIVER",
    DRIVER_OK: "DRIVER_OK",
    FEATURES_OK: "FEATURES_OK",
    NEEDS_RESET: "DEVICE_NEEDS_RESET",
    FAILED: "FAILED",
}
DEFINED = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | NEEDS_RESET | FAILED

_RESET = 0
_FOUND = ACKNOWLEDGE
_DRIVEN = ACKNOWLEDGE | DRIVER
_AGREED = ACKNOWLEDGE | DRIVER | FEATURES_OK
_LIVE = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK

STEPS: dict[int, tuple[int, ...]] = {
    # Firmware is known to set ACKNOWLEDGE and DRIVER in one write; nothing lies between them that
    # the device would have to see. Each later step is one the device answers to.
    _RESET: (_FOUND, _DRIVEN),
    _FOUND: (_DRIVEN,),
    _DRIVEN: (_AGREED,),
    _AGREED: (_LIVE,),
    _LIVE: (),
}
"""The rungs of 3.1.1 Driver Requirements: Device Initialization, and the ones reached from each."""


def _transitions() -> dict[int, frozenset[int]]:
    table = {}
    for rung, steps in STEPS.items():
        table[rung] = frozenset({rung, rung | FAILED, *steps})
        # A driver that gave up, or whose device is broken, can only reset: no further step.
        for stuck in (rung | FAILED, rung | NEEDS_RESET, rung | NEEDS_RESET | FAILED):
            table[stuck] = frozenset({stuck, stuck | FAILED})
    return table


TRANSITIONS = _transitions()
"""Status now → the values the driver may bring about, the same again included; also 0, always."""


def next_status(current: int, written: int) -> int | None:
    """The status after the driver writes `written`, or None if that write is to be ignored."""
    if written == 0:
        return 0
    # The driver may have read the status before the device set its bit, so its copy may lack it.
    wanted = written & ~NEEDS_RESET | current & NEEDS_RESET
    return wanted if wanted in TRANSITIONS.get(current, ()) else None


def explain_refusal(current: int, written: int) -> str:
    """The reason why `next_status` gave None, for a warning."""
    undefined = written & ~DEFINED
    if undefined:
        return f"sets undefined bits {undefined:#x}"
    cleared = current & ~written & ~NEEDS_RESET
    if cleared:
        return f"clears {describe(cleared)} without resetting"
    if current & (FAILED | NEEDS_RESET):
        return f"needs a reset first, the status is {describe(current)}"
    return f"{describe(written)} cannot follow {describe(current)}"


def describe(status: int) -> str:
    """The names of the bits in `status`, as one word each; ``"RESET"`` if there is none."""
    names = [name for bit, name in NAMES.items() if status & bit]
    unknown = status & ~DEFINED
    if unknown:
        names.append(f"{unknown:#x}")
    return "|".join(names) or "RESET"


class Gate(NamedTuple):
    """The condition for a driver's write: the status bits in `mask` are just those in `value`."""

    mask: int
    value: int
    when: str

    def open(self, status: int) -> bool:
        """True if the write is taken in `status`."""
        return status & self.mask == self.value


_BROKEN = FAILED | NEEDS_RESET

ALWAYS = Gate(0, 0, "always")
FEATURES_GATE = Gate(
    DRIVER | FEATURES_OK | _BROKEN, DRIVER, "after DRIVER, before FEATURES_OK"
)  # 3.1.1, steps 4 and 5
QUEUE_SETUP_GATE = Gate(
    FEATURES_OK | DRIVER_OK | _BROKEN, FEATURES_OK, "after FEATURES_OK, before DRIVER_OK"
)  # 3.1.1, step 7
QUEUE_CHANGE_GATE = Gate(
    FEATURES_OK | _BROKEN,
    FEATURES_OK,
    "after FEATURES_OK, before DRIVER_OK or after the queue's reset",
)  # 3.1.1, step 7; 2.6.1.2 Virtqueue Re-enable
QUEUE_RESET_GATE = Gate(DRIVER_OK | _BROKEN, DRIVER_OK, "after DRIVER_OK")  # 2.6.1.1
CONFIG_GATE = Gate(FEATURES_OK | _BROKEN, FEATURES_OK, "after FEATURES_OK")  # 3.1.1, step 4
NOTIFY_GATE = Gate(DRIVER_OK | NEEDS_RESET, DRIVER_OK, "after DRIVER_OK")  # 3.1.1, last sentence
