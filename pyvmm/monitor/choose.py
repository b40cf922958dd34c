"""Where to run: this machine's KVM if it can boot Linux, an emulated KVM host if not."""

from __future__ import annotations

from pyvmm.errors import PyvmmError


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
