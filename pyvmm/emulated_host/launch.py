"""Starts QEMU for an emulated host."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from pyvmm.emulated_host.architecture import emulated_machine
from pyvmm.emulated_host.cache import boot_files
from pyvmm.emulated_host.initramfs import RunSettings, settings_of
from pyvmm.emulated_host.ports import Port, open_machine_ports, open_run_ports
from pyvmm.emulated_host.qemu import (
    OpenDisk,
    Qcow2Disk,
    boot_arguments,
    machine_arguments,
    open_disk,
    restore_arguments,
    run_arguments,
)
from pyvmm.emulated_host.spec import EmulatedHostError, EmulatedHostSpec, HostDisk
from pyvmm.errors import ConfigError
from pyvmm.host import helper_box
from pyvmm.host.files import open_image
from pyvmm.host.programs import find_program
from pyvmm.host.qcow2 import Layer

SETPRIV_CURE = "apt-get install util-linux"


@dataclass
class Launched:
    """A running QEMU: our ends of its streams, and the `settings` of the run in it, if it has one;
    `restored` if it goes on from a saved state."""

    process: subprocess.Popen[bytes]
    ports: list[Port]
    console: socket.socket
    messages: socket.socket
    qmp: socket.socket
    settings: RunSettings | None = None

    @property
    def restored(self) -> bool:
        """True if it goes on from a saved state, and does not boot."""
        return self.settings is not None and self.settings.restored

    def port(self, name: str) -> socket.socket:
        """Our end of the port of that name."""
        return next(port.ours for port in self.ports if port.name == name)

    def kill(self) -> None:
        """End QEMU. What has been written to disks is in the page cache of this machine."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Close all our ends."""
        for end in (self.console, self.messages, self.qmp, *(port.ours for port in self.ports)):
            end.close()


def require_setpriv() -> str:
    """The path of setpriv. Raises ConfigError, with the cure, if it is missing."""
    setpriv = find_program("setpriv")
    if setpriv is None:
        raise ConfigError("an emulated KVM host needs setpriv", cure=SETPRIV_CURE)
    return setpriv


def launch(
    spec: EmulatedHostSpec, argv: Sequence[str] = (), *, state_fd: int | None = None
) -> Launched:
    """Start QEMU, to run `argv` in it. It goes on from the saved state in the open file `state_fd`,
    if there is one, or boots. Without `argv` the machine waits once it has booted, and nothing of a
    run is in it. Raises ConfigError or EmulatedHostError.

    QEMU gets SIGKILL when the calling thread ends, and so when the process is killed.
    """
    machine = emulated_machine(spec.image.architecture)
    written = [folder.path for folder in spec.folders if argv and not folder.read_only]
    # Whatever kills us takes QEMU along: prctl(2), PR_SET_PDEATHSIG.
    qemu = [require_setpriv(), "--pdeathsig", "KILL", "--", *_in_box(spec.image.qemu, written)]
    settings = settings_of(spec, argv, restored=state_fd is not None) if argv else None
    inherited: list[int] = []
    stream_fds = [stream.fd for stream in spec.streams]
    ports = open_machine_ports()
    run_ports = open_run_ports(len(spec.sinks), len(spec.streams)) if argv else []
    console, console_theirs = socket.socketpair()
    messages, messages_theirs = socket.socketpair()
    qmp, qmp_theirs = socket.socketpair()
    launched_ports = [*ports, *run_ports]
    try:
        arguments = machine_arguments(
            spec, console_fd=console_theirs.fileno(), qmp_fd=qmp_theirs.fileno(), ports=ports
        )
        if argv:
            disks = _open_disks(spec.disks, inherited)
            arguments += run_arguments(spec, ports=run_ports, disks=disks, stream_fds=stream_fds)
        if state_fd is None:
            tsc_khz = None if spec.image.is_foreign else machine.frequency_khz()
            arguments += boot_arguments(spec, boot_files(spec.image), tsc_khz)
        else:
            inherited.append(os.dup(state_fd))
            arguments += restore_arguments(inherited[-1])
        theirs = (console_theirs, qmp_theirs, *(port.theirs for port in launched_ports))
        process = _spawn(
            [*qemu, *arguments],
            messages_theirs,
            [*inherited, *stream_fds, *(end.fileno() for end in theirs)],
        )
    except BaseException:
        for end in (console, messages, qmp, *(port.ours for port in launched_ports)):
            end.close()
        raise
    finally:
        for end in (messages_theirs, console_theirs, qmp_theirs):
            end.close()
        for port in launched_ports:
            port.theirs.close()
        for fd in inherited:
            os.close(fd)
    console.setblocking(False)
    messages.setblocking(False)
    return Launched(process, launched_ports, console, messages, qmp, settings)


def _in_box(qemu: Sequence[str], written: Sequence[str]) -> list[str]:
    """QEMU's command line, in a box in which it writes to `written` only. Its program may be named
    as a shell would find it."""
    path = find_program(qemu[0]) if "/" not in qemu[0] else qemu[0]
    return list(qemu) if path is None else helper_box.command([path, *qemu[1:]], written)


def _spawn(command: list[str], messages: socket.socket, fds: list[int]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=messages.fileno(),
            stderr=messages.fileno(),
            pass_fds=fds,
            # Ctrl-C on the terminal is for us to pass on, not for QEMU to die of.
            start_new_session=True,
        )
    except OSError as error:
        raise EmulatedHostError(f"cannot start {command[0]}: {error.strerror}") from None


def _open_disks(disks: Sequence[HostDisk], inherited: list[int]) -> list[OpenDisk | Qcow2Disk]:
    opened: list[OpenDisk | Qcow2Disk] = []
    for disk in disks:
        if disk.layers:
            layers = tuple(_duplicate(layer) for layer in disk.layers)
            inherited += [file.fd for layer in layers for file in layer.files]
            opened.append(Qcow2Disk(layers, disk.direct))
            continue
        # A duplicate shares the open file description, and with it the lock.
        fd = open_image(disk.path, read_only=disk.read_only).fd if disk.fd is None else disk.fd
        if disk.fd is not None:
            fd = os.dup(fd)
        inherited.append(fd)
        opened.append(open_disk(fd, disk.read_only, disk.direct))
    return opened


def _duplicate(layer: Layer) -> Layer:
    image, data = layer.image, layer.data
    return layer._replace(
        image=image.duplicate(),
        data=None if data is None else data.duplicate(),
    )
