"""The way in which pyvmm runs in an emulated host of another architecture: with that one's Python,
and the code of this machine's pyvmm, which init.sh leaves visible below /run/machine."""

from __future__ import annotations

import os
from collections.abc import Mapping

PYTHON = "/usr/bin/python3"
_MACHINE = "/run/machine"
_PACKAGES = "/usr/lib/python3/dist-packages"


def path_inside(path: str) -> str:
    """The place in the emulated host of the machine's file at the absolute `path`, whatever lies
    over it there. It is read-only."""
    return _MACHINE + os.path.realpath(path)


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env` for a Python there that imports pyvmm."""
    import ioctl_opt  # of plain Python, and Debian has no package of it

    places = (os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ioctl_opt.__path__[0])
    folders = dict.fromkeys(os.path.dirname(place) for place in places)
    # Its own packages come first: those of this machine may have parts in machine code.
    searched = [_PACKAGES, *map(path_inside, folders)]
    without = ("PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in env.items() if name not in without}
    return {**kept, "PYTHONPATH": ":".join(searched), "PATH": "/usr/bin:/usr/sbin"}
