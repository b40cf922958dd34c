"""The choice between this machine's KVM and an emulated host."""

from __future__ import annotations

from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.kvm.probe import probe
from pyvmm.kvm.system import Kvm
from pyvmm.machine.board.registry import board_of_host


def why_unusable() -> str | None:
    """None if this machine's KVM runs unmodified Linux kernels, else the reason in a few words."""
    try:
        board = board_of_host()
        with Kvm.open() as kvm:
            kvm.check_required(board.requirements)
            found = probe(board.probe_guest(kvm))
    except PyvmmError as error:
        return str(error)
    return None if found.usable else found.reason


def check_there(why: str) -> None:
    """Raise ConfigError if this machine has no KVM, which is needed as `why` says."""
    try:
        Kvm.open().close()
    except PyvmmError as error:
        raise ConfigError(
            f"{why}, and here is none: {error}", cure="restore it on a machine with KVM"
        ) from None
