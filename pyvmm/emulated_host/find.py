"""Finds the parts of an emulated host that the caller has not named."""

from __future__ import annotations

import os

from pyvmm import images
from pyvmm.emulated_host import foreign
from pyvmm.emulated_host.spec import HostImage
from pyvmm.errors import ConfigError
from pyvmm.host.programs import find_program

BUSYBOX_CURE = "apt-get install busybox-static"


def find_busybox() -> str:
    """The machine's own busybox. Raises ConfigError."""
    path = find_program("busybox")
    if path is None:
        raise ConfigError(
            "the emulated KVM host needs busybox, statically linked", cure=BUSYBOX_CURE
        )
    return path


def find_image(*, make: bool = False, architecture: str = "") -> HostImage:
    """The machine's busybox, and QEMU and the kernel from the cache of pyvmm.images; for another
    `architecture` than the machine's, by uname(2)'s name, also the programs in it.

    Raises ConfigError if there is no busybox, if an image has not been built and is not to be made,
    or on a machine that the QEMU of the images is not for.
    """
    machine = os.uname().machine
    if architecture not in ("", machine):
        return _find_foreign(architecture, make=make)
    if machine != "x86_64":
        raise ConfigError(
            f"there is no emulated KVM host for this machine, which is {machine}",
            cure="use a machine whose KVM runs kernels",
        )
    busybox = find_busybox()
    found = images.host_artifacts(make=make)
    return HostImage(found.vmlinux, found.modules, busybox, found.qemu)


def _find_foreign(architecture: str, *, make: bool) -> HostImage:
    if (os.uname().machine, architecture) != ("x86_64", "aarch64"):
        raise ConfigError(
            f"a machine of the architecture {architecture} cannot be emulated on this one, which "
            f"is {os.uname().machine}",
            cure="use a host of that architecture",
            option="--arch",
        )
    found = images.arm64_host_artifacts(make=make)
    foreign.compile_modules(found.python, found.programs)
    busybox = os.path.join(found.programs, "usr/bin/busybox")
    return HostImage(
        found.vmlinux, found.modules, busybox, found.qemu, architecture, found.programs
    )
