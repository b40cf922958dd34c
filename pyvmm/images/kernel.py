"""A kernel image: Debian's bzImage, the ELF vmlinux in it, and its modules.

bzImage  vmlinux  config          files
lib/modules/RELEASE/              with depmod's indexes

A kernel of another architecture has no vmlinux: whoever boots it takes Debian's file.
"""

from __future__ import annotations

import glob
import os
import shlex
import shutil
from collections.abc import Sequence

from pyvmm.errors import ConfigError
from pyvmm.host import own_python
from pyvmm.images import apt, cache, tools
from pyvmm.images.lock import Pin
from pyvmm.images.progress import Progress


def build(
    name: str,
    pins: Sequence[Pin],
    client: apt.Apt,
    into: str,
    progress: Progress,
    *,
    is_foreign: bool = False,
) -> None:
    """Fill the folder `into` from the kernel packages `pins`. Raises ConfigError."""
    with cache.workspace() as room:
        with progress.step(f"{name}: fetching {pins[0].package} {pins[0].version}"):
            packages = client.download_all(pins, room)
        with progress.step(f"{name}: unpacking the kernel and its modules"):
            _unpack(packages, os.path.join(room, "tree"), into)
    if is_foreign:
        return
    with progress.step(f"{name}: unpacking vmlinux from bzImage"):
        _extract_vmlinux(into)


def modules_folder(kernel: str) -> str:
    """…/lib/modules/RELEASE of the kernel image `kernel`. Raises ConfigError for a damaged one."""
    found = glob.glob(os.path.join(glob.escape(kernel), "lib", "modules", "*"))
    if len(found) != 1:
        raise ConfigError(
            f"the cached kernel in {kernel} is damaged: it has modules of {len(found)} releases",
            cure=f"it is made again after: rm -r {shlex.quote(kernel)}",
        )
    return found[0]


def _unpack(packages: Sequence[str], tree: str, into: str) -> None:
    for package in packages:
        tools.run(["dpkg-deb", "-x", package, tree], "cannot unpack the kernel package")
    below = glob.escape(tree)
    # A folder of modules is in /usr since trixie, and has the kernel beside them since Linux 7.
    modules = _only(f"{below}/lib/modules/*", f"{below}/usr/lib/modules/*")
    image = _only(f"{below}/boot/vmlinuz-*", f"{glob.escape(modules)}/vmlinuz")
    shutil.move(image, os.path.join(into, "bzImage"))
    config = _only(f"{below}/boot/config-*", f"{glob.escape(modules)}/config")
    shutil.move(config, os.path.join(into, "config"))
    os.makedirs(os.path.join(into, "lib", "modules"))
    release = os.path.basename(modules)
    shutil.move(modules, os.path.join(into, "lib", "modules", release))
    tools.run(["depmod", "-b", into, release], "depmod")


def _only(*patterns: str) -> str:
    """The one file that one of the patterns finds. Raises ConfigError."""
    found = [path for pattern in patterns for path in glob.glob(pattern)]
    if len(found) != 1:
        name = os.path.basename(patterns[0])
        raise ConfigError(f"the kernel package has {len(found)} files {name}")
    return found[0]


def _extract_vmlinux(into: str) -> None:
    # A program of its own: what it reads is foreign, and it confines itself.
    bzimage, vmlinux = os.path.join(into, "bzImage"), os.path.join(into, "vmlinux")
    tools.run(
        own_python.command("pyvmm.machine.board", bzimage, vmlinux),
        "cannot unpack vmlinux",
        env=own_python.environment(),
    )
