"""The calls that the filter has refused, so that they can be told: which call, in which thread.

The filter raises SIGSYS in the thread that calls (SECCOMP_RET_TRAP, signal(7)). Its handler must
give the call its result, EPERM, and must not need Python's lock, which that thread may hold. So it
is a few instructions of the processor: they put the result into the thread's registers, and a
record into a pipe, or nowhere if that is full. Whoever has the time reads it.

A thread that blocks SIGSYS would be ended with its process instead. So the filter raises none for
those calls before which the C library blocks all signals, the ones that make processes, but asks a
listener (seccomp_unotify(2)): a thread that does not need Python's lock either, and always says no.
Who has its descriptor could say yes. So that thread has a table of descriptors of its own, and
nobody else has that one.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

from pyvmm.host.call_names import name_of, number_of
from pyvmm.host.confinement import call_kernel

_RECORD = struct.Struct("=4Q")
_SIGSYS = 31
_SA_SIGINFO, _SA_RESTART, _SA_NODEFER = 4, 0x10000000, 0x40000000
_PROT_READ, _PROT_EXEC = 1, 4
_PAGE = 4096
_MOST_READ = 64 << 10
# Calls of which the second argument says what is asked for.
_BY_REQUEST = ("ioctl", "fcntl")

# void handler(int, siginfo_t *, ucontext_t *), for the descriptor {fd}. In siginfo_t si_code is at
# 8 and si_syscall at 24. Arguments and result are in ucontext_t (<sys/ucontext.h>): on x86-64 RDI
# at 104, RSI at 112, RAX at 144; on arm64 X0 at 184, X1 at 192.
_HANDLING = {
    "x86_64": (
        "837e0801 754d"  # cmp dword [rsi+8], SYS_SECCOMP; jne end: it may be anybody's signal
        "4883ec20"  # sub rsp, 32
        "48634618 48890424"  # movsxd rax, [rsi+24]; mov [rsp], rax
        "488b4268 4889442410"  # mov rax, [rdx+104]; mov [rsp+16], rax
        "488b4270 4889442418"  # mov rax, [rdx+112]; mov [rsp+24], rax
        "48c78290000000 ffffffff"  # mov qword [rdx+144], -EPERM
        "b8ba000000 0f05 4889442408"  # mov eax, SYS_gettid; syscall; mov [rsp+8], rax
        "bf {fd} 4889e6 ba20000000"  # mov edi, FD; mov rsi, rsp; mov edx, 32
        "b801000000 0f05"  # mov eax, SYS_write; syscall
        "4883c420 c3"  # add rsp, 32; end: ret
    ),
    "aarch64": (
        "230840b9 7f040071 41020054"  # ldr w3, [x1, #8]; cmp w3, #SYS_SECCOMP; b.ne end
        "ff8300d1 231880b9"  # sub sp, sp, #32; ldrsw x3, [x1, #24]
        "445c40f9 456040f9"  # ldr x4, [x2, #184]; ldr x5, [x2, #192]
        "e30300f9 e41701a9"  # str x3, [sp]; stp x4, x5, [sp, #16]
        "03008092 435c00f9"  # mov x3, #-EPERM; str x3, [x2, #184]
        "481680d2 010000d4 e00700f9"  # mov x8, #SYS_gettid; svc #0; str x0, [sp, #8]
        "e0000018 e1030091 020480d2"  # ldr w0, pipe; mov x1, sp; mov x2, #32
        "080880d2 010000d4"  # mov x8, #SYS_write; svc #0
        "ff830091 c0035fd6"  # add sp, sp, #32; end: ret
        "{fd}"  # pipe: .word FD
    ),
}


# void answer(int FD, int PIPE, void *BUFFER), which comes back only if the listener is of no use.
# In BUFFER: struct seccomp_notif, struct seccomp_notif_resp, a record.
_ANSWERING = {
    "x86_64": (
        "53 4154 4155"  # push rbx, r12, r13
        "89fb 4189f4 4989d5"  # ebx = FD; r12d = PIPE; r13 = BUFFER
        "4c89ef 31c0 b90a000000 f348ab"  # again: clear the first 80 bytes
        "89df be002150c0 4c89ea b810000000 0f05"  # ioctl(FD, SECCOMP_IOCTL_NOTIF_RECV, BUFFER)
        "85c0 7867"  # test eax, eax; js failed
        "49634510 49894568 418b4508 49894570"  # into the record: the call's number, the thread,
        "498b4520 49894578 498b4528 49898580000000"  # the first two arguments
        "4489e7 498d7568 ba20000000 b801000000 0f05"  # write(PIPE, record, 32)
        "498b4500 49894550 31c0 49894558"  # into the answer: its id; val = 0;
        "41c74560ffffffff 41894564"  # error = -EPERM; flags = 0
        "89df 498d5550 be012118c0 b810000000 0f05"  # ioctl(FD, SECCOMP_IOCTL_NOTIF_SEND, answer)
        "e977ffffff"  # jmp again
        "83f8fe 0f846effffff"  # failed: cmp eax, -ENOENT; je again: the thread has gone
        "83f8fc 0f8465ffffff"  # cmp eax, -EINTR; je again
        "415d 415c 5b c3"
    ),
    "aarch64": (
        "f353bea9 f50b00f9"  # stp x19, x20, [sp, #-32]!; str x21, [sp, #16]
        "f303002a f403012a f50302aa"  # w19 = FD; w20 = PIPE; x21 = BUFFER
        "bf7e00a9 bf7e01a9 bf7e02a9 bf7e03a9 bf7e04a9"  # again: clear the first 80 bytes
        "e003132a 01040018 e20315aa a80380d2 010000d4"  # ioctl(FD, receive, BUFFER)
        "a002f837"  # tbnz w0, #31, failed
        "a01280b9 a10a40b9 a08606a9"  # into the record: the call's number, the thread,
        "a00642a9 a08607a9"  # the first two arguments
        "e003142a a1a20191 020480d2 080880d2 010000d4"  # write(PIPE, record, 32)
        "a00240f9 a07e05a9"  # into the answer: its id; val = 0;
        "00008012 a07e0c29"  # error = -EPERM; flags = 0
        "e003132a a1010018 a2420191 a80380d2 010000d4"  # ioctl(FD, send, answer)
        "e2ffff17"  # b again
        "1f080031 00fcff54"  # failed: cmn w0, #ENOENT; b.eq again: the thread has gone
        "1f100031 c0fbff54"  # cmn w0, #EINTR; b.eq again
        "f50b40f9 f353c2a8 c0035fd6"
        "002150c0"  # receive: .word SECCOMP_IOCTL_NOTIF_RECV
        "012118c0"  # send: .word SECCOMP_IOCTL_NOTIF_SEND
    ),
}
_BUFFER_SIZE = 80 + 24 + _RECORD.size
_LAST = 0xFFFFFFFF  # of all descriptors
_CLOSE_RANGE = number_of("close_range")  # since Linux 5.9
_CLOSE_RANGE_UNSHARE = 2  # <linux/close_range.h>


class Refusals:
    """The calls that were refused to this process, from now on and until its end."""

    def __init__(self) -> None:
        """Raises OSError where the kernel lets no code be made, or it is not written."""
        machine = os.uname().machine
        if machine not in _HANDLING:
            raise OSError(errno.ENOSYS, "the handler")
        self.count = 0
        self._threads: dict[int, str] = {}
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        writer = self._writer
        # Never freed: a thread may come into it at any time.
        self._page = mmap.mmap(-1, _PAGE)
        code = bytes.fromhex(_HANDLING[machine].format(fd=struct.pack("<I", writer).hex()))
        code += bytes(-len(code) % 8)
        self._page.write(code + bytes.fromhex(_ANSWERING[machine]))
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        # Such a call gives Python's lock back until it is over.
        call = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
        self._answering = call(address + len(code))
        libc = ctypes.CDLL(None, use_errno=True)
        place = ctypes.c_void_p(address)
        # This also has arm64's caches agree, as nothing of the page was executable before
        # (Linux arch/arm64/mm/flush.c, __sync_icache_dcache).
        if libc.mprotect(place, ctypes.c_size_t(_PAGE), _PROT_READ | _PROT_EXEC):
            raise OSError(ctypes.get_errno(), "mprotect")
        # struct sigaction (<bits/sigaction.h>): the handler, a mask of 128 bytes, flags, restorer
        action = struct.pack("=Q128xI4xQ", address, _SA_SIGINFO | _SA_RESTART | _SA_NODEFER, 0)
        if libc.sigaction(_SIGSYS, ctypes.c_char_p(action), None):
            raise OSError(ctypes.get_errno(), "sigaction")

    def answer(self, listener: int) -> None:
        """Refuse all that `listener` is asked, which is nobody else's from now on."""
        ready = threading.Event()
        threading.Thread(
            target=self._answer, args=(listener, ready), name="refusals", daemon=True
        ).start()
        ready.wait()
        os.close(listener)

    def _answer(self, listener: int, ready: threading.Event) -> None:
        buffer = ctypes.create_string_buffer(_BUFFER_SIZE)
        first, last = sorted((listener, self._writer))
        alone = True
        for begin, end in ((last + 1, _LAST), (first + 1, last - 1), (0, first - 1)):
            if begin <= end:
                flags = _CLOSE_RANGE_UNSHARE
                alone = alone and call_kernel(_CLOSE_RANGE, begin, end, flags) == 0
        ready.set()
        if alone:
            self._answering(listener, self._writer, buffer)

    def meet_threads(self) -> None:
        """Learn the names of the threads that there are, which may end before they are told of."""
        self._threads |= {one.native_id or 0: one.name for one in threading.enumerate()}

    def take(self) -> Iterator[str]:
        """Those that nobody has taken yet, each in words."""
        data = b""
        with suppress(OSError):  # EAGAIN: there are none
            data = os.read(self._reader, _MOST_READ)
        if not data:
            return
        self.meet_threads()
        for number, thread, first, second in _RECORD.iter_unpack(data):
            self.count += 1
            name = name_of(number)
            what = f"{name} (system call {number})" if not name.endswith(str(number)) else name
            if name in _BY_REQUEST:
                what += f" {second & 0xFFFFFFFF:#x}"
            elif name == "socket":
                what += f" of family {first & 0xFFFFFFFF}"
            where = f"the thread {self._threads[thread]}" if thread in self._threads else "a thread"
            yield f"the box refused {what} in {where}"
