"""Starts QEMU for an emulated host."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from pyvmm.emulated_host.architecture import emulated_machine
from pyvmm.emulated_host.cache import boot_files
from pyvmm.emulated_host.initramfs import run_archive, settings_of
from pyvmm.emulated_host.limits import check_memory
from pyvmm.emulated_host.ports import Port, open_ports
from pyvmm.emulated_host.qemu import OpenDisk, Qcow2Disk, open_disk, qemu_arguments
from pyvmm.emulated_host.spec import EmulatedHostError, EmulatedHostSpec, HostDisk
from pyvmm.errors import ConfigError
from pyvmm.host import helper_box
from pyvmm.host.files import open_image
from pyvmm.host.programs import find_program
from pyvmm.host.qcow2 import Layer

SETPRIV_CURE = "apt-get install util-linux"


@dataclass
class Launched:
    """A running QEMU: our ends of its streams, and the mark that ends the output streams."""

    process: subprocess.Popen[bytes]
    ports: list[Port]
    console: socket.socket
    messages: socket.socket
    qmp: socket.socket
    mark: bytes

    @property
    def ends(self) -> list[socket.socket]:
        """All our ends."""
        return [self.console, self.messages, self.qmp, *(port.ours for port in self.ports)]


def require_setpriv() -> str:
    """The path of setpriv. Raises ConfigError, with the cure, if it is missing."""
    setpriv = find_program("setpriv")
    if setpriv is None:
        raise ConfigError("an emulated KVM host needs setpriv", cure=SETPRIV_CURE)
    return setpriv


def launch(spec: EmulatedHostSpec, argv: Sequence[str]) -> Launched:
    """Start QEMU, to run `argv` in it. Raises ConfigError or EmulatedHostError.

    QEMU gets SIGKILL when the calling thread ends, and so when the process is killed.
    """
    if not argv:
        raise ConfigError("there is no command to run in the emulated host")
    machine = emulated_machine(spec.image.architecture)
    # Whatever kills us takes QEMU along: prctl(2), PR_SET_PDEATHSIG.
    written = [folder.path for folder in spec.folders if not folder.read_only]
    qemu = _in_box(spec.image.qemu, written)
    qemu = [require_setpriv(), "--pdeathsig", "KILL", "--", *qemu]
    check_memory(spec.memory_mib)
    boot = boot_files(spec.image)
    settings = settings_of(spec, argv)
    inherited: list[int] = []
    ports = open_ports(len(spec.sinks), relay=spec.has_relay, stream_count=len(spec.streams))
    stream_fds = [stream.fd for stream in spec.streams]
    console, console_theirs = socket.socketpair()
    messages, messages_theirs = socket.socketpair()
    qmp, qmp_theirs = socket.socketpair()
    try:
        initramfs = _joined(boot.initramfs, run_archive(settings))
        inherited.append(initramfs)
        disks = _open_disks(spec.disks, inherited)
        arguments = qemu_arguments(
            spec,
            boot,
            initramfs_fd=initramfs,
            console_fd=console_theirs.fileno(),
            qmp_fd=qmp_theirs.fileno(),
            ports=ports,
            disks=disks,
            stream_fds=stream_fds,
            tsc_khz=None if spec.image.is_foreign else machine.frequency_khz(),
        )
        process = _spawn(
            [*qemu, *arguments],
            messages_theirs,
            [
                *inherited,
                *stream_fds,
                console_theirs.fileno(),
                qmp_theirs.fileno(),
                *(port.theirs.fileno() for port in ports),
            ],
        )
    except BaseException:
        for end in (console, messages, qmp, *(port.ours for port in ports)):
            end.close()
        raise
    finally:
        for end in (console_theirs, messages_theirs, qmp_theirs, *(port.theirs for port in ports)):
            end.close()
        for fd in inherited:
            os.close(fd)
    console.setblocking(False)
    messages.setblocking(False)
    return Launched(process, ports, console, messages, qmp, settings.mark.encode())


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


def _joined(base: str, addition: bytes) -> int:
    # An anonymous file: the settings hold the environment, which other users must not read.
    fd = os.memfd_create("initramfs", os.MFD_CLOEXEC)
    with open(base, "rb") as file:
        while os.sendfile(fd, file.fileno(), os.lseek(fd, 0, os.SEEK_END), 1 << 30):
            pass
    view = memoryview(addition)
    while view:
        view = view[os.write(fd, view) :]
    return fd


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
