"""A keeper that has nothing to do: a program of some hundred bytes in place of Python, which would
hold 8 MiB of memory for each VM.

It is made here, as an ELF file in a memfd, and keeps what the keeper has open. It waits, and passes
on to the monitor who comes to a control socket and asks for no device:

    poll the monitor's socket and the doors
    the monitor's: if it has gone and left nothing to do, end; or else wake
    a door's: accept a connection, and give it 100 ms to say something;
        if its user is not ours, or a look (MSG_PEEK) at what it says finds no end of a line, or
        `.add"` before that: keep it as that door's, and wake
        or else send it to the monitor by the door's channel, as Python would, and close it

To wake is to become Python again, with the same descriptors; what that has to know is in another
memfd, and nothing that a client says gets there.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import NamedTuple

MOST_DOORS = 15

# Where it has its data: structures of <poll.h>, <sys/socket.h>, <linux/uio.h>.
_TEXT, _DATA, _ALIGN = 0x400000, 0x600000, 0x10000
_DOORS = (
    0x100  # the channel and the place of each door, whose pollfd is at the same distance from 0
)
_COUNT = 0x200  # of pollfds; the user; whether there is something to do at the end
_CLIENT = 0x210  # a pollfd; 0x218: the size of the next; 0x220: struct ucred
_PYTHON = 0x230
_MESSAGE = 0x240  # struct msghdr
_RIGHTS = 0x280  # struct cmsghdr, the descriptor at 0x290
_NAME = 0x2A0  # 0x2b0: struct timespec
_PIECE = 0x2C0  # struct iovec; then the byte that it has
_ARGUMENTS, _MOST_ARGUMENTS = 0x300, 31
_TEXTS, _SAID, _END = 0x400, 0x2000, 0x4000

_CODE = {
    "x86_64": (
        "41bf00006000 4c8d742418 bf0f000000"  # mov r15d, 0x600000; lea r14, [rsp+24]; mov edi, 15
        "498db7a0020000 b89d000000 0f05"  # lea rsi, [r15+0x2a0]; mov eax, SYS_prctl; syscall
        "4489ff 418bb700020000"  # again: mov edi, r15d; mov esi, [r15+0x200]
        "baffffffff b807000000 0f05"  # mov edx, -1; mov eax, SYS_poll; syscall
        "83f8fc 74e5"  # cmp eax, -4; je again
        "85c0 0f885a010000"  # test eax, eax; js wake
        "410fb74706 85c0 741c"  # movzx eax, word [r15+6]; test eax, eax; jz doors
        "a810 0f8449010000"  # test al, 0x10; jz wake
        "31ff 413bbf08020000 0f853a010000"  # xor edi, edi; cmp edi, [r15+0x208]; jne wake
        "e952010000"  # jmp exit
        "bb01000000"  # doors: mov ebx, 1
        "413b9f00020000 73aa"  # next: cmp ebx, [r15+0x200]; jae again
        "6641837cdf0600 7504"  # cmp word [r15+rbx*8+6], 0; jne door
        "ffc3 ebea"  # inc ebx; jmp next
        "418b3cdf 31f6 31d2"  # door: mov edi, [r15+rbx*8]; xor esi, esi; xor edx, edx
        "41ba00080800 b820010000 0f05"  # mov r10d, 0x80800; mov eax, SYS_accept4; syscall
        "4189c4 85c0 7917"  # mov r12d, eax; test eax, eax; jns accepted
        "83f8f5 0f8478ffffff"  # cmp eax, -11; je again
        "83f899 0f846fffffff"  # cmp eax, -103; je again
        "e9e7000000"  # jmp wake
        "4589a710020000 498dbf10020000"  # accepted: mov [r15+0x210], r12d; lea rdi, [r15+0x210]
        "be01000000 ba64000000 b807000000"  # mov esi, 1; mov edx, 100; mov eax, SYS_poll
        "0f05"  # syscall
        "4489e7 be01000000 ba11000000"  # mov edi, r12d; mov esi, 1; mov edx, 17
        "4d8d9720020000 4d8d8718020000"  # lea r10, [r15+0x220]; lea r8, [r15+0x218]
        "41c7000c000000 b837000000 0f05"  # mov dword [r8], 12; mov eax, SYS_getsockopt; syscall
        "85c0 0f8583000000"  # test eax, eax; jnz give
        "418b8724020000 413b8704020000 7573"  # mov eax, [r15+0x224]; cmp eax, [r15+0x204]; jne give
        "4489e7 498db700200000 ba00100000"  # mov edi, r12d; lea rsi, [r15+0x2000]; mov edx, 0x1000
        "41ba42000000 4531c0 4531c9"  # mov r10d, 0x42; xor r8d, r8d; xor r9d, r9d
        "b82d000000 0f05"  # mov eax, SYS_recvfrom; syscall
        "85c0 743e"  # test eax, eax; jz close
        "784b"  # js give
        "803e0a 7411"  # scan: cmp byte [rsi], 10; je pass
        "813e2e616464 743e"  # cmp dword [rsi], 0x6464612e; je give
        "48ffc6 ffc8 75ec"  # inc rsi; dec eax; jnz scan
        "eb35"  # jmp give
        "4589a790020000 418bbcdf00010000"  # pass: mov [r15+0x290], r12d; mov edi, [r15+0x100+rbx*8]
        "498db740020000 ba40400000"  # lea rsi, [r15+0x240]; mov edx, 0x4040
        "b82e000000 0f05"  # mov eax, SYS_sendmsg; syscall
        "85c0 780f"  # test eax, eax; js give
        "4489e7 b803000000 0f05"  # close: mov edi, r12d; mov eax, SYS_close; syscall
        "e997feffff"  # jmp again
        "4489e7 418bb4df04010000"  # give: mov edi, r12d; mov esi, [r15+0x104+rbx*8]
        "31d2 b824010000 0f05"  # xor edx, edx; mov eax, SYS_dup3; syscall
        "498bbf30020000 498db700030000"  # wake: mov rdi, [r15+0x230]; lea rsi, [r15+0x300]
        "4c89f2 b83b000000 0f05"  # mov rdx, r14; mov eax, SYS_execve; syscall
        "bf01000000"  # mov edi, 1
        "b8e7000000 0f05"  # exit: mov eax, SYS_exit_group; syscall
    ),
    "aarch64": (
        "1c0ca0d2 fb630091 e00180d2"  # movz x28, #0x60, lsl #16; add x27, sp, #24; mov x0, #15
        "81830a91 e81480d2 010000d4"  # add x1, x28, #0x2a0; mov x8, #SYS_prctl; svc #0
        "e0031caa 810342b9 020080d2"  # again: mov x0, x28; ldr w1, [x28, #0x200]; mov x2, #0
        "030080d2 280980d2 010000d4"  # mov x3, #0; mov x8, #SYS_ppoll; svc #0
        "1f100031 20ffff54"  # cmn w0, #4; b.eq again
        "c00bf837"  # tbnz w0, #31, wake
        "800f4079 c0000034"  # ldrh w0, [x28, #6]; cbz w0, doors
        "600b2036"  # tbz w0, #4, wake
        "810b42b9 210b0035"  # ldr w1, [x28, #0x208]; cbnz w1, wake
        "000080d2 5d000014"  # mov x0, #0; b exit
        "33008052"  # doors: mov w19, #1
        "800342b9 7f02006b a2fdff54"  # next: ldr w0, [x28, #0x200]; cmp w19, w0; b.hs again
        "940f138b 800e4079 60000035"  # add x20, x28, x19, lsl #3; ldrh w0, [x20, #6]; cbnz w0, door
        "73060011 f9ffff17"  # add w19, w19, #1; b next
        "800240b9 010080d2 020080d2"  # door: ldr w0, [x20]; mov x1, #0; mov x2, #0
        "03008152 0301a072"  # movz w3, #0x800; movk w3, #0x8, lsl #16
        "481e80d2 010000d4"  # mov x8, #SYS_accept4; svc #0
        "f503002a c000f836"  # mov w21, w0; tbz w0, #31, accepted
        "1f2c0031 a0fbff54"  # cmn w0, #11; b.eq again
        "1f9c0131 60fbff54"  # cmn w0, #103; b.eq again
        "40000014"  # b wake
        "951302b9 80430891"  # accepted: str w21, [x28, #0x210]; add x0, x28, #0x210
        "210080d2 9f5b01f9 02209c52"  # mov x1, #1; str xzr, [x28, #0x2b0]; movz w2, #0xe100
        "a2bea072 825f01f9"  # movk w2, #0x5f5, lsl #16; str x2, [x28, #0x2b8]
        "82c30a91 030080d2 280980d2"  # add x2, x28, #0x2b0; mov x3, #0; mov x8, #SYS_ppoll
        "010000d4"  # svc #0
        "e003152a 210080d2 220280d2"  # mov w0, w21; mov x1, #1; mov x2, #17
        "83830891 84630891 85018052"  # add x3, x28, #0x220; add x4, x28, #0x218; mov w5, #12
        "850000b9 281a80d2 010000d4"  # str w5, [x4]; mov x8, #SYS_getsockopt; svc #0
        "c0040035"  # cbnz w0, give
        "802742b9 810742b9 1f00016b"  # ldr w0, [x28, #0x224]; ldr w1, [x28, #0x204]; cmp w0, w1
        "41040054"  # b.ne give
        "e003152a 810b4091 f60301aa"  # mov w0, w21; add x1, x28, #2, lsl #12; mov x22, x1
        "020082d2 430880d2 040080d2"  # mov x2, #0x1000; mov x3, #0x42; mov x4, #0
        "050080d2 e81980d2 010000d4"  # mov x5, #0; mov x8, #SYS_recvfrom; svc #0
        "80020034"  # cbz w0, close
        "e002f837"  # tbnz w0, #31, give
        "c1258c52 818cac72"  # movz w1, #0x612e; movk w1, #0x6464, lsl #16
        "c2024039 5f280071 e0000054"  # scan: ldrb w2, [x22]; cmp w2, #10; b.eq pass
        "c21640b8 5f00016b e0010054"  # ldr w2, [x22], #1; cmp w2, w1; b.eq give
        "00040071 21ffff54"  # subs w0, w0, #1; b.ne scan
        "0c000014"  # b give
        "959302b9 800241b9"  # pass: str w21, [x28, #0x290]; ldr w0, [x20, #0x100]
        "81030991 02088852 681a80d2"  # add x1, x28, #0x240; movz w2, #0x4040; mov x8, #SYS_sendmsg
        "010000d4"  # svc #0
        "a000f837"  # tbnz w0, #31, give
        "e003152a 280780d2 010000d4"  # close: mov w0, w21; mov x8, #SYS_close; svc #0
        "a0ffff17"  # b again
        "e003152a 810641b9 020080d2"  # give: mov w0, w21; ldr w1, [x20, #0x104]; mov x2, #0
        "080380d2 010000d4"  # mov x8, #SYS_dup3; svc #0
        "801b41f9 81030c91"  # wake: ldr x0, [x28, #0x230]; add x1, x28, #0x300
        "e2031baa a81b80d2 010000d4"  # mov x2, x27; mov x8, #SYS_execve; svc #0
        "200080d2"  # mov x0, #1
        "c80b80d2 010000d4"  # exit: mov x8, #SYS_exit_group; svc #0
    ),
}

_ELF = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM = struct.Struct("<IIQQQQQQ")
_MACHINES = {"x86_64": 62, "aarch64": 183}  # <elf.h>
_ET_EXEC, _PT_LOAD, _PT_GNU_STACK = 2, 1, 0x6474E551
_PF_X, _PF_W, _PF_R = 1, 2, 4
_POLLIN = 1
_SOL_SOCKET, _SCM_RIGHTS = 1, 1
_MFD_EXEC = 0x10  # <linux/memfd.h>, since Linux 6.3


class Door(NamedTuple):
    """A door of the keeper's: `listener`, the `channel` to the monitor, and the `place` of the one
    connection that may have to wait for Python. All are descriptors."""

    listener: int
    channel: int
    place: int


def make(
    python: Sequence[str], monitor: int, doors: Sequence[Door], *, has_work_at_the_end: bool
) -> int:
    """The program, as the descriptor of a file that can be executed: `python` is the command line
    by which it wakes, `monitor` a socket. Raises OSError where it cannot be made, ValueError for
    what it has no room for."""
    machine = os.uname().machine
    if machine not in _CODE or len(doors) > MOST_DOORS:
        raise ValueError
    fd = _memfd()
    try:
        os.pwrite(fd, _program(machine, python, monitor, doors, has_work_at_the_end), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def become(program: int, name: str) -> None:
    """Become `program`, for the VM `name`. Raises OSError."""
    os.execve(program, [f"pyvmm: keeper of {name}"], os.environ)


def _memfd() -> int:
    try:
        return os.memfd_create("pyvmm-keeper", os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError:  # a kernel that does not know it
        return os.memfd_create("pyvmm-keeper", os.MFD_CLOEXEC)


def _program(
    machine: str, python: Sequence[str], monitor: int, doors: Sequence[Door], has_work: bool
) -> bytes:
    """Raises ValueError."""
    code = bytes.fromhex("".join(_CODE[machine]))
    headers = _ELF.size + 3 * _PROGRAM.size
    elf = _ELF.pack(
        *(b"\x7fELF\2\1\1", _ET_EXEC, _MACHINES[machine], 1, _TEXT + headers, _ELF.size, 0, 0),
        *(_ELF.size, _PROGRAM.size, 3, 0, 0, 0),
    )
    size = headers + len(code)
    for kind, flags, offset, address, in_file, in_memory in (
        (_PT_LOAD, _PF_R | _PF_X, 0, _TEXT, size, size),
        (_PT_LOAD, _PF_R | _PF_W, _ALIGN, _DATA, _SAID, _END),
        (_PT_GNU_STACK, _PF_R | _PF_W, 0, 0, 0, 0),
    ):
        elf += _PROGRAM.pack(kind, flags, offset, address, address, in_file, in_memory, _ALIGN)
    return (elf + code).ljust(_ALIGN, b"\0") + _data(python, monitor, doors, has_work)


def _data(python: Sequence[str], monitor: int, doors: Sequence[Door], has_work: bool) -> bytes:
    data = bytearray(_SAID)
    for number, fd in enumerate((monitor, *(door.listener for door in doors))):
        struct.pack_into("<ihh", data, 8 * number, fd, _POLLIN, 0)
    for number, door in enumerate(doors, 1):
        struct.pack_into("<ii", data, _DOORS + 8 * number, door.channel, door.place)
    struct.pack_into("<III", data, _COUNT, 1 + len(doors), os.geteuid(), has_work)
    struct.pack_into("<ihh", data, _CLIENT, -1, _POLLIN, 0)
    message = (0, 0, _DATA + _PIECE, 1, _DATA + _RIGHTS, 24, 0)
    struct.pack_into("<QI4xQQQQI", data, _MESSAGE, *message)
    struct.pack_into("<QiiI", data, _RIGHTS, 20, _SOL_SOCKET, _SCM_RIGHTS, 0)
    struct.pack_into("<16s", data, _NAME, b"pyvmm-keeper")
    struct.pack_into("<QQ", data, _PIECE, _DATA + _PIECE + 16, 1)
    at = _TEXTS
    if len(python) > _MOST_ARGUMENTS:
        raise ValueError
    for number, text in enumerate(map(os.fsencode, python)):
        if at + len(text) >= _SAID:
            raise ValueError
        data[at : at + len(text)] = text
        struct.pack_into("<Q", data, _ARGUMENTS + 8 * number, _DATA + at)
        at += len(text) + 1
    struct.pack_into("<Q", data, _PYTHON, _DATA + _TEXTS)
    return bytes(data)
