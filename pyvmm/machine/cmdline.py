"""The kernel command line that a guest gets when the user says nothing, and what overrides it."""

from __future__ import annotations

from typing import Any

from pyvmm.boot.cmdline import merge, values
from pyvmm.machine.board.board import Board
from pyvmm.spec.vm import VmSpec

# For the devices in a guest's /etc/fstab, in an emulated KVM host: systemd gives them 90, which its
# udev can need there to look at them all.
_DEVICE_SECONDS = 900


def default_parameters(spec: VmSpec, board: Board[Any], *, quiet: bool) -> list[str]:
    """Parameters that let an ordinary kernel come up on this machine.

    `panic=-1` reboots at once after a panic, which ends the run; `quiet` is for where console
    output is slow, and so is all else. The board has what its machine needs.
    """
    console = spec.console or board.console
    parameters = [f"console={console}", "panic=-1", *board.kernel_parameters]
    if quiet:
        parameters.append("quiet")
    if spec.disks:
        parameters += ["root=/dev/vda", "ro" if spec.disks[0].read_only else "rw"]
        if quiet:
            parameters.append(f"pyvmm.devicewait={_DEVICE_SECONDS}")
    for device in spec.devices:
        parameters += device.kernel_parameters
    return parameters


def command_line(spec: VmSpec, board: Board[Any], *, quiet: bool = False) -> str:
    """The defaults merged with what the user gave, who wins. Raises ConfigError."""
    return merge(default_parameters(spec, board, quiet=quiet), spec.cmdline)


def turns_pci_off(cmdline: str) -> bool:
    """True if a kernel with this command line looks for no PCI bus (Linux
    kernel-parameters.txt, "pci=")."""
    return any("off" in value.split(",") for value in values(cmdline, "pci"))
