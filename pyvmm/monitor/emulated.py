"""`pyvmm run` in an emulated KVM host: checked here, run there, with this terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from pyvmm.emulated_host import (
    OWN_MEMORY_MIB,
    EmulatedHost,
    EmulatedHostSpec,
    HostListener,
    HostSink,
)
from pyvmm.emulated_host import foreign as foreign_programs
from pyvmm.emulated_host.find import find_image
from pyvmm.emulated_host.host import GRACE
from pyvmm.emulated_host.spec import cpus_for
from pyvmm.errors import ConfigError
from pyvmm.host import log, own_python
from pyvmm.host.unix_sockets import Socket
from pyvmm.kinds import registry
from pyvmm.kinds.border import Border, Crossing
from pyvmm.kinds.vm_spec import absolute, to_json, with_paths
from pyvmm.machine.board.registry import is_foreign, uname_of
from pyvmm.machine.builder import check_boot
from pyvmm.machine.outcome import Ending
from pyvmm.machine.trace import cannot_write
from pyvmm.monitor import emulated_inside
from pyvmm.monitor.emulated_plug import Plugging
from pyvmm.platform.console import standard_fds
from pyvmm.platform.escape import HELP, Command, EscapeParser
from pyvmm.platform.terminal import Terminal, is_terminal
from pyvmm.platform.window_size import SERVICE, SizeService
from pyvmm.spec.surroundings import AUTO, EXEC, STOP_SECONDS, STRICT, USUAL, Surroundings
from pyvmm.spec.vm import DeviceSpec, DiskSpec, VmSpec

if TYPE_CHECKING:
    from pyvmm.control.doors import Door
    from pyvmm.control.vm_log import VmLog

_MIB = 1 << 20
_TRACE_PATH = "/run/pyvmm-trace"
_NOT_SHARED = ("/dev/", "/proc/", "/sys/")  # the emulated host has its own


def run_emulated(
    spec: VmSpec,
    because: str | None = None,
    *,
    control: Socket | None = None,
    stop_patience: float = STOP_SECONDS,
    vm_log: VmLog | None = None,
    surroundings: Surroundings = USUAL,
    doors: Sequence[Door] = (),
) -> int:
    """Run `spec` in an emulated KVM host; the exit code is the guest's. Requests to the listening
    socket `control` are answered from inside. A guest that a signal asks to power off has
    `stop_patience` seconds. What comes out is kept in `vm_log` too. `surroundings` are for the
    monitor inside (pyvmm.monitor.confine), as far as they can be; `doors` are their sockets.

    Everything the user may have got wrong is found here, before the emulated host starts: it takes
    seconds to come up. Then `because` says why there is an emulated host at all. The disks stay
    locked by this process until it has gone.
    """
    with ExitStack() as closing:
        described = to_json(with_paths(spec, absolute))
        if not spec.restored_from:
            check_boot(spec)
        crossings = _cross(spec, closing)
        spec = _inside(spec, crossings)
        sinks = _trace_sink(spec, closing)
        if sinks:
            spec = replace(spec, trace_file=sinks[0].path)
        size = _size_service(crossings)
        strict = surroundings.confine == STRICT
        plugging = closing.enter_context(
            Plugging(spec, _visible, emulated_inside.CONTROL_PATH, strict=strict)
        )
        foreign = is_foreign(spec.arch)
        image = find_image(make=True, architecture=uname_of(spec.arch))
        host = EmulatedHostSpec(
            image=image,
            memory_mib=spec.memory // _MIB + OWN_MEMORY_MIB,
            cpus=cpus_for(spec.cpus),
            disks=tuple(disk for crossing in crossings for disk in crossing.disks),
            sinks=sinks,
            sockets_in=(
                *_control_listeners(control, doors, plugging),
                *_device_listeners(crossings),
            ),
            sockets_out=tuple(path for crossing in crossings for path in crossing.reached),
            streams=tuple(stream for crossing in crossings for stream in crossing.streams),
            folders=tuple(folder for crossing in crossings for folder in crossing.folders),
            services={} if size is None else {SERVICE: size.connect},
            cwd="/",
            env=foreign_programs.environment(own_python.environment(), image),
        )
        if because is not None:
            hint = "" if foreign else " (--kvm=host insists, `pyvmm doctor` explains)"
            log.to_stderr(
                f"{because}; running in an emulated KVM host, 10 to 20 times slower than real KVM"
                f"{hint}"
            )
            if vm_log is not None:
                vm_log.last_message = b""  # that is not why the VM ends
        argv = own_python.command(
            emulated_inside.__name__,
            *(described, to_json(spec), str(stop_patience), _around(surroundings)),
            program=foreign_programs.PYTHON if foreign else "",
        )
        return _join_terminal(host, argv, size, stop_patience, vm_log)


def _around(surroundings: Surroundings) -> str:
    """The surroundings of the monitor inside. Raises ConfigError for what it cannot have there."""
    if surroundings.user not in ("", AUTO):
        raise ConfigError(
            "the monitor in an emulated KVM host is that machine's root",
            cure="start pyvmm as that user",
            option="--user",
        )
    inside = replace(
        surroundings,
        allow_read=tuple(_visible(path, "--allow-read") for path in surroundings.allow_read),
        cgroup="",
        user="",
    )
    return json.dumps(inside.as_values())


def _size_service(crossings: list[Crossing]) -> SizeService | None:
    stdout = standard_fds()[1]
    wanted = any(crossing.sizes_terminal for crossing in crossings)
    return SizeService(stdout) if wanted and stdout is not None and is_terminal(stdout) else None


def _control_listeners(
    control: Socket | None, doors: Sequence[Door], plugging: Plugging
) -> list[HostListener]:
    path = emulated_inside.CONTROL_PATH
    if control is None:
        return []
    return [
        HostListener(path, control, True, take=plugging.take),
        *(
            HostListener(
                emulated_inside.door_path(number),
                door.socket,
                door.owner_only,
                # What is this machine's is for those who have all rights.
                take=plugging.take if door.rights == EXEC else None,
                # More than are let in, so that those who are not are told.
                most=2 * door.most,
            )
            for number, door in enumerate(doors)
        ),
    ]


def _device_listeners(crossings: list[Crossing]) -> list[HostListener]:
    return [
        HostListener(path, listener.socket)
        for crossing in crossings
        for listener, path in crossing.listening
    ]


def _cross(spec: VmSpec, closing: ExitStack) -> list[Crossing]:
    border = Border(closing, _visible, machine=uname_of(spec.arch))
    return [registry.cross(part, border) for part in spec.parts]


def _inside(spec: VmSpec, crossings: list[Crossing]) -> VmSpec:
    """`spec` with its devices as they are to be asked for inside, and with paths that mean the same
    there: not relative, not through this process' descriptors (/dev/fd/3). Raises ConfigError for
    what cannot be seen from inside."""
    parts = [crossing.spec for crossing in crossings]
    return replace(
        spec,
        kernel=_boot_file(spec, spec.kernel, "--kernel"),
        restored_from=spec.restored_from and _visible(spec.restored_from, "--restore"),
        initrd=None if spec.initrd is None else _boot_file(spec, spec.initrd, "--initrd"),
        disks=tuple(part for part in parts if isinstance(part, DiskSpec)),
        devices=tuple(part for part in parts if isinstance(part, DeviceSpec)),
    )


def _boot_file(spec: VmSpec, path: str, option: str) -> str:
    found = _visible(path, option)
    return foreign_programs.path_inside(found) if is_foreign(spec.arch) else found


def _trace_sink(spec: VmSpec, closing: ExitStack) -> tuple[HostSink, ...]:
    if not spec.trace or spec.trace_file is None:
        return ()
    try:
        file = open(spec.trace_file, "wb")  # noqa: SIM115 - `closing` closes it
    except OSError as error:
        raise cannot_write(spec.trace_file, error) from None
    closing.callback(file.close)
    return (HostSink(_TRACE_PATH, file.fileno()),)


def _visible(path: str, option: str) -> str:
    real = os.path.realpath(path)
    if real.startswith(_NOT_SHARED) or not os.path.exists(real):
        raise ConfigError(
            f"{path} cannot be seen from the emulated KVM host",
            cure="copy it to /tmp, say",
            option=option,
        )
    return real


def _join_terminal(
    spec: EmulatedHostSpec,
    argv: list[str],
    size: SizeService | None,
    stop_patience: float,
    vm_log: VmLog | None,
) -> int:
    stdin, stdout = standard_fds()
    keyboard = _Keyboard()
    with ExitStack() as closing:
        null = os.open(os.devnull, os.O_WRONLY)
        closing.callback(os.close, null)
        host = EmulatedHost(
            spec,
            argv,
            stdin=stdin,
            stdout=null if stdout is None else stdout,
            stderr=2 if sys.stderr is not None else null,
            on_input=keyboard.filter if is_terminal(stdin) else None,
            on_output=None if vm_log is None else (vm_log.console, vm_log.messages),
        )
        keyboard.on_quit = lambda: host.request_stop(signal.SIGQUIT)

        def on_signal(number: int, frame: object) -> None:
            # The first may have the guest asked inside, the next cuts its power there.
            first = number != signal.SIGQUIT and host.stop_requests == 0
            host.request_stop(number, GRACE + (stop_patience if first else 0.0))

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            closing.callback(signal.signal, number, signal.signal(number, on_signal))
        # Until QEMU is there nobody reads the keyboard, whose Ctrl-C is to be a signal until then.
        host.start()
        terminal = closing.enter_context(Terminal(stdin))
        if size is not None:
            terminal.watch_size(stdout, size.tell)
        code = host.wait()
    if keyboard.quitting:
        log.to_stderr("ended by Ctrl-A x")
        return Ending.QUIT.value
    return code


class _Keyboard:
    """The Ctrl-A keys, taken out on this side: they must work even if the other side hangs."""

    def __init__(self) -> None:
        self._parser = EscapeParser()
        self.quitting = False
        self.on_quit: Callable[[], None] = lambda: None

    def filter(self, data: bytes) -> bytes:
        """The part of `data` that is for the guest."""
        to_guest, commands = self._parser.feed(data)
        for command in commands:
            if command is Command.QUIT:
                self.quitting = True
                self.on_quit()
            else:
                _show_help()
        return to_guest


def _show_help() -> None:
    try:
        if sys.stdout is not None:
            sys.stdout.write("\r\n" + HELP.replace("\n", "\r\n"))
            sys.stdout.flush()
    except OSError:
        pass  # Nobody reads any more; the guest does not depend on it.
