"""Saved vCPUs and interrupt controllers of arm64 on any machine: which registers, in which order,
and what becomes of a state that cannot be. Whether KVM takes them only an arm64 guest can tell
(tests/guest/test_linux_arm64.py)."""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from c_claims import assembled, needs_arm64_headers

from pyvmm.errors import ConfigError, HostError
from pyvmm.host.saved import Saved
from pyvmm.kvm.arm64 import boot_vcpu, registers, saved_gic, saved_vcpu, uapi
from pyvmm.kvm.arm64.saved_gic import Register
from pyvmm.kvm.plain import to_plain

AFFINITIES = [boot_vcpu.mpidr(index) for index in range(2)]
INTERRUPTS = 96
DIST, REDIST = uapi.KVM_DEV_ARM_VGIC_GRP_DIST_REGS, uapi.KVM_DEV_ARM_VGIC_GRP_REDIST_REGS
ITS = uapi.KVM_DEV_ARM_VGIC_GRP_ITS_REGS


def contents(register: Register) -> int:
    """Something else in each register; ICC_CTLR_EL1 says that there are 7 bits of priority."""
    if register.attribute & 0xFFFF_FFFF == saved_gic._ICC_CTLR and register.size == 8:
        return 6 << 8
    return (register.attribute * 2654435761 + register.group) % (1 << 8 * register.size)


def saved_controller() -> dict[str, Any]:
    state = saved_gic.save(contents, contents, AFFINITIES, INTERRUPTS)
    found: dict[str, Any] = json.loads(json.dumps(state))
    return found


def restored(state: object) -> list[tuple[Register, int] | str]:
    """What is written, in its order."""
    written: list[tuple[Register, int] | str] = []
    saved_gic.restore(
        lambda register, value: written.append((register, value)),
        lambda register, value: written.append((register, value)),
        lambda: written.append("tables"),
        Saved(state, "the VM"),
        AFFINITIES,
        INTERRUPTS,
    )
    return written


def test_every_register_gets_what_it_had() -> None:
    writes = [one for one in restored(saved_controller()) if not isinstance(one, str)]
    assert all(value == contents(register) for register, value in writes)
    assert len({register for register, _ in writes}) == len(writes)
    places = {(one.group, one.attribute) for one, _ in writes}
    # All 96 interrupts: four priorities in a register, a route of two halves for each shared one.
    assert {(DIST, 0x6000 + 8 * n + half) for n in range(32, 96) for half in (0, 4)} <= places
    assert {(DIST, 0x400 + n) for n in range(32, 96, 4)} <= places
    for affinity in AFFINITIES:
        own = {(REDIST, affinity << 32 | 0x1_0400 + n) for n in range(0, 32, 4)}
        assert own <= places
    assert {(ITS, 0x100 + 8 * n) for n in range(8)} <= places
    # The lines of interrupts: of shared ones no vCPU's.
    lines = {place for group, place in places if group == uapi.KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO}
    assert lines == {32, 64, *(affinity << 32 for affinity in AFFINITIES)}


def order(writes: list[tuple[Register, int] | str], group: int, attribute: int) -> int:
    [found] = [
        place
        for place, one in enumerate(writes)
        if not isinstance(one, str) and one[0][:2] == (group, attribute)
    ]
    return found


def test_the_order_is_what_kvm_asks_for() -> None:
    writes = restored(saved_controller())
    assert order(writes, DIST, 0x8) < order(writes, DIST, 0x0)  # GICD_IIDR says how the rest is
    assert order(writes, DIST, 0x6000 + 8 * 32) < order(writes, DIST, 0x204)  # routes, pending
    assert order(writes, DIST, 0xC08) < order(writes, DIST, 0x204)  # edge or level, pending
    assert order(writes, REDIST, 0x78) < order(writes, REDIST, 0)  # GICR_PENDBASER, GICR_CTLR
    assert order(writes, ITS, 0x4) < order(writes, ITS, 0x80)  # GITS_IIDR, GITS_CBASER
    assert order(writes, ITS, 0x80) < order(writes, ITS, 0x90)  # GITS_CREADR
    last_of_gic = max(
        place for place, one in enumerate(writes) if not isinstance(one, str) and one[0].group < ITS
    )
    assert last_of_gic < order(writes, ITS, 0x4)
    assert order(writes, ITS, 0x138) < writes.index("tables") < order(writes, ITS, 0x0)
    assert order(writes, ITS, 0x0) == len(writes) - 1


@pytest.mark.parametrize(("bits", "count"), [(5, 1), (6, 2), (7, 4)])
def test_an_interface_has_as_many_active_priorities_as_bits_need(bits: int, count: int) -> None:
    names = saved_gic._cpu_interface(0, bits - 1 << 8)
    assert len(names) == 7 + 2 * count


@needs_arm64_headers
def test_the_interfaces_registers_are_the_assemblers(tmp_path: Path) -> None:
    names = ("CTLR", "SRE", "IGRPEN0", "IGRPEN1", "PMR", "BPR0", "BPR1")
    names += (*(f"AP0R{n}" for n in range(4)), *(f"AP1R{n}" for n in range(4)))
    code = assembled(tmp_path, "".join(f"mrs x0, ICC_{name}_EL1\n" for name in names))
    words = struct.unpack(f"<{len(names)}I", code)
    # MRS has op0, op1, CRn, CRm and op2 in bits 20 to 5, as KVM's attribute has them.
    expected = [word >> 5 & 0xFFFF for word in words]
    assert [one.attribute for one in saved_gic._cpu_interface(0, 6 << 8)] == expected


def wrong_states(state: dict[str, Any]) -> Iterator[Any]:
    """`state` with something in each place that cannot be there."""
    for name, values in state.items():
        for bad in (None, 1, "x", [], {}, [*values, 0], values[1:]):
            yield {**state, name: bad}
        yield {other: row for other, row in state.items() if other != name}
        for place in (0, -1):
            for bad in (None, -1, 1 << 64, 0.5, "1", True, [[]]):
                changed = copy.deepcopy(state)
                row = changed[name]
                if isinstance(row[place], list) and not isinstance(bad, list):
                    row = row[place]
                row[place] = bad
                yield changed


def test_a_state_that_cannot_be_changes_nothing() -> None:
    too_wide = saved_controller()
    too_wide["distributor"][0] = 1 << 32
    for state in (too_wide, *wrong_states(saved_controller())):
        written: list[object] = []

        def write(register: Register, value: int, written: list[object] = written) -> None:
            written.append(register)

        with pytest.raises(ConfigError, match="the saved state of the VM cannot be"):
            saved_gic.restore(
                write, write, lambda: None, Saved(state, "the VM"), AFFINITIES, INTERRUPTS
            )
        assert written == []


# --- a GICv2 --------------------------------------------------------------------------------------

CPU = uapi.KVM_DEV_ARM_VGIC_GRP_CPU_REGS


def saved_old_controller() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(saved_gic.save_v2(contents, 2, INTERRUPTS)))
    return found


def restored_old(state: object) -> list[tuple[Register, int]]:
    written: list[tuple[Register, int]] = []
    saved_gic.restore_v2(
        lambda register, value: written.append((register, value)),
        Saved(state, "the VM"),
        2,
        INTERRUPTS,
    )
    return written


def test_every_register_of_a_gicv2_gets_what_it_had() -> None:
    writes = restored_old(saved_old_controller())
    found = {(one.group, one.attribute): value for one, value in writes}
    assert len(found) == len(writes)
    for (group, place), value in found.items():
        if (group, place & 0xFFFF_FFFF) == (DIST, 0x200):  # GICD_ISPENDR0, of each vCPU
            assert value == contents(Register(group, place)) & 0xFFFF_0000
        else:
            assert value == contents(Register(group, place))
    assert {(DIST, 0x400 + n) for n in range(32, 96, 4)} <= set(found)  # priorities
    assert {(DIST, 0x800 + n) for n in range(32, 96, 4)} <= set(found)  # targets
    for vcpu in range(2):
        own = {(DIST, vcpu << 32 | 0x400 + n) for n in range(0, 32, 4)}
        # Who has sent the SGIs that wait; the CPU interface: mask, binary points, active priorities
        own |= {(DIST, vcpu << 32 | 0xF20 + n) for n in range(0, 16, 4)}
        own |= {(CPU, vcpu << 32 | n) for n in (0, 4, 8, 0x1C, 0xD0, 0xD4, 0xD8, 0xDC)}
        assert own <= set(found)


def test_the_order_of_a_gicv2s_registers() -> None:
    writes: list[tuple[Register, int] | str] = [*restored_old(saved_old_controller())]
    assert order(writes, DIST, 0x8) == 0  # without GICD_IIDR, KVM takes no groups
    for vcpu in range(2):
        who = vcpu << 32
        assert order(writes, DIST, who | 0xC04) < order(writes, DIST, who | 0x200)
    assert order(writes, DIST, 0x820) < order(writes, DIST, 0x204)  # targets, pending
    assert order(writes, DIST, 0xC08) < order(writes, DIST, 0x204)  # edge or level, pending


def test_a_gicv2s_state_that_cannot_be_changes_nothing() -> None:
    for state in wrong_states(saved_old_controller()):
        with pytest.raises(ConfigError, match="the saved state of the VM cannot be"):
            assert restored_old(state) == []


# --- vCPUs ----------------------------------------------------------------------------------------


class Processor:
    """KVM's side of vCPU `id`: its registers, some of which can only be read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int = 0) -> None:
        self.id, self.fd = number, -1
        self.values = {registers.PC: 0, registers.MPIDR_EL1: 7, registers.CNTVCT_EL0: 0}
        self.fixed = {registers.MPIDR_EL1}
        self.set: list[int] = []
        monkeypatch.setattr(registers, "all_registers", lambda vcpu: list(vcpu.values))
        monkeypatch.setattr(registers, "get_register", lambda vcpu, one: vcpu.values[one])
        monkeypatch.setattr(registers, "set_register", Processor._set)

    def _set(self, register: int, value: int) -> None:
        if register in self.fixed:
            raise HostError(22, "KVM_SET_ONE_REG")
        self.values[register] = value
        self.set.append(register)

    def restore(self, *rows: object) -> None:
        state = Saved({"registers": list(rows)}, "the VM")
        saved_vcpu.restore_registers(self, state)  # type: ignore[arg-type]


def test_registers_that_can_only_be_read_may_be_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = Processor(monkeypatch)
    vcpu.restore([registers.PC, 5], [registers.MPIDR_EL1, 7], [registers.CNTVCT_EL0, 9])
    assert vcpu.values == {registers.PC: 5, registers.MPIDR_EL1: 7, registers.CNTVCT_EL0: 9}


def test_the_guests_time_is_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = Processor(monkeypatch, number=1)
    vcpu.restore([registers.PC, 5], [registers.CNTVCT_EL0, 9])
    assert vcpu.set == [registers.PC]


def test_what_this_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = Processor(monkeypatch)
    line = re.escape("lacks what the guest's processor had: S3_0_C0_C0_5 = 0x8 of vCPU 0; restore")
    with pytest.raises(ConfigError, match=line):
        vcpu.restore([registers.MPIDR_EL1, 8])
    with pytest.raises(ConfigError, match=r"lacks .*: S3_0_C1_C0_0 = 0x1 of vCPU 0"):
        vcpu.restore([registers.SCTLR_EL1, 1], [registers.TCR_EL1, 0])
    assert vcpu.set == []
    vcpu.restore([registers.TCR_EL1, 0])  # one of 0 that is not here is as good as none
    many = [[registers.system(3, 5, n, 0, 0), 1] for n in range(16)]
    many += [[registers.system(3, 5, n, 1, 0), 1] for n in range(16)]
    many += [[registers.system(3, 5, n, 2, 0), 1] for n in range(16)]
    with pytest.raises(ConfigError, match=r", 16 more of vCPU 0"):
        vcpu.restore(*many)


def test_wide_registers_make_no_long_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a stranger's, of any number and width."""
    vcpu = Processor(monkeypatch)
    with pytest.raises(ConfigError) as caught:
        vcpu.restore(*([8 << 52 | n, (1 << 2048) - 1] for n in range(40)))
    assert len(str(caught.value)) < 4096
    with pytest.raises(ConfigError, match="cannot be"):
        vcpu.restore([9 << 52, 1])


@pytest.mark.parametrize(
    "row",
    [
        *(None, 1, [], [1], [1, 2, 3], ["1", 2], [registers.PC, "2"], [registers.PC, None]),
        *([-1, 0], [1 << 64, 0], [registers.PC, -1], [registers.PC, 1 << 64], [True, False]),
    ],
)
def test_a_register_that_cannot_be(monkeypatch: pytest.MonkeyPatch, row: object) -> None:
    vcpu = Processor(monkeypatch)
    with pytest.raises(ConfigError, match="the saved state of the VM cannot be"):
        vcpu.restore([registers.PC, 5], row)
    assert vcpu.set == []


def test_vectors_have_128_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    vcpu = Processor(monkeypatch)
    vector = registers.core("fp_regs", "vregs", 3)
    vcpu.values[vector] = 0
    vcpu.restore([vector, (1 << 128) - 1])
    assert vcpu.values[vector] == (1 << 128) - 1
    with pytest.raises(ConfigError, match="cannot be"):
        vcpu.restore([vector, 1 << 128])


def test_an_serror_that_this_machine_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the processor has no RAS, KVM refuses one with a syndrome."""
    vcpu = Processor(monkeypatch)
    events = to_plain(uapi.ffi, uapi.ffi.new("struct kvm_vcpu_events *"))
    whole = {"registers": [[registers.PC, 5]], "events": events, "mp_state": 0}
    asked: list[str] = []

    def refused(fd: int, request: int, arg: object, what: str) -> None:
        asked.append(what)
        raise HostError(22, what)

    monkeypatch.setattr(saved_vcpu, "struct_ioctl", refused)
    with pytest.raises(ConfigError, match=r"refuses .* vCPU 0: KVM_SET_VCPU_EVENTS.*; restore it"):
        saved_vcpu.restore(vcpu, Saved(whole, "the VM"))  # type: ignore[arg-type]
    assert asked == ["KVM_SET_VCPU_EVENTS"]
    with pytest.raises(ConfigError, match="the saved state of the VM cannot be"):
        state = Saved({**whole, "mp_state": -1}, "the VM")
        saved_vcpu.restore(vcpu, state)  # type: ignore[arg-type]
