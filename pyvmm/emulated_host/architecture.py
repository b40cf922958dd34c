"""Which machine is emulated: one of this computer's own architecture, for its programs run in it.

The only module here that chooses by architecture, as the registry of boards does for guests.
"""

from __future__ import annotations

import os
from typing import Protocol

from pyvmm.errors import ConfigError


class EmulatedMachine(Protocol):
    """What differs by architecture; a package for each implements it as functions."""

    ROOT_MODULES: tuple[str, ...]
    """Kernel modules that are loaded before the command's root is mounted."""

    KVM_MODULES: tuple[str, ...]
    """Those that are loaded beside that, for /dev/kvm and the network."""

    def vmlinux(self, kernel: bytes) -> bytes | None:
        """The kernel in `kernel`, as QEMU starts it fastest; None to take it as it is. Raises
        ConfigError if it is none."""

    def frequency_khz(self) -> int | None:
        """How fast this computer's time-stamp counter runs, if the machine's clock needs that."""

    def kernel_parameters(self, tsc_khz: int | None) -> str:
        """The kernel's command line."""

    def machine_arguments(self, cpus: int, memory_mib: int) -> list[str]:
        """QEMU's arguments for the machine, its CPUs and its RAM."""


def emulated_machine() -> EmulatedMachine:
    """The machine of this computer's architecture. Raises ConfigError if there is none."""
    architecture = os.uname().machine
    if architecture != "x86_64":
        raise ConfigError(
            f"there is no emulated KVM host for the architecture {architecture}",
            cure="use a host that is x86_64",
        )
    from pyvmm.emulated_host import x86

    return x86
