"""The way in which pyvmm runs in an emulated host of another architecture: with that one's Python,
and the code of this machine's pyvmm, which init.sh leaves visible below /run/machine."""

from __future__ import annotations

import glob
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

from pyvmm.host import user_cache

PYTHON = "/usr/bin/python3"
_MACHINE = "/run/machine"
_PACKAGES = "/usr/lib/python3/dist-packages"


def path_inside(path: str) -> str:
    """The place in the emulated host of the machine's file at the absolute `path`, whatever lies
    over it there. It is read-only."""
    return _MACHINE + os.path.realpath(path)


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env` for a Python there that imports pyvmm."""
    folders = dict.fromkeys(os.path.dirname(place) for place in _ours())
    # Its own packages come first: those of this machine may have parts in machine code.
    searched = [_PACKAGES, *map(path_inside, folders)]
    without = ("PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in env.items() if name not in without}
    found = {"PYTHONPATH": ":".join(searched), "PATH": "/usr/bin:/usr/sbin"}
    return {**kept, **found, "PYTHONPYCACHEPREFIX": _compiled()}


def _ours() -> tuple[str, str]:
    """The packages that are not below /usr there: pyvmm, and what Debian has no package of, which
    is plain Python as well."""
    import ioctl_opt

    return os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ioctl_opt.__path__[0]


def _compiled() -> str:
    return os.path.join(user_cache.folder(), "compiled")


def compile_modules(python: Sequence[str], programs: str) -> None:
    """Compile all modules that the Python below `programs` may load there and that have changed
    since. `python` begins the command line of one of the same version for this machine. What cannot
    be compiled is compiled in the emulated host, at each start."""
    standard = glob.glob(os.path.join(glob.escape(programs), "usr/lib/python3*"))
    pairs = [(folder, folder.removeprefix(programs)) for folder in standard]
    pairs += [(os.path.realpath(folder), path_inside(folder)) for folder in _ours()]
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "compiling.py")
    words = (word for pair in pairs for word in pair)
    with suppress(OSError):
        subprocess.run(
            [*python, "-S", "-P", program, _compiled(), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
