"""The exits of KVM_RUN, as values: one type per exit reason of <linux/kvm.h>.

`Vcpu.exit` makes them (exit_decoding.py). They hold copies, so they stay true after the next
KVM_RUN. The hot path (loop.py) does without.
"""

from __future__ import annotations

from typing import NamedTuple

from pyvmm.errors import how_many
from pyvmm.kvm import uapi


def _times(repeat: int) -> str:
    return f" x {repeat}" if repeat != 1 else ""


# --- accesses ------------------------------------------------------------------------------------


class IoIn(NamedTuple):
    """KVM_EXIT_IO: the guest reads `repeat` values of `size` bytes from `port`."""

    port: int
    size: int
    repeat: int

    def __str__(self) -> str:
        return f"in port {self.port:#x}, {how_many(self.size, 'byte')}{_times(self.repeat)}"


class IoOut(NamedTuple):
    """KVM_EXIT_IO: the guest writes `data` to `port`, `repeat` values of `size` bytes."""

    port: int
    size: int
    repeat: int
    data: bytes

    @property
    def values(self) -> tuple[int, ...]:
        """The values in order, as numbers."""
        return tuple(
            int.from_bytes(self.data[at : at + self.size], "little")
            for at in range(0, len(self.data), self.size)
        )

    def __str__(self) -> str:
        shown = " ".join(f"{value:#x}" for value in self.values[:8])
        return (
            f"out port {self.port:#x}, {how_many(self.size, 'byte')}{_times(self.repeat)}: {shown}"
        )


class MmioRead(NamedTuple):
    """KVM_EXIT_MMIO: the guest reads `size` bytes at guest-physical `address`."""

    address: int
    size: int

    def __str__(self) -> str:
        return f"mmio read {self.address:#x}, {how_many(self.size, 'byte')}"


class MmioWrite(NamedTuple):
    """KVM_EXIT_MMIO: the guest writes `value`, `size` bytes, at guest-physical `address`."""

    address: int
    size: int
    value: int

    def __str__(self) -> str:
        return f"mmio write {self.address:#x}, {how_many(self.size, 'byte')}: {self.value:#x}"


# --- the end of the road -------------------------------------------------------------------------


class Shutdown(NamedTuple):
    """KVM_EXIT_SHUTDOWN: a triple fault, on x86."""

    def __str__(self) -> str:
        return "KVM_EXIT_SHUTDOWN: triple fault"


class FailEntry(NamedTuple):
    """KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state; `hardware_reason` says why."""

    hardware_reason: int
    cpu: int

    def __str__(self) -> str:
        return f"KVM_EXIT_FAIL_ENTRY: hardware reason {self.hardware_reason:#x} on CPU {self.cpu}"


_SUBERRORS = {
    uapi.KVM_INTERNAL_ERROR_EMULATION: "KVM_INTERNAL_ERROR_EMULATION",
    uapi.KVM_INTERNAL_ERROR_SIMUL_EX: "KVM_INTERNAL_ERROR_SIMUL_EX",
    uapi.KVM_INTERNAL_ERROR_DELIVERY_EV: "KVM_INTERNAL_ERROR_DELIVERY_EV",
    uapi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON",
}


class InternalError(NamedTuple):
    """KVM_EXIT_INTERNAL_ERROR: KVM itself gave up.

    `instruction` holds the bytes KVM could not emulate, where it says so; `data` is its own notes.
    """

    suberror: int
    data: tuple[int, ...]
    instruction: bytes

    @property
    def name(self) -> str:
        """The suberror's name in the header."""
        return _SUBERRORS.get(self.suberror, f"suberror {self.suberror}")

    def __str__(self) -> str:
        text = f"KVM_EXIT_INTERNAL_ERROR: {self.name}"
        if self.instruction:
            text += f", instruction bytes {self.instruction.hex(' ')}"
        return text


_SYSTEM_EVENTS = {
    uapi.KVM_SYSTEM_EVENT_SHUTDOWN: "shutdown",
    uapi.KVM_SYSTEM_EVENT_RESET: "reset",
    uapi.KVM_SYSTEM_EVENT_CRASH: "crash",
    uapi.KVM_SYSTEM_EVENT_WAKEUP: "wakeup",
    uapi.KVM_SYSTEM_EVENT_SUSPEND: "suspend",
    uapi.KVM_SYSTEM_EVENT_SEV_TERM: "SEV termination",
}


class SystemEvent(NamedTuple):
    """KVM_EXIT_SYSTEM_EVENT: the guest asked KVM to stop, reset … (PSCI, Hyper-V crash)."""

    type: int
    data: tuple[int, ...]

    @property
    def is_shutdown(self) -> bool:
        return self.type == uapi.KVM_SYSTEM_EVENT_SHUTDOWN

    @property
    def is_reset(self) -> bool:
        return self.type == uapi.KVM_SYSTEM_EVENT_RESET

    def __str__(self) -> str:
        return f"system event: {_SYSTEM_EVENTS.get(self.type, f'type {self.type}')}"


# --- others --------------------------------------------------------------------------------------


class Hlt(NamedTuple):
    """KVM_EXIT_HLT: the guest waits for an interrupt (only without the in-kernel irqchip)."""


class Intr(NamedTuple):
    """KVM_EXIT_INTR: a signal or immediate_exit; nothing happened in the guest."""


class IrqWindowOpen(NamedTuple):
    """KVM_EXIT_IRQ_WINDOW_OPEN: an interrupt could be injected now."""


class SetTpr(NamedTuple):
    """KVM_EXIT_SET_TPR: the guest changed its task priority (only with an APIC of our own)."""


class Nmi(NamedTuple):
    """KVM_EXIT_NMI."""


class Watchdog(NamedTuple):
    """KVM_EXIT_WATCHDOG: the guest's watchdog timer ran out twice."""


class DirtyRingFull(NamedTuple):
    """KVM_EXIT_DIRTY_RING_FULL: harvest the ring of dirty pages first."""


class ApResetHold(NamedTuple):
    """KVM_EXIT_AP_RESET_HOLD: an SEV-ES vCPU waits for its start-up."""


class BusLock(NamedTuple):
    """KVM_EXIT_X86_BUS_LOCK: the guest locked the whole memory bus."""


class UnknownHardware(NamedTuple):
    """KVM_EXIT_UNKNOWN: the processor gave a reason KVM does not know."""

    hardware_exit_reason: int


class ExceptionExit(NamedTuple):
    """KVM_EXIT_EXCEPTION: unused on x86 today."""

    exception: int
    error_code: int


class Hypercall(NamedTuple):
    """KVM_EXIT_HYPERCALL: hypercall `nr` with six arguments."""

    nr: int
    args: tuple[int, ...]
    longmode: bool


class Debug(NamedTuple):
    """KVM_EXIT_DEBUG: a breakpoint or single step asked for by KVM_SET_GUEST_DEBUG.

    `arch` are the bytes of struct kvm_debug_exit_arch, which each architecture reads by itself
    (x86: `pyvmm.kvm.x86.debugging`).
    """

    arch: bytes


class TprAccess(NamedTuple):
    """KVM_EXIT_TPR_ACCESS: the guest touched its task priority at `rip`."""

    rip: int
    is_write: bool


class IoapicEoi(NamedTuple):
    """KVM_EXIT_IOAPIC_EOI: the guest ended interrupt `vector` (split irqchip)."""

    vector: int


class Hyperv(NamedTuple):
    """KVM_EXIT_HYPERV: `kind` is "synic", "hcall" or "syndbg", `fields` its numbers by name."""

    kind: str
    fields: tuple[tuple[str, int], ...]


class ArmNisv(NamedTuple):
    """KVM_EXIT_ARM_NISV: an arm64 access KVM could not decode: one that loads or stores two
    registers, say. `esr_iss` is what the processor tells of it, `fault_ipa` where it went."""

    esr_iss: int
    fault_ipa: int

    def __str__(self) -> str:
        return (
            f"KVM_EXIT_ARM_NISV: an access to {self.fault_ipa:#x} by an instruction that KVM "
            f"cannot decode (syndrome {self.esr_iss:#x})"
        )


class Rdmsr(NamedTuple):
    """KVM_EXIT_X86_RDMSR: the guest reads MSR `msr`; `why` is KVM_MSR_EXIT_REASON_…."""

    msr: int
    why: int


class Wrmsr(NamedTuple):
    """KVM_EXIT_X86_WRMSR: the guest writes `value` to MSR `msr`."""

    msr: int
    why: int
    value: int


class Xen(NamedTuple):
    """KVM_EXIT_XEN: a Xen hypercall."""

    type: int
    input: int
    params: tuple[int, ...]


class Notify(NamedTuple):
    """KVM_EXIT_NOTIFY: no chance to inject an event for too long."""

    context_invalid: bool


class MemoryFault(NamedTuple):
    """KVM_EXIT_MEMORY_FAULT: KVM could not get at guest memory."""

    flags: int
    address: int
    size: int

    def __str__(self) -> str:
        return f"KVM_EXIT_MEMORY_FAULT: {self.address:#x} + {self.size:#x} bytes"


class OtherArchitecture(NamedTuple):
    """A reason of the header that other architectures than x86 and arm64 have."""

    reason: int
    name: str


class Unknown(NamedTuple):
    """A reason that is newer than pyvmm."""

    reason: int


Exit = (
    IoIn | IoOut | MmioRead | MmioWrite | Shutdown | FailEntry | InternalError | SystemEvent
    | Hlt | Intr | IrqWindowOpen | SetTpr | Nmi | Watchdog | DirtyRingFull | ApResetHold | BusLock
    | UnknownHardware | ExceptionExit | Hypercall | Debug | TprAccess | IoapicEoi | Hyperv | ArmNisv
    | Rdmsr | Wrmsr | Xen | Notify | MemoryFault | OtherArchitecture | Unknown
)  # fmt: skip
