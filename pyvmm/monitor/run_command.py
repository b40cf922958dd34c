"""`pyvmm run … -- CMD`: boot, run one command with this terminal, power off, exit with its code.

The process forks. The parent becomes the monitor: whatever ends it, the guest goes with it. The
child is a client like `pyvmm exec`, and so takes no time from the vCPUs; it keeps the end of the
guest's console output, to show it if the command never runs.

Ctrl-C is the client's. A terminal sends it to both, and a program to the parent, whose number it
knows: so the parent takes it and passes it on, by a pipe, as it may be another user by then. The
client makes a signal of it that it sends nobody else.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from threading import Event, Thread, get_ident
from types import FrameType
from typing import TYPE_CHECKING

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import log, output, pausing
from pyvmm.host.pausing import Watcher
from pyvmm.host.unix_sockets import Socket
from pyvmm.spec.vm import DiskSpec, VmSpec

if TYPE_CHECKING:
    from pyvmm.agent import Agent

BOOT_PATIENCE = 300.0  # seconds until the agent answers; also for a guest in an emulated KVM host
_OFF_PATIENCE = 90.0  # as systemd gives its services; Ctrl-C does not wait for it
_END_PATIENCE = 10.0  # a guest that panics says a lot before it is over
_CUT_SECONDS = 1.0  # between asking the monitor to end, and not asking any more
_KILL_SECONDS = 10.0
_TAIL_LINES = 20
_TAIL_BYTES = 16 << 10
# How Linux begins its reports of what it has done wrong, as far as "quiet" lets them through.
_COMPLAINT = re.compile(
    r"\b(BUG: |Oops: |Oops - |Internal error: |Unable to handle kernel |general protection fault"
    r"|kernel BUG at |Kernel panic - ).*"
)
# Init has nobody to serve on the console, and the kernel nothing to say there.
_CMDLINE = "quiet pyvmm.exec=agent"
# What the monitor gets, and what the client sends itself for it.
_PASSED_ON: dict[int, int] = {signal.SIGINT: signal.SIGUSR1, signal.SIGQUIT: signal.SIGUSR2}

_MAKE_WAY = signal.SIGRTMIN  # what ends the monitor's thread that waits for signals

_CONSOLE_ENDED = signal.SIGALRM  # what a thread of the client wakes its main thread by


@dataclass(frozen=True)
class CommandLine:
    """The command that runs in the guest; `env` are NAME=VALUE, and `user_option` is the option
    that has named `user`, if one has."""

    argv: tuple[str, ...]
    env: tuple[str, ...] = ()
    cwd: str | None = None
    user: str | None = None
    user_option: str = ""


def for_image(command: Sequence[str], image: str | None) -> CommandLine:
    """The command as a container image wants it to be run, if `image` is one. Raises ConfigError
    for an image of before there was an agent."""
    if image is not None:
        from pyvmm import images

        found = images.machine_image(image, make=False)
        if not found.has_agent:
            raise ConfigError(
                f"the image {image} was made without the agent that runs commands",
                cure=f"make it again: pyvmm image rm {image}, then pyvmm image build",
            )
        process = found.process
        if process is not None:
            argv = process.argv(tuple(command))
            return CommandLine(argv, process.env, process.cwd, process.account)
    return CommandLine(tuple(command))


def for_command(spec: VmSpec, *, rm: bool) -> VmSpec:
    """`spec` for a guest that serves one command: it has a vsock device, and says less. With `rm`
    what the guest changes on the root disk is thrown away."""
    from pyvmm.kinds import vsock as device_vsock

    if not any(device.kind == "vsock" for device in spec.devices):
        spec = replace(spec, devices=(*spec.devices, device_vsock.Spec()))
    if rm and spec.disks:
        spec = replace(spec, disks=(_thrown_away(spec.disks[0]), *spec.disks[1:]))
    # The command does not survive a reboot: the run is over then, as for one that powers off.
    return replace(spec, cmdline=f"{_CMDLINE} {spec.cmdline}".strip(), on_reboot="end")


def _thrown_away(disk: DiskSpec) -> DiskSpec:
    if disk.base_read_only or disk.storage == "ram":
        return disk
    if disk.direct:
        raise ConfigError(
            f"{disk.path}: with --rm the root disk is a snapshot, which cannot be direct",
            cure="leave one out",
            option="--disk",
        )
    return replace(disk, snapshot=True)


def run_with_command(
    spec: VmSpec,
    control: Socket | None,
    run: Callable[[], int],
    command: CommandLine,
    *,
    debug: bool,
) -> tuple[int, bool]:
    """Have `run` be the monitor of `spec`, whose control socket is `control`, and run `command` in
    the guest; the command's exit code and True, or the guest's and False if it ends before. Raises
    HostError."""
    if control is None:
        raise ConfigError(
            "without a control socket no command reaches the guest",
            cure="set XDG_RUNTIME_DIR to a directory of yours",
        )
    console, result, signals = os.pipe(), os.pipe(), os.pipe()
    _flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, (*_PASSED_ON, *_PASSED_ON.values()))
    try:
        child = os.fork()
    except OSError as error:
        raise HostError(error.errno or 0, "fork") from None
    if not child:
        try:
            control.close()  # who listens is the monitor
            os.close(console[1])
            os.close(result[0])
            os.close(signals[1])
            Thread(target=_hear_signals, args=(signals[0],), name="signals", daemon=True).start()
            code = _Client(spec, console[0], command, debug=debug).run()
            if code is not None:
                os.write(result[1], bytes([code & 0xFF]))
        finally:
            _flush()
            os._exit(0)
    os.close(console[0])
    os.close(result[1])
    os.close(signals[0])
    return _be_monitor(run, child, console[1], result[0], signals[1])


def _hear_signals(numbers: int) -> None:
    while number := os.read(numbers, 1):
        os.kill(os.getpid(), number[0])


def _be_monitor(
    run: Callable[[], int], child: int, console: int, result: int, signals: int
) -> tuple[int, bool]:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON.values())
    attending = _Attending(child, signals)
    null = os.open(os.devnull, os.O_RDWR)
    stdout = os.dup(1)
    os.dup2(null, 0)
    os.dup2(console, 1)
    os.close(console)
    try:
        code = run()
    finally:
        attending.over()
        _flush()
        os.dup2(null, 1)
        output.close_streams()  # the client sees the console's end
        told = os.read(result, 1)
        os.waitpid(child, 0)
        os.dup2(stdout, 1)
        for fd in (null, stdout, result, signals):
            os.close(fd)
    if told:
        return told[0], True
    if not code:
        log.to_stderr("the guest powered off before the command had ended")
    return code or 1, False


class _Attending:
    """The monitor's duties to its client: pass Ctrl-C on, and not go on without it."""

    def __init__(self, client: int, signals: int) -> None:
        self._signals = signals
        self._over = Event()
        Watcher(os.pidfd_open(client), "client", self._end_with_it)
        signal.pthread_sigmask(signal.SIG_BLOCK, {_MAKE_WAY})
        self._start()
        pausing.register(self)

    def over(self) -> None:
        """The monitor has ended its work."""
        self._over.set()

    def pause(self) -> None:
        signal.pthread_kill(self._passing.ident or 0, _MAKE_WAY)
        self._passing.join()

    def go_on(self) -> None:
        self._start()

    def _start(self) -> None:
        self._passing = Thread(target=self._pass_on, name="client", daemon=True)
        self._passing.start()

    def _pass_on(self) -> None:
        while (number := signal.sigwait((*_PASSED_ON, _MAKE_WAY))) != _MAKE_WAY:
            with suppress(BrokenPipeError):  # it has gone
                os.write(self._signals, bytes([_PASSED_ON[number]]))

    def _end_with_it(self) -> bool:
        while not self._over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)
            self._over.wait(_CUT_SECONDS)
        return False


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def _age() -> float:
    """Seconds since this process' parent, which the client was forked from, was started."""
    with open(f"/proc/{os.getppid()}/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])  # proc(5): starttime
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


class _Client:
    """The process that runs the command and watches the console."""

    def __init__(self, spec: VmSpec, console: int, command: CommandLine, *, debug: bool) -> None:
        self._spec = spec
        self._command = command
        self._debug = debug
        self._tail: deque[bytes] = deque()
        self._kept = 0
        self._monitor = os.getppid()
        self._times = [("start", time.monotonic() - _age())]
        self._console = Thread(target=self._watch_console, args=(console,), daemon=True)
        self._main = get_ident()
        self._waiting = False  # for the agent
        self._console_ended = False

    def run(self) -> int | None:
        """The exit code; None if it is for the monitor to say, as the guest has ended."""
        from pyvmm.host.leaving import Left

        def leave(number: int, frame: FrameType | None) -> None:
            raise Left(given[number])

        given = {passed: number for number, passed in _PASSED_ON.items()}
        for number in given:
            signal.signal(number, leave)
        self._console.start()  # by which `_end_monitor` sees the end, however early that is
        try:
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, given)
                return self._run()
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, given)  # one more changes nothing
        except Left as left:
            self._end_monitor()
            return left.code

    def _run(self) -> int | None:
        from pyvmm.agent import AgentGone
        from pyvmm.control.client import NoAnswer
        from pyvmm.monitor.exit_code import explain

        self._note("start")
        try:
            code = self._run_command()
        except NoAnswer:  # it never came up
            self._console.join(_END_PATIENCE)
            self._show_tail()
            return None
        except Exception as error:
            # Has the agent gone alone, or the guest with it? Its monitor says how it ended.
            if isinstance(error, AgentGone) and self._has_ended():
                self._tell_complaint()
                return None
            if self._debug:
                import traceback

                log.to_stderr(traceback.format_exc())
            code = explain(error)
            self._show_tail()
            self._end_monitor()
            return code
        self._power_off()
        self._tell_complaint()
        self._note("power-off")
        if self._debug:
            self._tell_times()
        return code

    def _end_monitor(self) -> None:
        """End the monitor and its guest, which is not waited for."""
        for number in _PASSED_ON.values():
            signal.signal(number, signal.SIG_IGN)  # it could not be quicker
        deadline = time.monotonic() + _KILL_SECONDS
        while os.getppid() == self._monitor:
            late = time.monotonic() > deadline
            os.kill(self._monitor, signal.SIGKILL if late else signal.SIGTERM)
            self._console.join(_CUT_SECONDS)  # a second signal cuts what the first one asks for
            if not self._console.is_alive():
                return

    def _note(self, stage: str) -> None:
        """`stage` ends now."""
        self._times.append((stage, time.monotonic()))

    def _tell_times(self) -> None:
        stages = [
            f"{stage} {end - begin:.3f}" for (_, begin), (stage, end) in pairwise(self._times)
        ]
        whole = self._times[-1][1] - self._times[0][1]
        log.to_stderr(f"{self._spec.name}: took {whole:.3f} s: {', '.join(stages)}")

    def _has_ended(self) -> bool:
        self._console.join(_END_PATIENCE)
        return not self._console.is_alive()

    def _run_command(self) -> int:
        from pyvmm.monitor.attached import agent_of, attach, terminal_size
        from pyvmm.platform.console import standard_fds
        from pyvmm.platform.terminal import is_terminal

        stdin, stdout = standard_fds()
        tty = is_terminal(stdin) and is_terminal(stdout)
        env = dict(variable.partition("=")[::2] for variable in self._command.env)
        if tty and "TERM" in os.environ:
            env.setdefault("TERM", os.environ["TERM"])
        agent = agent_of(self._spec.name)
        self._wait_for(agent)
        self._note("boot")
        process = agent.open(
            self._command.argv,
            env=env,
            cwd=self._command.cwd,
            user=self._command.user,
            stdin=stdin is not None,
            tty=terminal_size(stdout, stdin) if tty else None,
        )
        signals = {passed: number for number, passed in _PASSED_ON.items()}
        with process:
            code = attach(
                process,
                stdin,
                stdout,
                tty=tty,
                signals=signals,
                user_option=self._command.user_option,
            )
        self._note("command")
        self._agent = agent
        return code

    def _wait_for(self, agent: Agent) -> None:
        """Raises NoAnswer as soon as the monitor has ended its work. The socket at which it was
        asked is there until we have ended, so that a request may be one that nobody takes."""
        from pyvmm.control.client import NoAnswer

        def give_up(number: int, frame: FrameType | None) -> None:
            if self._waiting:
                raise NoAnswer(f"{self._spec.name} has ended")

        signal.signal(_CONSOLE_ENDED, give_up)
        try:
            # We say that we wait and then look; the console's thread does it the other way round.
            # So one of the two sees the other.
            self._waiting = True
            if self._console_ended:
                raise NoAnswer(f"{self._spec.name} has ended")
            agent.wait_ready(BOOT_PATIENCE)
        finally:
            self._waiting = False

    def _power_off(self) -> None:
        """The monitor ends when the guest has; if that takes too long, by a signal."""
        from pyvmm.errors import PyvmmError

        try:
            self._agent.power_off(quick=not self._spec.keeps)
        except PyvmmError as error:
            log.to_stderr(f"{self._spec.name}: cannot be powered off: {error}")
        else:
            self._console.join(_OFF_PATIENCE)
            if not self._console.is_alive():
                return
            log.to_stderr(f"{self._spec.name}: still runs {_OFF_PATIENCE:g} s after its power-off")
        self._end_monitor()

    def _watch_console(self, console: int) -> None:
        while data := os.read(console, 1 << 16):
            if self._debug:
                os.write(2, data)
            self._tail.append(data)
            self._kept += len(data)
            while self._kept - len(self._tail[0]) > _TAIL_BYTES:
                self._kept -= len(self._tail.popleft())
        self._console_ended = True
        if self._waiting:
            signal.pthread_kill(self._main, _CONSOLE_ENDED)

    def _show_tail(self) -> None:
        if self._debug:
            return  # all of it was shown
        lines = self._lines()
        panics = [index for index, line in enumerate(lines) if "Kernel panic" in line]
        if panics:  # what follows is registers
            lines = lines[: panics[0] + 1]
        for line in lines[-_TAIL_LINES:]:
            log.to_stderr(f"console: {line}")

    def _tell_complaint(self) -> None:
        """One line for whoever sees the command's output alone, if the kernel has said on the
        console that something is wrong in it."""
        complaint = next(filter(None, map(_COMPLAINT.search, self._lines())), None)
        if complaint is not None and not self._debug:
            name = self._spec.name
            log.to_stderr(
                f"{name}: the guest's kernel said: {complaint[0]:.120}; pyvmm logs {name}"
            )

    def _lines(self) -> list[str]:
        """The end of what the console has shown."""
        text = b"".join(self._tail).decode(errors="replace")
        lines = (line.rstrip() for line in text.splitlines() if line.strip())
        return ["".join(one if one.isprintable() else "�" for one in line) for line in lines]
