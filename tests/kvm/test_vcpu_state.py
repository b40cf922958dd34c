"""The state that a vCPU is given before it runs, as KVM itself reports it back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from bare_guest import BareGuest

from pyvmm.errors import HostError
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.x86 import cpuid, lapic, msrs, uapi
from pyvmm.kvm.x86 import registers as r

MakeGuest = Callable[..., BareGuest]


def test_the_entry_state_of_long_mode(bare_guest: MakeGuest) -> None:
    vcpu = bare_guest(b"", mode="long64").vcpu
    sregs = r.get_sregs(vcpu)
    assert sregs.efer & (r.EFER_LME | r.EFER_LMA) == r.EFER_LME | r.EFER_LMA
    assert sregs.cr0 & (r.CR0_PE | r.CR0_PG) == r.CR0_PE | r.CR0_PG
    assert sregs.cr4 == r.CR4_PAE
    assert (sregs.cs.selector, sregs.cs.l, sregs.cs.db) == (0x10, 1, 0)
    assert {s.selector for s in (sregs.ds, sregs.es, sregs.ss)} == {0x18}
    assert not r.get_regs(vcpu).rflags & r.RFLAGS_IF


def test_the_entry_state_of_pvh(bare_guest: MakeGuest) -> None:
    vcpu = bare_guest(b"", mode="protected32").vcpu
    sregs = r.get_sregs(vcpu)
    assert (sregs.efer, sregs.cr4) == (0, 0)
    assert sregs.cr0 & (r.CR0_PE | r.CR0_PG) == r.CR0_PE
    assert (sregs.cs.l, sregs.cs.db, sregs.cs.base, sregs.cs.limit) == (0, 1, 0, 0xFFFF_FFFF)
    assert (sregs.tr.limit, sregs.tr.type) == (0x67, 0xB)
    assert not r.get_regs(vcpu).rflags & r.RFLAGS_IF


def test_fpu_and_local_apic_are_as_after_reset_and_firmware(bare_guest: MakeGuest) -> None:
    vcpu = bare_guest(b"").vcpu
    assert r.get_fpu(vcpu).fcw == 0x37F
    page = lapic.get_lapic(vcpu)
    assert lapic.get_register(page, lapic.LVT0) & 0x1_0700 == 0x700
    assert lapic.get_register(page, lapic.LVT1) & 0x1_0700 == 0x400


def test_boot_msrs_read_back(bare_guest: MakeGuest) -> None:
    vcpu = bare_guest(b"").vcpu
    wanted = [msrs.MSR_IA32_MISC_ENABLE, msrs.MSR_MTRR_DEF_TYPE, msrs.MSR_LSTAR]
    values = msrs.get_msrs(vcpu, wanted)
    assert values[msrs.MSR_IA32_MISC_ENABLE] & 1
    assert values[msrs.MSR_MTRR_DEF_TYPE] == 0x806
    assert values[msrs.MSR_LSTAR] == 0


def test_a_refused_msr_is_named(bare_guest: MakeGuest) -> None:
    vcpu = bare_guest(b"").vcpu
    # Not a canonical address: no KVM takes it. The good one before it does not confuse the report.
    values = {msrs.MSR_STAR: 0, msrs.MSR_LSTAR: 1 << 62, msrs.MSR_CSTAR: 0}
    with pytest.raises(HostError, match="MSR_LSTAR"):
        msrs.set_msrs(vcpu, values)
    with pytest.raises(HostError, match="0x12345"):
        msrs.get_msrs(vcpu, [msrs.MSR_STAR, 0x12345])


def test_every_vcpu_has_its_own_apic_id_in_cpuid(bare_guest: MakeGuest) -> None:
    guest = bare_guest(b"", vcpus=3)
    for number, vcpu in enumerate(guest.vcpus):
        entries = cpuid.get_cpuid(vcpu)
        assert next(e.ebx >> 24 for e in entries if e.function == 1) == number


def test_tsc_deadline_is_offered_where_kvm_has_it(kvm: Kvm) -> None:
    features = next(e for e in cpuid.supported(kvm) if e.function == 1)
    has_it = kvm.check_extension(uapi.KVM_CAP_TSC_DEADLINE_TIMER) > 0
    assert bool(features.ecx & 1 << 24) == has_it


def test_a_state_kvm_refuses_is_an_error_that_names_the_call(bare_guest: MakeGuest) -> None:
    vcpu = bare_guest(b"").vcpu
    sregs = r.get_sregs(vcpu)
    sregs.cr0 = r.CR0_PG  # paging without protection
    with pytest.raises(HostError, match="KVM_SET_SREGS"):
        r.set_sregs(vcpu, sregs)
