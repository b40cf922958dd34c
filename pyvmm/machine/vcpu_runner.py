"""A thread that runs one vCPU until the machine ends."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from threading import Condition, Thread, get_ident
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from pyvmm.bus import Action
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.kvm.vcpu import EXIT_INTR, Vcpu
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.machine.trace import Hook
from pyvmm.memory import GuestMemory

if TYPE_CHECKING:
    from pyvmm.kvm import exits
    from pyvmm.kvm.report import StateLines

T = TypeVar("T")

ENDING = "the VM is ending"
CALL_SECONDS = 2.0  # in which a vCPU leaves the guest for a call, or the call is called off

# Enters the guest until an exit that is not a plain port or MMIO access; what a handler asked for.
RunLoop = Callable[[Vcpu], Action | None]

_ACTIONS = {
    Action.POWEROFF: Outcome(Ending.POWEROFF),
    Action.RESET: Outcome(Ending.RESET, "the guest asked for a reset"),
}


class _Call(Generic[T]):
    """Something that a vCPU's thread does for another one. The runner's lock guards `begun` and
    `done`."""

    def __init__(self, function: Callable[[Vcpu], T]) -> None:
        self._function = function
        self._result: T | None = None
        self._error: BaseException | None = None
        self.begun = False
        self.done = False

    def make(self, vcpu: Vcpu) -> None:
        try:
            self._result = self._function(vcpu)
        except BaseException as error:
            self._error = error

    def refuse(self) -> None:
        self._error = ConfigError(ENDING)
        self.done = True

    def outcome(self) -> T:
        if self._error is not None:
            raise self._error
        return cast("T", self._result)


Stopped = Callable[["VcpuRunner", "exits.Debug"], None]
"""Hears in the vCPU's thread that it has stopped for a debugger. It must not wait for the vCPU."""


class VcpuRunner:
    """Runs `vcpu` in a thread; `end` hears how the guest ended, if it was this vCPU's doing.

    `on_debug` is for whoever has switched on KVM_SET_GUEST_DEBUG: a vCPU that stops for it is
    parked, as if somebody had paused it, and `on_debug` is called. Without it the vCPU goes on.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        loop: RunLoop,
        memory: GuestMemory,
        end: Callable[[Outcome], None],
        trace: Hook | None,
        state_lines: StateLines,
    ) -> None:
        """`state_lines` says of which state a crashed vCPU is, as a board does."""
        self._vcpu = vcpu
        self._state_lines = state_lines
        self._loop = loop
        self._memory = memory
        self._end = end
        self._trace = trace
        self.id = vcpu.id
        self.on_debug: Stopped | None = None
        # The thread looks at these without the lock each time the guest was left. Whoever changes
        # one kicks the vCPU afterwards, so that the guest is left.
        self._stopping = False
        self._pausing = False
        self._calls: deque[_Call[Any]] = deque()
        self._changed = Condition()
        self._parked = False
        self._ended = False
        self._thread = Thread(target=self._run, name=f"vcpu{vcpu.id}", daemon=True)

    def start(self) -> None:
        """Raises HostError if the host has no more threads."""
        try:
            self._thread.start()
        except RuntimeError:  # all that Python says of pthread_create's EAGAIN
            raise HostError(errno.EAGAIN, f"thread for vCPU {self._vcpu.id}") from None

    def stop(self) -> None:
        """Get the vCPU out of the guest and wait until its thread has ended. A call that has begun
        ends first; those that wait are refused."""
        with self._changed:
            self._stopping = True
            self._pausing = False
            self._changed.notify_all()
        self._vcpu.kick()
        if self._thread.ident is not None:
            self._thread.join()

    def request_pause(self) -> None:
        """Get the vCPU out of the guest, to be parked until `resume`."""
        with self._changed:
            self._pausing = True
        self._vcpu.kick()

    def wait_parked(self, seconds: float) -> bool:
        """True if the vCPU is parked, or has ended, within `seconds`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._parked or self._ended, max(0.0, seconds))

    def resume(self) -> None:
        """Let the vCPU run again."""
        with self._changed:
            self._pausing = False
            self._changed.notify_all()

    def call(self, function: Callable[[Vcpu], T], *, seconds: float = CALL_SECONDS) -> T:
        """The result of `function(vcpu)`, or its exception; it is called in the vCPU's own thread.

        KVM wants the calls on a vCPU made by the thread that runs it. The guest is between two
        instructions then, so registers and state are complete. A vCPU that runs leaves the guest
        for the call and goes on after it; one that is parked stays so. Calls from several threads
        are made one after another, in their order. `function` must not wait for another vCPU.

        Raises ConfigError if the vCPU does not run yet or no more, or does not leave the guest
        within `seconds`; RuntimeError in the vCPU's own thread.
        """
        if get_ident() == self._thread.ident:
            raise RuntimeError(f"vCPU {self.id} cannot wait for itself")
        call = _Call(function)
        with self._changed:
            if self._thread.ident is None:
                raise ConfigError("the VM has not started")
            if self._stopping or self._ended:
                raise ConfigError(ENDING)
            self._calls.append(call)
            self._changed.notify_all()
        self._vcpu.kick()
        with self._changed:
            if not self._changed.wait_for(lambda: call.begun or call.done, max(0.0, seconds)):
                self._calls.remove(call)
                raise ConfigError(
                    f"vCPU {self.id} does not come to rest",
                    cure="does anybody read the guest's console?",
                )
            self._changed.wait_for(lambda: call.done)
        return call.outcome()

    def settle(self) -> None:
        """Return once it has left what it was in the middle of, however long that takes."""
        while self._thread.ident is not None and not (self._ended or self._stopping):
            try:
                self.call(lambda vcpu: None)
                return
            except ConfigError:  # it is busy still, or ends
                continue

    def _attend(self) -> None:
        """Make the calls that wait, and stay here while the vCPU is to be paused."""
        while (call := self._next_call()) is not None:
            call.make(self._vcpu)
            with self._changed:
                call.done = True
                self._changed.notify_all()

    def _next_call(self) -> _Call[Any] | None:
        """The next call to make, waited for while the vCPU is paused; None to run the guest."""
        with self._changed:
            while self._pausing and not self._stopping and not self._calls:
                self._parked = True
                self._changed.notify_all()
                self._changed.wait()
            if self._calls and not self._stopping:
                call = self._calls.popleft()
                call.begun = True
                return call
            # A kick that comes from now on is seen: whoever kicks has said why before.
            self._vcpu.set_immediate_exit(False)
            if self._parked:
                self._parked = False
                self._vcpu.excuse_pause()
            return None

    def _run(self) -> None:
        self._vcpu.bind_thread()
        try:
            while not self._stopping:
                if self._pausing or self._calls:
                    self._attend()
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
            with self._changed:
                self._ended = True
                for call in self._calls:
                    call.refuse()
                self._calls.clear()
                self._changed.notify_all()

    def _run_once(self) -> Outcome | None:
        action = self._loop(self._vcpu)
        if action is not None:
            return _ACTIONS[action]
        if self._stopping:
            return None
        if self._vcpu.exit_reason == EXIT_INTR:
            self._attend()  # also to what was called off meanwhile: the kick has to be forgotten
            return None
        event = self._vcpu.exit()
        if self._trace is not None:
            self._trace(f"vcpu{self._vcpu.id} {event}")
        return self._interpret(event)

    def _interpret(self, event: exits.Exit) -> Outcome | None:
        """The end of the run by an exit other than port or MMIO access; None if it goes on."""
        from pyvmm.kvm import exits  # 30 types, and most runs meet none of them

        if isinstance(event, exits.Hlt | exits.IrqWindowOpen):
            return None
        if isinstance(event, exits.Debug):
            self._stop_for_debugger(event)
            return None
        if isinstance(event, exits.SystemEvent):
            return _system_event(event)
        if isinstance(event, exits.Shutdown):
            return self._crash(Ending.TRIPLE_FAULT, "the guest triple-faulted", event)
        return self._crash(Ending.KVM_ERROR, f"KVM cannot go on: {event}", event)

    def _stop_for_debugger(self, event: exits.Debug) -> None:
        told = self.on_debug
        if told is None:
            return  # It has gone since the guest was entered.
        with self._changed:
            self._pausing = True
        told(self, event)

    def _crash(self, ending: Ending, line: str, event: exits.Exit) -> Outcome:
        from pyvmm.kvm.report import crash_report

        report = crash_report(self._vcpu, event, self._memory.read, self._state_lines)
        return Outcome(ending, f"{line} (vCPU {self._vcpu.id})", report)


def _system_event(event: exits.SystemEvent) -> Outcome:
    if event.is_shutdown:
        return _ACTIONS[Action.POWEROFF]
    if event.is_reset:
        return _ACTIONS[Action.RESET]
    return Outcome(Ending.PANIC, f"the guest crashed: {event}")
