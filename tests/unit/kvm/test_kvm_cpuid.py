"""CPUID topology as a pure function, for processors shaped like Intel's and AMD's."""

from __future__ import annotations

import pytest

from pyvmm.kvm.x86.cpuid import INDEXED, CpuidEntry, for_vcpu, vendor, with_tsc_deadline

HYPERVISOR, OSXSAVE, TSC_DEADLINE = 1 << 31, 1 << 27, 1 << 24
HTT = 1 << 28


def entry(function: int, index: int = 0, **registers: int) -> CpuidEntry:
    flags = INDEXED if function in (4, 0xB, 0x1F, 0x8000_001D) else 0
    zero = dict.fromkeys(("eax", "ebx", "ecx", "edx"), 0)
    return CpuidEntry(function, index, flags, **{**zero, **registers})


def leaf_0(highest: int, name: bytes) -> CpuidEntry:
    ebx, edx, ecx = (int.from_bytes(name[at : at + 4], "little") for at in (0, 4, 8))
    return entry(0, eax=highest, ebx=ebx, edx=edx, ecx=ecx)


KVM_SIGNATURE = entry(0x4000_0000, eax=0x4000_0001, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D)
KVM_FEATURES = entry(0x4000_0001, eax=0x0100_7AFB)

INTEL = [
    leaf_0(0x1F, b"GenuineIntel"),
    entry(1, eax=0xA0671, ebx=0xFF_FF_08_00, ecx=OSXSAVE | 0x0100_0001, edx=0x1F8B_FBFF),
    # type, level, and somebody else's topology
    entry(4, 0, eax=0xFC1F_C121, ebx=0x02C0_003F, ecx=0x3F),  # L1 data
    entry(4, 1, eax=0xFC1F_C122, ebx=0x01C0_003F, ecx=0x3F),  # L1 code
    entry(4, 2, eax=0xFC1F_C143, ebx=0x04C0_003F, ecx=0x3FF),  # L2
    entry(4, 3, eax=0xFC1F_C163, ebx=0x03C0_003F, ecx=0x7FFF),  # L3
    entry(4, 4),
    entry(7, ebx=0xF1BF_2BFB),
    entry(0xB, 0, eax=1, ebx=2, ecx=0x100, edx=99),
    entry(0xB, 1, eax=7, ebx=64, ecx=0x201, edx=99),
    entry(0x1F, 0, eax=1, ebx=2, ecx=0x100, edx=99),
    KVM_SIGNATURE,
    KVM_FEATURES,
    entry(0x8000_0000, eax=0x8000_0008),
    entry(0x8000_0008, eax=0x3930, ecx=0),
]

AMD = [
    leaf_0(0x10, b"AuthenticAMD"),
    entry(1, eax=0x0083_0F10, ebx=0xFF_FF_08_00, ecx=1, edx=0x178B_FBFF),
    entry(0xB, 0, edx=99),
    KVM_SIGNATURE,
    KVM_FEATURES,
    entry(0x8000_0000, eax=0x8000_0021),
    entry(0x8000_0001, ecx=0x0040_03F3, edx=0x2FD3_FBFF),
    entry(0x8000_0008, eax=0x3030, ebx=0x10_7000, ecx=0x7FFF),
    entry(0x8000_001D, 0, eax=0x3FFC_121),  # L1 data
    entry(0x8000_001D, 2, eax=0x3FFC_143),  # L2
    entry(0x8000_001D, 3, eax=0x3FFC_163),  # L3
    entry(0x8000_001D, 4),
    entry(0x8000_001E, eax=99, ebx=0x0163, ecx=0x0707),
    entry(0x8000_0026, 0, eax=99, ebx=99),
]


def leaf(entries: list[CpuidEntry], function: int, index: int = 0) -> CpuidEntry:
    (found,) = [e for e in entries if (e.function, e.index) == (function, index)]
    return found


def test_the_vendor_is_read_from_leaf_0() -> None:
    assert vendor(INTEL) == "GenuineIntel"
    assert vendor(AMD) == "AuthenticAMD"
    assert vendor([]) == ""


@pytest.mark.parametrize("supported", [INTEL, AMD], ids=["intel", "amd"])
@pytest.mark.parametrize(("index", "count", "ids"), [(0, 1, 1), (1, 2, 2), (2, 3, 4), (7, 8, 8)])
def test_leaf_1_has_apic_id_count_and_htt(
    supported: list[CpuidEntry], index: int, count: int, ids: int
) -> None:
    features = leaf(for_vcpu(supported, index, count), 1)
    assert features.ebx >> 24 == index
    assert features.ebx >> 16 & 0xFF == ids
    assert features.ebx & 0xFFFF == 0x0800, "CLFLUSH size and brand stay"
    assert bool(features.edx & HTT) == (count > 1)
    assert features.ecx & HYPERVISOR
    assert not features.ecx & OSXSAVE, "CR4's to say"


@pytest.mark.parametrize(("count", "ids"), [(1, 1), (2, 2), (3, 4), (8, 8)])
def test_intel_caches_belong_to_the_core_and_l3_to_the_package(count: int, ids: int) -> None:
    entries = for_vcpu(INTEL, 0, count)
    for index, sharing in ((0, 0), (1, 0), (2, 0), (3, ids - 1)):
        cache = leaf(entries, 4, index)
        assert cache.eax >> 14 & 0xFFF == sharing
        assert cache.eax >> 26 == ids - 1
        assert cache.eax & 0x3FFF == INTEL[2 + index].eax & 0x3FFF
    assert leaf(entries, 4, 4) == entry(4, 4)


@pytest.mark.parametrize("function", [0xB, 0x1F])
@pytest.mark.parametrize(("index", "count", "bits"), [(0, 1, 0), (1, 2, 1), (4, 5, 3), (7, 8, 3)])
def test_topology_leaves_number_threads_and_cores(
    function: int, index: int, count: int, bits: int
) -> None:
    entries = for_vcpu(INTEL, index, count)
    smt, core, end = (leaf(entries, function, level) for level in range(3))
    assert (smt.eax, smt.ebx, smt.ecx, smt.edx) == (0, 1, 0x100, index)
    assert (core.eax, core.ebx, core.ecx, core.edx) == (bits, count, 0x201, index)
    assert (end.eax, end.ebx, end.ecx >> 8 & 0xFF, end.edx) == (0, 0, 0, index)
    assert {level.flags for level in (smt, core, end)} == {INDEXED}


def test_apic_ids_and_widths_separate_the_cores_and_keep_one_package() -> None:
    for count in range(1, 9):
        shifts = set()
        for index in range(count):
            entries = for_vcpu(INTEL, index, count)
            shifts.add(leaf(entries, 0xB, 1).eax)
            assert leaf(entries, 0xB, 0).edx == leaf(entries, 1).ebx >> 24
            assert index >> leaf(entries, 0xB, 1).eax == 0, "all in package 0"
        assert len(shifts) == 1


def test_1f_is_given_only_where_kvm_has_it() -> None:
    assert not [e for e in for_vcpu(AMD, 0, 2) if e.function == 0x1F]
    assert len([e for e in for_vcpu(INTEL, 0, 2) if e.function == 0x1F]) == 3


def test_b_is_not_given_to_processors_before_it() -> None:
    old = [leaf_0(0xA, b"GenuineIntel"), INTEL[1]]
    assert not [e for e in for_vcpu(old, 0, 2) if e.function == 0xB]


@pytest.mark.parametrize(("count", "bits"), [(1, 0), (2, 1), (3, 2), (8, 3)])
def test_amd_says_how_many_cores_and_id_bits(count: int, bits: int) -> None:
    sizes = leaf(for_vcpu(AMD, 0, count), 0x8000_0008)
    assert sizes.ecx & 0xFF == count - 1
    assert sizes.ecx >> 12 & 0xF == bits
    assert sizes.eax == 0x3030, "address widths stay"
    legacy = leaf(for_vcpu(AMD, 0, count), 0x8000_0001).ecx & 2
    assert bool(legacy) == (count > 1)


def test_amd_extended_apic_id_and_caches() -> None:
    entries = for_vcpu(AMD, 3, 4)
    extended = leaf(entries, 0x8000_001E)
    assert (extended.eax, extended.ebx, extended.ecx) == (3, 3, 0)
    sharing = [leaf(entries, 0x8000_001D, index).eax >> 14 & 0xFFF for index in (0, 2, 3)]
    assert sharing == [0, 0, 3]
    assert leaf(entries, 0x8000_001D, 4) == entry(0x8000_001D, 4)


def test_amd_extended_apic_id_is_added_where_promised_but_not_listed() -> None:
    without = [e for e in AMD if e.function != 0x8000_001E]
    assert leaf(for_vcpu(without, 1, 2), 0x8000_001E).eax == 1
    unpromised = [
        e._replace(ecx=0) if e.function == 0x8000_0001 else e for e in without
    ]  # no topology extensions
    assert not [e for e in for_vcpu(unpromised, 1, 2) if e.function == 0x8000_001E]


def test_amd_extended_topology_of_the_host_is_dropped() -> None:
    assert not [e for e in for_vcpu(AMD, 0, 2) if e.function == 0x8000_0026]


def test_intels_reserved_bits_of_80000008_stay_clear() -> None:
    assert leaf(for_vcpu(INTEL, 0, 8), 0x8000_0008).ecx == 0


@pytest.mark.parametrize("supported", [INTEL, AMD], ids=["intel", "amd"])
def test_the_rest_stays_and_kvms_own_leaves_too(supported: list[CpuidEntry]) -> None:
    entries = for_vcpu(supported, 0, 2)
    assert KVM_SIGNATURE in entries
    assert KVM_FEATURES in entries
    if supported is INTEL:
        assert leaf(entries, 7).ebx == 0xF1BF_2BFB
    places = [(e.function, e.index) for e in entries]
    assert len(places) == len(set(places)), "no leaf twice"


def test_the_input_is_left_alone() -> None:
    before = list(INTEL)
    for_vcpu(INTEL, 1, 2)
    assert before == INTEL


def test_tsc_deadline_is_set_in_leaf_1_only() -> None:
    entries = with_tsc_deadline(AMD)
    assert leaf(entries, 1).ecx == AMD[1].ecx | TSC_DEADLINE
    assert [e for e in entries if e.function != 1] == [e for e in AMD if e.function != 1]
    assert leaf(for_vcpu(entries, 0, 1), 1).ecx & TSC_DEADLINE


@pytest.mark.parametrize(("index", "count"), [(-1, 1), (1, 1), (0, 0)])
def test_a_vcpu_that_does_not_exist_is_refused(index: int, count: int) -> None:
    with pytest.raises(ValueError, match="vCPU"):
        for_vcpu(INTEL, index, count)
