"""Programs of another Debian release, unpacked with every library they need and not installed.

root/       the packages' files; nothing in them was configured

They run through that release's own dynamic loader, so this machine's libraries do not matter.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence

from pyvmm.errors import how_many
from pyvmm.images import apt, cache, tools
from pyvmm.images.lock import Pin
from pyvmm.images.progress import Progress

_LIBRARIES = "usr/lib/x86_64-linux-gnu"
# The dynamic loader and the libraries, by uname(2)'s name of the architecture.
_PLACES = {
    "x86_64": ("usr/lib64/ld-linux-x86-64.so.2", _LIBRARIES),
    "aarch64": ("usr/lib/ld-linux-aarch64.so.1", "usr/lib/aarch64-linux-gnu"),
}
# Files for people, or for a package manager.
_LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "var")


def build(name: str, pins: Sequence[Pin], client: apt.Apt, into: str, progress: Progress) -> None:
    """Unpack the packages `pins` into `into`/root. Raises ConfigError."""
    root = os.path.join(into, "root")
    os.mkdir(root)
    with cache.workspace() as room:
        with progress.step(f"{name}: fetching {how_many(len(pins), 'package')}"):
            packages = client.download_all(pins, room)
        with progress.step(f"{name}: unpacking"):
            for package in packages:
                tools.run(["dpkg-deb", "-x", package, root], "cannot unpack a package")
    for folder in _LEFT_OUT:
        shutil.rmtree(os.path.join(root, folder), ignore_errors=True)


def command(image: str, program: str, name: str, machine: str = "x86_64") -> list[str]:
    """The beginning of a command line that runs `program` (a path below /) of the image's folder on
    a `machine`, by uname(2)'s name.

    `name` is what the program sees as its own name.
    """
    root = os.path.join(image, "root")
    loader, libraries = (os.path.join(root, place) for place in _PLACES[machine])
    return [loader, "--library-path", libraries, "--argv0", name, os.path.join(root, program)]


def qemu_command(image: str, architecture: str = "x86_64") -> list[str]:
    """The same for the QEMU in the image's folder, which is told where its firmware is; it emulates
    an `architecture` of the recipe's."""
    firmware = [os.path.join(image, "root/usr/share", name) for name in ("qemu", "seabios")]
    name = f"qemu-system-{architecture}"
    program = command(image, f"usr/bin/{name}", name)
    return [*program, *(word for folder in firmware for word in ("-L", folder))]


def python_command(image: str) -> list[str]:
    """The same for the Python in the image's folder, which is told where its modules are."""
    home = os.path.join(image, "root/usr")
    python = command(image, "usr/bin/python3", "python3")
    return ["env", "-i", f"PYTHONHOME={home}", *python]


def storage_command(image: str, program: str) -> list[str]:
    """The same for one of QEMU's storage programs, which loads its drivers as modules."""
    modules = os.path.join(image, "root", _LIBRARIES, "qemu")
    return ["env", f"QEMU_MODULE_DIR={modules}", *command(image, f"usr/bin/{program}", program)]
