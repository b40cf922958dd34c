"""The choice of the machine that is emulated: one of this computer's own architecture, whose
programs run in it, or one of another, which brings its own.

The only module here that chooses by architecture, as the registry of boards does for guests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from pyvmm.errors import ConfigError


class EmulatedMachine(Protocol):
    """The part that differs by architecture; a package for each implements it as functions."""

    ROOT_MODULES: tuple[str, ...]
    """Kernel modules that are loaded before the command's root is mounted."""

    KVM_MODULES: tuple[str, ...]
    """Those that are loaded beside that, for /dev/kvm and the network."""

    SAVES_STATE: bool
    """Whether a saved state of it can go on in another run: QEMU has a VMGenID for it, by which its
    kernel takes other random numbers."""

    def vmlinux(self, kernel: bytes) -> bytes | None:
        """The kernel in `kernel`, as QEMU starts it fastest; None to take it as it is. Raises
        ConfigError if it is not one."""

    def frequency_khz(self) -> int | None:
        """The rate of this computer's time-stamp counter, if the machine's clock needs that."""

    def kernel_parameters(self, tsc_khz: int | None) -> str:
        """The kernel's command line."""

    def machine_arguments(self, cpus: int, memory_mib: int) -> list[str]:
        """QEMU's arguments for the machine, its CPUs and its RAM."""


def _x86() -> EmulatedMachine:
    from pyvmm.emulated_host import x86

    return x86


def _arm64() -> EmulatedMachine:
    from pyvmm.emulated_host import arm64

    return arm64


MACHINES: dict[str, Callable[[], EmulatedMachine]] = {"x86_64": _x86, "aarch64": _arm64}
"""By what uname(2) calls the architecture."""


def emulated_machine(architecture: str) -> EmulatedMachine:
    """The machine of that `architecture`. Raises ConfigError if there is none."""
    make = MACHINES.get(architecture)
    if make is None:
        raise ConfigError(
            f"there is no emulated KVM host for the architecture {architecture}",
            cure=f"use a host that is one of {', '.join(MACHINES)}",
        )
    return make()
