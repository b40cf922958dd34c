"""Devices that have come to a running guest, until a driver of the guest's takes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from threading import Event, Lock
from typing import TYPE_CHECKING

from pyvmm.host.log import Sink
from pyvmm.machine.cmdline import turns_pci_off
from pyvmm.machine.machine import Machine
from pyvmm.virtio.status import ACKNOWLEDGE, DRIVER_OK, FAILED

if TYPE_CHECKING:
    from pyvmm.transport.base import Transport

# Seconds in which a guest that has drivers at work takes what has come, however slow it is.
TAKES_WITHIN = 60
_LOOKS_EACH = 0.05  # seconds, for somebody who waits for a driver


class _Arrived:
    """A device that has come, and that no driver has looked at yet."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds = 0  # of a guest that has drivers at work


class Arrivals:
    """Watches devices that come to `machine`. Any thread may call it."""

    def __init__(self, machine: Machine, say: Sink) -> None:
        """`say` hears of what no driver takes."""
        self._machine = machine
        self._say = say
        self._lock = Lock()
        self._waiting: dict[Transport, _Arrived] = {}

    def watch(self, transport: Transport | None, name: str) -> None:
        """The device `name` has come, behind `transport`; None if it has gone again."""
        if turns_pci_off(self._machine.parts.prepared.entry.cmdline):
            self._say(f"the guest does not find {name}: pci=off on its command line hides the bus")
        elif transport is not None:
            with self._lock:
                self._waiting[transport] = _Arrived(name)

    def forget(self) -> None:
        """The guest starts anew, and looks at all that is there."""
        with self._lock:
            self._waiting.clear()

    def look(self) -> None:
        """Tell of what no driver has taken: called about every second."""
        with self._lock:
            arrived = self._waiting.copy()
        if not arrived or self._machine.pauser.paused:
            return
        transports = self._machine.parts.transports
        others = [one for one in transports if one not in arrived]
        # A guest that is about to start takes its time, and then has drivers for what was there.
        is_up = not others or _any_driven(others)
        for transport, one in arrived.items():
            negotiation = transport.negotiation
            one.seconds += is_up
            # Linux' virtio acknowledges each device, also one that it has no driver for.
            taken = negotiation.state.status & ~ACKNOWLEDGE or negotiation.activations
            if not taken and transport in transports and one.seconds < TAKES_WITHIN:
                continue
            with self._lock:
                self._waiting.pop(transport, None)
            if not taken and transport in transports:
                self._say(
                    f"no driver in the guest has taken {one.name} for {TAKES_WITHIN} s; its kernel "
                    "needs a PCI bus with hot-plug (CONFIG_HOTPLUG_PCI_ACPI), virtio_pci, and the "
                    "device's own driver (docs/hotplug.md)"
                )

    def wait(self, find: Callable[[], Transport], timeout: float, wake: Event) -> str | None:
        """Wait until a driver serves the device that `find` finds, for `timeout` seconds at most,
        and not once a caller has set `wake`. None if one does by then; or else what is known of
        the reason, "" for nothing. Raises what `find` raises."""
        give_up_at = time.monotonic() + timeout
        while True:
            transport = find()
            if transport.negotiation.state.status & DRIVER_OK:
                return None
            why = self._why_not_taken(transport)
            left = give_up_at - time.monotonic()
            if why or left <= 0 or wake.wait(min(left, _LOOKS_EACH)):
                return why

    def _why_not_taken(self, transport: Transport) -> str:
        """The reason for which it is of no use to wait for a driver; "" if there is none."""
        parts = self._machine.parts
        if self._machine.pauser.paused:
            return "it is paused"
        if turns_pci_off(parts.prepared.entry.cmdline):
            return "its kernel runs with pci=off"
        if transport.negotiation.state.status & FAILED:
            return "its driver has failed"
        others = [one for one in parts.transports if one is not transport]
        return "" if not others or _any_driven(others) else "no driver of it is at work yet"


def _any_driven(transports: Iterable[Transport]) -> bool:
    """True if a driver of the guest's is at work on one of them."""
    return any(one.negotiation.state.status & DRIVER_OK for one in transports)
