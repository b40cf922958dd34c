"""The state of an x86 vCPU as text, for reports and humans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pyvmm.kvm.vcpu import Vcpu
from pyvmm.kvm.x86 import registers

_GENERAL = (
    ("rip", "rsp", "rbp", "rflags"),
    ("rax", "rbx", "rcx", "rdx"),
    ("rsi", "rdi", "r8", "r9"),
    ("r10", "r11", "r12", "r13"),
    ("r14", "r15"),
)
_SEGMENTS = ("cs", "ss", "ds", "es", "fs", "gs", "tr", "ldt")
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "efer")
_BYTES_AT_RIP = 16
_PAGE = 4096


def state_lines(vcpu: Vcpu, read: Callable[[int, int], bytes]) -> Iterator[str]:
    """Registers, control registers, segments and the bytes at the instruction, a line at a time.

    `read` reads guest-physical memory. Each part stands for itself: one that fails says so in its
    line and the others follow.
    """
    regs: Any = None
    sregs: Any = None
    try:
        regs = registers.get_regs(vcpu)
        yield from general_lines(regs)
    except Exception as error:
        yield f"  general registers unavailable: {error}"
    try:
        sregs = registers.get_sregs(vcpu)
        yield from special_lines(sregs)
    except Exception as error:
        yield f"  segments and control registers unavailable: {error}"
    if regs is not None and sregs is not None:
        yield code_line(vcpu, sregs.cs.base + regs.rip, _is_long(sregs), read)


def general_lines(regs: Any) -> Iterator[str]:
    """struct kvm_regs, four to a line."""
    for names in _GENERAL:
        yield "  " + "  ".join(f"{name:<6} {getattr(regs, name):016x}" for name in names)


def special_lines(sregs: Any) -> Iterator[str]:
    """struct kvm_sregs: control registers, descriptor tables, segments."""
    yield "  " + "  ".join(f"{name} {getattr(sregs, name):x}" for name in _CONTROL)
    for name in ("gdt", "idt"):
        table = getattr(sregs, name)
        yield f"  {name}  base {table.base:x} limit {table.limit:x}"
    for name in _SEGMENTS:
        yield f"  {name:<4} {_segment(getattr(sregs, name))}"


def _segment(segment: Any) -> str:
    if segment.unusable:
        return f"{segment.selector:04x} unusable"
    width = "64-bit" if segment.l else "32-bit" if segment.db else "16-bit"
    kind = f"{width} code" if segment.s and segment.type & 8 else "data" if segment.s else "system"
    return (
        f"{segment.selector:04x} base {segment.base:x} limit {segment.limit:x} "
        f"dpl {segment.dpl} type {segment.type:x} {kind}"
    )


def _is_long(sregs: Any) -> bool:
    return bool(sregs.efer & registers.EFER_LMA)


def code_line(vcpu: Vcpu, address: int, long: bool, read: Callable[[int, int], bytes]) -> str:
    """The bytes at linear `address`, as far as they are mapped and RAM."""
    # Addresses wrap at the width of the mode; KVM_TRANSLATE knows the page tables.
    address &= (1 << 64) - 1 if long else (1 << 32) - 1
    found = b""
    try:
        while len(found) < _BYTES_AT_RIP:
            here = address + len(found)
            room = min(_BYTES_AT_RIP - len(found), _PAGE - here % _PAGE)
            physical = registers.translate(vcpu, here)
            if physical is None:
                break
            found += read(physical, room)
    except Exception as error:
        if not found:
            return f"  code at {address:x}: unavailable: {error}"
    return f"  code at {address:x}: " + (found.hex(" ") if found else "not mapped")
