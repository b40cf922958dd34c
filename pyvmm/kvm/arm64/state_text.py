"""The state of an arm64 vCPU as text, for reports and humans."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pyvmm.kvm.arm64 import registers
from pyvmm.kvm.vcpu import Vcpu

_INSTRUCTIONS = 4  # at the program counter
_GENERAL = tuple((f"x{n}", register) for n, register in enumerate(registers.GENERAL))
_SPECIAL = (
    ("pc", registers.PC),
    ("sp", registers.SP),
    ("sp_el1", registers.SP_EL1),
    ("pstate", registers.PSTATE),
    ("elr_el1", registers.ELR_EL1),
    ("spsr_el1", registers.SPSR_EL1),
    ("far_el1", registers.FAR_EL1),
    ("vbar_el1", registers.VBAR_EL1),
    ("sctlr_el1", registers.SCTLR_EL1),
    ("tcr_el1", registers.TCR_EL1),
    ("ttbr0_el1", registers.TTBR0_EL1),
    ("ttbr1_el1", registers.TTBR1_EL1),
    ("mpidr_el1", registers.MPIDR_EL1),
)

# Arm Architecture Reference Manual, D24.2.40 "ESR_EL1, Exception Syndrome Register (EL1)": EC
_CLASSES = {
    0x00: "unknown reason",
    0x01: "trapped WFI or WFE",
    0x07: "access to SVE, SIMD or floating point",
    0x09: "pointer authentication",
    0x0D: "branch target exception",
    0x0E: "illegal execution state",
    0x15: "SVC, a system call",
    0x16: "HVC",
    0x17: "SMC",
    0x18: "trapped MSR, MRS or system instruction",
    0x19: "access to SVE",
    0x1C: "pointer authentication failed",
    0x20: "instruction abort from a lower exception level",
    0x21: "instruction abort",
    0x22: "misaligned program counter",
    0x24: "data abort from a lower exception level",
    0x25: "data abort",
    0x26: "misaligned stack pointer",
    0x2C: "floating-point exception",
    0x2F: "SError interrupt",
    0x30: "breakpoint from a lower exception level",
    0x31: "breakpoint",
    0x32: "single step from a lower exception level",
    0x33: "single step",
    0x34: "watchpoint from a lower exception level",
    0x35: "watchpoint",
    0x3C: "BRK instruction",
}
_INSTRUCTION_ABORTS, _DATA_ABORTS = (0x20, 0x21), (0x24, 0x25)
_SERROR = 0x2F
# The same, "ISS encoding for an exception from a Data Abort": DFSC. The last two bits are a level.
_FAULTS = {
    0b0000: "address size fault",
    0b0001: "translation fault",
    0b0010: "access flag fault",
    0b0011: "permission fault",
    0b0101: "external abort on a table walk",
    0b0111: "parity or ECC error on a table walk",
}
_OTHER_FAULTS = {
    0b010000: "external abort",
    0b010001: "tag check fault",
    0b011000: "parity or ECC error",
    0b100001: "alignment fault",
    0b110000: "TLB conflict",
    0b110100: "lockdown",
    0b110101: "unsupported exclusive or atomic access",
}
_IDS, _WNR, _FNV = 1 << 24, 1 << 6, 1 << 10


def esr_words(esr: int) -> str:
    """An exception syndrome in words: "data abort, a write: translation fault, level 3"."""
    kind, iss = esr >> 26 & 0x3F, esr & 0x1FF_FFFF
    name = _CLASSES.get(kind, f"class {kind:#x}")
    if kind in _INSTRUCTION_ABORTS:
        return f"{name}: {fault_words(iss)}"
    if kind in _DATA_ABORTS:
        access = "a write" if iss & _WNR else "a read"
        unknown = ", at an address that it does not tell" if iss & _FNV else ""
        return f"{name}, {access}: {fault_words(iss)}{unknown}"
    if kind == _SERROR:
        what = "of the processor's own kind" if iss & _IDS else f"status {iss & 0x3F:#x}"
        return f"{name}, {what}"
    return f"{name}, ISS {iss:#x}" if iss else name


def fault_words(iss: int) -> str:
    """The status of an abort in its syndrome `iss`."""
    status = iss & 0x3F
    if status in _OTHER_FAULTS:
        return _OTHER_FAULTS[status]
    fault = _FAULTS.get(status >> 2)
    return f"status {status:#x}" if fault is None else f"{fault}, level {status & 3}"


def state_lines(vcpu: Vcpu, read: Callable[[int, int], bytes]) -> Iterator[str]:
    """Registers, the last exception in words, and the instructions at the program counter, a line
    at a time. `read` reads guest-physical memory. A part that cannot be had says so."""
    for rows in (_SPECIAL, _GENERAL):
        yield from _rows(vcpu, rows)
    try:
        esr = registers.get_register(vcpu, registers.ESR_EL1)
        yield f"  esr_el1 {esr:x}: {esr_words(esr)}"
    except Exception as error:
        yield f"  esr_el1 unavailable: {error}"
    yield _code_line(vcpu, read)


def _rows(vcpu: Vcpu, rows: tuple[tuple[str, int], ...]) -> Iterator[str]:
    texts = []
    for name, register in rows:
        try:
            texts.append(f"{name:<9} {registers.get_register(vcpu, register):016x}")
        except Exception as error:
            yield f"  {name} unavailable: {error}"
    for first in range(0, len(texts), 3):
        yield "  " + "  ".join(texts[first : first + 3])


def _code_line(vcpu: Vcpu, read: Callable[[int, int], bytes]) -> str:
    try:
        pc = registers.get_register(vcpu, registers.PC)
        if registers.get_register(vcpu, registers.SCTLR_EL1) & registers.SCTLR_M:
            return f"  code at {pc:x}: its place in memory is known to the guest's page tables only"
        words = memoryview(read(pc, 4 * _INSTRUCTIONS)).cast("I")
    except Exception as error:
        return f"  code at the program counter unavailable: {error}"
    return f"  code at {pc:x}: " + " ".join(f"{word:08x}" for word in words)
