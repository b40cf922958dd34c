"""A machine that runs: starts the vCPUs, waits for the ending, and stops everything in order."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from queue import Empty, SimpleQueue
from threading import RLock
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pyvmm.host import leaving
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.machine.builder import Parts
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.machine.pause import Pauser
from pyvmm.machine.run_loop import make_run_loop
from pyvmm.machine.trace import Trace
from pyvmm.machine.vcpu_runner import VcpuRunner
from pyvmm.spec.surroundings import STOP_SECONDS

if TYPE_CHECKING:
    from pyvmm.machine.changes import Changes

# How long one Python thread may keep the interpreter from the others, in seconds. At the default of
# 5 ms a vCPU busy with register accesses would hold up a disk's worker for that long.
_SWITCH_INTERVAL = 50e-6

_LOOK_EVERY = 1.0  # seconds
_PATIENCE = 2.0  # seconds that a stop may take before one more signal ends the process on the spot

_SIGNALS = {
    signal.SIGINT: Outcome(Ending.INTERRUPTED, "interrupted"),
    signal.SIGTERM: Outcome(Ending.TERMINATED, "terminated"),
    signal.SIGHUP: Outcome(Ending.HUNG_UP, "the terminal was closed"),
    signal.SIGQUIT: Outcome(Ending.QUIT, "ended by SIGQUIT"),
}
_AT_ONCE = (signal.SIGQUIT,)


class _Request(NamedTuple):
    """Somebody wants the run to end. The guest has `patience` seconds to power off, then `outcome`
    is how it ended."""

    outcome: Outcome
    patience: float


class _FromGuest(NamedTuple):
    """The end of the guest; `boot` is the start that it ended."""

    outcome: Outcome
    boot: int


Ask = Callable[[Outcome, float], bool]


class Restarting(Protocol):
    """Answers on what becomes of a guest that has ended by itself."""

    def pause(self, outcome: Outcome) -> float | None:
        """The seconds until it starts again; None if it does not."""

    def build(self) -> Parts | Outcome:
        """The parts that it starts with; or why it cannot."""


class Machine:
    """An assembled machine. `run` it once, in the main thread if signals shall end it."""

    def __init__(
        self,
        parts: Parts,
        trace: Trace,
        *,
        signal_patience: float = STOP_SECONDS,
        waits: bool = False,
        before_first: Callable[[], None] | None = None,
    ) -> None:
        """A guest that a signal asks to power off has `signal_patience` seconds to do so. One that
        `waits` is paused before its first instruction. `before_first` is called before that, as
        late as can be."""
        self._trace = trace
        self._signal_patience = signal_patience
        self._waits, self._before_first = waits, before_first
        self.steady = RLock()
        """Held while the parts are exchanged, and by whoever needs them not to be."""
        # A SimpleQueue, because a signal's handler may put into it at any moment; a lock or an
        # Event deadlocks if the signal comes while this thread is inside it.
        self._inbox: SimpleQueue[Outcome | _Request | _FromGuest | Callable[[], None]]
        self._inbox = SimpleQueue()
        self._lose_patience_at = math.inf
        self._asked: _Request | None = None
        self._cut_at = math.inf
        self.boots = 0
        self.changes: Changes | None = None  # since snapshots, once somebody wants to know
        self._take(parts)

    def _take(self, parts: Parts) -> None:
        self.parts, prepared = parts, parts.prepared
        self.boots += 1
        exits = self._trace.hook("exits")
        loop = make_run_loop(parts.ports, parts.mmio, exits, parts.counts)
        end = partial(self._guest_ended, self.boots)
        self._runners = [
            VcpuRunner(vcpu, loop, prepared.memory, end, exits, prepared.board.state_lines)
            for vcpu in parts.vcpus
        ]
        self.pauser = Pauser(self._runners, parts.transports)

    def exchange(self, parts: Parts) -> None:
        """`parts` are those that there were, with other devices: some have come or gone."""
        with self.steady:
            self.parts = parts
            self.pauser.exchange(parts.transports)

    def on_vcpus(self, function: Callable[[Vcpu], Any]) -> list[Any]:
        """The results of `function` for each vCPU, called in its thread. Raises ConfigError if one
        of them does not come to rest."""
        return [runner.call(function) for runner in self._runners]

    def settle(self) -> None:
        """Return once each vCPU has left what it was in the middle of, if that was an access to a
        device."""
        for runner in self._runners:
            runner.settle()

    def _guest_ended(self, boot: int, outcome: Outcome) -> None:
        self._inbox.put(_FromGuest(outcome, boot))

    # --- what any thread may say ------------------------------------------------------------------

    def end(self, outcome: Outcome) -> None:
        """End the run at once, for this reason unless there was one before."""
        self._inbox.put(outcome)

    def request_end(self, outcome: Outcome, patience: float) -> None:
        """Ask the guest to power off, and cut its power after `patience` seconds, or at once if it
        was asked before, or cannot be: `outcome` is how the run has ended then."""
        self._inbox.put(_Request(outcome, patience))

    def do(self, what: Callable[[], None]) -> None:
        """Have `what` called in the thread of `run`, while that waits for the end. It must not
        wait."""
        self._inbox.put(what)

    # --- the run ----------------------------------------------------------------------------------

    def run(
        self,
        on_start: Callable[[], None],
        on_idle: Callable[[], None],
        *,
        ask: Ask = lambda outcome, patience: False,
        restarting: Restarting | None = None,
    ) -> Outcome:
        """Run the guest until it ends; how it ended.

        `on_start` is called each time the vCPUs run, `on_idle` about every second from then on.
        `ask(outcome, patience)` asks the guest to power off, and is False if there is nobody in it
        to be asked; if it sees that only later, it ends the run with `outcome`.
        `restarting` says whether a guest that has ended by itself starts again. On return no vCPU
        runs, no device works, and guest memory no longer changes.

        The first signal asks the guest, the second cuts its power. One that comes when stopping, or
        the answer to the signal before, has already taken long ends the process instead.
        """
        sys.setswitchinterval(_SWITCH_INTERVAL)
        with ExitStack() as restoring:
            self._catch_signals(restoring)
            while True:
                outcome, by_itself = self._run_once(on_start, on_idle, ask)
                if not by_itself or self._asked is not None or restarting is None:
                    return outcome
                pause = restarting.pause(outcome)
                if pause is None:
                    return outcome
                if (wanted := self._wanted_within(pause)) is not None:
                    return wanted
                with self.steady:
                    parts = restarting.build()
                    if isinstance(parts, Outcome):
                        return parts
                    self._take(parts)
                self._lose_patience_at = math.inf

    def _wanted_within(self, seconds: float) -> Outcome | None:
        """The outcome that somebody has asked for since the guest ended, or does within
        `seconds`."""
        until = time.monotonic() + seconds
        while True:
            try:
                found = self._inbox.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                return None
            if isinstance(found, Outcome):
                return found
            if isinstance(found, _Request):
                return found.outcome

    def _run_once(
        self,
        on_start: Callable[[], None],
        on_idle: Callable[[], None],
        ask: Ask,
    ) -> tuple[Outcome, bool]:
        """Run until the end; return the end, and whether that was the guest's doing."""
        with ExitStack() as stopping:
            stopping.callback(self._stop)
            waits, self._waits = self._waits, False
            if waits:
                self.pauser.before_first = self._before_first
            elif self._before_first is not None:
                self._before_first()
            self._before_first = None
            for runner in self._runners:
                if waits:
                    runner.request_pause()
                runner.start()
            if waits:
                self.pauser.pause()
            on_start()
            while True:
                try:
                    left = max(0.0, self._cut_at - time.monotonic())
                    found = self._inbox.get(timeout=min(_LOOK_EVERY, left))
                except Empty:
                    if self._asked is not None and time.monotonic() >= self._cut_at:
                        return self._too_late(self._asked), False
                    on_idle()
                    continue
                if isinstance(found, Outcome):
                    return found, False
                if isinstance(found, _FromGuest):
                    if found.boot == self.boots:
                        return found.outcome, True
                elif isinstance(found, _Request):
                    if self._asked is not None or found.patience <= 0:
                        return found.outcome, False
                    if not ask(*found):
                        return nobody_to_ask(found.outcome), False
                    self._asked = found
                    self._cut_at = time.monotonic() + found.patience
                    self._lose_patience_at = math.inf  # it was heard
                else:
                    found()

    def _too_late(self, asked: _Request) -> Outcome:
        line = f"did not power off within {asked.patience:g} s, so its power was cut"
        return _explained(asked.outcome, line)

    def _stop(self) -> None:
        self._lose_patience_at = time.monotonic() + _PATIENCE
        self.pauser.ending = True  # before waiting for whoever holds the machine still
        with self.steady:
            self.pauser.end()
            for runner in self._runners:
                runner.stop()
            for transport in self.parts.transports:
                transport.device.reset()

    def _catch_signals(self, restoring: ExitStack) -> None:
        before: dict[int, Any] = {}

        def on_signal(number: int, frame: FrameType | None) -> None:
            wanted = signal.Signals(number)
            patience = 0.0 if wanted in _AT_ONCE else self._signal_patience
            self.request_end(_SIGNALS[wanted], patience)
            now = time.monotonic()
            if now > self._lose_patience_at:
                # A thread hangs in a system call (a disk that does not answer). What SIGTERM did
                # before us ends the process, the terminal restored.
                leaving.at_once()
                signal.signal(signal.SIGTERM, before[signal.SIGTERM])
                signal.raise_signal(signal.SIGTERM)
            self._lose_patience_at = min(self._lose_patience_at, now + _PATIENCE)

        for number in _SIGNALS:
            try:
                before[number] = signal.signal(number, on_signal)
            except ValueError:
                return  # Not the main thread: whoever runs us takes the signals.
            restoring.callback(signal.signal, number, before[number])


def nobody_to_ask(outcome: Outcome) -> Outcome:
    """`outcome` of a guest that could not be asked to power off."""
    return _explained(outcome, "nobody in the guest can be asked, so its power was cut")


def _explained(outcome: Outcome, line: str) -> Outcome:
    return outcome._replace(line=f"{outcome.line}: {line}" if outcome.line else line)
