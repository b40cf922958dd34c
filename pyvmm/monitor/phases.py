"""The life of a monitor on this machine's KVM: open → assemble → confine → run → end.

`run_here` is all of it, in that order. The monitor is joined to this process's terminal. What a
phase opens is closed in reverse order, whichever phase fails. Decision 0353 says what opens a file
after the first phase, and why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from pyvmm.boot.diagnosis import PANIC
from pyvmm.errors import HostError, PyvmmError
from pyvmm.host import log
from pyvmm.host.syscalls import Closable
from pyvmm.host.unix_sockets import Socket
from pyvmm.kinds import registry
from pyvmm.machine.builder import Parts, Prepared, assemble, open_kvm, prepare, prepare_again
from pyvmm.machine.machine import Machine
from pyvmm.machine.outcome import Alarm, Ending, Outcome
from pyvmm.machine.trace import Trace
from pyvmm.monitor import polling
from pyvmm.monitor.attendant import Attendant
from pyvmm.monitor.open_devices import OpenDevices
from pyvmm.monitor.restart import FRUITLESS, RebootPolicy
from pyvmm.monitor.whole_disk import with_root
from pyvmm.platform.console import Console, standard_fds
from pyvmm.platform.console_pump import InputPort
from pyvmm.platform.shared_console import ConsoleTail, SharedInput
from pyvmm.spec.surroundings import STOP_SECONDS
from pyvmm.spec.vm import DeviceSpec, VmSpec

if TYPE_CHECKING:
    from pyvmm.control.doors import Door
    from pyvmm.kvm.system import Kvm
    from pyvmm.machine.mapped_files import MappedFiles
    from pyvmm.memory.private_memory import PrivateMemory
    from pyvmm.monitor.confine import Confinement
    from pyvmm.monitor.control import ResizeOutside
    from pyvmm.monitor.hotplug import Hotplug
    from pyvmm.monitor.power_off import PowerOff
    from pyvmm.monitor.restored import Restoring
    from pyvmm.monitor.watch import Watch

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


class Opened(NamedTuple):
    """All that a VM has of the host: files, sockets and programs, its memory, and KVM."""

    trace: Trace
    prepared: Prepared
    kvm: Kvm
    devices: OpenDevices
    restoring: Restoring | None = None


def run_here(
    spec: VmSpec,
    *,
    quiet: bool = False,
    control: Socket | None = None,
    on_listening: Callable[[], None] = lambda: None,
    resize_outside: ResizeOutside | None = None,
    stop_patience: float = STOP_SECONDS,
    on_output: Callable[[bytes], None] = lambda data: None,
    described: VmSpec | None = None,
    confinement: Confinement | None = None,
    doors: Sequence[Door] = (),
) -> int:
    """Run `spec`; the exit code. Requests to the listening socket `control` are answered once the
    vCPUs run; `on_listening` is called once all sockets for the host's programs listen;
    `resize_outside` is MachineControl's. A guest that a signal asks to power off has
    `stop_patience` seconds. `described` is MachineControl's too. `on_output` sees what the console
    says; it must not wait. `confinement` is entered when all is open that the machine works on.
    At `doors` requests are answered as well.
    Raises ConfigError or HostError if it cannot be started.
    """
    with _Answering(control, resize_outside, described, doors) as answering:
        with ExitStack() as closing:
            opened = _open(spec, closing, quiet=quiet)
            if confinement is not None:
                opened.devices.run_by = confinement.run
                opened.devices.opens_nothing = lambda: confinement.opens_nothing
            on_listening()
            run = _Run(opened, answering, on_output, closing)
            run.assemble(stop_patience)
            if confinement is not None:
                answering.hear_by(confinement)
                confinement.enter(opened.prepared.spec)
                answering.confinement = run.confinement = confinement
            outcome = run.to_the_end()
        return _end(run, outcome)


def _open(spec: VmSpec, closing: ExitStack, *, quiet: bool) -> Opened:
    restoring = _restoring(spec)
    kvm = None if restoring is None else restoring.open_kvm(closing)
    trace = Trace(spec.trace, spec.trace_file)
    closing.callback(trace.close)
    alarm = Alarm()
    files = _Files(spec, closing)
    opening = closing.enter_context(
        OpenDevices(
            *(spec.name, trace.hook("requests"), alarm, files.map),
            poll_ns=polling.poll_ns(spec.cpus),
        )
    )
    devices = tuple(opening.open(part) for part in spec.parts)
    if restoring is None:
        spec = with_root(spec, devices)
        prepared = prepare(spec, devices, alarm, closing, files=files.mapped, quiet=quiet)
    else:
        prepared = restoring.prepare(devices, alarm, closing, files.mapped)
    kvm = kvm or open_kvm(prepared.board, spec.cpus, closing)
    return Opened(trace, prepared, kvm, opening, restoring)


def _restoring(spec: VmSpec) -> Restoring | None:
    if not spec.restored_from:
        return None
    from pyvmm.monitor.restored import Restoring

    return Restoring(spec)


class _Files:
    """The files that devices make the guest's memory, which most do not."""

    def __init__(self, spec: VmSpec, closing: ExitStack) -> None:
        self._spec = spec
        self._closing = closing
        self.mapped: MappedFiles | None = None

    def map(self, fd: int, size: int, read_only: bool, private: PrivateMemory | None) -> int:
        """See MappedFiles."""
        if self.mapped is None:
            from pyvmm.machine.mapped_files import MappedFiles

            as_bars = self._spec.transport == "pci"
            self.mapped = MappedFiles(self._spec.memory, self._closing, as_bars=as_bars)
        return self.mapped.map(fd, size, read_only, private)


def _end(run: _Run, outcome: Outcome) -> int:
    """Say how it has ended, to the user and to those who watch; the exit code. The console is
    closed: the attendant has seen the last byte."""
    attendant = run.attendant
    attendant.look()
    if run.confinement is not None:
        run.confinement.look()
    if outcome.ending is Ending.RESET and attendant.saw_panic():
        line = "" if attendant.said(PANIC) else "the guest's kernel panicked"
        outcome = Outcome(Ending.PANIC, line)
    elif outcome.ending is Ending.RESET and (silent := attendant.silent_reset()):
        outcome = Outcome(Ending.RESET, str(silent))
    _report(run.name, outcome)
    run.answering.tell_end(outcome)
    return outcome.exit_code


class _Answering(Closable):
    """The control socket while the machine runs, and those who watch until its end is told."""

    def __init__(
        self,
        listener: Socket | None,
        resize_outside: ResizeOutside | None,
        described: VmSpec | None = None,
        doors: Sequence[Door] = (),
    ) -> None:
        """`resize_outside` resizes disks that are somebody else's, `described` is
        MachineControl's."""
        self._doors = doors
        self._listener: Socket | Door | None = listener
        self._described = described
        self._resize_outside = resize_outside
        self.is_inside = resize_outside is not None
        self.confinement: Confinement | None = None
        self._watch: Watch | None = None

    def hear_by(self, confinement: Confinement) -> None:
        """Let somebody hear first who comes, if there is somebody to. Raises HostError."""
        if isinstance(self._listener, Socket):
            try:
                found = confinement.hear_clients(self._listener, self._doors)
            except OSError as error:
                raise HostError(error.errno or 0, "control sockets in the box") from None
            self._listener, self._doors = found

    def start(
        self,
        machine: Machine,
        hotplug: Callable[[], Hotplug],
        attendant: Attendant,
        console: tuple[ConsoleTail, SharedInput],
        console_left_out: Callable[[], int],
        closing: ExitStack,
    ) -> None:
        """Answer requests from now on until `closing` ends that. `hotplug` is asked for devices
        that are to come or go."""
        if self._listener is None:
            return
        # Imported while the guest runs already, which does not wait for this.
        from pyvmm.control.server import ControlServer
        from pyvmm.monitor.control import MachineControl, not_confined
        from pyvmm.monitor.watch import Watch

        self._watch = watch = Watch(*console, attendant.console)
        watch.console_left_out = console_left_out
        watch.events.emit("started")
        attendant.on_finding = watch.tell_finding
        control = MachineControl(
            machine,
            watch,
            hotplug,
            self._resize_outside,
            self._described,
            confinement=not_confined if self.confinement is None else self.confinement.described,
        )
        server = ControlServer(self._listener, control.method, self._doors)
        closing.callback(server.close)
        server.start()

    def emit(self, kind: str, /, **details: object) -> None:
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
        opened: Opened,
        answering: _Answering,
        on_output: Callable[[bytes], None],
        closing: ExitStack,
    ) -> None:
        self._opened = opened
        self._prepared = opened.prepared
        self.name = opened.prepared.spec.name
        self.attendant = Attendant(self.name, opened.prepared)
        self.answering = answering
        self._on_output = on_output
        self._closing = closing
        self._of_boot = closing.enter_context(ExitStack())
        closing.callback(self._close_hotplug)
        self._tail = ConsoleTail()
        self._console = Console(*standard_fds(), on_quit=self._quit, observer=self._observe)
        self._input: SharedInput | None = None
        self._policy = RebootPolicy(opened.prepared.spec.on_reboot == "restart")
        self._warn = log.RateLimited(log.of_vm(self.name))
        self._machine: Machine | None = None
        self._asking: PowerOff | None = None
        self._hotplug: Hotplug | None = None
        self._making_hotplug = Lock()
        self.confinement: Confinement | None = None

    def assemble(self, stop_patience: float) -> None:
        """Put the machine together. Raises ConfigError or HostError."""
        parts = self._parts()
        before_first: Callable[[], None] | None = None
        if (restoring := self._opened.restoring) is not None:
            restoring.restore(parts, self._warn)
            before_first = partial(restoring.start_clock, parts)
        machine = Machine(
            parts,
            self._opened.trace,
            signal_patience=stop_patience,
            waits=self._prepared.spec.waits,
            before_first=before_first,
        )
        self._machine = machine
        self._prepared.alarm.connect(machine.end)

    def to_the_end(self) -> Outcome:
        """Run the guest until nothing starts it again; how it ended."""
        machine = self._machine
        assert machine is not None
        with self._console:
            outcome = machine.run(
                lambda: self._on_start(machine), self._look, ask=self._ask, restarting=self
            )
        return outcome._replace(line=GETS_NOWHERE) if self._policy.gave_up else outcome

    def _parts(self) -> Parts:
        trace, kvm = self._opened.trace, self._opened.kvm
        parts = assemble(self._prepared, kvm, trace, self._console.write, self._of_boot)
        self.attendant.attend(parts.transports)
        if parts.pci is not None:
            parts.pci.on_eject = lambda number: self._hot().ejected(number)
        return parts

    def _hot(self) -> Hotplug:
        """The hot-plug of this run, which few runs need."""
        with self._making_hotplug:
            if self._hotplug is None:
                from pyvmm.monitor.hotplug import Hotplug

                assert self._machine is not None
                self._hotplug = Hotplug(
                    self._machine,
                    self._opened.devices,
                    self._opened.trace,
                    tell=self.answering.emit,
                    changed=self._devices_changed,
                    is_inside=self.answering.is_inside,
                )
            return self._hotplug

    def _devices_changed(self, parts: Parts) -> None:
        self._prepared = parts.prepared
        self.attendant.exchange(parts.prepared.devices, parts.transports)

    def _close_hotplug(self) -> None:
        if self._hotplug is not None:
            self._hotplug.close()

    def _observe(self, data: bytes) -> None:
        self._tail.observe(data)
        self.attendant.observe(data)
        self._on_output(data)

    def _quit(self) -> None:
        if self._machine is not None:
            self._machine.end(Outcome(Ending.QUIT, "ended by Ctrl-A x"))

    def _on_start(self, machine: Machine) -> None:
        self._policy.started()
        if self.confinement is not None:
            self.confinement.started()
        serial = machine.parts.serial
        if self._input is None:
            port = _join_virtio_console(self._prepared, self._console) or serial
            self._input = SharedInput(port)
            self._console.connect(self._input.join())
            self.answering.start(
                machine,
                self._hot,
                self.attendant,
                (self._tail, self._input),
                lambda: self._console.left_out,
                self._closing,
            )
            return
        self.answering.emit("restarted")

    def _ask(self, request: Outcome, patience: float) -> bool:
        assert self._machine is not None
        # Imported when it is wanted, as most guests power off by themselves.
        from pyvmm.monitor.power_off import PowerOff

        self._asking = PowerOff(self._machine, self.name, self._tell_asked)
        return self._asking.ask(patience, request)

    def _look(self) -> None:
        self.attendant.look()
        if self._asking is not None:
            self._asking.look()
        if self._hotplug is not None:
            self._hotplug.look()
        if self.confinement is not None:
            self.confinement.look()

    def _tell_asked(self, how: str) -> None:
        self.answering.emit("stopping", asked=how)

    # What Machine asks when the guest has ended by itself.

    def pause(self, outcome: Outcome) -> float | None:
        """See Restarting. The last of what the guest has said is looked at first: it may be a
        panic."""
        self._console.settle()
        pause = self._policy.pause(
            outcome,
            panicked=self.attendant.saw_panic(),
            has_devices=bool(self._prepared.devices),
            came_up=self.attendant.guest_came_up,
            printed=self.attendant.watcher.bytes_seen > 0,
        )
        if pause is not None:
            self._warn("the guest asked for a reset, and starts again")
        return pause

    def build(self) -> Parts | Outcome:
        """See Restarting."""
        self._of_boot.close()
        if self._hotplug is not None:
            self._hotplug.guest_restarts()
        try:
            if self.confinement is not None:
                self.confinement.check_files()
            self._prepared = prepare_again(self._prepared)
            parts = self._parts()
        except PyvmmError as error:
            return Outcome(Ending.FAILED, f"the guest cannot be started again: {error}")
        if self._input is not None:  # before the guest runs: what it is told first is not lost
            self._input.replace_serial(parts.serial)
        return parts


def _join_virtio_console(prepared: Prepared, console: Console) -> InputPort | None:
    """Give the console to the device that is to have it; where the input goes then."""
    for spec, device in zip(prepared.spec.parts, prepared.devices, strict=True):
        if isinstance(spec, DeviceSpec) and spec.console:
            port: InputPort = registry.load(spec.kind).join_terminal(device, console)
            return port
    return None


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
