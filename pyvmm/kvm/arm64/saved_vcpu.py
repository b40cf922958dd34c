"""The whole state of an arm64 vCPU as plain data, and back.

KVM lists the registers that are the state (KVM API, 4.82 KVM_GET_REG_LIST); the floating-point ones
are among them, as no vCPU of ours has SVE. What no register says are the vCPU's MP state and an
SError that waits (4.31 KVM_GET_VCPU_EVENTS).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyvmm.errors import ConfigError, HostError
from pyvmm.host.saved import Saved
from pyvmm.kvm.arm64 import registers, uapi
from pyvmm.kvm.arm64.uapi import ffi
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.plain import fill, to_plain
from pyvmm.kvm.vcpu import Vcpu

_HOW = "restore it on a machine like the one it was saved on, with the same --kvm"
_MOST_REGISTERS = 4096
_MOST_NAMED = 32  # registers in a message
_ID_BITS = 64
_MOST_BYTES = 256  # of a register (<linux/kvm.h>, KVM_REG_SIZE_U2048)
_MOST_DIGITS = 34  # of one in a message: 128 bits, and 0x


def save(vcpu: Vcpu) -> dict[str, Any]:
    """The state of `vcpu`, which is between two instructions. Raises HostError."""
    # First: it has KVM carry out a reset that another vCPU has asked for by PSCI.
    rows = [[one, registers.get_register(vcpu, one)] for one in registers.all_registers(vcpu)]
    events = ffi.new("struct kvm_vcpu_events *")
    struct_ioctl(vcpu.fd, uapi.KVM_GET_VCPU_EVENTS, events, "KVM_GET_VCPU_EVENTS")
    return {"registers": rows, "events": to_plain(ffi, events), "mp_state": vcpu.get_mp_state()}


def restore(vcpu: Vcpu, state: Saved) -> None:
    """Give `vcpu`, which is new and initialised, the state that `save` gave.

    Raises ConfigError, which names them, for registers that this machine's KVM lacks or refuses,
    and for state that cannot be; HostError.
    """
    restore_registers(vcpu, state)
    events = ffi.new("struct kvm_vcpu_events *")
    fill(ffi, events, state.table("events"))
    mp_state = state.bits("mp_state", 32)
    try:
        # A processor without RAS has no syndrome for an SError that waits.
        struct_ioctl(vcpu.fd, uapi.KVM_SET_VCPU_EVENTS, events, "KVM_SET_VCPU_EVENTS")
        vcpu.set_mp_state(mp_state)
    except HostError as error:
        raise ConfigError(
            f"this machine's KVM refuses the saved state of vCPU {vcpu.id}: {error}", cure=_HOW
        ) from None


def restore_registers(vcpu: Vcpu, state: Saved) -> None:
    """The part of `restore` that depends on the machine. Raises as that does."""
    values = _values(state)
    here = registers.all_registers(vcpu)
    lacking = [one for one in values.keys() - set(here) if values[one]]
    if lacking:
        raise _lacks(vcpu, lacking, values)
    if vcpu.id:
        # The counter is the VM's: each time that it is set, the guest's time would move.
        values.pop(registers.CNTVCT_EL0, None)
    refused = [one for one in here if one in values and not _set(vcpu, one, values[one])]
    if refused:
        raise _lacks(vcpu, refused, values)


def _set(vcpu: Vcpu, register: int, value: int) -> bool:
    try:
        registers.set_register(vcpu, register, value)
    except HostError:
        # Some can be read only, and have the value that they had.
        return registers.get_register(vcpu, register) == value
    return True


def _lacks(vcpu: Vcpu, found: list[int], values: Mapping[int, int]) -> ConfigError:
    names = [
        f"{registers.name_of(one)} = {f'{values[one]:#x}':.{_MOST_DIGITS}}" for one in sorted(found)
    ]
    if len(names) > _MOST_NAMED:
        names[_MOST_NAMED:] = [f"{len(names) - _MOST_NAMED} more"]
    return ConfigError(
        f"this machine's KVM lacks what the guest's processor had: {', '.join(names)} of vCPU "
        f"{vcpu.id}",
        cure=_HOW,
    )


def _values(state: Saved) -> dict[int, int]:
    values: dict[int, int] = {}
    for row in state.items("registers", _MOST_REGISTERS):
        good = isinstance(row, list) and len(row) == 2 and all(type(one) is int for one in row)
        if not good or not 0 <= row[0] < 1 << _ID_BITS:
            raise state.wrong(f"registers has {row!r:.60}")
        size = registers.size_of(row[0])
        if size > _MOST_BYTES or not 0 <= row[1] < 1 << 8 * size:
            raise state.wrong(f"{registers.name_of(row[0])} is {row[1]!r:.60}")
        values[row[0]] = row[1]
    return values
