"""Asking a guest to power off: by its agent, or else by the power button of its board.

Called in the thread of `Machine.run`, which must not wait: what the agent says is heard in a thread
of its own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from threading import Thread
from typing import TYPE_CHECKING

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host import log
from pyvmm.machine.machine import Machine, nobody_to_ask
from pyvmm.machine.outcome import Outcome
from pyvmm.monitor.guest_agent import agent_at, vsock_of

if TYPE_CHECKING:
    from pyvmm.virtio.vsock.device import VsockDevice

_AGENT_SECONDS = 5.0  # for the agent to take notice; then the button is pressed
# A press is lost on a guest that has the button's driver and not yet who listens to it. Whoever has
# heard one takes no notice of the next.
_PRESS_EVERY = 5.0

AGENT, BUTTON = "agent", "power button"


class PowerOff:
    """Asks the guest of `machine`; `tell` hears by what it was asked."""

    def __init__(self, machine: Machine, name: str, tell: Callable[[str], None]) -> None:
        self._machine = machine
        self._name = name
        self._tell = tell
        self._press_at = math.inf

    def ask(self, patience: float, otherwise: Outcome) -> bool:
        """Have the guest power off; False if there is nobody in it to be asked. If that shows only
        later, the machine ends with `otherwise` then. A paused guest goes on."""
        vsock = vsock_of(self._machine)
        if vsock is None and not self._button_is_watched():
            return False
        self._machine.pauser.resume()
        if vsock is None:
            self._press(otherwise)
        else:
            seconds = min(patience, _AGENT_SECONDS)
            asking = (vsock, seconds, otherwise)
            Thread(target=self._ask_agent, args=asking, name="power-off", daemon=True).start()
        return True

    def _ask_agent(self, vsock: VsockDevice, seconds: float, otherwise: Outcome) -> None:
        try:
            agent_at(vsock, seconds).power_off(timeout=seconds)
        except (PyvmmError, OSError):
            self._machine.do(lambda: self._press(otherwise))
        else:
            self._machine.do(lambda: self._say(AGENT))

    def look(self) -> None:
        """Press the button once more if it is time: called about every second."""
        if time.monotonic() >= self._press_at and self._button_is_watched():
            self._pulse()

    # --- the button, in the machine's thread --------------------------------------------------

    def _button_is_watched(self) -> bool:
        """True if there is a button, and a driver of the guest that notices it."""
        button = self._machine.parts.power_button
        try:
            return button is not None and button.is_watched()
        except HostError:
            return False

    def _press(self, otherwise: Outcome) -> None:
        if not self._button_is_watched():
            self._machine.end(nobody_to_ask(otherwise))
            return
        self._pulse()
        self._say(BUTTON)

    def _pulse(self) -> None:
        button = self._machine.parts.power_button
        if button is not None:
            button.press()
        self._press_at = time.monotonic() + _PRESS_EVERY

    def _say(self, how: str) -> None:
        self._tell(how)
        text = f"{self._name}: asked the guest to power off, by its {how}"
        log.to_stderr(log.Line(text, level=log.INFO))
