"""The state of vCPUs and interrupt controllers, taken from one VM and given to another."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from bare_guest import BareGuest

from pyvmm.errors import ConfigError
from pyvmm.host.saved import Saved
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.x86 import cpuid, irqchip, lapic, msrs, saved_vcpu, uapi
from pyvmm.kvm.x86 import registers as r

MakeGuest = Callable[..., BareGuest]
# mov eax,5; again: out 0xf4,al; inc eax; jmp again
COUNTS = bytes.fromhex("b805000000 e6f4 40 ebfb")


def guest(make: MakeGuest, **options: Any) -> BareGuest:
    made = make(COUNTS, **options)
    irqchip.create_pit2(made.vm)
    return made


def plain(state: Any) -> Any:
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("mode", ["protected32", "long64"])
def test_a_guest_goes_on_in_another_vm(kvm: Kvm, bare_guest: MakeGuest, mode: str) -> None:
    host = saved_vcpu.HostAbilities(kvm)
    # In long mode 0x40 is a prefix of the jump, and the count stays.
    step = 1 if mode == "protected32" else 0
    one, other = (guest(bare_guest, mode=mode, vcpus=2) for _ in range(2))
    assert one.run_to_stop() == 5
    fpu = r.get_fpu(one.vcpu)
    fpu.fcw = 0x27F
    r.set_fpu(one.vcpu, fpu)
    msrs.set_msrs(one.vcpu, {msrs.MSR_LSTAR: 0xFFFF_8000_1234_5678})
    debug = r.get_debugregs(one.vcpu)
    debug.db[0] = 0x1234
    r.set_debugregs(one.vcpu, debug)
    page = lapic.get_lapic(one.vcpu)
    page[0x350:0x354] = (0x1_0700).to_bytes(4, "little")  # LINT0, masked
    lapic.set_lapic(one.vcpu, page)
    states = [plain(saved_vcpu.save(vcpu, host)) for vcpu in one.vcpus]
    chips = plain(irqchip.save(one.vm))
    said: list[str] = []
    for vcpu, state in zip(other.vcpus, states, strict=True):
        saved_vcpu.check_cpu(vcpu, Saved(state, "vcpu"))
        saved_vcpu.restore(vcpu, Saved(state, "vcpu"), host, said.append)
    irqchip.restore(other.vm, Saved(chips, "vm"))
    assert not said
    for before, vcpu in zip(states, other.vcpus, strict=True):
        after = plain(saved_vcpu.save(vcpu, host))
        for state in (before, after):
            state["msrs"] = [row for row in state["msrs"] if row[0] != msrs.MSR_IA32_TSC]
            state["cpuid"] = [row for row in state["cpuid"] if row[0] != 1]  # OSXSAVE
        assert after == before
    after = plain(irqchip.save(other.vm))
    assert [after[chip] for chip in ("pic_master", "pic_slave", "ioapic")] == [
        chips[chip] for chip in ("pic_master", "pic_slave", "ioapic")
    ]
    assert after["clock"] >= chips["clock"]
    assert other.run_to_stop() == 5 + step
    assert one.run_to_stop() == 5 + step, "the one that was saved goes on too"


def test_features_that_are_missing_are_named(kvm: Kvm, bare_guest: MakeGuest) -> None:
    one = guest(bare_guest)
    state = plain(saved_vcpu.save(one.vcpu, saved_vcpu.HostAbilities(kvm)))
    for row in state["cpuid"]:
        if row[0] == 7 and row[1] == 0:
            row[4] = 0xFFFF_FFFF
    with pytest.raises(ConfigError, match=r"lacks .* CPUID (0x7\.0 ebx bit \d+,? ?)+;"):
        saved_vcpu.check_cpu(one.vcpu, Saved(state, "vcpu"))


def test_capabilities_that_are_missing_are_named(kvm: Kvm, bare_guest: MakeGuest) -> None:
    one = guest(bare_guest)
    state = Saved(plain(saved_vcpu.save(one.vcpu, saved_vcpu.HostAbilities(kvm))), "vcpu")

    def seldom() -> list[cpuid.CpuidEntry]:
        pytest.fail("a vCPU is made, although the state is of this very machine")

    saved_vcpu.check(kvm, [state], seldom)

    class Less(Kvm):
        """This machine's, but for those in `lacks`."""

        lacks: tuple[int, ...] = ()

        def check_extension(self, number: int) -> int:
            return 0 if number in self.lacks else super().check_extension(number)

    with Less.open() as less:
        saved_vcpu.check(less, [state], lambda: cpuid.get_cpuid(one.vcpu))
        irqchip.check(less)
        less.lacks = (uapi.KVM_CAP_XCRS, uapi.KVM_CAP_DEBUGREGS, uapi.KVM_CAP_PIT_STATE2)
        with pytest.raises(ConfigError, match=r"had: KVM_CAP_XCRS, KVM_CAP_DEBUGREGS;"):
            saved_vcpu.check(less, [state], lambda: cpuid.get_cpuid(one.vcpu))
        with pytest.raises(ConfigError, match="KVM_CAP_PIT_STATE2"):
            irqchip.check(less)


def test_a_refused_msr_is_named(kvm: Kvm, bare_guest: MakeGuest) -> None:
    host = saved_vcpu.HostAbilities(kvm)
    one = guest(bare_guest)
    state = plain(saved_vcpu.save(one.vcpu, host))
    for row in state["msrs"]:
        if row[0] == msrs.MSR_LSTAR:
            row[1] = 1 << 62  # not canonical
    with pytest.raises(ConfigError, match="refuses MSR_LSTAR"):
        saved_vcpu.restore(guest(bare_guest).vcpu, Saved(state, "vcpu"), host, print)
