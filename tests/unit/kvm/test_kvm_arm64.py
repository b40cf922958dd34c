"""KVM on arm64, as far as any machine can tell: numbers, structures and register ids against the
cross compiler's headers, machine code against its assembler, and the words of a report."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from c_claims import ARM64, assembled, assert_in_c, fields, needs_arm64_headers

from pyvmm.kvm import uapi as common
from pyvmm.kvm.arm64 import boot_vcpu, probe_guest, registers, state_text, uapi
from pyvmm.kvm.exit_decoding import decode

HEADERS = ("stddef.h", "asm/ptrace.h", "linux/kvm.h")
# What the header takes from one that is not exported: <linux/sizes.h>.
COMPILER = (ARM64, "-DSZ_64K=0x10000")
# What headers of Linux 6.1, the oldest ones supported, do not have yet.
NEWER = {
    "KVM_CAP_GUEST_MEMFD",
    "KVM_CAP_MEMORY_FAULT_INFO",
    "KVM_CAP_USER_MEMORY2",
    "KVM_EXIT_ARM_SEA",
    "KVM_EXIT_LOONGARCH_IOCSR",
    "KVM_EXIT_MEMORY_FAULT",
    "KVM_EXIT_TDX",
    "KVM_MEMORY_EXIT_FLAG_PRIVATE",
}
OWN = {name for name in vars(uapi) if name.startswith("KVM")} - set(vars(common))
# The headers have these of the common numbers for x86 alone (__KVM_HAVE_PIT and the like).
ONLY_X86 = {
    f"KVM_CAP_{name}"
    for name in ("REINJECT_CONTROL", "MCE", "PIT2", "PIT_STATE2", "DEBUGREGS", "XSAVE", "XCRS")
}


def test_what_only_arm64_has_is_listed() -> None:
    assert {"KVM_ARM_VCPU_INIT", "KVM_DEV_TYPE_ARM_VGIC_V3"} <= OWN


@needs_arm64_headers
def test_every_number_is_the_headers(tmp_path: Path) -> None:
    numbers = {name: value for name, value in vars(uapi).items() if name.startswith("KVM")}
    numbers = {name: value for name, value in numbers.items() if name not in ONLY_X86}
    claims = [f"{name} == {value}ULL" for name, value in numbers.items()]
    assert_in_c(tmp_path, HEADERS, claims, NEWER, compiler=COMPILER)
    with pytest.raises(AssertionError):  # or the compiler was not asked
        wrong = [f"KVM_ARM_VCPU_INIT == {uapi.KVM_ARM_VCPU_INIT + 1}ULL"]
        assert_in_c(tmp_path, HEADERS, wrong, compiler=COMPILER)


@needs_arm64_headers
@pytest.mark.parametrize("types", [common.ffi, uapi.ffi], ids=["every architecture's", "arm64's"])
def test_every_structure_and_field_lies_where_the_headers_say(tmp_path: Path, types) -> None:
    claims = []
    for name in types.list_types()[1]:
        if not name.startswith(("kvm_", "user_")):
            continue
        c_type = types.typeof(f"struct {name}")
        claims.append(f"sizeof(struct {name}) == {types.sizeof(c_type)}")
        for path, offset, size in fields(types, c_type):
            if path.startswith(("padding", "memory_fault")):
                continue  # Only ours, or newer than the headers.
            if path.startswith("debug"):
                continue  # It is as large as the largest architecture's.
            claims.append(f"offsetof(struct {name}, {path}) == {offset}")
            if size >= 0:
                claims.append(f"sizeof(((struct {name} *)0)->{path}) == {size}")
    assert len(claims) > 30
    assert_in_c(tmp_path, HEADERS, claims, compiler=COMPILER)


@needs_arm64_headers
def test_register_ids_are_what_the_headers_macros_make(tmp_path: Path) -> None:
    core = "(KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG({}))"
    named = {
        "regs.regs[0]": registers.GENERAL[0],
        "regs.regs[30]": registers.GENERAL[30],
        "regs.sp": registers.SP,
        "regs.pc": registers.PC,
        "regs.pstate": registers.PSTATE,
        "sp_el1": registers.SP_EL1,
        "elr_el1": registers.ELR_EL1,
        "spsr[KVM_SPSR_EL1]": registers.SPSR_EL1,
    }
    claims = [f"{core.format(field)} == {number}ULL" for field, number in named.items()]
    claims.append(f"ARM64_SYS_REG(3, 0, 1, 0, 0) == {registers.SCTLR_EL1}ULL")
    claims.append(f"ARM64_SYS_REG(3, 3, 14, 3, 2) == {registers.system(3, 3, 14, 3, 2)}ULL")
    vector = registers.core("fp_regs", "vregs", 3)
    wide = core.replace("U64", "U128").format("fp_regs.vregs[3]")
    claims.append(f"{wide} == {vector}ULL")
    claims.append(f"PSR_MODE_EL1h == {registers.PSTATE_EL1H}")
    masked = registers.PSTATE_MASKED
    claims.append(f"(PSR_D_BIT | PSR_A_BIT | PSR_I_BIT | PSR_F_BIT) == {masked}")
    assert_in_c(tmp_path, HEADERS, claims, compiler=COMPILER)
    assert registers.size_of(vector) == 16
    assert registers.size_of(registers.PC) == 8


@needs_arm64_headers
@pytest.mark.parametrize(
    "system",
    [
        *("MPIDR_EL1", "SCTLR_EL1", "TTBR0_EL1", "TTBR1_EL1", "TCR_EL1", "ESR_EL1", "FAR_EL1"),
        "VBAR_EL1",
    ],
)
def test_system_registers_are_the_assemblers(tmp_path: Path, system: str) -> None:
    [word] = struct.unpack("<I", assembled(tmp_path, f"mrs x0, {system}\n"))
    # MRS: op0, op1, CRn, CRm and op2 in bits 20 to 5, of which op0 is 2 or 3
    expected = registers.system(*(word >> shift & mask for shift, mask in MRS_FIELDS))
    assert getattr(registers, system) == expected


MRS_FIELDS = ((19, 3), (16, 7), (12, 15), (8, 15), (5, 7))


@needs_arm64_headers
def test_the_probe_guests_code_is_what_its_comments_say(tmp_path: Path) -> None:
    nowhere, times = probe_guest._NOWHERE, probe_guest._ITERATIONS
    done = f"mov x1, #{nowhere}\nstr w0, [x1]\n"
    assert assembled(tmp_path, done) == probe_guest._DONE
    loop = f"start: mov x2, #{times}\nagain: subs x2, x2, #1\nb.ne again\n{done}b start\n"
    assert assembled(tmp_path, loop) == probe_guest._COUNTING_LOOP
    floating = "mov x5, #0x300000\nmsr cpacr_el1, x5\nisb\nmov v0.16b, v1.16b\n"
    assert assembled(tmp_path, floating) == probe_guest._FLOATING_POINT
    assert assembled(tmp_path, "mrs x3, cntvct_el0\n") == probe_guest._COUNTER
    assert assembled(tmp_path, "nop\n") == probe_guest._NOP


def test_affinities_are_kvms() -> None:
    assert [boot_vcpu.mpidr(n) for n in (0, 1, 15, 16, 63)] == [0, 1, 15, 0x100, 0x30F]
    assert boot_vcpu.mpidr(1 << 12) == 0x1_0000
    assert len({boot_vcpu.mpidr(n) for n in range(512)}) == 512


@pytest.mark.parametrize(
    ("esr", "words"),
    [
        (0x9600_0046, "data abort, a write: translation fault, level 2"),
        (0x9600_0007, "data abort, a read: translation fault, level 3"),
        (0x9200_0021, "data abort from a lower exception level, a read: alignment fault"),
        (0x9600_0410, "data abort, a read: external abort, at an address that it does not tell"),
        (0x8600_000E, "instruction abort: permission fault, level 2"),
        (0x8600_003F, "instruction abort: status 0x3f"),
        (0x0200_0000, "unknown reason"),
        (0x5600_0007, "SVC, a system call, ISS 0x7"),
        (0xF200_0800, "BRK instruction, ISS 0x800"),
        (0xBE00_0011, "SError interrupt, status 0x11"),
        (0xBF00_0002, "SError interrupt, of the processor's own kind"),
        (0x0E00_0000, "class 0x3"),
    ],
)
def test_a_syndrome_in_words(esr: int, words: str) -> None:
    assert state_text.esr_words(esr) == words


def test_every_syndrome_has_words() -> None:
    for kind in range(64):
        for iss in (0, 1, 0x3F, 0x1FF_FFFF):
            assert re.fullmatch(r"[\w ,:.'-]+", state_text.esr_words(kind << 26 | iss))


class Silent:
    """A vCPU that KVM knows nothing of."""

    fd = -1


def test_a_report_of_what_cannot_be_had_says_so() -> None:
    lines = list(state_text.state_lines(Silent(), lambda address, size: b""))  # type: ignore[arg-type]
    assert len(lines) == 13 + 31 + 2
    assert all("unavailable" in line for line in lines)


EXITS = [
    (
        {"reason": uapi.KVM_EXIT_ARM_NISV, "first": 0x1C0_0047, "second": 0x900_0000},
        "KVM_EXIT_ARM_NISV: an access to 0x9000000 by an instruction that KVM cannot decode "
        "(syndrome 0x1c00047)",
    ),
    (
        {"reason": uapi.KVM_EXIT_SYSTEM_EVENT, "first": 1 << 32 | 1, "second": 0},
        "system event: shutdown",
    ),
    (
        {"reason": uapi.KVM_EXIT_SYSTEM_EVENT, "first": 1 << 32 | 2, "second": 0},
        "system event: reset",
    ),
]


@pytest.mark.parametrize(("filled", "text"), EXITS)
def test_exits_that_arm64_has(filled: dict[str, int], text: str) -> None:
    page = bytearray(4096)
    struct.pack_into("<I", page, 8, filled["reason"])
    struct.pack_into("<2Q", page, 32, filled["first"], filled["second"])
    assert str(decode(memoryview(page))) == text
