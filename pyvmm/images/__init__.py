"""Guest images: kernels, initramfs and root disks, built from Debian's packages and cached.

    images.build(["rootfs-minbase"])              makes what is missing
    files = images.artifacts(kernel="6.1")        paths; built where missing, if `build=True`
    images.fresh_disk("root.img")                 a writable copy of a root disk
    images.machine_image("debian", make=True)     all that a VM boots from

The recipes are in guest-images/; docs/decisions/0060 says why they are as they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pyvmm.errors import ConfigError
from pyvmm.images.built import (
    DEFAULT_KERNEL,
    DEFAULT_VARIANT,
    Artifacts,
    HostArtifacts,
    arm64_host_artifacts,
    artifacts,
    folders,
    host_artifacts,
    path,
)

if TYPE_CHECKING:
    from pyvmm.images.bootable import MachineImage
    from pyvmm.images.image_list import Row

__all__ = [
    "DEFAULT_KERNEL",
    "DEFAULT_VARIANT",
    "Artifacts",
    "HostArtifacts",
    "arm64_host_artifacts",
    "artifacts",
    "folders",
    "host_artifacts",
    "path",
]

_VIRTIOFSD = {"x86_64": "programs-virtiofsd", "aarch64": "programs-virtiofsd-arm64"}


def names() -> list[str]:
    """All images, each after those it is made from."""
    from pyvmm.images.builder import Catalogue

    return Catalogue().names()


def build(
    wanted: Sequence[str] | None = None, *, quiet: bool = False, locked: bool = False
) -> None:
    """Make those of the images (default: all) that are not in the cache. Raises ConfigError.

    Progress goes to standard error. `locked`: a pinned version that is gone is an error. Of all
    images the optional ones are left out where they cannot be made, which is said, and those that
    take minutes always.
    """
    from pyvmm.images import builder
    from pyvmm.images.progress import Progress

    catalogue = builder.Catalogue()
    chosen = catalogue.at_once() if wanted is None else wanted
    spare = wanted is None and not locked
    builder.build(catalogue, chosen, Progress(quiet=quiet), locked=locked, spare=spare)


def machine_image(name: str | None, *, make: bool) -> MachineImage:
    """The image called `name`, which a VM boots from, or the default one for None.

    The recipes' images are built first where missing, if `make` is true. Raises ConfigError for a
    name that nothing has, and for what has not been built.
    """
    from pyvmm.images import bootable

    return bootable.resolve(name, make=make)


def boot_files(kernel: str, *, make: bool = False) -> tuple[str, str]:
    """The paths of the recipes' kernel called `kernel` ("6.1", "arm64") and of its initramfs.
    Raises ConfigError as `artifacts` does."""
    from pyvmm.images import bootable

    return bootable.boot_files(kernel, make=make)


def kernel_headers(name: str) -> str:
    """The folder in which modules for a kernel of Debian's ("debian:6.12") are built, fetched where
    it is missing. Raises ConfigError."""
    from pyvmm.images import debian_kernels

    return debian_kernels.headers(name)


def storage_command(program: str, *, make: bool = False) -> list[str]:
    """The beginning of a command line that runs qemu-img, qemu-io or qemu-storage-daemon 10, which
    speak vhost-user. Raises ConfigError as `artifacts` does."""
    [folder] = folders(["programs-storage"], make=make)
    from pyvmm.images.programs import storage_command as command

    return command(folder, program)


def passt_command(make: bool = False) -> list[str]:
    """The beginning of a command line that runs passt of May 2025, for machines with an older one
    or none. Raises ConfigError as `artifacts` does."""
    [folder] = folders(["programs-passt"], make=make)
    from pyvmm.images.programs import command

    return command(folder, "usr/bin/passt", "passt")


def virtiofsd_command(make: bool = False, machine: str = "") -> list[str]:
    """The beginning of a command line that runs virtiofsd 1.13, which serves directories, on a
    `machine`: uname(2)'s name, this one's if it is "". Raises ConfigError as `artifacts` does."""
    machine = machine or os.uname().machine
    name = _VIRTIOFSD.get(machine)
    if name is None:
        raise ConfigError(f"pyvmm has no virtiofsd for the architecture {machine}")
    [folder] = folders([name], make=make)
    from pyvmm.images.programs import command

    return command(folder, "usr/libexec/virtiofsd", "virtiofsd", machine)


def fresh_disk(target: str, variant: str = DEFAULT_VARIANT, *, make: bool = False) -> str:
    """A sparse, writable copy of a root disk at `target`, which is replaced; returns `target`."""
    [folder] = folders([f"rootfs-{variant}"], make=make)
    from pyvmm.images.disk import copy_sparse

    copy_sparse(os.path.join(folder, "rootfs.ext4"), target)
    return target


def listing() -> list[tuple[str, str | None]]:
    """All images with the folder each is in; None for one that has not been built."""
    from pyvmm.images.builder import Catalogue

    catalogue = Catalogue()
    folders = [(name, catalogue.path(name)) for name in catalogue.names()]
    return [(name, folder if os.path.isdir(folder) else None) for name, folder in folders]


def machine_images() -> list[Row]:
    """All images that can be booted by name: the recipes' and then the user's. A user's image with
    a broken record says so in `made_from`."""
    from pyvmm.images import image_list

    return image_list.rows()


def build_from(
    name: str,
    source: str,
    *,
    packages: Sequence[str] = (),
    size: int = 0,
    kernel: str = DEFAULT_KERNEL,
    script: str = "",
    copies: Sequence[tuple[str, str]] = (),
    replace: bool = False,
    quiet: bool = False,
    arch: str = "",
) -> None:
    """Make an image of one's own called `name` from "debian:RELEASE", "oci-archive:FILE",
    "docker-archive:FILE" or "oci:DIRECTORY".

    `packages` are installed in a Debian, `copies` (pairs of a path here and one there) put into it,
    and `script` is run in it. `size` is the root disk's in bytes, 0 for what is enough. An image of
    that name is replaced if `replace` is true. With an `arch` ("arm64") it is for machines of
    another architecture, and so is its kernel. Raises ConfigError.
    """
    from pyvmm.images import user_build
    from pyvmm.images.progress import Progress

    order = user_build.Order(
        name, source, tuple(packages), size, kernel, script, tuple(copies), replace, arch
    )
    user_build.build(order, Progress(quiet=quiet))


def remove(name: str, *, running: Sequence[str] = (), force: bool = False) -> None:
    """Remove an image that `build_from` made. `running` are the VMs that run now.

    Raises ConfigError if VMs need it, unless `force`; those then cannot go on.
    """
    from pyvmm.images import user_build

    user_build.remove(name, running, force=force)


def refresh_lock() -> None:
    """Pin, in guest-images/, the versions that the mirror has now. Raises ConfigError."""
    from pyvmm.images import builder
    from pyvmm.images.progress import Progress

    builder.refresh_lock(builder.Catalogue(), Progress())


def prune(*, kernels: bool = False) -> list[str]:
    """Remove images that no current recipe makes and no VM needs, and the headers of kernels that
    are not there; their folders. With `kernels` Debian's kernels that were fetched go as well.
    Waits for a build to end. What a user has built stays."""
    from pyvmm.images import builder, cache, debian_kernels, machines
    from pyvmm.images.progress import Progress

    catalogue = builder.Catalogue()
    with cache.building(Progress().waiting):
        needed = {os.path.dirname(base) for base in machines.bases()}
        removed = cache.prune({catalogue.path(name) for name in catalogue.names()} | needed)
        if kernels:
            removed += debian_kernels.remove_all()
        return removed + debian_kernels.remove_headers_without_kernel(
            [catalogue.path(f"kernel-{name}") for name in catalogue.recipes.guest_kernels]
        )


def exec_argument(script: str) -> str:
    """The kernel command line word that has pyvmm-init run `script` (sh) instead of a shell."""
    from base64 import b64encode

    return f"pyvmm.exec={b64encode(script.encode()).decode()}"
