"""CPUID: what the guest learns of its processor.

KVM says what it supports; `for_vcpu` makes of it what vCPU `index` of `count` sees. That is a pure
function: one package, `count` cores of one thread each, APIC id = vCPU number. Leaves as in the
Intel SDM, volume 2, "CPUID", and the AMD APM, volume 3, appendix E.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pyvmm.errors import HostError
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.x86 import uapi
from pyvmm.kvm.x86.uapi import ffi

if TYPE_CHECKING:
    from pyvmm.kvm.system import Kvm
    from pyvmm.kvm.vcpu import Vcpu


class CpuidEntry(NamedTuple):
    """One leaf; `flags` says whether `index` matters (KVM_CPUID_FLAG_SIGNIFCANT_INDEX)."""

    function: int
    index: int  # type: ignore[assignment]  # hides tuple.index, for the header's name
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


INDEXED = uapi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX

_AMD_LIKE = ("AuthenticAMD", "HygonGenuine")

# Leaf 1
_ECX_TSC_DEADLINE = 1 << 24
_ECX_OSXSAVE = 1 << 27
_ECX_HYPERVISOR = 1 << 31
_EDX_HTT = 1 << 28
# Leaf 0x80000001
_ECX_CMP_LEGACY = 1 << 1
_ECX_TOPOLOGY_EXTENSIONS = 1 << 22
# Leaves 0xB and 0x1F: level types
_LEVEL_SMT = 1 << 8
_LEVEL_CORE = 2 << 8

_TOPOLOGY_LEAVES = (0xB, 0x1F)
_AMD_EXTENDED_TOPOLOGY = 0x8000_0026


def for_vcpu(supported: Sequence[CpuidEntry], index: int, count: int) -> list[CpuidEntry]:
    """The leaves of vCPU `index` of `count`, made from what KVM supports.

    Everything but the topology stays, KVM's own leaves (0x40000000…) among it. Raises ValueError
    for an `index` that is not below `count`.
    """
    if not 0 <= index < count:
        raise ValueError(f"vCPU {index} of {count}")
    amd = vendor(supported) in _AMD_LIKE
    entries = [
        _adjust(entry, index, count, amd)
        for entry in supported
        if entry.function not in (*_TOPOLOGY_LEAVES, _AMD_EXTENDED_TOPOLOGY)
    ]
    for leaf in _TOPOLOGY_LEAVES:
        if _has_topology_leaf(supported, leaf):
            entries += _topology(leaf, index, count)
    if amd and _needs_extended_apic_id(supported):
        entries.append(_extended_apic_id(CpuidEntry(0x8000_001E, 0, 0, 0, 0, 0, 0), index))
    return entries


def address_bits(entries: Iterable[CpuidEntry]) -> int:
    """The number of bits of a physical address (leaf 0x80000008, MAXPHYADDR)."""
    for entry in entries:
        if entry.function == 0x8000_0008:
            return entry.eax & 0xFF
    return 36  # Intel SDM, volume 3, 4.1.4: what a processor without the leaf has, with PAE


def vendor(entries: Iterable[CpuidEntry]) -> str:
    """The twelve letters of leaf 0, or "" without one."""
    for entry in entries:
        if entry.function == 0:
            letters = b"".join(
                register.to_bytes(4, "little") for register in (entry.ebx, entry.edx, entry.ecx)
            )
            return letters.decode("latin-1")
    return ""


def with_tsc_deadline(entries: Sequence[CpuidEntry]) -> list[CpuidEntry]:
    """The same with leaf 1's TSC deadline timer, which KVM never reports by itself.

    It works if KVM has KVM_CAP_TSC_DEADLINE_TIMER and the irqchip is in the kernel (KVM API,
    "KVM_GET_SUPPORTED_CPUID").
    """
    return [
        entry._replace(ecx=entry.ecx | _ECX_TSC_DEADLINE) if entry.function == 1 else entry
        for entry in entries
    ]


def _adjust(entry: CpuidEntry, index: int, count: int, amd: bool) -> CpuidEntry:
    function = entry.function
    if function == 1:
        return _features(entry, index, count)
    if function == 4:
        return _intel_cache(entry, count)
    if amd:
        if function == 0x8000_0001:
            return _put(entry, ecx=_flag(entry.ecx, _ECX_CMP_LEGACY, count > 1))
        if function == 0x8000_0008:
            # NC, cores minus one, and ApicIdSize, the bits of an APIC id that number them.
            sizes = (_order(count) << 12) | min(count - 1, 0xFF)
            return _put(entry, ecx=(entry.ecx & ~0xF0FF) | sizes)
        if function == 0x8000_001D:
            return _amd_cache(entry, count)
        if function == 0x8000_001E:
            return _extended_apic_id(entry, index)
    return entry


def _features(entry: CpuidEntry, index: int, count: int) -> CpuidEntry:
    """Leaf 1: initial APIC id, ids per package, HTT, "there is a hypervisor"."""
    ids = min(1 << _order(count), 0xFF)
    ebx = (entry.ebx & 0xFFFF) | (ids << 16) | ((index & 0xFF) << 24)
    # OSXSAVE mirrors CR4, which is KVM's to do.
    ecx = (entry.ecx | _ECX_HYPERVISOR) & ~_ECX_OSXSAVE
    return _put(entry, ebx=ebx, ecx=ecx, edx=_flag(entry.edx, _EDX_HTT, count > 1))


def _intel_cache(entry: CpuidEntry, count: int) -> CpuidEntry:
    """Leaf 4: L1 and L2 belong to one core, L3 to the package; ids per package."""
    if entry.eax & 0x1F == 0:  # no more caches
        return entry
    ids = (1 << _order(count)) - 1
    level = (entry.eax >> 5) & 7
    sharing = min(ids, 0xFFF) if level >= 3 else 0
    return _put(entry, eax=(entry.eax & 0x3FFF) | (sharing << 14) | (min(ids, 0x3F) << 26))


def _amd_cache(entry: CpuidEntry, count: int) -> CpuidEntry:
    """Leaf 0x8000001D: the same for AMD, as the number of cores that share, minus one."""
    if entry.eax & 0x1F == 0:
        return entry
    sharing = min(count - 1, 0xFFF) if (entry.eax >> 5) & 7 >= 3 else 0
    return _put(entry, eax=(entry.eax & ~(0xFFF << 14)) | (sharing << 14))


def _extended_apic_id(entry: CpuidEntry, index: int) -> CpuidEntry:
    """Leaf 0x8000001E: APIC id, core id with one thread per core, node 0 of 1."""
    return _put(entry, eax=index, ebx=index & 0xFF, ecx=0, edx=0)


def _topology(leaf: int, index: int, count: int) -> list[CpuidEntry]:
    """Leaves 0xB and 0x1F: how many APIC id bits to drop for the core's and the package's id."""
    return [
        CpuidEntry(leaf, 0, INDEXED, 0, 1, 0 | _LEVEL_SMT, index),
        CpuidEntry(leaf, 1, INDEXED, _order(count), count, 1 | _LEVEL_CORE, index),
        CpuidEntry(leaf, 2, INDEXED, 0, 0, 2, index),
    ]


def _has_topology_leaf(supported: Sequence[CpuidEntry], leaf: int) -> bool:
    """0xB where the highest leaf allows it; 0x1F, its successor, only where KVM has it too."""
    if leaf == 0xB:
        return _highest(supported, 0) >= leaf
    return any(entry.function == leaf for entry in supported)


def _needs_extended_apic_id(supported: Sequence[CpuidEntry]) -> bool:
    """True if the processor says it has leaf 0x8000001E while KVM does not list it."""
    if any(entry.function == 0x8000_001E for entry in supported):
        return False
    promised = any(
        entry.function == 0x8000_0001 and entry.ecx & _ECX_TOPOLOGY_EXTENSIONS
        for entry in supported
    )
    return promised and _highest(supported, 0x8000_0000) >= 0x8000_001E


def _highest(entries: Iterable[CpuidEntry], base: int) -> int:
    return next((entry.eax for entry in entries if entry.function == base), 0)


def _order(count: int) -> int:
    """The number of bits that tell `count` things apart."""
    return (count - 1).bit_length()


def _flag(register: int, bit: int, on: bool) -> int:
    return register | bit if on else register & ~bit


def _put(entry: CpuidEntry, **registers: int) -> CpuidEntry:
    return entry._replace(**registers)


# --- to and from KVM -----------------------------------------------------------------------------


def get_supported(kvm_fd: int) -> list[CpuidEntry]:
    """KVM_GET_SUPPORTED_CPUID as it is. Raises HostError."""
    room = 128
    while True:
        table = ffi.new("struct kvm_cpuid2 *", {"entries": room})
        table.nent = room
        try:
            struct_ioctl(kvm_fd, uapi.KVM_GET_SUPPORTED_CPUID, table, "KVM_GET_SUPPORTED_CPUID")
        except HostError as error:
            if error.errno != errno.E2BIG or room >= 4096:
                raise
            room *= 2
            continue
        return _from_table(table)


def supported(kvm: Kvm) -> list[CpuidEntry]:
    """The leaves that `kvm` can give a guest with the irqchip in the kernel. Raises HostError."""
    entries = get_supported(kvm.fd)
    deadline = kvm.check_extension(uapi.KVM_CAP_TSC_DEADLINE_TIMER) > 0
    return with_tsc_deadline(entries) if deadline else entries


def set_cpuid(vcpu: Vcpu, entries: Sequence[CpuidEntry]) -> None:
    """KVM_SET_CPUID2: give `vcpu` these leaves, before it first runs. Raises HostError."""
    table = ffi.new("struct kvm_cpuid2 *", {"entries": len(entries)})
    table.nent = len(entries)
    for slot, entry in zip(table.entries, entries, strict=True):
        slot.function, slot.index, slot.flags = entry.function, entry.index, entry.flags
        slot.eax, slot.ebx, slot.ecx, slot.edx = entry.eax, entry.ebx, entry.ecx, entry.edx
    struct_ioctl(vcpu.fd, uapi.KVM_SET_CPUID2, table, "KVM_SET_CPUID2")


def get_cpuid(vcpu: Vcpu) -> list[CpuidEntry]:
    """KVM_GET_CPUID2: the leaves `vcpu` has. Raises HostError."""
    table = ffi.new("struct kvm_cpuid2 *", {"entries": 256})
    table.nent = 256
    struct_ioctl(vcpu.fd, uapi.KVM_GET_CPUID2, table, "KVM_GET_CPUID2")
    return _from_table(table)


def _from_table(table: object) -> list[CpuidEntry]:
    nent: int = table.nent  # type: ignore[attr-defined]
    entries = table.entries  # type: ignore[attr-defined]
    return [
        CpuidEntry(e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx)
        for e in entries[0:nent]
    ]
