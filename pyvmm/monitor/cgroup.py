"""A group of processes (Documentation/admin-guide/cgroup-v2.rst) that a monitor and its helpers are
in, so that what they all use has a limit.

    /sys/fs/cgroup/vms                          join this one; its limits are its owner's affair
    /sys/fs/cgroup/vms,memory=1G,pids=64        make one below it for this VM, with limits
    own,cpus=1.5                                the same, beside the one that we are in
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.spec.sizes import parse_memory

_OPTION = "--cgroup"
_USAGE = "PATH or own, then memory=SIZE, pids=N or cpus=N after commas"
_PREFIX = "pyvmm-"
_TRIALS = 100  # to make a group that nobody takes for left behind
_STEP, _PATIENCE = 0.02, 10.0  # seconds
_PERIOD = 100_000  # microseconds, the kernel's default
_CONTROLLERS = {"memory.max": "memory", "pids.max": "pids", "cpu.max": "cpu"}


class Wanted(NamedTuple):
    """`place` is a group's folder, "" for the one above ours. `limits` are by file."""

    place: str
    limits: dict[str, str]

    @classmethod
    def parse(cls, text: str) -> Wanted:
        """Raises ConfigError."""
        place, *words = text.split(",")
        limits: dict[str, str] = {}
        for word in words:
            key, _, value = word.partition("=")
            file, limit = _limit(key, value)
            if file in limits:
                raise ConfigError(f"{key} is there twice", cure=_USAGE, option=_OPTION)
            limits[file] = limit
        if not place or "\0" in place:
            raise ConfigError(f"{place!r} is not a group", cure=_USAGE, option=_OPTION)
        return cls("" if place == "own" else place, limits)


def _limit(key: str, value: str) -> tuple[str, str]:
    try:
        if key == "memory":
            return "memory.max", str(parse_memory(value))
        if key == "pids" and value.isdecimal() and 0 < int(value) < 1 << 22:
            return "pids.max", str(int(value))
        if key == "cpus" and 0.01 <= float(value) <= 4096:
            return "cpu.max", f"{round(float(value) * _PERIOD)} {_PERIOD}"
    except (ValueError, ConfigError):
        pass
    raise ConfigError(f"{key}={value:.100} is not a limit", cure=_USAGE, option=_OPTION)


class Group:
    """The group that this process, and what it starts, is in from now on."""

    def __init__(self, wanted: Wanted, name: str) -> None:
        """For the VM `name`. Raises ConfigError."""
        self._before = _ours()
        place = wanted.place or os.path.dirname(self._before)
        self._made = ""
        if not os.path.isfile(os.path.join(place, "cgroup.procs")) or not os.path.isfile(
            os.path.join(place, "cgroup.controllers")
        ):
            raise ConfigError(
                f"{place or 'the place of our own group'} is not a group of cgroup v2",
                cure="name one that you may write to, below /sys/fs/cgroup",
                option=_OPTION,
            )
        for left in reversed(range(_TRIALS)):
            try:
                self._enter(place, name, wanted)
                return
            except (OSError, ConfigError) as error:
                # Another VM that begins may have removed it while nobody was in it.
                has_gone = self._made and not os.path.isdir(self._made)
                self.leave()
                if has_gone and left:
                    continue
                if isinstance(error, ConfigError):
                    raise
                raise ConfigError(
                    f"{error.filename or place}: {error.strerror}",
                    cure="use a group that is yours: systemd-run --user --scope -p Delegate=yes, "
                    "or one that root has made",
                    option=_OPTION,
                ) from None

    def _enter(self, place: str, name: str, wanted: Wanted) -> None:
        """Raises OSError, ConfigError."""
        if wanted.limits or not wanted.place:
            place = self._made = _make(place, name)
        for file, limit in wanted.limits.items():
            _write(place, file, limit)
        _write(place, "cgroup.procs", str(os.getpid()))

    def leave(self) -> None:
        """Go back to where we were, and remove the group if it was made for us. What cannot be
        removed now is by the next one that is made there."""
        if self._made:
            with suppress(OSError):
                _write(self._before, "cgroup.procs", str(os.getpid()))
            with suppress(OSError):
                os.rmdir(self._made)

    @property
    def places(self) -> tuple[str, str]:
        """Where we were, and the group that was made for us, "" for none."""
        return self._before, self._made


def leave_last(before: str, made: str) -> None:
    """Leave the group `made` as the last one in it, and remove it; others are about to end."""
    give_up_at = time.monotonic() + _PATIENCE
    while True:
        with suppress(OSError):
            _write(before, "cgroup.procs", str(os.getpid()))
        try:
            os.rmdir(made)
            return
        except OSError:
            if not os.path.isdir(made) or time.monotonic() > give_up_at:
                return
        time.sleep(_STEP)


def _ours() -> str:
    """The folder of the group that we are in; "" where there is no cgroup v2."""
    with open("/proc/self/cgroup", encoding="utf-8") as file:
        own = [line[3:].rstrip("\n") for line in file if line.startswith("0::")]
    with open("/proc/self/mounts", encoding="utf-8") as file:
        mounts = [line.split() for line in file]
    roots = [words[1] for words in mounts if len(words) > 2 and words[2] == "cgroup2"]
    return roots[0] + own[0].rstrip("/") if own and roots else ""


def _make(place: str, name: str) -> str:
    """Raises OSError."""
    for entry in os.scandir(place):
        if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
            with suppress(OSError):  # somebody is in it
                os.rmdir(entry.path)
    path = os.path.join(place, f"{_PREFIX}{name}")
    os.mkdir(path)
    return path


def _write(place: str, file: str, text: str) -> None:
    """Raises OSError, ConfigError."""
    path = os.path.join(place, file)
    if file in _CONTROLLERS and not os.path.exists(path):
        above = os.path.join(os.path.dirname(place), "cgroup.subtree_control")
        with suppress(OSError), open(above, "w", encoding="utf-8") as control:
            control.write(f"+{_CONTROLLERS[file]}")
        if not os.path.exists(path):
            raise ConfigError(
                f"{os.path.dirname(place)} has no {_CONTROLLERS[file]} controller for groups in it",
                cure=f"as root: echo +{_CONTROLLERS[file]} > {above}",
                option=_OPTION,
            )
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(text)
