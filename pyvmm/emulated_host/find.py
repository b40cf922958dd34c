"""Finds the parts of an emulated host that the caller has not named."""

from __future__ import annotations

from pyvmm import images
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


def find_image(*, make: bool = False) -> HostImage:
    """The machine's busybox, and QEMU and the kernel from the cache of pyvmm.images.

    Raises ConfigError if there is no busybox, or if an image has not been built and is not to be
    made.
    """
    busybox = find_busybox()
    found = images.host_artifacts(make=make)
    return HostImage(found.vmlinux, found.modules, busybox, found.qemu)
