"""A machine that runs: starts the vCPUs, waits for the ending, and stops everything in order."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Any

from pyvmm.machine.builder import Parts
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.machine.pause import Pauser
from pyvmm.machine.run_loop import make_run_loop
from pyvmm.machine.trace import Trace
from pyvmm.machine.vcpu_runner import VcpuRunner

# How long one Python thread may keep the interpreter from the others, in seconds. At the default of
# 5 ms a vCPU busy with register accesses would hold up a disk's worker for that long.
_SWITCH_INTERVAL = 50e-6

_LOOK_EVERY = 1.0  # seconds
_PATIENCE = 2.0  # seconds that a stop may take before one more signal ends the process on the spot

_SIGNALS = {
    signal.SIGINT: Outcome(Ending.INTERRUPTED, "interrupted"),
    signal.SIGTERM: Outcome(Ending.TERMINATED, "terminated"),
    signal.SIGHUP: Outcome(Ending.HUNG_UP, "the terminal was closed"),
}


class Machine:
    """An assembled machine. `run` it once, in the main thread if signals shall end it."""

    def __init__(self, parts: Parts, trace: Trace, unblock: Callable[[], None]) -> None:
        """`unblock` frees vCPU threads that wait for somebody to read the console."""
        self.parts = parts
        self._unblock = unblock
        # The first one counts. A SimpleQueue, because a signal's handler may put into it at any
        # moment; a lock or an Event deadlocks if the signal comes while this thread is inside it.
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self._lose_patience_at = math.inf
        exits = trace.hook("exits")
        loop = make_run_loop(parts.ports, parts.mmio, exits, parts.counts)
        self._runners = [
            VcpuRunner(vcpu, loop, parts.prepared.memory, self.end, exits) for vcpu in parts.vcpus
        ]
        self.pauser = Pauser(self._runners, parts.transports)

    def end(self, outcome: Outcome) -> None:
        """The run is over, for this reason unless there was one before. Any thread may say so."""
        self._outcomes.put(outcome)

    def run(self, on_start: Callable[[], None], on_idle: Callable[[], None]) -> Outcome:
        """Run the guest until it ends; how it ended.

        A signal that comes when stopping, or the answer to the signal before, has already taken
        long ends the process instead.

        `on_start` is called when the vCPUs run, `on_idle` about every second from then on. On
        return no vCPU runs, no device works, and guest memory no longer changes.
        """
        sys.setswitchinterval(_SWITCH_INTERVAL)
        with ExitStack() as restoring:
            self._catch_signals(restoring)
            restoring.callback(self._stop)
            for runner in self._runners:
                runner.start()
            on_start()
            while True:
                try:
                    return self._outcomes.get(timeout=_LOOK_EVERY)
                except Empty:
                    on_idle()

    def _stop(self) -> None:
        self._lose_patience_at = time.monotonic() + _PATIENCE
        self._unblock()
        self.pauser.end()
        for runner in self._runners:
            runner.stop()
        for transport in self.parts.transports:
            transport.device.reset()

    def _catch_signals(self, restoring: ExitStack) -> None:
        before: dict[int, Any] = {}

        def on_signal(number: int, frame: FrameType | None) -> None:
            self.end(_SIGNALS[signal.Signals(number)])
            now = time.monotonic()
            if now > self._lose_patience_at:
                # A thread hangs in a system call (a disk that does not answer, a pipe that nobody
                # reads). What SIGTERM did before us ends the process, the terminal restored.
                signal.signal(signal.SIGTERM, before[signal.SIGTERM])
                signal.raise_signal(signal.SIGTERM)
            self._lose_patience_at = min(self._lose_patience_at, now + _PATIENCE)

        for number in _SIGNALS:
            try:
                before[number] = signal.signal(number, on_signal)
            except ValueError:
                return  # Not the main thread: whoever runs us takes the signals.
            restoring.callback(signal.signal, number, before[number])
