"""The knowledge of a keeper, whether it sleeps (pyvmm.monitor.asleep) or not."""

from __future__ import annotations

import signal
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyvmm.host import confinement
from pyvmm.host.confinement import Call
from pyvmm.monitor import asleep

ANSWER = struct.Struct("=i")
REMOVE = struct.Struct("=3sxI")
# What is not the keeper's affair: the terminal's, and a shutdown's, whose monitor it ends with.
NOT_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)


class State(NamedTuple):
    """What a keeper knows, with numbers of descriptors: see Keeper. `monitor` is that process,
    `alive` a descriptor of it (pidfd_open(2)) or -1, `socket` the way to it. `module` is what
    wakes, and `packages` are the folders that Python looks in. `held` only stay open. `named` are
    the paths of files that were announced, each also without links in its folder's; `files` those
    to remove, as asleep.File. `doors` are a listener, a channel, and whether its owner alone is
    heard."""

    place: str
    name: str
    user: tuple[int, int] | None
    is_inside: bool
    monitor: int
    awake: float
    alive: int
    socket: int
    module: str
    packages: list[str]
    group: tuple[str, ...]
    held: list[int]
    named: list[tuple[str, str]]
    files: list[tuple[int, str, int, int]]
    doors: list[tuple[int, int, bool]]

    def lasting(self) -> Iterator[int]:
        """The descriptors that it always has."""
        yield self.socket
        if self.alive >= 0:
            yield self.alive
        yield from self.held
        yield from {folder for folder, _, _, _ in self.files}
        for listener, channel, _ in self.doors:
            yield listener
            yield channel

    def places(self) -> range:
        """See asleep.places."""
        return asleep.places(self.lasting(), len(self.doors))

    def program(self, memory: int, calls: Iterable[Call] = ()) -> int:
        """What it is while it sleeps; this is in the file `memory`. Raises OSError, ValueError."""
        return asleep.make(
            self.python(memory),
            self.socket,
            self.alive,
            [
                asleep.Door(listener, channel, place)
                for place, (listener, channel, _) in zip(self.places(), self.doors, strict=True)
            ],
            [asleep.File(*file) for file in self.files],
            has_work_at_the_end=bool(self.group),
            calls=calls,
        )

    def python(self, memory: int, *more: str) -> list[str]:
        """The command line of what it is when it wakes."""
        return confinement.python(self.module, str(memory), f"for {self.name}", *more)


def begin(state: State) -> Iterator[Call]:
    """The system calls that a keeper makes as the first thing: it gives up what it never needs."""
    from pyvmm.host import box

    if not state.is_inside:
        yield from box.outside_calls()
