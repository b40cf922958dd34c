"""The files of images that have been built, and building those that have not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pyvmm.errors import ConfigError

DEFAULT_KERNEL = "6.1"
DEFAULT_VARIANT = "minbase"


class Artifacts(NamedTuple):
    """Paths of what one guest boots from. `rootfs` is read-only: boot from a `fresh_disk` of it."""

    bzimage: str
    vmlinux: str
    initramfs: str
    rootfs: str
    modules: str


class HostArtifacts(NamedTuple):
    """The parts of an emulated host: the paths of its kernel and of …/lib/modules/RELEASE;
    `qemu` is the beginning of QEMU's command line. `programs` is the root of what runs in it, where
    that is not this machine's own; `python` begins the command line of the same Python for this
    machine."""

    vmlinux: str
    modules: str
    qemu: tuple[str, ...]
    programs: str = ""
    python: tuple[str, ...] = ()


def path(name: str) -> str:
    """The folder of an image that has been built. Raises ConfigError where it has not."""
    from pyvmm.images.builder import Catalogue

    return _present({name: Catalogue().path(name)})[0]


def artifacts(
    kernel: str = DEFAULT_KERNEL, variant: str = DEFAULT_VARIANT, *, make: bool = False
) -> Artifacts:
    """The files of a guest with that kernel ("6.1", "6.12", "7") and root disk variant.

    Raises ConfigError where they are not in the cache, unless `make` is true: then they are built.
    """
    wanted = [f"kernel-{kernel}", f"initramfs-{kernel}", f"rootfs-{variant}"]
    found = folders(wanted, make=make)
    from pyvmm.images.kernel import modules_folder

    return Artifacts(
        bzimage=os.path.join(found[0], "bzImage"),
        vmlinux=os.path.join(found[0], "vmlinux"),
        initramfs=os.path.join(found[1], "initramfs.cpio"),
        rootfs=os.path.join(found[2], "rootfs.ext4"),
        modules=modules_folder(found[0]),
    )


def host_artifacts(*, make: bool = False) -> HostArtifacts:
    """The emulated host's QEMU and kernel. Raises ConfigError as `artifacts` does."""
    kernel, emulator = folders(["kernel-host", "programs-emulator"], make=make)
    from pyvmm.images.kernel import modules_folder
    from pyvmm.images.programs import qemu_command

    return HostArtifacts(
        vmlinux=os.path.join(kernel, "vmlinux"),
        modules=modules_folder(kernel),
        qemu=tuple(qemu_command(emulator)),
    )


def arm64_host_artifacts(*, make: bool = False) -> HostArtifacts:
    """The emulated arm64 host's. Raises ConfigError as `artifacts` does."""
    wanted = ["kernel-arm64", "programs-emulator-arm64", "programs-arm64", "programs-python"]
    kernel, emulator, programs, python = folders(wanted, make=make)
    from pyvmm.images.kernel import modules_folder
    from pyvmm.images.programs import python_command, qemu_command

    return HostArtifacts(
        vmlinux=os.path.join(kernel, "bzImage"),
        modules=modules_folder(kernel),
        qemu=tuple(qemu_command(emulator, "aarch64")),
        programs=os.path.join(programs, "root"),
        python=tuple(python_command(python)),
    )


def folders(wanted: Sequence[str], *, make: bool) -> list[str]:
    """The folders of the images, built first where missing if `make` is true. Raises ConfigError
    where it is not, for those that have not been built."""
    from pyvmm.images import builder
    from pyvmm.images.progress import Progress

    catalogue = builder.Catalogue()
    if make:
        builder.build(catalogue, wanted, Progress())
    return _present({name: catalogue.path(name) for name in wanted})


def _present(places: Mapping[str, str]) -> list[str]:
    missing = [name for name, folder in places.items() if not os.path.isdir(folder)]
    if missing:
        raise ConfigError(
            f"the image {missing[0]} has not been built",
            cure=f"run: pyvmm image build {' '.join(missing)}",
        )
    return list(places.values())
