"""The parts of an emulated host, as plain data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

from pyvmm.errors import PyvmmError
from pyvmm.host.qcow2 import Layer
from pyvmm.host.unix_sockets import Socket

# What the emulated host itself needs beside the RAM of the guests in it.
OWN_MEMORY_MIB = 512
DEFAULT_CPUS = 2


def cpus_for(vcpus: int) -> int:
    """The number of CPUs that an emulated host has for a guest of so many vCPUs.

    With more than one it ruined guests of several vCPUs now and then (docs/decisions/0071).
    """
    return DEFAULT_CPUS if vcpus == 1 else 1


BUSYBOX = "/dev/.pyvmm/busybox"
"""The place of a busybox in every emulated host: of other programs there are those that the machine
has, or none."""

# Names the port of the relay for Unix sockets, where there is one; see pyvmm.relay.inside.
RELAY_VARIABLE = "PYVMM_SOCKET_RELAY"


class EmulatedHostError(PyvmmError):
    """The emulated host itself failed: QEMU, or the Linux in it."""


@dataclass(frozen=True)
class HostImage:
    """The files that it boots. `kernel`: a generic Debian kernel, in any form that distributions
    have. `modules_dir`: its modules, with a modules.dep as depmod(8) writes it. `busybox`: a
    statically linked one. `qemu`: the beginning of QEMU's command line, its program first.

    `architecture` is what uname(2) calls it. Where that is another than the machine's, `programs`
    is a directory whose /usr is that architecture's: in it are Python and what pyvmm needs.
    """

    kernel: str
    modules_dir: str
    busybox: str
    qemu: tuple[str, ...]
    architecture: str = field(default_factory=lambda: os.uname().machine)
    programs: str = ""

    @property
    def is_foreign(self) -> bool:
        """True if the machine's own programs are of no use in it."""
        return self.architecture != os.uname().machine


@dataclass(frozen=True)
class HostDisk:
    """A file or block device of the machine that the command inside may use, at the same path.

    Inside it is a block device whose writes and flushes reach the real one. With `fd`, an open file
    descriptor of it, QEMU works on that open file description, and so holds the locks that were
    taken on it for as long as it lives. `read_only` must agree with how `fd` was opened.

    `layers` are a qcow2 image and what it builds on, open and locked, in place of `fd`: what is
    inside is the disk that the image holds. `direct`: past the machine's page cache.
    """

    path: str
    read_only: bool = False
    fd: int | None = None
    layers: tuple[Layer, ...] = ()
    direct: bool = False


@dataclass(frozen=True)
class HostSink:
    """A file that the command inside may write from start to end (a FIFO there, at the same path);
    what it writes goes to the machine's file descriptor `fd`."""

    path: str
    fd: int


@dataclass(frozen=True)
class HostListener:
    """A listening Unix socket of the machine: connections to it reach whoever listens at `path`
    inside. With `owner_only`, those of other users are closed at once. At most `most` are there at
    a time, and others wait; None stands for all that there may be.

    `take` sees what each connection says first, a whole line if there is one. If it returns
    something, that is called with the connection and what was said, and the connection goes nowhere
    else; it must not wait."""

    path: str
    socket: Socket
    owner_only: bool = False
    take: Callable[[bytes, Plugs], Callable[[Socket, bytes], None] | None] | None = None
    most: int | None = None


@dataclass(frozen=True)
class HostStream:
    """A stream for the command inside: what it writes to and reads from `path`, a character device
    there, goes to and comes from the machine's connected socket `fd`."""

    path: str
    fd: int


@dataclass(frozen=True)
class HostFolder:
    """A directory of the machine that is a 9p file system inside, by the mount tag `tag`, for the
    command to mount. What it writes stays, unless it is `read_only`."""

    tag: str
    path: str
    read_only: bool = False


class Plugs(NamedTuple):
    """The ways in which something gets into the emulated host: `plug_disk` and `plug_stream` until
    `closing` ends; `connect` reaches who listens at a path inside; `take_back` gives a connection
    that has been taken back to its listener, with what it has said and nobody has heard."""

    plug_disk: Callable[[HostDisk, str, ExitStack], str]
    plug_stream: Callable[[HostStream, ExitStack], str]
    connect: Callable[[str], Socket]
    take_back: Callable[[Socket, bytes], None]


def _current_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # It has been removed, and so would be missed inside too.
        return "/"


@dataclass(frozen=True)
class EmulatedHostSpec:
    """An emulated host: `memory_mib` in all (guest RAM + OWN_MEMORY_MIB), files as on the machine.

    `env` and `cwd` are the command's; everything it writes other than `disks`, `sinks` and
    `folders` is lost.

    `sockets_out` are paths of the machine's Unix sockets that the command may connect to, from
    where it serves pyvmm.relay.inside; one that ends in ``*`` stands for all with a decimal number
    there. `services` are reached the same way, by a name that is not a path: each call makes the
    machine's end of a connection.

    With `boots` it does not go on from a saved state, even if there is one.
    """

    image: HostImage
    memory_mib: int = 1024 + OWN_MEMORY_MIB
    cpus: int = DEFAULT_CPUS
    disks: tuple[HostDisk, ...] = ()
    sinks: tuple[HostSink, ...] = ()
    streams: tuple[HostStream, ...] = ()
    folders: tuple[HostFolder, ...] = ()
    sockets_in: tuple[HostListener, ...] = ()
    sockets_out: tuple[str, ...] = ()
    services: Mapping[str, Callable[[], Socket]] = field(default_factory=dict)
    boots: bool = False
    cwd: str = field(default_factory=_current_directory)
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def has_relay(self) -> bool:
        """True if there is a port for sockets."""
        return bool(self.sockets_in or self.sockets_out or self.services)
