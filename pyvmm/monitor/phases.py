"""Runs a specification on this machine's KVM, joined to this process's terminal, to its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from pyvmm.boot.diagnosis import PANIC, ConsoleWatcher, Finding
from pyvmm.errors import PyvmmError
from pyvmm.host import log
from pyvmm.kinds.disk import open_disk
from pyvmm.machine.alarm import Alarm
from pyvmm.machine.builder import Parts, Prepared, assemble, prepare, prepare_again
from pyvmm.machine.machine import Machine
from pyvmm.machine.outcome import STOP_SECONDS, Ending, Outcome
from pyvmm.machine.trace import Hook, Trace
from pyvmm.monitor.restart import FRUITLESS, RebootPolicy
from pyvmm.platform.console import Console, standard_fds
from pyvmm.platform.console_pump import InputPort
from pyvmm.platform.shared_console import ConsoleTail, SharedInput
from pyvmm.spec.vm import VmSpec
from pyvmm.transport.base import Transport
from pyvmm.virtio import constants
from pyvmm.virtio.blk.device import BlockDevice
from pyvmm.virtio.device import VirtioDevice

if TYPE_CHECKING:
    from pyvmm.boot.partitions import Table
    from pyvmm.host.unix_sockets import Socket
    from pyvmm.monitor.control import ResizeOutside
    from pyvmm.monitor.power_off import PowerOff
    from pyvmm.monitor.watch import Watch

_SILENCE_SECONDS = 20.0
# The end of every run is told where programs read the log; text has no line for these.
_SILENT_ENDINGS = {
    Ending.POWEROFF: "the guest powered off",
    Ending.PANIC: "the guest's kernel panicked",
}
_FAILURES = (
    *(Ending.FAILED, Ending.PANIC, Ending.TRIPLE_FAULT, Ending.KVM_ERROR, Ending.DISK_ERROR),
)


GETS_NOWHERE = (
    f"the guest asked for a reset {FRUITLESS} times before any driver of it was up, and is not "
    "started again"
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
        self._transports: Sequence[Transport] = ()
        self._devices = prepared.devices
        self.watcher = ConsoleWatcher(self._disk_ready, self._partition_tables)
        self.on_finding: Callable[[Finding], None] | None = None
        self._passed_on = 0  # findings
        self._said: set[str] = set()
        self._start = time.monotonic()

    def attend(self, transports: Sequence[Transport]) -> None:
        """The guest starts; take the devices' word for whether a driver has found them."""
        self._transports = transports
        self._start = time.monotonic()

    @property
    def guest_came_up(self) -> bool:
        """Whether a driver of the guest has brought up a device since it started."""
        return any(t.negotiation.activations for t in self._transports)

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
        return any(
            t.negotiation.read_status() & constants.VIRTIO_CONFIG_S_DRIVER_OK
            for t in self._transports
        )


def run_here(
    spec: VmSpec,
    *,
    quiet: bool = False,
    control: Socket | None = None,
    on_listening: Callable[[], None] = lambda: None,
    resize_outside: ResizeOutside | None = None,
    stop_patience: float = STOP_SECONDS,
    on_output: Callable[[bytes], None] = lambda data: None,
) -> int:
    """Run `spec`; the exit code. Requests to the listening socket `control` are answered once the
    vCPUs run; `on_listening` is called once all sockets for the host's programs listen;
    `resize_outside` is MachineControl's. A guest that a signal asks to power off has
    `stop_patience` seconds. `on_output` sees what the console says; it must not wait. Raises
    ConfigError or HostError if it cannot be started.
    """
    answering = _Answering(control, resize_outside)
    try:
        with ExitStack() as closing:
            trace = Trace(spec.trace, spec.trace_file)
            closing.callback(trace.close)
            alarm = Alarm()
            devices = _open_devices(spec, trace.hook("requests"), alarm, closing)
            prepared = prepare(spec, devices, alarm, closing, quiet=quiet)
            on_listening()
            attendant = Attendant(spec.name, prepared)
            run = _Run(prepared, attendant, trace, answering, on_output)
            outcome = run(closing, stop_patience)
            if run.gave_up:
                outcome = outcome._replace(line=GETS_NOWHERE)
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


def _open_devices(
    spec: VmSpec, trace: Hook | None, alarm: Alarm, closing: ExitStack
) -> tuple[VirtioDevice, ...]:
    disks = [open_disk(disk, trace, closing, alarm) for disk in spec.disks]
    if not spec.devices:
        return tuple(disks)
    from pyvmm.kinds import registry

    context = registry.Context(spec.name, trace, closing)
    return (*disks, *(registry.open_device(device, context) for device in spec.devices))


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
        console_left_out: Callable[[], int],
        closing: ExitStack,
    ) -> None:
        """Answer requests from now on until `closing` ends that."""
        if self._listener is None:
            return
        # Imported while the guest runs already, which does not wait for this.
        from pyvmm.control.server import ControlServer
        from pyvmm.monitor.control import MachineControl
        from pyvmm.monitor.watch import Watch

        self._watch = watch = Watch(*console, attendant.console)
        watch.console_left_out = console_left_out
        watch.events.emit("started")
        attendant.on_finding = watch.tell_finding
        control = MachineControl(machine, prepared, watch, self._resize_outside)
        server = ControlServer(self._listener, control.methods())
        closing.callback(server.close)
        server.start()

    def emit(self, kind: str, **details: object) -> None:
        """Tell those who watch that `kind` has happened."""
        if self._watch is not None:
            self._watch.events.emit(kind, **details)

    def tell_end(self, outcome: Outcome) -> None:
        if self._watch is not None:
            self._watch.end(outcome)

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()


class _Run:
    """One run, from the first start of the guest to its last end: the console and the devices stay,
    the rest is new at each start."""

    def __init__(
        self,
        prepared: Prepared,
        attendant: Attendant,
        trace: Trace,
        answering: _Answering,
        on_output: Callable[[bytes], None],
    ) -> None:
        self._prepared = prepared
        self._attendant = attendant
        self._trace = trace
        self._answering = answering
        self._on_output = on_output
        self._tail = ConsoleTail()
        self._console = Console(*standard_fds(), on_quit=self._quit, observer=self._observe)
        self._input: SharedInput | None = None
        self._policy = RebootPolicy(prepared.spec.on_reboot == "restart")
        self._warn = log.RateLimited(log.of_vm(prepared.spec.name))
        self._machine: Machine | None = None
        self._asking: PowerOff | None = None

    def __call__(self, closing: ExitStack, stop_patience: float) -> Outcome:
        self._of_boot = closing.enter_context(ExitStack())
        parts = self._assemble()
        machine = Machine(parts, self._trace, signal_patience=stop_patience)
        self._machine = machine
        self._prepared.alarm.connect(machine.end)
        with self._console:
            return machine.run(
                lambda: self._on_start(machine, closing),
                self._look,
                ask=self._ask,
                restarting=self,
            )

    def _assemble(self) -> Parts:
        parts = assemble(self._prepared, self._trace, self._console.write, self._of_boot)
        self._attendant.attend(parts.transports)
        return parts

    def _observe(self, data: bytes) -> None:
        self._tail.observe(data)
        self._attendant.observe(data)
        self._on_output(data)

    def _quit(self) -> None:
        if self._machine is not None:
            self._machine.end(Outcome(Ending.QUIT, "ended by Ctrl-A x"))

    def _on_start(self, machine: Machine, closing: ExitStack) -> None:
        self._policy.started()
        serial = machine.parts.serial
        if self._input is None:
            port = _join_virtio_console(self._prepared, self._console) or serial
            self._input = SharedInput(port)
            self._console.connect(self._input.join())
            self._answering.start(
                machine,
                self._prepared,
                self._attendant,
                (self._tail, self._input),
                lambda: self._console.left_out,
                closing,
            )
            return
        self._answering.emit("restarted")

    def _ask(self, request: Outcome, patience: float) -> bool:
        assert self._machine is not None
        # Imported when it is wanted, as most guests power off by themselves.
        from pyvmm.monitor.power_off import PowerOff

        self._asking = PowerOff(self._machine, self._prepared.spec.name, self._tell_asked)
        return self._asking.ask(patience, request)

    def _look(self) -> None:
        self._attendant.look()
        if self._asking is not None:
            self._asking.look()

    def _tell_asked(self, how: str) -> None:
        self._answering.emit("stopping", asked=how)

    # What Machine asks when the guest has ended by itself.

    def pause(self, outcome: Outcome) -> float | None:
        """See Restarting. The last of what the guest has said is looked at first: it may be a
        panic."""
        self._console.settle()
        pause = self._policy.pause(
            outcome,
            panicked=self._attendant.saw_panic(),
            has_devices=bool(self._prepared.devices),
            came_up=self._attendant.guest_came_up,
            printed=self._attendant.watcher.bytes_seen > 0,
        )
        if pause is not None:
            self._warn("the guest asked for a reset, and starts again")
        return pause

    def build(self) -> Parts | Outcome:
        """See Restarting."""
        self._of_boot.close()
        try:
            self._prepared = prepare_again(self._prepared)
            parts = self._assemble()
        except PyvmmError as error:
            return Outcome(Ending.FAILED, f"the guest cannot be started again: {error}")
        if self._input is not None:  # before the guest runs: what it is told first is not lost
            self._input.replace_serial(parts.serial)
        return parts

    @property
    def gave_up(self) -> bool:
        """Whether a guest that wants to start again gets nowhere."""
        return self._policy.gave_up


def _join_virtio_console(prepared: Prepared, console: Console) -> InputPort | None:
    """Give the console to the virtio-console that is to have it; where the input goes then."""
    if not any(device.kind == "console" for device in prepared.spec.devices):
        return None
    from pyvmm.kinds.console import TerminalConsole
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
        log.raw_to_stderr(report)
    if outcome.line:
        log.to_stderr(f"{name}: {outcome.line}")
