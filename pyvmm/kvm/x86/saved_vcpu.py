"""The whole state of an x86 vCPU as plain data, and back.

The order of the calls matters, both ways, and is told where it does. KVM's documentation has no
chapter on it ("Virtual Machine Control Interface" lists the calls); the reasons are in its code,
arch/x86/kvm/x86.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import syscalls
from pyvmm.host.saved import Saved
from pyvmm.kvm.calls import struct_ioctl
from pyvmm.kvm.plain import fill, to_plain
from pyvmm.kvm.system import Kvm
from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.x86 import cpuid, lapic, msrs, uapi
from pyvmm.kvm.x86 import registers as r
from pyvmm.kvm.x86.cpuid import CpuidEntry
from pyvmm.kvm.x86.uapi import ffi

_MOST_MSRS = 4096
_MOST_XSAVE = 1 << 16
# MSR_KVM_WALL_CLOCK_NEW and those that follow. KVM does not list all that it has.
_KVM_MSRS = range(0x4B56_4D00, 0x4B56_4D10)
_TSC_TOLERANCE = 250e-6  # by which a counter may be off; Linux corrects as much by NTP
_LVTT = 0x320  # Intel SDM, volume 3, table 10-1
_LVTT_MODE, _LVTT_DEADLINE = 3 << 17, 2 << 17
_EFER_SVME, _CR4_VMXE = 1 << 12, 1 << 13


class HostAbilities:
    """The parts of a vCPU's state on this KVM."""

    def __init__(self, kvm: Kvm) -> None:
        """Raises HostError."""
        self.msrs = (*_msr_list(kvm), *_KVM_MSRS)
        self.xsave_size = max(r.XSAVE_SIZE, kvm.check_extension(uapi.KVM_CAP_XSAVE2))
        self.scales_tsc = kvm.check_extension(uapi.KVM_CAP_TSC_CONTROL) > 0
        self._kvm = kvm
        self._supported: list[CpuidEntry] = []

    def supported(self) -> list[CpuidEntry]:
        """What KVM says of the processors that it can give a guest. Raises HostError."""
        if not self._supported:
            self._supported = cpuid.supported(self._kvm)
        return self._supported


def _msr_list(kvm: Kvm) -> list[int]:
    table = ffi.new("struct kvm_msr_list *", {"indices": _MOST_MSRS})
    table.nmsrs = _MOST_MSRS
    struct_ioctl(kvm.fd, uapi.KVM_GET_MSR_INDEX_LIST, table, "KVM_GET_MSR_INDEX_LIST")
    return [int(index) for index in table.indices[0 : table.nmsrs]]


# --- saved ----------------------------------------------------------------------------------------


def save(vcpu: Vcpu, host: HostAbilities) -> dict[str, Any]:
    """The state of `vcpu`, which is between two instructions. Raises HostError; ConfigError for a
    guest that has guests of its own, whose state is not in it."""
    # First: reading it has KVM deliver an INIT or SIPI that waits, which changes registers.
    mp_state = vcpu.get_mp_state()
    sregs = r.get_sregs(vcpu)
    if sregs.efer & _EFER_SVME or sregs.cr4 & _CR4_VMXE:
        raise ConfigError(
            "the guest uses KVM itself, and the state of its own guests cannot be saved",
            cure="unload kvm_amd or kvm_intel in it",
        )
    state: dict[str, Any] = {
        "mp_state": mp_state,
        "cpuid": [list(entry) for entry in cpuid.get_cpuid(vcpu)],
        "regs": to_plain(ffi, r.get_regs(vcpu)),
        "sregs": to_plain(ffi, sregs),
        "xsave": r.get_xsave(vcpu, host.xsave_size).hex(),
        "xcrs": _saved_xcrs(vcpu),
        "debugregs": _saved_debugregs(vcpu),
        "lapic": lapic.get_lapic(vcpu).hex(),
        "tsc_khz": _tsc_khz(vcpu),
        "msrs": [[index, value] for index, value in _read_all(vcpu, host.msrs).items()],
    }
    # KVM without VMX and SVM shows guests more than it says that it supports.
    state["beyond"] = _missing(host.supported(), [Saved(state, "the vCPU")])
    # Last: what the calls before have moved from where it waited is in here then.
    state["events"] = to_plain(ffi, r.get_vcpu_events(vcpu))
    return state


def _saved_xcrs(vcpu: Vcpu) -> list[list[int]]:
    xcrs = r.get_xcrs(vcpu)
    return [[one.xcr, one.value] for one in xcrs.xcrs[0 : xcrs.nr_xcrs]]


def _saved_debugregs(vcpu: Vcpu) -> dict[str, Any]:
    return to_plain(ffi, r.get_debugregs(vcpu))


def _tsc_khz(vcpu: Vcpu) -> int:
    """0 where the counter has no steady frequency."""
    try:
        return syscalls.ioctl(vcpu.fd, uapi.KVM_GET_TSC_KHZ, 0, "KVM_GET_TSC_KHZ")
    except HostError:
        return 0


def _read_all(vcpu: Vcpu, wanted: Sequence[int]) -> dict[int, int]:
    """Those of `wanted` that this vCPU has: KVM lists some that depend on its CPUID."""
    found: dict[int, int] = {}
    rest = list(dict.fromkeys(wanted))
    while rest:
        table = ffi.new("struct kvm_msrs *", {"entries": len(rest)})
        table.nmsrs = len(rest)
        for entry, index in zip(table.entries, rest, strict=True):
            entry.index = index
        done = struct_ioctl(vcpu.fd, uapi.KVM_GET_MSRS, table, "KVM_GET_MSRS")
        found.update((int(entry.index), int(entry.data)) for entry in table.entries[0:done])
        rest = rest[done + 1 :]  # KVM stops at the first that it does not have
    return found


# --- compared -------------------------------------------------------------------------------------

# Leaf, subleaf and register of what says which instructions and registers there are.
_FEATURES = {
    (0x1, 0): ("ecx", "edx"),
    (0x7, 0): ("ebx", "ecx", "edx"),
    (0x7, 1): ("eax",),
    (0xD, 0): ("eax", "edx"),
    (0xD, 1): ("eax",),
    (0x4000_0001, 0): ("eax",),
    (0x8000_0001, 0): ("ecx", "edx"),
    (0x8000_0008, 0): ("ebx",),
}
_OWN_BITS = {(0x1, 0, "ecx"): 1 << 27 | 1 << 31, (0x7, 0, "ecx"): 1 << 4}  # OSXSAVE, ours, OSPKE
_HTT = {(0x1, 0, "edx"): 1 << 28, (0x8000_0001, 0, "ecx"): 1 << 1}  # of the number of vCPUs


def check(kvm: Kvm, states: Sequence[Saved], leaves: Callable[[], Sequence[CpuidEntry]]) -> None:
    """Raise ConfigError, which names them all, if `kvm` lacks abilities that vCPUs with `states`
    have used. `leaves` gives those of a new vCPU here, as in `check_cpu`. To make one takes long:
    it is asked only if KVM does not support a feature by its own account, and the KVM that it was
    saved on did. Raises HostError."""
    lacking = [
        name
        for number, name in _CAPABILITIES
        if kvm.check_extension(number) <= 0 and any(state.get(_USED_BY[name]) for state in states)
    ]
    host = HostAbilities(kvm)
    largest = max((len(state.data("xsave", most=_MOST_XSAVE)) for state in states), default=0)
    if largest > host.xsave_size:
        lacking.append(f"KVM_CAP_XSAVE2 with {largest} bytes (it has {host.xsave_size})")
    known = frozenset(host.msrs)
    unknown = {
        index: None
        for state in states
        for index, value in _msrs_of(state).items()
        if value and index not in known
    }
    lacking += [f"MSR {index:#x}" for index in [*unknown][:_MOST_NAMED]]
    if len(unknown) > _MOST_NAMED:
        lacking.append(f"{len(unknown) - _MOST_NAMED} more MSRs")
    features = _missing(host.supported(), states)
    if set(features) <= {text for state in states for text in _beyond(state)}:
        features = []  # `check_cpu` has the last word
    else:
        features = _missing(leaves(), states)
    _refuse(lacking, features)


_MOST_NAMED = 32  # MSRs in a message
# Those without which parts of a state cannot be given to a vCPU; each part's name.
_USED_BY = {
    "KVM_CAP_XSAVE": "xsave",
    "KVM_CAP_XCRS": "xcrs",
    "KVM_CAP_DEBUGREGS": "debugregs",
    "KVM_CAP_VCPU_EVENTS": "events",
}
_CAPABILITIES = tuple((int(getattr(uapi, name)), name) for name in _USED_BY)


def check_cpu(vcpu: Vcpu, state: Saved) -> None:
    """Raise ConfigError, which names them, if the guest was told of features of its processor that
    a new `vcpu` of this machine is not told of. (It is asked for them, and not KVM for what it
    supports: KVM without VMX and SVM shows guests more.)"""
    _refuse([], _missing(cpuid.get_cpuid(vcpu), [state]))


def _beyond(state: Saved) -> list[str]:
    """Those that `save` has noted; pyvmm did not always do so."""
    if not state.has("beyond"):
        return []
    return [text for text in state.items("beyond", 1024) if isinstance(text, str)]


def _missing(here: Iterable[CpuidEntry], states: Iterable[Saved]) -> list[str]:
    known = {(entry.function, entry.index): entry for entry in here}
    missing: dict[str, None] = {}
    for state in states:
        for entry in _entries(state):
            place = (entry.function, entry.index)
            for register in _FEATURES.get(place, ()):
                key = (*place, register)
                there = getattr(known[place], register) if place in known else 0
                there |= _OWN_BITS.get(key, 0) | _HTT.get(key, 0)
                rest = getattr(entry, register) & ~there
                missing |= {
                    f"{entry.function:#x}.{entry.index} {register} bit {bit}": None
                    for bit in range(32)
                    if rest >> bit & 1
                }
    return [*missing]


def _refuse(lacking: list[str], features: list[str]) -> None:
    if features:
        lacking = [*lacking, f"CPUID {', '.join(features)}"]
    if lacking:
        raise ConfigError(
            f"this machine's KVM lacks what the guest's processor had: {', '.join(lacking)}",
            cure="restore it on a machine like the one it was saved on, with the same --kvm",
        )


def _entries(state: Saved) -> list[CpuidEntry]:
    entries = []
    for row in state.items("cpuid", 256):
        good = isinstance(row, list) and len(row) == 7
        if not good or not all(type(one) is int and 0 <= one < 1 << 32 for one in row):
            raise state.wrong(f"a CPUID leaf is {row!r:.60}")
        entries.append(CpuidEntry(*row))
    return entries


# --- restored -------------------------------------------------------------------------------------


def restore(vcpu: Vcpu, state: Saved, host: HostAbilities, warn: Callable[[str], None]) -> None:
    """Give `vcpu`, which is new, the state that `save` gave. `warn` hears of what is not as it was.

    Raises ConfigError for state that cannot be, or that this machine's KVM refuses; HostError.
    """
    try:
        _restore(vcpu, state, host, warn)
    except HostError as error:
        raise ConfigError(
            f"this machine's KVM refuses the saved state of vCPU {vcpu.id}: {error}",
            cure="restore it on a machine like the one it was saved on",
        ) from None


def _restore(vcpu: Vcpu, state: Saved, host: HostAbilities, warn: Callable[[str], None]) -> None:
    # CPUID before all else: it decides which bits and MSRs exist.
    cpuid.set_cpuid(vcpu, _entries(state))
    _restore_tsc_frequency(vcpu, state.bits("tsc_khz", 31), host, warn)
    vcpu.set_mp_state(state.bits("mp_state", 32))
    for name, set_it in (("regs", r.set_regs), ("sregs", r.set_sregs)):
        structure = ffi.new(f"struct kvm_{name} *")
        fill(ffi, structure, state.table(name))
        set_it(vcpu, structure)
    xsave = state.data("xsave", most=_MOST_XSAVE)
    if not r.XSAVE_SIZE <= len(xsave) <= host.xsave_size:
        raise state.wrong(f"xsave has {len(xsave)} bytes, and KVM here {host.xsave_size}")
    r.set_xsave(vcpu, xsave.ljust(host.xsave_size, b"\0"))
    _restore_xcrs(vcpu, state)
    debugregs = ffi.new("struct kvm_debugregs *")
    fill(ffi, debugregs, state.table("debugregs"))
    r.set_debugregs(vcpu, debugregs)
    # After the special registers, which have the APIC's base and whether it is on; KVM starts its
    # timer from the registers.
    registers = state.data("lapic", uapi.KVM_APIC_REG_SIZE)
    lapic.set_lapic(vcpu, registers)
    _restore_msrs(vcpu, state, registers)
    # Last: what came before may have cleared what waits to be injected.
    events = ffi.new("struct kvm_vcpu_events *")
    fill(ffi, events, state.table("events"))
    r.set_vcpu_events(vcpu, events)
    # The guest is told that it stood still, or its watchdog takes that for a lockup.
    vcpu.excuse_pause()


def _restore_tsc_frequency(
    vcpu: Vcpu, wanted: int, host: HostAbilities, warn: Callable[[str], None]
) -> None:
    here = _tsc_khz(vcpu)
    if not wanted or not here or abs(wanted - here) <= wanted * _TSC_TOLERANCE:
        return
    if host.scales_tsc:
        syscalls.ioctl(vcpu.fd, uapi.KVM_SET_TSC_KHZ, wanted, "KVM_SET_TSC_KHZ")
    elif vcpu.id == 0:
        warn(
            f"the guest's time stamp counter ran at {wanted} kHz and runs at {here} here, which "
            "this KVM cannot hide (it lacks KVM_CAP_TSC_CONTROL): its clock is right only if that "
            "is kvm-clock"
        )


def _restore_xcrs(vcpu: Vcpu, state: Saved) -> None:
    rows = state.items("xcrs", uapi.KVM_MAX_XCRS)
    xcrs = ffi.new("struct kvm_xcrs *")
    xcrs.nr_xcrs = len(rows)
    for one, row in zip(xcrs.xcrs, rows, strict=False):
        one.xcr, one.value = _pair(state, row, "xcrs")
    if rows:
        r.set_xcrs(vcpu, xcrs)


def _pair(state: Saved, row: Any, what: str) -> tuple[int, int]:
    good = isinstance(row, list) and len(row) == 2 and all(type(one) is int for one in row)
    if not good or not (0 <= row[0] < 1 << 32 and 0 <= row[1] < 1 << 64):
        raise state.wrong(f"{what} has {row!r:.60}")
    return row[0], row[1]


def _msrs_of(state: Saved) -> dict[int, int]:
    return dict(_pair(state, row, "msrs") for row in state.items("msrs", _MOST_MSRS))


def _restore_msrs(vcpu: Vcpu, state: Saved, registers: bytes) -> None:
    values = _msrs_of(state)
    # The deadline after the counter that it is compared with, whatever the list's order. One of 0
    # means that the timer has gone off, perhaps just before it was saved and unnoticed by the
    # guest: the time of the saving has it go off again, which is harmless.
    deadline = values.pop(msrs.MSR_IA32_TSC_DEADLINE, None)
    if deadline is not None:
        in_use = lapic.get_register(registers, _LVTT) & _LVTT_MODE == _LVTT_DEADLINE
        now = values.get(msrs.MSR_IA32_TSC, 0)
        values[msrs.MSR_IA32_TSC_DEADLINE] = now if in_use and not deadline else deadline
    refused = _write_all(vcpu, values)
    for index in refused:
        # Some that can be read cannot be written, and have the value that they had.
        if values[index] and _read_all(vcpu, [index]).get(index) != values[index]:
            raise ConfigError(
                f"this machine's KVM refuses {msrs.name_of(index)} ({index:#x}) = "
                f"{values[index]:#x} of vCPU {vcpu.id}",
                cure="restore it on a machine like the one it was saved on",
            )


def _write_all(vcpu: Vcpu, values: dict[int, int]) -> list[int]:
    """Those that KVM does not take."""
    refused = []
    rest = list(values.items())
    while rest:
        table = ffi.new("struct kvm_msrs *", {"entries": len(rest)})
        table.nmsrs = len(rest)
        for entry, (index, value) in zip(table.entries, rest, strict=True):
            entry.index, entry.data = index, value
        done = struct_ioctl(vcpu.fd, uapi.KVM_SET_MSRS, table, "KVM_SET_MSRS")
        if done < len(rest):
            refused.append(rest[done][0])
        rest = rest[done + 1 :]
    return refused
