"""The machine code that refuses calls, against the assembler, and the structures that it looks
into. What it does is tried on this machine's architecture by tests/kvm/test_monitors_box.py, and
on arm64 by tests/guest/test_linux_arm64.py."""

from __future__ import annotations

import struct
from pathlib import Path

from c_claims import ARM64, assembled, assert_in_c, needs_arm64_headers

from pyvmm.host import refusals

FD = 0x11223344


def handler(architecture: str) -> bytes:
    return bytes.fromhex(refusals._HANDLING[architecture].format(fd=struct.pack("<I", FD).hex()))


def test_the_jump_over_the_handler_leads_to_its_end() -> None:
    code = handler("x86_64")
    # `end` is the last byte, and the jump to it counts from behind itself.
    assert code[4] == 0x75 and code[5] == len(code) - 7


@needs_arm64_headers
def test_the_code_for_arm64_is_what_its_comments_say(tmp_path: Path) -> None:
    handling = f"""
    ldr w3, [x1, #8]
    cmp w3, #1
    b.ne end
    sub sp, sp, #32
    ldrsw x3, [x1, #24]
    ldr x4, [x2, #184]
    ldr x5, [x2, #192]
    str x3, [sp]
    stp x4, x5, [sp, #16]
    mov x3, #-1
    str x3, [x2, #184]
    mov x8, #178
    svc #0
    str x0, [sp, #8]
    ldr w0, pipe
    mov x1, sp
    mov x2, #32
    mov x8, #64
    svc #0
    add sp, sp, #32
end: ret
pipe: .word {FD}
"""
    assert assembled(tmp_path, handling) == handler("aarch64")
    answering = """
    stp x19, x20, [sp, #-32]!
    str x21, [sp, #16]
    mov w19, w0
    mov w20, w1
    mov x21, x2
again:
    stp xzr, xzr, [x21]
    stp xzr, xzr, [x21, #16]
    stp xzr, xzr, [x21, #32]
    stp xzr, xzr, [x21, #48]
    stp xzr, xzr, [x21, #64]
    mov w0, w19
    ldr w1, receive
    mov x2, x21
    mov x8, #29
    svc #0
    tbnz w0, #31, failed
    ldrsw x0, [x21, #16]
    ldr w1, [x21, #8]
    stp x0, x1, [x21, #104]
    ldp x0, x1, [x21, #32]
    stp x0, x1, [x21, #120]
    mov w0, w20
    add x1, x21, #104
    mov x2, #32
    mov x8, #64
    svc #0
    ldr x0, [x21]
    stp x0, xzr, [x21, #80]
    mov w0, #-1
    stp w0, wzr, [x21, #96]
    mov w0, w19
    ldr w1, send
    add x2, x21, #80
    mov x8, #29
    svc #0
    b again
failed:
    cmn w0, #2
    b.eq again
    cmn w0, #4
    b.eq again
    ldr x21, [sp, #16]
    ldp x19, x20, [sp], #32
    ret
receive: .word 0xc0502100
send: .word 0xc0182101
"""
    assert assembled(tmp_path, answering) == bytes.fromhex(refusals._ANSWERING["aarch64"])


@needs_arm64_headers
def test_numbers_and_structures_on_arm64_are_the_headers(tmp_path: Path) -> None:
    headers = ("stddef.h", "signal.h", "errno.h", "asm/unistd.h", "sys/ioctl.h", "linux/seccomp.h")
    claims = [
        *("offsetof(siginfo_t, si_code) == 8", "offsetof(siginfo_t, si_syscall) == 24"),
        "offsetof(ucontext_t, uc_mcontext.regs) == 184",
        "sizeof(struct sigaction) == 152 && offsetof(struct sigaction, sa_flags) == 136",
        *("__NR_gettid == 178", "__NR_write == 64", "__NR_ioctl == 29"),
        *("EPERM == 1", "ENOENT == 2", "EINTR == 4"),
        "SECCOMP_IOCTL_NOTIF_RECV == 0xc0502100",
        "SECCOMP_IOCTL_NOTIF_SEND == 0xc0182101",
        *("sizeof(struct seccomp_notif) == 80", "sizeof(struct seccomp_notif_resp) == 24"),
        "offsetof(struct seccomp_notif, pid) == 8",
        "offsetof(struct seccomp_notif, data.nr) == 16",
        "offsetof(struct seccomp_notif, data.args) == 32",
        "offsetof(struct seccomp_notif_resp, error) == 16",
    ]
    assert_in_c(tmp_path, headers, claims, compiler=(ARM64, "-D_GNU_SOURCE"))
