"""Runs a specification on this machine's KVM, joined to this process's terminal, to its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from pyvmm.boot.diagnosis import PANIC, ConsoleWatcher, Finding
from pyvmm.host import log
from pyvmm.machine.builder import Prepared, assemble, prepare
from pyvmm.machine.machine import Machine
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.machine.spec import VmSpec
from pyvmm.machine.trace import Trace
from pyvmm.platform.console import Console, standard_fds
from pyvmm.platform.console_pump import InputPort
from pyvmm.platform.shared_console import ConsoleTail, SharedInput
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio import constants
from pyvmm.virtio.blk.device import BlockDevice

if TYPE_CHECKING:
    from pyvmm.boot.partitions import Table
    from pyvmm.host.unix_sockets import Socket
    from pyvmm.machine.control import ResizeOutside
    from pyvmm.machine.watch import Watch

_SILENCE_SECONDS = 20.0
# The end of every run is told where programs read the log; text has no line for these.
_SILENT_ENDINGS = {
    Ending.POWEROFF: "the guest powered off",
    Ending.PANIC: "the guest's kernel panicked",
}
_FAILURES = (
    *(Ending.FAILED, Ending.PANIC, Ending.TRIPLE_FAULT, Ending.KVM_ERROR, Ending.DISK_ERROR),
)


class Attendant:
    """Watches a guest's console for what goes wrong, and says each thing once."""

    def __init__(self, name: str, prepared: Prepared) -> None:
        self._name = name
        self._cmdline = prepared.entry.cmdline
        # A guest that only serves its agent has nothing to say on a console.
        self._is_silent = "pyvmm.exec=agent" in self._cmdline.split()
        # The serial port is always there; both are shown on the terminal.
        virtio = any(device.kind == "console" for device in prepared.spec.devices)
        self._consoles = ("ttyS0", "hvc0") if virtio else ("ttyS0",)
        self.console = self._consoles[-1]  # where the keys go
        self._transports: Sequence[MmioTransport] = ()
        self._devices = prepared.devices
        self.watcher = ConsoleWatcher(self._disk_ready, self._partition_tables)
        self.on_finding: Callable[[Finding], None] | None = None
        self._passed_on = 0  # findings
        self._said: set[str] = set()
        self._start = time.monotonic()

    def attend(self, transports: Sequence[MmioTransport]) -> None:
        """Take the devices' word for whether a driver has found them."""
        self._transports = transports

    def observe(self, data: bytes) -> None:
        """The guest has written `data` to its console."""
        self.watcher.feed(data)
        findings = self.watcher.findings
        while self.on_finding is not None and self._passed_on < len(findings):
            self._passed_on += 1
            self.on_finding(findings[self._passed_on - 1])

    def look(self) -> None:
        """Say what is new since the last look: the most telling finding, or that all is silent."""
        waited = time.monotonic() - self._start
        found = self.watcher.diagnosis
        if found is None and not self._is_silent:
            found = self.watcher.silence_hint(
                self._cmdline, waited, patience=_SILENCE_SECONDS, consoles=self._consoles
            )
        if found is not None and found.kind not in self._said:
            self._said.add(found.kind)
            more = {"finding": found.kind, "message": found.message, "cure": found.cure}
            log.to_stderr(log.Line(f"{self._name}: {found}", level=log.ERROR, more=more))

    def said(self, kind: str) -> bool:
        """Whether a finding of that kind was told to the user."""
        return kind in self._said

    def saw_panic(self) -> bool:
        """Whether the guest's kernel panicked."""
        return any(finding.kind == PANIC for finding in self.watcher.findings)

    def silent_reset(self) -> Finding | None:
        """What to say of a guest that has reset itself, if it has said nothing."""
        if self._is_silent:
            return None
        return self.watcher.silent_reset(self._cmdline, consoles=self._consoles)

    def _partition_tables(self) -> list[tuple[str, Table]]:
        from pyvmm.boot.partitions import read_disk

        disks = [device for device in self._devices if isinstance(device, BlockDevice)]
        found = []
        for index, disk in enumerate(disks):
            try:
                table = read_disk(disk.peek, disk.size, disk.block_size)
            except Exception:  # a class of the user's may raise anything; this is only a hint
                continue
            if table is not None:
                found.append((f"/dev/vd{chr(ord('a') + index)}", table))
        return found

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
    answering = _Answering(control, resize_outside)
    try:
        with ExitStack() as closing:
            trace = Trace(spec.trace, spec.trace_file)
            closing.callback(trace.close)
            prepared = prepare(spec, trace, closing, quiet=quiet)
            on_listening()
            attendant = Attendant(spec.name, prepared)
            outcome = _run(prepared, attendant, trace, closing, answering)
        # The console is closed: the watcher has seen the last byte.
        attendant.look()
        if outcome.ending is Ending.RESET and attendant.saw_panic():
            line = "" if attendant.said(PANIC) else "the guest's kernel panicked"
            outcome = Outcome(Ending.PANIC, line)
        elif outcome.ending is Ending.RESET and (silent := attendant.silent_reset()):
            outcome = Outcome(Ending.RESET, str(silent))
        _report(spec.name, outcome)
        answering.tell_end(outcome)
    finally:
        answering.close()
    return outcome.exit_code


class _Answering:
    """The control socket while the machine runs, and those who watch until its end is told."""

    def __init__(self, listener: Socket | None, resize_outside: ResizeOutside | None) -> None:
        """`resize_outside` resizes disks that are somebody else's."""
        self._listener = listener
        self._resize_outside = resize_outside
        self._watch: Watch | None = None

    def start(
        self,
        machine: Machine,
        prepared: Prepared,
        attendant: Attendant,
        console: tuple[ConsoleTail, SharedInput],
        closing: ExitStack,
    ) -> None:
        """Answer requests from now on until `closing` ends that."""
        if self._listener is None:
            return
        # Imported while the guest runs already, which does not wait for this.
        from pyvmm.control.server import ControlServer
        from pyvmm.machine.control import MachineControl
        from pyvmm.machine.watch import Watch

        self._watch = watch = Watch(*console, attendant.console)
        watch.events.emit("started")
        attendant.on_finding = watch.tell_finding
        control = MachineControl(machine, prepared, watch, self._resize_outside)
        server = ControlServer(self._listener, control.methods())
        closing.callback(server.close)
        server.start()

    def tell_end(self, outcome: Outcome) -> None:
        if self._watch is not None:
            self._watch.end(outcome)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()


def _run(
    prepared: Prepared,
    attendant: Attendant,
    trace: Trace,
    closing: ExitStack,
    answering: _Answering,
) -> Outcome:
    machine: Machine | None = None
    tail = ConsoleTail()

    def quit_guest() -> None:
        if machine is not None:
            machine.end(Outcome(Ending.QUIT, "ended by Ctrl-A x"))

    def observe(data: bytes) -> None:
        tail.observe(data)
        attendant.observe(data)

    console = Console(*standard_fds(), on_quit=quit_guest, observer=observe)
    parts = assemble(prepared, trace, console.write, closing)
    attendant.attend(parts.transports)
    machine = Machine(parts, trace, console.release)
    prepared.alarm.connect(machine.end)

    def on_start() -> None:
        input = SharedInput(_join_virtio_console(prepared, console) or parts.serial)
        console.connect(input.join())
        answering.start(machine, prepared, attendant, (tail, input), closing)

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
    ending, report = outcome.ending, outcome.report
    if log.is_json():
        message = outcome.line or _SILENT_ENDINGS.get(ending, "")
        more = {"ending": ending.name.lower(), "exit_code": outcome.exit_code, "report": report}
        level = log.ERROR if ending in _FAILURES else log.INFO
        log.to_stderr(log.Line(message, level=level, more=more))
        return
    if report and sys.stderr is not None:
        with suppress(OSError):  # nobody reads any more
            print(report, file=sys.stderr)
    if outcome.line:
        log.to_stderr(f"{name}: {outcome.line}")
