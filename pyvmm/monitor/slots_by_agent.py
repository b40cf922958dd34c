"""News of a PCI bus for a guest that no firmware tells of them: its agent has the kernel look.

A device tree says where a PCI bus is and nothing of what comes to it. Linux looks when somebody
writes to files below /sys/bus/pci; the guest's agent is that somebody.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, Thread

from pyvmm.errors import PyvmmError
from pyvmm.machine.machine import Machine
from pyvmm.monitor.guest_agent import agent_at, vsock_of
from pyvmm.pci.slots import ARRIVED, LEAVING

_SECONDS = 5.0  # for the agent to take notice
_RUN_SECONDS = 30.0  # for the kernel to look, in a guest that is slow
_MOST_SAID = 4096  # bytes

# $1 is the PCI function. One that the kernel does not know is not to be given up.
_SCRIPTS = {
    ARRIVED: "echo 1 > /sys/bus/pci/rescan",
    LEAVING: 'cd /sys/bus/pci/devices/"$1" 2> /dev/null || exit 0; echo 1 > remove',
}


class SlotsByAgent:
    """Tells the guest of `machine`. Any thread may call it."""

    def __init__(self, machine: Machine, eject: Callable[[int], None]) -> None:
        """`eject` hears of each device number that the guest has given up, in a thread of its
        own."""
        self._machine = machine
        self._eject = eject
        self._lock = Lock()
        self._news: dict[int, int] = {}  # what there is to tell, by device number
        self._is_telling = False

    def has_agent(self) -> bool:
        """True if the machine has a device by which an agent could be asked."""
        return vsock_of(self._machine) is not None

    def tell(self, what: int, number: int) -> None:
        """Have the guest look at a slot: ARRIVED or LEAVING."""
        with self._lock:
            self._news[number] = what
        self.remind()

    def withdraw(self, number: int) -> None:
        """Take back the news of a slot that the guest has not heard yet."""
        with self._lock:
            self._news.pop(number, None)

    def forget(self) -> None:
        """The guest starts anew, and looks at all that is there by itself."""
        with self._lock:
            self._news.clear()

    def remind(self) -> None:
        """Ask again for what the agent has not done yet, as it may not have been there: called
        about every second."""
        with self._lock:
            if not self._news or self._is_telling:
                return
            self._is_telling = True
        try:
            Thread(target=self._tell_all, name="hotplug-agent", daemon=True).start()
        except RuntimeError:  # no more threads: the next call tries again
            with self._lock:
                self._is_telling = False

    def _tell_all(self) -> None:
        try:
            while (news := self._next()) is not None:
                number, what = news
                if not self._ask(number, what):
                    return
                with self._lock:
                    is_wanted = self._news.get(number) == what
                    if is_wanted:
                        del self._news[number]
                if is_wanted and what == LEAVING:
                    self._eject(number)
        finally:
            with self._lock:
                self._is_telling = False

    def _next(self) -> tuple[int, int] | None:
        with self._lock:
            return next(iter(self._news.items()), None)

    def _ask(self, number: int, what: int) -> bool:
        vsock = vsock_of(self._machine)
        if vsock is None or self._machine.pauser.paused:
            return False
        argv = ["/bin/sh", "-c", _SCRIPTS[what], "sh", f"0000:00:{number:02x}.0"]
        try:
            agent = agent_at(vsock, _SECONDS)
            return not agent.run(argv, timeout=_RUN_SECONDS, most=_MOST_SAID).returncode
        except (PyvmmError, OSError):
            return False
