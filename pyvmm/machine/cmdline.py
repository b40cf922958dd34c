"""The kernel command line that a guest gets when the user says nothing, and what overrides it."""

from __future__ import annotations

from pyvmm.boot.cmdline import merge
from pyvmm.spec.vm import VmSpec


def default_parameters(spec: VmSpec, *, quiet: bool) -> list[str]:
    """Parameters that let an ordinary kernel come up on this machine.

    `panic=-1` reboots at once after a panic, which ends the run; `reboot=k` is tried where ACPI's
    reset register is not; without `pci=off` a kernel complains that it finds no PCI bus, of which
    there is none; `quiet` is for where console output is slow.
    """
    parameters = [f"console={spec.console}", "panic=-1", "reboot=k", "pci=off"]
    if quiet:
        parameters.append("quiet")
    if spec.disks:
        parameters += ["root=/dev/vda", "ro" if spec.disks[0].read_only else "rw"]
    return parameters


def command_line(spec: VmSpec, *, quiet: bool = False) -> str:
    """The defaults merged with what the user gave, who wins. Raises ConfigError."""
    return merge(default_parameters(spec, quiet=quiet), spec.cmdline)
