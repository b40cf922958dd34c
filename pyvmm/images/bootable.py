"""Images that a VM boots from, by one name: a kernel, an initial RAM disk, and a read-only root
disk.

There are the images the recipes make (debian, debian-systemd …) and those a user has built, which
`user_image` keeps.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyvmm.errors import ConfigError

if TYPE_CHECKING:
    from pyvmm.images.user_image import Process

DEFAULT = "debian"


@dataclass(frozen=True)
class MachineImage:
    """`kernel`, `initrd` and `disk` are paths. The disk is a base image: boot on an overlay of it.

    `cmdline` is what the kernel command line needs beside the defaults, `process` what a container
    image runs (None for other images).
    """

    name: str
    kernel: str
    initrd: str
    disk: str
    cmdline: str = ""
    has_agent: bool = False
    process: Process | None = None


def resolve(name: str | None, *, make: bool) -> MachineImage:
    """The image called `name`; None is the default one, which is built if `make` is true.

    So is the kernel of any other. Raises ConfigError for a name that nothing has, and for what has
    not been built.
    """
    from pyvmm.images import user_image

    name = name or DEFAULT
    user_image.check_name(name)
    found = user_image.find(name)
    if found is not None:
        kernel, initrd = boot_files(found.kernel, make=make)
        disk = os.path.join(found.folder, user_image.DISK)
        return MachineImage(
            name, kernel, initrd, disk, found.cmdline, found.has_agent, found.process
        )
    kernel, initrd, disk = _files_of(name, make=make)
    return MachineImage(name, kernel, initrd, disk, has_agent=True)


def _files_of(name: str, *, make: bool) -> list[str]:
    """Of one of the recipes' images. Raises ConfigError."""
    from pyvmm.images import built, found_before, user_image

    paths = found_before.find(name)
    if paths is not None and len(paths) == 3:
        return paths
    variants = built_in()
    if name not in variants:
        there = ", ".join([*variants, *user_image.names()])
        raise ConfigError(
            f"there is no image called {name!r}",
            cure=f"there are {there}; pyvmm image build --from … makes more",
        )
    files = built.artifacts(variant=variants[name], make=make)
    found = [files.vmlinux, files.initramfs, files.rootfs]
    found_before.remember(name, found)
    return found


def built_in() -> dict[str, str]:
    """The recipes' images: name → root disk variant. None where there are no recipes."""
    from pyvmm.images import recipes

    try:
        variants = recipes.load().rootfs
    except ConfigError:
        return {}
    return {DEFAULT if name == "minbase" else f"{DEFAULT}-{name}": name for name in variants}


def boot_files(kernel: str, *, make: bool) -> tuple[str, str]:
    """The paths of the guest kernel called `kernel` ("6.1") and of its initial RAM disk.

    vmlinux rather than bzImage: a guest has nothing to unpack then. Raises ConfigError.
    """
    from pyvmm.images import built, found_before

    names = [f"kernel-{kernel}", f"initramfs-{kernel}"]
    folders = found_before.find("+".join(names))
    if folders is None or len(folders) != 2:
        folders = built.folders(names, make=make)
        found_before.remember("+".join(names), folders)
    return os.path.join(folders[0], "vmlinux"), os.path.join(folders[1], "initramfs.cpio")
