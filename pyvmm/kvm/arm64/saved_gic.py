"""The state of a GICv3 and its ITS, or of a GICv2, as plain data, and back (KVM API,
devices/arm-vgic-v3.rst, arm-vgic.rst, and arm-vgic-its.rst, which has the order: redistributors,
then the ITS).

Registers stand here in the order in which they are written: what says how an interrupt behaves
before what says that it waits. A new controller has none enabled, pending or active, and KVM sets
the bits that are written; so nothing is cleared first.

What the ITS knows of devices and events is in tables in guest memory, where the guest has given it
room. KVM writes them there when it is asked to, so memory is to be saved afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pyvmm.host.saved import Saved
from pyvmm.kvm.arm64 import uapi

_PER_WORD = 32  # interrupts that have a bit each
_PRIVATE = 32  # interrupts of a vCPU's own

# Arm IHI 0069, 12.9 "The GIC Distributor register descriptions"
_GICD_CTLR, _GICD_IIDR = 0x0000, 0x0008
_IGROUPR, _ISENABLER, _ISPENDR, _ISACTIVER = 0x0080, 0x0100, 0x0200, 0x0300
_IPRIORITYR, _ICFGR, _IROUTER = 0x0400, 0x0C00, 0x6000

# 12.11 "The GIC Redistributor register descriptions"; the second frame has a vCPU's own interrupts.
_GICR_CTLR, _PROPBASER, _PENDBASER = 0x0000, 0x0070, 0x0078
_SGI = 0x1_0000

# 12.19 "The ITS register descriptions"
_GITS_CTLR, _GITS_IIDR = 0x0000, 0x0004
_GITS_CBASER, _GITS_CWRITER, _GITS_CREADR, _GITS_BASER = 0x0080, 0x0088, 0x0090, 0x0100
_BASERS = 8

# Arm IHI 0048, 4.3 "Distributor register descriptions", 4.4 "CPU interface register descriptions"
_ITARGETSR, _SPENDSGIR = 0x0800, 0x0F20
_SGIS = 16  # interrupts between vCPUs, the first of a vCPU's own
_GICC = (0x00, 0x04, 0x08, 0x1C, 0xD0, 0xD4, 0xD8, 0xDC)  # CTLR, PMR, BPR, ABPR, APR0 to 3


class Register(NamedTuple):
    """A register as KVM's device has it: group, attribute, and its bytes."""

    group: int
    attribute: int
    size: int = 4


Read = Callable[[Register], int]
Write = Callable[[Register, int], None]


def _interface(crn: int, crm: int, op2: int) -> int:
    """The attribute of a register of the CPU interface, whose encoding begins with 3, 0."""
    return 3 << 14 | crn << 7 | crm << 3 | op2


# 12.2 "AArch64 System register descriptions" of the physical CPU interface
_ICC_CTLR = _interface(12, 12, 4)  # the first, as the number of the others depends on it
_ICC = (
    _ICC_CTLR,
    _interface(12, 12, 5),  # ICC_SRE_EL1
    _interface(12, 12, 6),  # ICC_IGRPEN0_EL1
    _interface(12, 12, 7),  # ICC_IGRPEN1_EL1
    _interface(4, 6, 0),  # ICC_PMR_EL1
    _interface(12, 8, 3),  # ICC_BPR0_EL1
    _interface(12, 12, 3),  # ICC_BPR1_EL1
)
_ICC_AP0R0, _ICC_AP1R0 = _interface(12, 8, 4), _interface(12, 9, 0)
_PRIORITY_BITS = 8  # the place of ICC_CTLR_EL1.PRIbits, which is one less than they are
_FEWEST_PRIORITY_BITS, _MOST_ACTIVE = 5, 4


def _distributor(interrupts: int) -> list[Register]:
    words = range(_PRIVATE // _PER_WORD, interrupts // _PER_WORD)
    places = [_GICD_IIDR, _GICD_CTLR]
    # The routes before what waits, so that it waits for the right vCPU.
    places += [_IROUTER + 8 * n + half for n in range(_PRIVATE, interrupts) for half in (0, 4)]
    places += [_IGROUPR + 4 * word for word in words]
    places += [_IPRIORITYR + 4 * n for n in range(_PRIVATE // 4, interrupts // 4)]
    places += [_ICFGR + 4 * n for n in range(_PRIVATE // 16, interrupts // 16)]
    places += [_ISENABLER + 4 * word for word in words]
    waiting = [first + 4 * word for first in (_ISPENDR, _ISACTIVER) for word in words]
    group = uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS
    return [
        *(Register(group, place) for place in places),
        *(_levels(0, first) for first in range(_PRIVATE, interrupts, _PER_WORD)),
        *(Register(group, place) for place in waiting),
    ]


def _redistributor(vcpu: int) -> list[Register]:
    # Where the tables are before the switch that has KVM look into them.
    places = [_PROPBASER, _PROPBASER + 4, _PENDBASER, _PENDBASER + 4, _GICR_CTLR]
    places += [_SGI + _IGROUPR]
    places += [_SGI + _IPRIORITYR + 4 * n for n in range(_PRIVATE // 4)]
    places += [_SGI + _ICFGR, _SGI + _ICFGR + 4, _SGI + _ISENABLER]
    group = uapi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
    return [
        *(Register(group, vcpu | place) for place in places),
        _levels(vcpu, 0),
        *(Register(group, vcpu | _SGI + place) for place in (_ISPENDR, _ISACTIVER)),
    ]


def _levels(vcpu: int, first: int) -> Register:
    """The lines of the 32 interrupts from `first` on."""
    kind = uapi.VGIC_LEVEL_INFO_LINE_LEVEL << uapi.KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT
    return Register(uapi.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, vcpu | kind | first)


def _cpu_interface(vcpu: int, control: int) -> list[Register]:
    """Of one with that ICC_CTLR_EL1."""
    bits = (control >> _PRIORITY_BITS & 7) + 1
    active = min(_MOST_ACTIVE, 1 << max(bits - _FEWEST_PRIORITY_BITS, 0))
    places = [*_ICC, *(first + n for first in (_ICC_AP0R0, _ICC_AP1R0) for n in range(active))]
    group = uapi.KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS
    return [Register(group, vcpu | place, 8) for place in places]


def _distributor_v2(interrupts: int) -> list[Register]:
    group = uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS
    places = [_GICD_IIDR, _GICD_CTLR]
    # The targets before what waits, so that it waits for the right vCPU.
    places += [_ITARGETSR + 4 * n for n in range(_PRIVATE // 4, interrupts // 4)]
    places += _of_interrupts_v2(range(_PRIVATE, interrupts))
    return [Register(group, place) for place in places]


def _vcpu_v2(vcpu: int) -> list[Register]:
    """A vCPU's own interrupts, and its CPU interface."""
    who = vcpu << uapi.KVM_DEV_ARM_VGIC_CPUID_SHIFT
    places = _of_interrupts_v2(range(_PRIVATE))
    places += [_SPENDSGIR + n for n in range(0, _SGIS, 4)]
    own = [Register(uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, who | place) for place in places]
    interface = (Register(uapi.KVM_DEV_ARM_VGIC_GRP_CPU_REGS, who | place) for place in _GICC)
    return [*own, *interface]


def _of_interrupts_v2(numbers: range) -> list[int]:
    words = range(numbers.start // _PER_WORD, numbers.stop // _PER_WORD)
    places = [_IGROUPR + 4 * word for word in words]
    places += [_IPRIORITYR + 4 * n for n in range(numbers.start // 4, numbers.stop // 4)]
    places += [_ICFGR + 4 * n for n in range(numbers.start // 16, numbers.stop // 16)]
    return [
        *places,
        *(first + 4 * word for first in (_ISENABLER, _ISPENDR, _ISACTIVER) for word in words),
    ]


def _without_sgis(register: Register, value: int) -> int:
    """Which vCPUs have sent an SGI that waits is in _SPENDSGIR; what is written to _ISPENDR would
    come as the vCPU's own."""
    is_own = register.attribute & 0xFFFF == _ISPENDR
    is_own = is_own and register.group == uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS
    return value >> _SGIS << _SGIS if is_own else value


def _its() -> list[Register]:
    # GITS_CBASER sets GITS_CREADR to 0.
    places = [_GITS_IIDR, _GITS_CBASER, _GITS_CREADR, _GITS_CWRITER]
    places += [_GITS_BASER + 8 * n for n in range(_BASERS)]
    return [Register(uapi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, place, 8) for place in places]


_ITS_SWITCH = Register(uapi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS, _GITS_CTLR, 8)


def _of_vcpus(affinities: Sequence[int]) -> list[int]:
    return [affinity << uapi.KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT for affinity in affinities]


def save(gic: Read, its: Read, affinities: Sequence[int], interrupts: int) -> dict[str, Any]:
    """The registers of a GICv3 with so many `interrupts`, of the vCPUs with those `affinities`,
    and of the ITS, whose tables are in guest memory already."""
    vcpus = _of_vcpus(affinities)
    interfaces = []
    for vcpu in vcpus:
        control = gic(_cpu_interface(vcpu, 0)[0])
        interfaces.append([gic(one) for one in _cpu_interface(vcpu, control)])
    return {
        "distributor": [gic(one) for one in _distributor(interrupts)],
        "redistributors": [[gic(one) for one in _redistributor(vcpu)] for vcpu in vcpus],
        "interfaces": interfaces,
        "its": [its(one) for one in (*_its(), _ITS_SWITCH)],
    }


def restore(
    gic: Write,
    its: Write,
    read_tables: Callable[[], None],
    saved: Saved,
    affinities: Sequence[int],
    interrupts: int,
) -> None:
    """Set what `save` gave, and have `read_tables` called once the ITS knows where in guest memory
    they are. Raises ConfigError for state that cannot be, before anything is set."""
    vcpus = _of_vcpus(affinities)
    writes = _paired(saved, "distributor", saved.get("distributor"), _distributor(interrupts))
    of_vcpus = []
    for vcpu, row in zip(vcpus, _lists(saved, "redistributors", len(vcpus)), strict=True):
        of_vcpus += _paired(saved, "redistributors", row, _redistributor(vcpu))
    for vcpu, row in zip(vcpus, _lists(saved, "interfaces", len(vcpus)), strict=True):
        known = isinstance(row, list) and row and type(row[0]) is int
        control = row[0] if known else 0
        writes += _paired(saved, "interfaces", row, _cpu_interface(vcpu, control))
    *of_its, switch = _paired(saved, "its", saved.get("its"), [*_its(), _ITS_SWITCH])
    for register, value in (*of_vcpus, *writes):
        gic(register, value)
    for register, value in of_its:
        its(register, value)
    read_tables()
    its(*switch)


def save_v2(gic: Read, vcpus: int, interrupts: int) -> dict[str, Any]:
    """The registers of a GICv2 with so many `vcpus` and `interrupts`."""
    return {
        "distributor": [gic(one) for one in _distributor_v2(interrupts)],
        "vcpus": [[_without_sgis(r, gic(r)) for r in _vcpu_v2(n)] for n in range(vcpus)],
    }


def restore_v2(gic: Write, saved: Saved, vcpus: int, interrupts: int) -> None:
    """Set what `save_v2` gave. Raises ConfigError for state that cannot be, before anything is
    set."""
    writes = _paired(saved, "distributor", saved.get("distributor"), _distributor_v2(interrupts))
    for vcpu, row in enumerate(_lists(saved, "vcpus", vcpus)):
        pairs = _paired(saved, "vcpus", row, _vcpu_v2(vcpu))
        writes += [(register, _without_sgis(register, value)) for register, value in pairs]
    for register, value in writes:
        gic(register, value)


def _lists(saved: Saved, name: str, count: int) -> list[Any]:
    rows = saved.items(name, count)
    if len(rows) != count:
        raise saved.wrong(f"{name} are those of {len(rows)} vCPUs, not {count}")
    return rows


def _paired(
    saved: Saved, name: str, row: Any, registers: Sequence[Register]
) -> list[tuple[Register, int]]:
    if not isinstance(row, list) or len(row) != len(registers):
        raise saved.wrong(f"{name} are not {len(registers)} registers")
    for register, value in zip(registers, row, strict=True):
        if type(value) is not int or not 0 <= value < 1 << 8 * register.size:
            raise saved.wrong(f"{name} has {value!r:.60} in it")
    return list(zip(registers, row, strict=True))
