"""The way in which pyvmm runs in an emulated host of another architecture: with that one's Python,
and the code of this machine's pyvmm, which init.sh leaves visible below /run/machine."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from pyvmm.emulated_host.collected import VARIABLE
from pyvmm.host import user_cache

if TYPE_CHECKING:
    from pyvmm.emulated_host.spec import HostImage

PYTHON = "/usr/bin/python3"
_MACHINE = "/run/machine"
_PACKAGES = "/usr/lib/python3/dist-packages"
_COMPILED = "compiled"  # in the user's cache
_OF = "of"  # the file in a folder of compiled modules that says whose they are
_MOST_OF = 16 << 10  # bytes
_MOST_COMPILED = 8  # installations of pyvmm, with 15 MB each
# Of a folder that does not say whose it is: another start may have made it.
_OLD_SECONDS = 24 * 3600


def path_inside(path: str) -> str:
    """The place in the emulated host of the machine's file at the absolute `path`, whatever lies
    over it there. It is read-only."""
    return _MACHINE + os.path.realpath(path)


def environment(env: Mapping[str, str], image: HostImage) -> dict[str, str]:
    """`env` for a Python that imports pyvmm in an emulated host of `image`."""
    if not image.is_foreign:
        return dict(env)
    folders = dict.fromkeys(os.path.dirname(place) for place in _ours())
    into = _compiled()
    # Its own packages come first: those of this machine may have parts in machine code.
    searched = [into, _PACKAGES, *map(path_inside, folders)]
    without = ("PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in env.items() if name not in without}
    return {
        **kept,
        "PYTHONPATH": ":".join(searched),
        "PATH": "/usr/bin:/usr/sbin",
        "PYTHONPYCACHEPREFIX": into,
        "PYTHONNOUSERSITE": "1",  # which is of this machine's Python
        VARIABLE: ":".join(file for _, _, file in _collections(image.programs, into)),
    }


def _ours() -> tuple[str, str]:
    """The packages that are not below /usr there: pyvmm, and what Debian has no package of, which
    is plain Python as well."""
    import ioctl_opt

    return os.path.dirname(os.path.dirname(os.path.abspath(__file__))), ioctl_opt.__path__[0]


def _compiled() -> str:
    """The folder of this pyvmm's compiled modules: each that is installed has one of its own."""
    mark = hashlib.sha256("\n".join(map(os.path.realpath, _ours())).encode("utf-8", "replace"))
    return os.path.join(user_cache.folder(), _COMPILED, mark.hexdigest()[:32])


def _collections(programs: str, into: str) -> list[tuple[str, str, str]]:
    """The folders with modules, the places that they have there, and the collections for them, in
    the order in which they are looked into."""
    standard = sorted(glob.glob(os.path.join(glob.escape(programs), "usr/lib/python3.*")))
    folders = [f"{programs}{_PACKAGES}", *standard, *(f"{one}/lib-dynload" for one in standard)]
    first, *others = [(folder, folder.removeprefix(programs)) for folder in folders]
    ours = [(os.path.realpath(folder), path_inside(folder)) for folder in _ours()]
    pairs = enumerate((first, *ours, *others))
    return [(folder, place, f"{into}/{number}") for number, (folder, place) in pairs]


def compile_modules(python: Sequence[str], programs: str) -> None:
    """Compile all modules that the Python below `programs` may load there and that have changed
    since. `python` begins the command line of one of the same version for this machine. What cannot
    be compiled is compiled in the emulated host, at each start.

    What has been compiled for another pyvmm goes if that is gone, and the oldest if there are many:
    a host that runs has to compile it then."""
    program = os.path.join(os.path.dirname(os.path.abspath(__file__)), "compiling.py")
    into = _compiled()
    words = (word for row in _collections(programs, into) for word in row)
    with suppress(OSError):
        os.makedirs(into, exist_ok=True)
        with open(os.path.join(into, _OF), "wb") as file:  # which is newer then than all others'
            file.write(b"\0".join(os.fsencode(os.path.realpath(one)) for one in _ours()))
        subprocess.run(
            [*python, "-S", "-P", program, into, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _forget_others(into)


def _forget_others(ours: str) -> None:
    folder = os.path.dirname(ours)
    wanted: list[tuple[float, str]] = []
    for entry in list(os.scandir(folder)):
        if entry.path == ours:
            continue
        of, made = b"", entry.stat(follow_symlinks=False).st_mtime
        with suppress(OSError), open(os.path.join(entry.path, _OF), "rb") as file:
            made = os.fstat(file.fileno()).st_mtime
            of = file.read(_MOST_OF)
        if of and all(map(os.path.isdir, of.split(b"\0"))):
            wanted.append((made, entry.path))
        elif of or time.time() - made > _OLD_SECONDS:
            shutil.rmtree(entry.path, ignore_errors=True)
    for _, path in sorted(wanted, reverse=True)[_MOST_COMPILED - 1 :]:
        shutil.rmtree(path, ignore_errors=True)
