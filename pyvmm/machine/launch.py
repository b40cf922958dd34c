"""Runs a specification on this machine's KVM, joined to this process's terminal, to its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

from pyvmm.boot.diagnosis import PANIC, ConsoleWatcher
from pyvmm.host import log
from pyvmm.machine.builder import Prepared, assemble, prepare
from pyvmm.machine.machine import Machine
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.machine.spec import VmSpec
from pyvmm.machine.trace import Trace
from pyvmm.platform.console import Console, standard_fds
from pyvmm.platform.console_pump import InputPort
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio import constants

if TYPE_CHECKING:
    from pyvmm.host.unix_sockets import Socket
    from pyvmm.machine.control import ResizeOutside

_SILENCE_SECONDS = 20.0


class Attendant:
    """Watches a guest's console for what goes wrong, and says each thing once."""

    def __init__(self, name: str, prepared: Prepared) -> None:
        self._name = name
        self._cmdline = prepared.entry.cmdline
        # The serial port is always there; both are shown on the terminal.
        virtio = any(device.kind == "console" for device in prepared.spec.devices)
        self._consoles = ("ttyS0", "hvc0") if virtio else ("ttyS0",)
        self._transports: Sequence[MmioTransport] = ()
        self.watcher = ConsoleWatcher(self._disk_ready)
        self.observe = self.watcher.feed
        self._said: set[str] = set()
        self._start = time.monotonic()

    def attend(self, transports: Sequence[MmioTransport]) -> None:
        """Take the devices' word for whether a driver has found them."""
        self._transports = transports

    def look(self) -> None:
        """Say what is new since the last look: the most telling finding, or that all is silent."""
        waited = time.monotonic() - self._start
        found = self.watcher.diagnosis or self.watcher.silence_hint(
            self._cmdline, waited, patience=_SILENCE_SECONDS, consoles=self._consoles
        )
        if found is not None and found.kind not in self._said:
            self._said.add(found.kind)
            log.to_stderr(f"{self._name}: {found}")

    def said(self, kind: str) -> bool:
        """Whether a finding of that kind was told to the user."""
        return kind in self._said

    def saw_panic(self) -> bool:
        """Whether the guest's kernel panicked."""
        return any(finding.kind == PANIC for finding in self.watcher.findings)

    def _disk_ready(self) -> bool:
        return any(t.read_status() & constants.VIRTIO_CONFIG_S_DRIVER_OK for t in self._transports)


def run_here(
    spec: VmSpec,
    *,
    quiet: bool = False,
    control: Socket | None = None,
    on_listening: Callable[[], None] = lambda: None,
    resize_outside: ResizeOutside | None = None,
) -> int:
    """Run `spec`; the exit code. Requests to the listening socket `control` are answered once the
    vCPUs run; `on_listening` is called once all sockets for the host's programs listen;
    `resize_outside` is MachineControl's. Raises ConfigError or HostError if it cannot be started.
    """
    with ExitStack() as closing:
        trace = Trace(spec.trace, spec.trace_file)
        closing.callback(trace.close)
        prepared = prepare(spec, trace, closing, quiet=quiet)
        on_listening()
        attendant = Attendant(spec.name, prepared)
        outcome = _run(prepared, attendant, trace, closing, _Control(control, resize_outside))
    # The console is closed: the watcher has seen the last byte.
    attendant.look()
    if outcome.ending is Ending.RESET and attendant.saw_panic():
        line = "" if attendant.said(PANIC) else "the guest's kernel panicked"
        outcome = Outcome(Ending.PANIC, line)
    _report(spec.name, outcome)
    return outcome.exit_code


class _Control(NamedTuple):
    """Where requests come from, and who resizes disks that are somebody else's."""

    listener: Socket | None
    resize_outside: ResizeOutside | None


def _answer(
    listener: Socket,
    machine: Machine,
    prepared: Prepared,
    resize_outside: ResizeOutside | None,
    closing: ExitStack,
) -> None:
    # Imported while the guest runs already, which does not wait for this.
    from pyvmm.control.server import ControlServer
    from pyvmm.machine.control import MachineControl

    server = ControlServer(listener, MachineControl(machine, prepared, resize_outside).methods())
    closing.callback(server.close)
    server.start()


def _run(
    prepared: Prepared,
    attendant: Attendant,
    trace: Trace,
    closing: ExitStack,
    control: _Control,
) -> Outcome:
    machine: Machine | None = None

    def quit_guest() -> None:
        if machine is not None:
            machine.end(Outcome(Ending.QUIT, "ended by Ctrl-A x"))

    console = Console(*standard_fds(), on_quit=quit_guest, observer=attendant.observe)
    parts = assemble(prepared, trace, console.write, closing)
    attendant.attend(parts.transports)
    machine = Machine(parts, trace, console.release)
    prepared.alarm.connect(machine.end)

    def on_start() -> None:
        console.connect(_join_virtio_console(prepared, console) or parts.serial)
        if control.listener is not None:
            _answer(control.listener, machine, prepared, control.resize_outside, closing)

    with console:
        return machine.run(on_start, attendant.look)


def _join_virtio_console(prepared: Prepared, console: Console) -> InputPort | None:
    """Give the console to the virtio-console that is to have it; where the input goes then."""
    if not any(device.kind == "console" for device in prepared.spec.devices):
        return None
    from pyvmm.machine.device_console import TerminalConsole
    from pyvmm.platform import window_size

    device = next(d for d in prepared.devices if isinstance(d, TerminalConsole))
    device.end.attach(console.offer)
    console.watch_room(device.end.wake)
    console.watch_size(device.set_size)
    window_size.follow(device.set_size)
    return device.end


def _report(name: str, outcome: Outcome) -> None:
    if outcome.report:
        print(outcome.report, file=sys.stderr)
    if outcome.line:
        log.to_stderr(f"{name}: {outcome.line}")
