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
FOREIGN = ("arm64",)
"""Architectures that there are images for beside this machine's, as a specification calls them. A
kernel of theirs is called so, or begins so: `kernel_for`."""


@dataclass(frozen=True)
class MachineImage:
    """`kernel`, `initrd` and `disk` are paths. The disk is a base image: boot on an overlay of it.

    `cmdline` is what the kernel command line needs beside the defaults, `process` what a container
    image runs (None for other images). `arch` is a specification's, "" for this machine's.
    """

    name: str
    kernel: str
    initrd: str
    disk: str
    cmdline: str = ""
    has_agent: bool = False
    process: Process | None = None
    arch: str = ""


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
            *(name, kernel, initrd, disk, found.cmdline, found.has_agent, found.process),
            arch=arch_of_kernel(found.kernel),
        )
    kernel, initrd, disk = _files_of(name, make=make)
    return MachineImage(name, kernel, initrd, disk, has_agent=True, arch=_arch_of_recipe(name))


def named_for(name: str | None, arch: str) -> str:
    """The image that somebody means who says `name`, None for the default one, and `arch`, one of
    FOREIGN: debian is debian-arm64 then."""
    from pyvmm.images import user_image

    name = name or DEFAULT
    user_image.check_name(name)
    if user_image.find(name) is None and f"{name}-{arch}" in built_in():
        return f"{name}-{arch}"
    return name


def architecture_of(name: str) -> str:
    """Of the image called `name`, which need not be there: a specification's word, "" for this
    machine's. Raises ConfigError for a name that no image can have."""
    from pyvmm.images import user_image

    user_image.check_name(name)
    found = user_image.find(name)
    return _arch_of_recipe(name) if found is None else arch_of_kernel(found.kernel)


def arch_of_kernel(name: str) -> str:
    """The architecture of the recipes' kernel called `name`."""
    arch = name.partition("-")[0]
    return arch if arch in FOREIGN else ""


def kernels_of(arch: str) -> dict[str, str]:
    """The recipes' kernels for guests of `arch`, one of FOREIGN, by their series ("6.12"). The
    default one is called by the architecture alone."""
    from pyvmm.images import recipes

    names = (one for one in recipes.load().booted_kernels if arch_of_kernel(one) == arch)
    return {series_of_kernel(name): name for name in names}


def series_of_kernel(name: str) -> str:
    """The series of the recipes' kernel called `name`: 6.12 of arm64-6.12."""
    from pyvmm.images.built import DEFAULT_KERNEL

    arch = arch_of_kernel(name)
    return (name.removeprefix(arch).lstrip("-") or DEFAULT_KERNEL) if arch else name


def _arch_of_recipe(name: str) -> str:
    return next((arch for arch in FOREIGN if name == f"{DEFAULT}-{arch}"), "")


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
    arch = _arch_of_recipe(name)
    if arch:
        [folder] = built.folders([f"rootfs-{variants[name]}"], make=make)
        found = [*boot_files(arch, make=make), os.path.join(folder, user_image.DISK)]
    else:
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

    vmlinux rather than bzImage: a guest has nothing to unpack then. One for another architecture
    has no vmlinux, and needs none. Raises ConfigError.
    """
    from pyvmm.images import built, found_before

    names = [f"kernel-{kernel}", f"initramfs-{kernel}"]
    folders = found_before.find("+".join(names))
    if folders is None or len(folders) != 2:
        folders = built.folders(names, make=make)
        found_before.remember("+".join(names), folders)
    file = "bzImage" if arch_of_kernel(kernel) else "vmlinux"
    return os.path.join(folders[0], file), os.path.join(folders[1], "initramfs.cpio")
