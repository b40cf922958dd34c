"""The crossing of a VM into an emulated host: what a kind's `cross` is given, and gives back."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pyvmm.emulated_host import HostDisk, HostFolder, HostStream
    from pyvmm.host.named_listener import NamedListener
    from pyvmm.kinds.interface import Spec

Visible = Callable[[str, str], str]
"""Gives the path by which the file at a path is seen in an emulated host, or raises ConfigError,
which names the option that is the second argument."""


class Border:
    """The border as a kind's `cross` is given it.

    `closing` keeps open what it has opened, for as long as the emulated host lives. `visible` is
    told above. `runs`: the emulated host is there already, and takes no more file systems. It is a
    `machine`, by uname(2)'s name; `is_foreign` if that is not this one's.
    """

    def __init__(
        self, closing: ExitStack, visible: Visible, *, runs: bool = False, machine: str = ""
    ) -> None:
        self.closing = closing
        self.visible = visible
        self.runs = runs
        self.machine = machine or os.uname().machine
        self._given: dict[str, int] = {}

    @property
    def is_foreign(self) -> bool:
        """True if this machine's programs are of no use inside."""
        return self.machine != os.uname().machine

    def place(self, what: str) -> str:
        """A new path inside, for a thing of the kind `what` that has none of its own."""
        number = self._given[what] = self._given.get(what, -1) + 1
        return f"/run/pyvmm-{what}-{number}"


class Crossing(NamedTuple):
    """A device that will run in an emulated host, while what it uses stays on this machine.

    `spec` is what to ask for in there. Each of `disks` is a block device in there, at the same
    path; each of `streams` a character device; each of `folders` a 9p file system. Each listener of
    `listening` leads to a path in there; `reached` are paths of this machine's sockets that the
    device may connect to, ``*`` at the end being a number. `sizes_terminal`: it wants to know the
    terminal's size.
    """

    spec: Spec
    listening: tuple[tuple[NamedListener, str], ...] = ()
    reached: tuple[str, ...] = ()
    disks: tuple[HostDisk, ...] = ()
    streams: tuple[HostStream, ...] = ()
    folders: tuple[HostFolder, ...] = ()
    sizes_terminal: bool = False
