"""The report of a guest that cannot go on: what KVM said, and where the vCPU was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyvmm.kvm.exits import Exit, FailEntry, InternalError, Shutdown
from pyvmm.kvm.vcpu import Vcpu

Reader = Callable[[int, int], bytes]
"""(guest-physical address, length) → bytes, raising where there is no RAM."""

StateLines = Callable[[Vcpu, Reader], Iterator[str]]


def crash_report(vcpu: Vcpu, event: Exit, read: Reader, state_lines: StateLines) -> str:
    """Several lines: the exit by name, registers, segments, and the bytes at the instruction.

    `event` is `vcpu.exit()`, `read` reads guest memory, `state_lines` gives the state of a vCPU of
    this architecture. Never raises: what cannot be had is said to be unavailable, as a report that
    fails would hide the failure it reports.
    """
    lines = [f"vCPU {vcpu.id}: {_text(event)}", *_details(event)]
    try:
        lines += state_lines(vcpu, read)
    except Exception as error:
        lines.append(f"state unavailable: {error}")
    return "\n".join(lines)


def _text(event: Exit) -> str:
    try:
        return str(event)
    except Exception as error:
        return f"{type(event).__name__} ({error})"


def _details(event: Exit) -> Iterator[str]:
    match event:
        case InternalError():
            if event.data:
                yield "  KVM's data: " + " ".join(f"{word:#x}" for word in event.data)
            if event.name == "KVM_INTERNAL_ERROR_EMULATION":
                yield "  KVM cannot emulate this instruction; `pyvmm doctor` tells what this KVM is"
        case FailEntry():
            yield "  the processor refused the vCPU's state: compare segments and control registers"
        case Shutdown():
            yield "  an exception in the handler of an exception's handler: is the IDT in order?"
