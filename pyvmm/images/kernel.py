"""A kernel image: Debian's bzImage, the ELF vmlinux in it, and its modules.

bzImage  vmlinux  config          files
lib/modules/RELEASE/              with depmod's indexes
"""

from __future__ import annotations

import glob
import os
import shutil
import sys

from pyvmm.errors import ConfigError
from pyvmm.images import apt, cache, tools
from pyvmm.images.lock import Pin
from pyvmm.images.progress import Progress


def build(name: str, pin: Pin, client: apt.Apt, into: str, progress: Progress) -> None:
    """Fill the folder `into` from the kernel package `pin`. Raises ConfigError."""
    with cache.workspace() as room:
        with progress.step(f"{name}: fetching {pin.package} {pin.version}"):
            package = client.download(pin, room)
        with progress.step(f"{name}: unpacking the kernel and its modules"):
            _unpack(package, os.path.join(room, "tree"), into)
    with progress.step(f"{name}: unpacking vmlinux from bzImage"):
        _extract_vmlinux(into)


def modules_folder(kernel: str) -> str:
    """…/lib/modules/RELEASE of the kernel image `kernel`."""
    [found] = glob.glob(os.path.join(kernel, "lib", "modules", "*"))
    return found


def _unpack(package: str, tree: str, into: str) -> None:
    tools.run(["dpkg-deb", "-x", package, tree], "cannot unpack the kernel package")
    _move(f"{tree}/boot/vmlinuz-*", os.path.join(into, "bzImage"))
    _move(f"{tree}/boot/config-*", os.path.join(into, "config"))
    os.makedirs(os.path.join(into, "lib", "modules"))
    pattern = f"{tree}/lib/modules/*"
    if not glob.glob(pattern):
        pattern = f"{tree}/usr/lib/modules/*"  # since trixie
    release = os.path.basename(next(iter(glob.glob(pattern)), ""))
    _move(pattern, os.path.join(into, "lib", "modules", release))
    tools.run(["depmod", "-b", into, release], "depmod")


def _move(pattern: str, target: str) -> None:
    found = glob.glob(pattern)
    if len(found) != 1:
        raise ConfigError(f"the kernel package has {len(found)} files {os.path.basename(pattern)}")
    shutil.move(found[0], target)


def _extract_vmlinux(into: str) -> None:
    # A program of its own: what it reads is foreign, and it confines itself.
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    bzimage, vmlinux = os.path.join(into, "bzImage"), os.path.join(into, "vmlinux")
    tools.run(
        [sys.executable, "-P", "-m", "pyvmm.machine.board", bzimage, vmlinux],
        "cannot unpack vmlinux",
        env={"PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")},
    )
