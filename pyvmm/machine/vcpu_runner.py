"""A thread that runs one vCPU until the machine ends."""

from __future__ import annotations

import errno
from collections.abc import Callable
from threading import Event, Thread
from typing import TYPE_CHECKING

from pyvmm.bus import Action
from pyvmm.errors import HostError, PyvmmError
from pyvmm.kvm.vcpu import EXIT_INTR, Vcpu
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.machine.trace import Hook
from pyvmm.memory import GuestMemory

if TYPE_CHECKING:
    from pyvmm.kvm import exits

# Enters the guest until an exit that is not a plain port or MMIO access; what a handler asked for.
RunLoop = Callable[[Vcpu], Action | None]

_ACTIONS = {
    Action.POWEROFF: Outcome(Ending.POWEROFF),
    Action.RESET: Outcome(Ending.RESET, "the guest asked for a reset"),
}


class VcpuRunner:
    """Runs `vcpu` in a thread; `end` hears how the guest ended, if it was this vCPU's doing."""

    def __init__(
        self,
        vcpu: Vcpu,
        loop: RunLoop,
        memory: GuestMemory,
        end: Callable[[Outcome], None],
        trace: Hook | None,
    ) -> None:
        self._vcpu = vcpu
        self._loop = loop
        self._memory = memory
        self._end = end
        self._trace = trace
        self.id = vcpu.id
        self._stopping = False
        self._pausing = False
        self._parked = Event()
        self._go = Event()
        self._thread = Thread(target=self._run, name=f"vcpu{vcpu.id}", daemon=True)

    def start(self) -> None:
        """Raises HostError if the host has no more threads."""
        try:
            self._thread.start()
        except RuntimeError:  # all that Python says of pthread_create's EAGAIN
            raise HostError(errno.EAGAIN, f"thread for vCPU {self._vcpu.id}") from None

    def stop(self) -> None:
        """Get the vCPU out of the guest and wait until its thread has ended."""
        self._stopping = True
        self.resume()
        self._vcpu.kick()
        if self._thread.ident is not None:
            self._thread.join()

    def request_pause(self) -> None:
        """Get the vCPU out of the guest, to be parked until `resume`."""
        self._go.clear()
        self._parked.clear()
        self._pausing = True
        self._vcpu.kick()

    def wait_parked(self, seconds: float) -> bool:
        """Whether the vCPU is parked, or has ended, within `seconds`."""
        return self._parked.wait(max(0.0, seconds)) or not self._thread.is_alive()

    def resume(self) -> None:
        """Let the vCPU run again."""
        self._pausing = False
        self._go.set()

    def _park(self) -> None:
        self._parked.set()
        self._go.wait()
        # A kick that comes from now on is seen: whoever kicks has said why before.
        self._vcpu.set_immediate_exit(False)
        self._vcpu.excuse_pause()

    def _run(self) -> None:
        self._vcpu.bind_thread()
        try:
            while not self._stopping:
                if self._pausing:
                    self._park()
                    continue
                outcome = self._run_once()
                if outcome is not None:
                    self._end(outcome)
                    return
        except PyvmmError as error:
            self._end(Outcome(Ending.FAILED, str(error)))
        except Exception as error:
            import traceback

            self._end(
                Outcome(
                    Ending.FAILED,
                    f"a defect in pyvmm stopped vCPU {self._vcpu.id}: {error!r}",
                    traceback.format_exc(),
                )
            )
        finally:
            self._vcpu.unbind_thread()
            self._parked.set()

    def _run_once(self) -> Outcome | None:
        action = self._loop(self._vcpu)
        if action is not None:
            return _ACTIONS[action]
        if self._stopping or self._vcpu.exit_reason == EXIT_INTR:
            return None
        event = self._vcpu.exit()
        if self._trace is not None:
            self._trace(f"vcpu{self._vcpu.id} {event}")
        return self._interpret(event)

    def _interpret(self, event: exits.Exit) -> Outcome | None:
        """How an exit other than port or MMIO access ends the run; None if it does not."""
        from pyvmm.kvm import exits  # 30 types, and most runs meet none of them

        if isinstance(event, exits.Hlt | exits.IrqWindowOpen):
            return None
        if isinstance(event, exits.SystemEvent):
            return _system_event(event)
        if isinstance(event, exits.Shutdown):
            return self._crash(Ending.TRIPLE_FAULT, "the guest triple-faulted", event)
        return self._crash(Ending.KVM_ERROR, f"KVM cannot go on: {event}", event)

    def _crash(self, ending: Ending, line: str, event: exits.Exit) -> Outcome:
        from pyvmm.kvm.report import crash_report

        report = crash_report(self._vcpu, event, self._memory.read)
        return Outcome(ending, f"{line} (vCPU {self._vcpu.id})", report)


def _system_event(event: exits.SystemEvent) -> Outcome:
    if event.is_shutdown:
        return _ACTIONS[Action.POWEROFF]
    if event.is_reset:
        return _ACTIONS[Action.RESET]
    return Outcome(Ending.PANIC, f"the guest crashed: {event}")
