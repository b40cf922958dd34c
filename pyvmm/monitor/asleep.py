"""A keeper that has nothing to do: a program of some hundred bytes in place of Python, which would
hold 8 MiB of memory for each VM. It begins as one.

It is made here, as an ELF file in a memfd, and keeps what the keeper has open. First it makes the
system calls that it was given, by which it gives up rights. Then it waits, removes files for the
monitor, and passes on to it who comes to a control socket and asks for no device:

    poll the monitor's socket, its process and the doors
    the socket: if a look (MSG_PEEK) finds a "del" for a file in the table: remove that if it is the
        same, answer as Python would, and take the message; for another one wake
    the process, or the socket's end: end, or wake if there is something to do then
    a door's: accept a connection, and give it 100 ms to say something;
        if its user is not ours, or a look at what it says finds no end of a line, or what may ask
        for a device before that: keep it as that door's, and wake
        or else send it to the monitor by the door's channel, as Python would, and close it

To wake is to become Python, with the same descriptors; what that has to know is in another memfd,
and nothing that a client says gets there.

Whoever has a monitor can have accept(2) wait, as the listeners are its own as well: O_NONBLOCK is
of both. An alarm wakes from that after a second, and Python looks after the monitor meanwhile.

A request for a device is known by `.add"`, and by an escape that may stand for a character of that
(`\\u00` and a digit below 8): JSON has no third way to spell it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple

from pyvmm.host.call_names import NO_CALL, number_of
from pyvmm.host.confinement import PRCTL, Argument, Call

MOST_DOORS = 15
MOST_FILES = 32  # that it removes; Python is woken for others

# Where it has its data: structures of <poll.h>, <sys/socket.h>, <linux/uio.h>.
_TEXT, _DATA, _ALIGN = 0x400000, 0x600000, 0x10000
_FIRST_DOOR = 2  # of pollfds
_DOORS = 0x100  # the channel and the place of each, as far from here as its pollfd from 0
# Of pollfds; the user; whether there is something to do at the end; of files.
_COUNT = 0x200
_CLIENT = 0x210  # a pollfd; 0x218: the size of the next; 0x220: struct ucred
_PYTHON = 0x230
_MESSAGE = 0x240  # struct msghdr
_RIGHTS = 0x280  # struct cmsghdr, the descriptor at 0x290
_PIECE = 0x2C0  # struct iovec; then the byte that it has; 0x2b0: struct timespec; 0x2d8: the answer
_ALARM = 0x2E0  # struct itimerval: a second from then; 0x1e0: never
_ARGUMENTS, _MOST_ARGUMENTS = 0x300, 31
_FILES, _FILE = 0x500, struct.Struct("<i4xQQQ")  # 0x400: struct stat
_CALLS, _CALL, _MOST_CALLS = 0x900, struct.Struct("<i4x5Q"), 47
_TEXTS, _SAID, _END = 0x1200, 0x6000, 0x8000

# Up to where it wakes, and from there on.
_CODE = {
    "x86_64": (
        (
            "41bf00006000 4c8d742418"  # start: mov r15d, 0x600000; lea r14, [rsp+24]
            "498daf00090000"  # lea rbp, [r15+0x900]
            "8b4500 85c0 781c"  # calls: mov eax, [rbp]; test eax, eax; js again
            "488b7d08 488b7510 488b5518"  # mov rdi, [rbp+8]; mov rsi, [rbp+16]; mov rdx, [rbp+24]
            "4c8b5520 4c8b4528 0f05"  # mov r10, [rbp+32]; mov r8, [rbp+40]; syscall
            "4883c530 ebdd"  # add rbp, 48; jmp calls
            "4489ff 418bb700020000"  # again: mov edi, r15d; mov esi, [r15+0x200]
            "baffffffff b807000000 0f05"  # mov edx, -1; mov eax, SYS_poll; syscall
            "83f8fc 74e5 85c0 0f888c020000"  # cmp eax, -4; je again; test eax, eax; js wake
            "6641837f0600 0f84fa000000 418b3f"  # cmp word [r15+6], 0; je ended; mov edi, [r15]
            "498db700600000 ba10000000"  # lea rsi, [r15+0x6000]; mov edx, 16
            "41ba42000000 4531c0 4531c9"  # mov r10d, 0x42; xor r8d, r8d; xor r9d, r9d
            "b82d000000 0f05 83f898"  # mov eax, SYS_recvfrom; syscall; cmp eax, -104
            "74aa 85c0 0f8ed3000000 83f808"  # je again; test eax, eax; jle gone; cmp eax, 8
            "0f8548020000 813e64656c00"  # jne wake; cmp dword [rsi], 0x6c6564
            "0f853c020000 8b6e04 413baf0c020000"  # jne wake; mov ebp, [rsi+4]; cmp ebp, [r15+0x20c]
            "0f832c020000 c1e505 498dac2f00050000"  # jae wake; shl ebp, 5; lea rbp, [r15+rbp+0x500]
            "8b7d00 488b7508"  # mov edi, [rbp]; mov rsi, [rbp+8]
            "498d9700040000 41ba00010000"  # lea rdx, [r15+0x400]; mov r10d, 0x100
            "b806010000 0f05 85c0"  # mov eax, SYS_newfstatat; syscall; test eax, eax
            "782a 498b8f00040000 483b4d10"  # js answer; mov rcx, [r15+0x400]; cmp rcx, [rbp+16]
            "751d 498b8f08040000 483b4d18"  # jne answer; mov rcx, [r15+0x408]; cmp rcx, [rbp+24]
            "7510 8b7d00 488b7508"  # jne answer; mov edi, [rbp]; mov rsi, [rbp+8]
            "31d2 b807010000 0f05"  # xor edx, edx; mov eax, SYS_unlinkat; syscall
            "f7d8 418987d8020000 418b3f"  # answer: neg eax; mov [r15+0x2d8], eax; mov edi, [r15]
            "498db700600000 ba10000000"  # lea rsi, [r15+0x6000]; mov edx, 16
            "41ba40000000 4531c0 4531c9"  # mov r10d, 0x40; xor r8d, r8d; xor r9d, r9d
            "b82d000000 0f05 418b3f"  # mov eax, SYS_recvfrom; syscall; mov edi, [r15]
            "498db7d8020000 ba04000000"  # lea rsi, [r15+0x2d8]; mov edx, 4
            "41ba40400000 4531c0 4531c9"  # mov r10d, 0x4040; xor r8d, r8d; xor r9d, r9d
            "b82c000000 0f05 e9d7feffff"  # mov eax, SYS_sendto; syscall; jmp again
            "6641837f0e00 7414"  # ended: cmp word [r15+14], 0; je doors
            "31ff 413bbf08020000 0f856f010000"  # gone: xor edi, edi; cmp edi, [r15+0x208]; jne wake
            "e987010000"  # jmp exit
            "bb02000000"  # doors: mov ebx, 2
            "413b9f00020000 0f83a9feffff"  # next: cmp ebx, [r15+0x200]; jae again
            "6641837cdf0600 7504 ffc3"  # cmp word [r15+rbx*8+6], 0; jne door; inc ebx
            "ebe6"  # jmp next
            "bf01000000 b825000000 0f05"  # door: mov edi, 1; mov eax, SYS_alarm; syscall
            "418b3cdf 31f6 31d2"  # mov edi, [r15+rbx*8]; xor esi, esi; xor edx, edx
            "41ba00080800 b820010000 0f05"  # mov r10d, 0x80800; mov eax, SYS_accept4; syscall
            "4189c4 31ff b825000000"  # mov r12d, eax; xor edi, edi; mov eax, SYS_alarm
            "0f05 4585e4 7919 4183fcf5"  # syscall; test r12d, r12d; jns accepted; cmp r12d, -11
            "0f8460feffff 4183fc99 0f8456feffff"  # je again; cmp r12d, -103; je again
            "e900010000"  # jmp wake
            "4589a710020000 498dbf10020000"  # accepted: mov [r15+0x210], r12d; lea rdi, [r15+0x210]
            "be01000000 ba64000000 b807000000"  # mov esi, 1; mov edx, 100; mov eax, SYS_poll
            "0f05 4489e7 be01000000 ba11000000"  # syscall; mov edi, r12d; mov esi, 1; mov edx, 17
            "4d8d9720020000 4d8d8718020000"  # lea r10, [r15+0x220]; lea r8, [r15+0x218]
            "41c7000c000000 b837000000 0f05"  # mov dword [r8], 12; mov eax, SYS_getsockopt; syscall
            "85c0 0f859c000000 418b8724020000"  # test eax, eax; jnz give; mov eax, [r15+0x224]
            "413b8704020000 0f8588000000 4489e7"  # cmp eax, [r15+0x204]; jne give; mov edi, r12d
            "498db700600000 ba00100000"  # lea rsi, [r15+0x6000]; mov edx, 0x1000
            "41ba42000000 4531c0 4531c9"  # mov r10d, 0x42; xor r8d, r8d; xor r9d, r9d
            "b82d000000 0f05 85c0 7453"  # mov eax, SYS_recvfrom; syscall; test eax, eax; jz close
            "7860"  # js give
            "803e0a 7426 8a4e04"  # scan: cmp byte [rsi], 10; je pass; mov cl, [rsi+4]
            "813e2e616464 7505"  # cmp dword [rsi], 0x6464612e; jne escape
            "80f922 744b"  # cmp cl, 0x22; je give
            "813e5c753030 7505"  # escape: cmp dword [rsi], 0x3030755c; jne more
            "80f938 723e"  # cmp cl, 0x38; jb give
            "48ffc6 ffc8 75d7 eb35"  # more: inc rsi; dec eax; jnz scan; jmp give
            "4589a790020000"  # pass: mov [r15+0x290], r12d
            "418bbcdf00010000 498db740020000"  # mov edi, [r15+0x100+rbx*8]; lea rsi, [r15+0x240]
            "ba40400000 b82e000000 0f05"  # mov edx, 0x4040; mov eax, SYS_sendmsg; syscall
            "85c0 780f"  # test eax, eax; js give
            "4489e7 b803000000 0f05"  # close: mov edi, r12d; mov eax, SYS_close; syscall
            "e965fdffff"  # jmp again
            "4489e7 418bb4df04010000"  # give: mov edi, r12d; mov esi, [r15+0x104+rbx*8]
            "31d2 b824010000 0f05"  # xor edx, edx; mov eax, SYS_dup3; syscall
        ),
        (
            "498bbf30020000 498db700030000"  # wake: mov rdi, [r15+0x230]; lea rsi, [r15+0x300]
            "4c89f2 b83b000000 0f05"  # mov rdx, r14; mov eax, SYS_execve; syscall
            "bf01000000"  # mov edi, 1
            "b8e7000000 0f05"  # exit: mov eax, SYS_exit_group; syscall
        ),
    ),
    "aarch64": (
        (
            "1c0ca0d2 fb630091"  # start: movz x28, #0x60, lsl #16; add x27, sp, #24
            "94032491"  # add x20, x28, #0x900
            "880240b9 e800f837"  # calls: ldr w8, [x20]; tbnz w8, #31, again
            "808640a9 828e41a9"  # ldp x0, x1, [x20, #8]; ldp x2, x3, [x20, #24]
            "841640f9 010000d4 94c20091"  # ldr x4, [x20, #40]; svc #0; add x20, x20, #48
            "f9ffff17"  # b calls
            "e0031caa 810342b9 020080d2"  # again: mov x0, x28; ldr w1, [x28, #0x200]; mov x2, #0
            "030080d2 280980d2 010000d4"  # mov x3, #0; mov x8, #SYS_ppoll; svc #0
            "1f100031 20ffff54 0016f837"  # cmn w0, #4; b.eq again; tbnz w0, #31, wake
            "800f4079 e0070034"  # ldrh w0, [x28, #6]; cbz w0, ended
            "800340b9 811b4091 020280d2"  # ldr w0, [x28]; add x1, x28, #6, lsl #12; mov x2, #16
            "430880d2 040080d2 050080d2"  # mov x3, #0x42; mov x4, #0; mov x5, #0
            "e81980d2 010000d4 1fa00131"  # mov x8, #SYS_recvfrom; svc #0; cmn w0, #104
            "80fdff54 1f000071 ad060054 1f200071"  # b.eq again; cmp w0, #0; b.le gone; cmp w0, #8
            "01140054 811b4091 220c4029"  # b.ne wake; add x1, x28, #6, lsl #12; ldp w2, w3, [x1]
            "84ac8c52 840da072 5f00046b"  # movz w4, #0x6564; movk w4, #0x6c, lsl #16; cmp w2, w4
            "41130054 840f42b9 7f00046b"  # b.ne wake; ldr w4, [x28, #0x20c]; cmp w3, w4
            "e2120054 94031491"  # b.hs wake; add x20, x28, #0x500
            "9416038b 800240b9"  # add x20, x20, x3, lsl #5; ldr w0, [x20]
            "810640f9 82031091 032080d2"  # ldr x1, [x20, #8]; add x2, x28, #0x400; mov x3, #0x100
            "e80980d2 010000d4 8001f837"  # mov x8, #SYS_newfstatat; svc #0; tbnz w0, #31, answer
            "820342f9 830742f9"  # ldr x2, [x28, #0x400]; ldr x3, [x28, #0x408]
            "841641a9 5f0004eb 600045fa"  # ldp x4, x5, [x20, #16]; cmp x2, x4; ccmp x3, x5, #0, eq
            "c1000054 800240b9 810640f9"  # b.ne answer; ldr w0, [x20]; ldr x1, [x20, #8]
            "020080d2 680480d2 010000d4"  # mov x2, #0; mov x8, #SYS_unlinkat; svc #0
            "e003004b 80db02b9 800340b9"  # answer: neg w0, w0; str w0, [x28, #0x2d8]; ldr w0, [x28]
            "811b4091 020280d2 030880d2"  # add x1, x28, #6, lsl #12; mov x2, #16; mov x3, #0x40
            "040080d2 050080d2 e81980d2"  # mov x4, #0; mov x5, #0; mov x8, #SYS_recvfrom
            "010000d4 800340b9 81630b91"  # svc #0; ldr w0, [x28]; add x1, x28, #0x2d8
            "820080d2 03088852 040080d2"  # mov x2, #4; movz w3, #0x4040; mov x4, #0
            "050080d2 c81980d2 010000d4"  # mov x5, #0; mov x8, #SYS_sendto; svc #0
            "b8ffff17"  # b again
            "801f4079 a0000034"  # ended: ldrh w0, [x28, #14]; cbz w0, doors
            "810b42b9 810d0035 000080d2"  # gone: ldr w1, [x28, #0x208]; cbnz w1, wake; mov x0, #0
            "70000014"  # b exit
            "53008052"  # doors: mov w19, #2
            "800342b9 7f02006b c2f5ff54"  # next: ldr w0, [x28, #0x200]; cmp w19, w0; b.hs again
            "940f138b 800e4079"  # add x20, x28, x19, lsl #3; ldrh w0, [x20, #6]
            "60000035 73060011 f9ffff17"  # cbnz w0, door; add w19, w19, #1; b next
            "000080d2 81830b91 020080d2"  # door: mov x0, #0; add x1, x28, #0x2e0; mov x2, #0
            "e80c80d2 010000d4"  # mov x8, #SYS_setitimer; svc #0
            "800240b9 010080d2 020080d2"  # ldr w0, [x20]; mov x1, #0; mov x2, #0
            "03008152 0301a072"  # movz w3, #0x800; movk w3, #0x8, lsl #16
            "481e80d2 010000d4 f503002a"  # mov x8, #SYS_accept4; svc #0; mov w21, w0
            "000080d2 81830791 020080d2"  # mov x0, #0; add x1, x28, #0x1e0; mov x2, #0
            "e80c80d2 010000d4"  # mov x8, #SYS_setitimer; svc #0
            "d500f836 bf2e0031 80f2ff54"  # tbz w21, #31, accepted; cmn w21, #11; b.eq again
            "bf9e0131 40f2ff54 49000014"  # cmn w21, #103; b.eq again; b wake
            "951302b9 80430891"  # accepted: str w21, [x28, #0x210]; add x0, x28, #0x210
            "210080d2 9f5b01f9 02209c52"  # mov x1, #1; str xzr, [x28, #0x2b0]; movz w2, #0xe100
            "a2bea072 825f01f9"  # movk w2, #0x5f5, lsl #16; str x2, [x28, #0x2b8]
            "82c30a91 030080d2 280980d2"  # add x2, x28, #0x2b0; mov x3, #0; mov x8, #SYS_ppoll
            "010000d4 e003152a 210080d2 220280d2"  # svc #0; mov w0, w21; mov x1, #1; mov x2, #17
            "83830891 84630891 85018052"  # add x3, x28, #0x220; add x4, x28, #0x218; mov w5, #12
            "850000b9 281a80d2 010000d4"  # str w5, [x4]; mov x8, #SYS_getsockopt; svc #0
            "e0050035 802742b9"  # cbnz w0, give; ldr w0, [x28, #0x224]
            "810742b9 1f00016b 61050054"  # ldr w1, [x28, #0x204]; cmp w0, w1; b.ne give
            "e003152a 811b4091 f60301aa"  # mov w0, w21; add x1, x28, #6, lsl #12; mov x22, x1
            "020082d2 430880d2 040080d2"  # mov x2, #0x1000; mov x3, #0x42; mov x4, #0
            "050080d2 e81980d2 010000d4"  # mov x5, #0; mov x8, #SYS_recvfrom; svc #0
            "a0030034 0004f837 c1258c52"  # cbz w0, close; tbnz w0, #31, give; movz w1, #0x612e
            "818cac72 83ab8e52"  # movk w1, #0x6464, lsl #16; movz w3, #0x755c
            "0306a672"  # movk w3, #0x3030, lsl #16
            "c2024039 5f280071 c0010054"  # scan: ldrb w2, [x22]; cmp w2, #10; b.eq pass
            "c4124039 c21640b8 5f00016b"  # ldrb w4, [x22, #4]; ldr w2, [x22], #1; cmp w2, w1
            "45048052 8000457a 60020054"  # mov w5, #0x22; ccmp w4, w5, #0, eq; b.eq give
            "5f00036b 05078052 8200457a"  # cmp w2, w3; mov w5, #0x38; ccmp w4, w5, #2, eq
            "e3010054"  # b.lo give
            "00040071 41feff54 0c000014"  # subs w0, w0, #1; b.ne scan; b give
            "959302b9 800241b9"  # pass: str w21, [x28, #0x290]; ldr w0, [x20, #0x100]
            "81030991 02088852"  # add x1, x28, #0x240; movz w2, #0x4040
            "681a80d2 010000d4 a000f837"  # mov x8, #SYS_sendmsg; svc #0; tbnz w0, #31, give
            "e003152a 280780d2 010000d4"  # close: mov w0, w21; mov x8, #SYS_close; svc #0
            "4effff17"  # b again
            "e003152a 810641b9 020080d2"  # give: mov w0, w21; ldr w1, [x20, #0x104]; mov x2, #0
            "080380d2 010000d4"  # mov x8, #SYS_dup3; svc #0
        ),
        (
            "801b41f9 81030c91"  # wake: ldr x0, [x28, #0x230]; add x1, x28, #0x300
            "e2031baa a81b80d2 010000d4"  # mov x2, x27; mov x8, #SYS_execve; svc #0
            "200080d2"  # mov x0, #1
            "c80b80d2 010000d4"  # exit: mov x8, #SYS_exit_group; svc #0
        ),
    ),
}

_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_MACHINES = {"x86_64": 62, "aarch64": 183}  # <elf.h>
_ET_EXEC, _PT_LOAD, _PT_GNU_STACK = 2, 1, 0x6474E551
_PF_X, _PF_W, _PF_R = 1, 2, 4
_POLLIN = 1
_SOL_SOCKET, _SCM_RIGHTS = 1, 1
_PR_SET_NAME = 15  # <linux/prctl.h>
_SA_NODEFER, _SA_RESTORER = 0x40000000, 0x04000000  # <asm/signal.h>
_MFD_ALLOW_SEALING, _MFD_NOEXEC_SEAL, _MFD_EXEC = 2, 8, 16  # <linux/memfd.h>
# F_ADD_SEALS; F_SEAL_SEAL, _SHRINK, _GROW, _WRITE (<linux/fcntl.h>)
_ADD_SEALS, _ALL_SEALS = 1033, 15


class Door(NamedTuple):
    """A door of the keeper's: `listener`, the `channel` to the monitor, and the `place` of the one
    connection that may have to wait for Python. All are descriptors."""

    listener: int
    channel: int
    place: int


class File(NamedTuple):
    """A file that is removed if it is still that one: `name` in the `folder` with that descriptor,
    with the number of its `device` and of its `inode`."""

    folder: int
    name: str
    device: int
    inode: int


def make(
    python: Sequence[str],
    monitor: int,
    alive: int,
    doors: Sequence[Door],
    files: Sequence[File] = (),
    *,
    has_work_at_the_end: bool,
    calls: Iterable[Call] = (),
) -> int:
    """The program, as the descriptor of a file that can be executed: `python` is the command line
    by which it wakes, `monitor` a socket, `alive` a descriptor of the monitor's process, or -1. It
    makes `calls` first, of five arguments at the most, and goes on if they fail. Raises OSError
    where it cannot be made, ValueError for what it has no room for."""
    machine = os.uname().machine
    if machine not in _CODE or len(doors) > MOST_DOORS:
        raise ValueError
    before, from_wake = map(bytes.fromhex, map("".join, _CODE[machine]))
    made = _Data(_TEXT + _HEADERS + len(before))
    made.wait_for((monitor, alive, *(door.listener for door in doors)), has_work_at_the_end)
    made.hear(doors)
    made.remove(files[:MOST_FILES])
    made.wake_as(python)
    made.call_first(calls)
    code = _elf(machine, before + from_wake)
    return memory("pyvmm-keeper", ((0, code), (_ALIGN, bytes(made.data))), executable=True)


def become(program: int, name: str) -> None:
    """Become `program`, for the VM `name`. Raises OSError."""
    os.execve(program, [called(name)], os.environ)


def called(name: str) -> str:
    """The command line of the keeper of the VM `name`, by which `ps` shows it."""
    return f"pyvmm: keeper of {name}"


def places(lasting: Iterable[int], count: int) -> range:
    """Numbers of descriptors for the places of so many doors, which no others get: those of new
    ones are the lowest that are free. `lasting` are those that a keeper always has."""
    first = max(lasting) + _APART
    return range(first, first + count)


_APART = 8


def memory(name: str, pieces: Iterable[tuple[int, bytes]], *, executable: bool = False) -> int:
    """A file that has `pieces` at their places, and that nobody can change any more. Raises
    OSError."""
    kind = _MFD_EXEC if executable else _MFD_NOEXEC_SEAL
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | _MFD_ALLOW_SEALING | kind)
    except OSError:  # a kernel that does not know it
        fd = os.memfd_create(name, os.MFD_CLOEXEC | _MFD_ALLOW_SEALING)
    try:
        for at, data in pieces:
            os.pwrite(fd, data, at)
        with suppress(OSError):
            fcntl.fcntl(fd, _ADD_SEALS, _ALL_SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


_HEADERS = _ELF.size + 3 * _PROGRAM.size


def _elf(machine: str, code: bytes) -> bytes:
    elf = _ELF.pack(
        *(b"\x7fELF\2\1\1", _ET_EXEC, _MACHINES[machine], 1, _TEXT + _HEADERS, _ELF.size, 0, 0),
        *(_ELF.size, _PROGRAM.size, 3, 0, 0, 0),
    )
    size = _HEADERS + len(code)
    for kind, flags, offset, address, in_file, in_memory in (
        (_PT_LOAD, _PF_R | _PF_X, 0, _TEXT, size, size),
        (_PT_LOAD, _PF_R | _PF_W, _ALIGN, _DATA, _SAID, _END),
        (_PT_GNU_STACK, _PF_R | _PF_W, 0, 0, 0, 0),
    ):
        elf += _PROGRAM.pack(kind, flags, offset, address, address, in_file, in_memory, _ALIGN)
    return elf + code


class _Data:
    """What the program has at _DATA; `wake` is the address of its code that wakes it."""

    def __init__(self, wake: int) -> None:
        self.data = bytearray(_SAID)
        self._wake = wake
        self._at = _TEXTS

    def _put(self, data: bytes) -> int:
        """The address of `data`, with a NUL behind. Raises ValueError if there is no more room."""
        at = self._at
        if at + len(data) >= _SAID:
            raise ValueError
        self.data[at : at + len(data)] = data
        self._at += -(-(len(data) + 1) // 8) * 8
        return _DATA + at

    def wait_for(self, fds: Sequence[int], has_work: bool) -> None:
        for number, fd in enumerate(fds):
            struct.pack_into("<ihh", self.data, 8 * number, fd, _POLLIN, 0)
        struct.pack_into("<III", self.data, _COUNT, len(fds), os.geteuid(), has_work)

    def hear(self, doors: Sequence[Door]) -> None:
        data = self.data
        for number, door in enumerate(doors, _FIRST_DOOR):
            struct.pack_into("<ii", data, _DOORS + 8 * number, door.channel, door.place)
        struct.pack_into("<4Q", data, _ALARM, 0, 0, 1, 0)
        struct.pack_into("<ihh", data, _CLIENT, -1, _POLLIN, 0)
        message = (0, 0, _DATA + _PIECE, 1, _DATA + _RIGHTS, 24, 0)
        struct.pack_into("<QI4xQQQQI", data, _MESSAGE, *message)
        struct.pack_into("<QiiI", data, _RIGHTS, 20, _SOL_SOCKET, _SCM_RIGHTS, 0)
        struct.pack_into("<QQ", data, _PIECE, _DATA + _PIECE + 16, 1)

    def remove(self, files: Sequence[File]) -> None:
        struct.pack_into("<I", self.data, _COUNT + 12, len(files))
        for number, file in enumerate(files):
            name = self._put(os.fsencode(file.name))
            place = _FILES + number * _FILE.size
            _FILE.pack_into(self.data, place, file.folder, name, file.device, file.inode)

    def wake_as(self, python: Sequence[str]) -> None:
        if len(python) > _MOST_ARGUMENTS:
            raise ValueError
        texts = [self._put(os.fsencode(text)) for text in python]
        struct.pack_into("<Q", self.data, _PYTHON, texts[0])
        struct.pack_into(f"<{len(texts)}Q", self.data, _ARGUMENTS, *texts)

    def call_first(self, calls: Iterable[Call]) -> None:
        """`calls`, after what an alarm does. Its name is last: who sees it knows that they are
        made."""
        # struct sigaction of the kernel: nothing returns from it.
        action = struct.pack("<4Q", self._wake, _SA_NODEFER | _SA_RESTORER, self._wake, 0)
        wakes = (number_of("rt_sigaction"), signal.SIGALRM, action, 0, 8)
        made: list[Call] = [wakes, *calls, (PRCTL, _PR_SET_NAME, b"pyvmm-keeper")]
        at = _CALLS
        for number, *arguments in made:
            if number == NO_CALL:
                continue
            if at >= _CALLS + _MOST_CALLS * _CALL.size:
                raise ValueError
            words = [self._word(argument) for argument in arguments]
            _CALL.pack_into(self.data, at, number, *words, *[0] * (5 - len(words)))
            at += _CALL.size
        struct.pack_into("<i", self.data, at, -1)

    def _word(self, argument: Argument) -> int:
        if isinstance(argument, int):
            return argument
        if isinstance(argument, tuple):
            first, other = argument
            argument = first + struct.pack("<Q", self._put(other))
        return self._put(argument)
