"""Where to run: this machine's KVM if it can boot Linux, an emulated KVM host if not."""

from __future__ import annotations

from pyvmm.errors import PyvmmError
from pyvmm.host import log


def choose_kvm() -> str:
    """ "host" or "emulated"; says why in one line when it is the second."""
    reason = why_not_host()
    if reason is None:
        return "host"
    log.to_stderr(
        f"{reason}; running in an emulated KVM host, 10 to 20 times slower than real KVM "
        "(--kvm=host insists, `pyvmm doctor` explains)"
    )
    return "emulated"


def why_not_host() -> str | None:
    """None if this machine's KVM runs unmodified Linux kernels, else the reason in a few words."""
    from pyvmm.kvm.probe import probe
    from pyvmm.kvm.system import Kvm

    try:
        with Kvm.open() as kvm:
            kvm.check_required()
            found = probe(kvm)
    except PyvmmError as error:
        return str(error)
    return None if found.usable else found.reason
