"""HLT with and without the in-kernel irqchip."""

from __future__ import annotations

from collections.abc import Callable

from bare_guest import CODE, BareGuest

from pyvmm.kvm.exits import Hlt
from pyvmm.kvm.x86 import registers as r

MakeGuest = Callable[..., BareGuest]


def test_without_an_irqchip_hlt_is_ours(bare_guest: MakeGuest) -> None:
    guest = bare_guest(bytes.fromhex("f4 e6f4"), irqchip=False, mode="real16")
    assert guest.run() is None
    assert guest.vcpu.exit() == Hlt()
    assert r.get_regs(guest.vcpu).rip == CODE + 1
    guest.run_to_stop()
