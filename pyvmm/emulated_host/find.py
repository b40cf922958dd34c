"""Finds what the emulated host boots where nobody says it: in the environment."""

from __future__ import annotations

import os

from pyvmm.emulated_host.launch import find_program
from pyvmm.emulated_host.spec import HostImage
from pyvmm.errors import ConfigError

KERNEL_VARIABLE = "PYVMM_EMULATED_HOST_KERNEL"
MODULES_VARIABLE = "PYVMM_EMULATED_HOST_MODULES"


def find_image() -> HostImage:
    """$PYVMM_EMULATED_HOST_KERNEL and _MODULES. Raises ConfigError."""
    kernel = os.environ.get(KERNEL_VARIABLE, "")
    modules = os.environ.get(MODULES_VARIABLE, "")
    busybox = find_program("busybox")
    if busybox is None:
        raise ConfigError(
            "an emulated KVM host needs a statically linked busybox",
            cure="apt-get install busybox-static",
        )
    if not kernel or not modules:
        raise ConfigError(
            "there is no kernel for the emulated host",
            cure=f"set {KERNEL_VARIABLE} and {MODULES_VARIABLE}",
        )
    return HostImage(kernel, modules, busybox)
