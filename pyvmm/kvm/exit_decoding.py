"""From the kvm_run page to the values of exits.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyvmm.kvm import uapi
from pyvmm.kvm.exits import (
    ApResetHold,
    ArmNisv,
    BusLock,
    Debug,
    DirtyRingFull,
    ExceptionExit,
    Exit,
    FailEntry,
    Hlt,
    Hypercall,
    Hyperv,
    InternalError,
    Intr,
    IoapicEoi,
    IoIn,
    IoOut,
    IrqWindowOpen,
    MemoryFault,
    MmioRead,
    MmioWrite,
    Nmi,
    Notify,
    OtherArchitecture,
    Rdmsr,
    SetTpr,
    Shutdown,
    SystemEvent,
    TprAccess,
    Unknown,
    UnknownHardware,
    Watchdog,
    Wrmsr,
    Xen,
)
from pyvmm.kvm.uapi import ffi

REASON_NAMES = {
    value: name
    for name, value in vars(uapi).items()
    if name.startswith("KVM_EXIT_") and not name.startswith(("KVM_EXIT_IO_", "KVM_EXIT_HYPERV_"))
    and name not in ("KVM_EXIT_XEN_HCALL",)
}  # fmt: skip
"""The header's name of each exit reason."""


def decode(page: memoryview) -> Exit:
    """The exit that the kvm_run `page` describes. Never raises for what KVM may put there."""
    run = ffi.cast("struct kvm_run *", ffi.from_buffer(page))
    reason = run.exit_reason
    if reason == uapi.KVM_EXIT_IO:
        return _io(run, page)
    decoder = _DECODERS.get(reason)
    if decoder is not None:
        return decoder(run)
    if reason in REASON_NAMES:
        return OtherArchitecture(reason, REASON_NAMES[reason])
    return Unknown(reason)


def _io(run: Any, page: memoryview) -> IoIn | IoOut:
    io = run.io
    if io.direction == uapi.KVM_EXIT_IO_IN:
        return IoIn(io.port, io.size, io.count)
    data = bytes(page[io.data_offset : io.data_offset + io.size * io.count])
    return IoOut(io.port, io.size, io.count, data)


def _mmio(run: Any) -> MmioRead | MmioWrite:
    mmio = run.mmio
    if not mmio.is_write:
        return MmioRead(mmio.phys_addr, mmio.len)
    return MmioWrite(
        mmio.phys_addr, mmio.len, int.from_bytes(bytes(mmio.data)[: mmio.len], "little")
    )


def _internal_error(run: Any) -> InternalError:
    internal = run.internal
    data = tuple(internal.data[0 : min(internal.ndata, 16)])
    instruction = b""
    failure = run.emulation_failure
    flag = uapi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
    is_emulation = internal.suberror == uapi.KVM_INTERNAL_ERROR_EMULATION
    # ndata counts 64-bit words: the flags, then two with the instruction's size and bytes.
    if is_emulation and len(data) >= 3 and failure.flags & flag:
        instruction = bytes(failure.insn_bytes)[: failure.insn_size]
    return InternalError(internal.suberror, data, instruction)


def _system_event(run: Any) -> SystemEvent:
    event = run.system_event
    return SystemEvent(event.type, tuple(event.data[0 : min(event.ndata, 16)]))


_HYPERV_KINDS = {
    uapi.KVM_EXIT_HYPERV_SYNIC: "synic",
    uapi.KVM_EXIT_HYPERV_HCALL: "hcall",
    uapi.KVM_EXIT_HYPERV_SYNDBG: "syndbg",
}


def _hyperv(run: Any) -> Hyperv:
    kind = _HYPERV_KINDS.get(run.hyperv.type)
    if kind is None:
        return Hyperv(f"type {run.hyperv.type}", ())
    member = getattr(run.hyperv.u, kind)
    names = [name for name, _ in ffi.typeof(member).fields if not name.startswith("pad")]
    fields: list[tuple[str, int]] = []
    for name in names:
        value = getattr(member, name)
        if isinstance(value, int):
            fields.append((name, value))
        else:
            fields += [(f"{name}[{place}]", number) for place, number in enumerate(value)]
    return Hyperv(kind, tuple(fields))


def _hypercall(run: Any) -> Hypercall:
    call = run.hypercall
    return Hypercall(call.nr, tuple(call.args), bool(call.longmode))


def _debug(run: Any) -> Debug:
    return Debug(bytes(ffi.buffer(run.debug.arch)))


def _xen(run: Any) -> Xen:
    hcall = run.xen.u.hcall
    return Xen(run.xen.type, hcall.input, tuple(hcall.params))


_DECODERS: dict[int, Callable[[Any], Exit]] = {
    uapi.KVM_EXIT_UNKNOWN: lambda run: UnknownHardware(run.hw.hardware_exit_reason),
    uapi.KVM_EXIT_EXCEPTION: lambda run: ExceptionExit(run.ex.exception, run.ex.error_code),
    uapi.KVM_EXIT_HYPERCALL: _hypercall,
    uapi.KVM_EXIT_DEBUG: _debug,
    uapi.KVM_EXIT_HLT: lambda run: Hlt(),
    uapi.KVM_EXIT_MMIO: _mmio,
    uapi.KVM_EXIT_IRQ_WINDOW_OPEN: lambda run: IrqWindowOpen(),
    uapi.KVM_EXIT_SHUTDOWN: lambda run: Shutdown(),
    uapi.KVM_EXIT_FAIL_ENTRY: lambda run: FailEntry(
        run.fail_entry.hardware_entry_failure_reason, run.fail_entry.cpu
    ),
    uapi.KVM_EXIT_INTR: lambda run: Intr(),
    uapi.KVM_EXIT_SET_TPR: lambda run: SetTpr(),
    uapi.KVM_EXIT_TPR_ACCESS: lambda run: TprAccess(
        run.tpr_access.rip, bool(run.tpr_access.is_write)
    ),
    uapi.KVM_EXIT_NMI: lambda run: Nmi(),
    uapi.KVM_EXIT_INTERNAL_ERROR: _internal_error,
    uapi.KVM_EXIT_WATCHDOG: lambda run: Watchdog(),
    uapi.KVM_EXIT_SYSTEM_EVENT: _system_event,
    uapi.KVM_EXIT_IOAPIC_EOI: lambda run: IoapicEoi(run.eoi.vector),
    uapi.KVM_EXIT_HYPERV: _hyperv,
    uapi.KVM_EXIT_ARM_NISV: lambda run: ArmNisv(run.arm_nisv.esr_iss, run.arm_nisv.fault_ipa),
    uapi.KVM_EXIT_X86_RDMSR: lambda run: Rdmsr(run.msr.index, run.msr.reason),
    uapi.KVM_EXIT_X86_WRMSR: lambda run: Wrmsr(run.msr.index, run.msr.reason, run.msr.data),
    uapi.KVM_EXIT_DIRTY_RING_FULL: lambda run: DirtyRingFull(),
    uapi.KVM_EXIT_AP_RESET_HOLD: lambda run: ApResetHold(),
    uapi.KVM_EXIT_X86_BUS_LOCK: lambda run: BusLock(),
    uapi.KVM_EXIT_XEN: _xen,
    uapi.KVM_EXIT_NOTIFY: lambda run: Notify(
        bool(run.notify.flags & uapi.KVM_NOTIFY_CONTEXT_INVALID)
    ),
    uapi.KVM_EXIT_MEMORY_FAULT: lambda run: MemoryFault(
        run.memory_fault.flags, run.memory_fault.gpa, run.memory_fault.size
    ),
}
