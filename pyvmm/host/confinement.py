"""A room for a program that reads what strangers wrote.

It opens nothing but the files it was given, writes to fewer of them, has no network, starts no
other process, and changes nothing of any file but its content.

Two of the kernel's means, which need neither root nor namespaces: Landlock decides which files
there are (Linux 5.13, Documentation/userspace-api/landlock.rst), and a seccomp filter which system
calls (Documentation/userspace-api/seccomp_filter.rst). Where the kernel has no Landlock, the filter
lets no file be opened for writing, so that only what writes to a descriptor it was given can run.

As a program this enters the room and then becomes another program: `command` makes the line.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from pyvmm.errors import ConfigError

# The dynamic loader and the C library of this machine read these. They hold no secrets.
SYSTEM = ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


@dataclass(frozen=True)
class Room:
    """Paths that are there; folders stand for all that is in them, and what is missing is skipped.

    `read` can be read, each file in `write` also written, and `execute` run. `memory` limits the
    bytes of address space and `size` those of each file that is written; 0 is no limit. `env` is
    the whole environment of a program that `command` runs. With `serves` it may listen and talk
    on the sockets that it was given; it can make none, so there is no network all the same.
    """

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    execute: tuple[str, ...] = ()
    memory: int = 0
    size: int = 0
    env: tuple[tuple[str, str], ...] = ()
    serves: bool = False


def available() -> bool:
    """Whether this machine can `enter` any room."""
    return os.uname().machine == "x86_64" and landlock_version() > 0


def command(room: Room, program: Sequence[str]) -> list[str]:
    """The command line that runs `program`, which begins with an absolute path, in `room`."""
    return python(__name__, json.dumps(asdict(room)), *program)


def python(module: str, *arguments: str) -> list[str]:
    """The command line that calls `main` of a module of pyvmm with `arguments`, in a Python that
    has its standard library and pyvmm only; such a program `enter`s a room by itself."""
    return [sys.executable, "-I", "-S", "-B", "-c", _CALL, _ABOVE, module, *arguments]


_CALL = """
import importlib, sys
above, module, *arguments = sys.argv[1:]
sys.path.insert(0, above)
sys.exit(importlib.import_module(module).main(arguments))
"""
_ABOVE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def for_system_program(program: str, memory: int) -> Room:
    """The room for `program`, an absolute path, of this machine: it writes to its output only.

    Raises OSError."""
    return Room(read=SYSTEM, execute=(program, *_loader(program)), memory=memory)


def _loader(program: str) -> tuple[str, ...]:
    """Of a dynamic ELF program (the System V ABI's PT_INTERP), which the kernel runs as well."""
    with open(program, "rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01":
            return ()
        start, size, count = (
            *struct.unpack_from("<Q", header, 32),
            *_SIZES.unpack_from(header, 54),
        )
        for number in range(count):
            file.seek(start + number * size)
            kind, _, offset, _, _, length, _, _ = _SEGMENT.unpack(file.read(_SEGMENT.size))
            if kind == _PT_INTERP:
                file.seek(offset)
                return (os.fsdecode(file.read(length).rstrip(b"\0")),)
    return ()


_SIZES, _SEGMENT, _PT_INTERP = struct.Struct("<HH"), struct.Struct("<II6Q"), 3


def enter(room: Room) -> None:
    """Bring this process, which has one thread, into `room`, for good.

    Raises ConfigError where the kernel cannot do it.
    """
    if os.uname().machine != "x86_64":
        raise ConfigError(f"no program is confined on {os.uname().machine}")
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, room.memory or None),
        (resource.RLIMIT_FSIZE, room.size or None),
    ):
        if value is not None:
            _lower(limit, value)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    abi = landlock_version()
    if abi:
        _restrict_files(room, abi)
    elif room.write:
        raise ConfigError(
            "this kernel cannot confine a program that reads foreign data: it has no Landlock",
            cure="use Linux 5.13 or newer, with landlock among its security modules (lsm=)",
        )
    calls = CALLS | SERVING if room.serves else CALLS
    _filter_calls(calls.values(), may_open_to_write=bool(abi))


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(limit, (value, value))


# --- Landlock ------------------------------------------------------------------------------------

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_RULESET_VERSION = 1
_PATH_BENEATH = 1
# <linux/landlock.h>, LANDLOCK_ACCESS_FS_…
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
# How many of the rights, from the lowest on, each version of the interface knows.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_RIGHTS_SINCE_5 = 16
_NET = 0b11  # LANDLOCK_ACCESS_NET_BIND_TCP and _CONNECT_TCP, since version 4
_SCOPES = 0b11  # LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and _SIGNAL, since version 6


def landlock_version() -> int:
    """Of the kernel's interface; 0 where there is none."""
    return max(_syscall(_CREATE_RULESET, 0, 0, _RULESET_VERSION), 0)


def _restrict_files(room: Room, abi: int) -> None:
    known = (1 << _RIGHTS.get(abi, _RIGHTS_SINCE_5)) - 1
    attributes = struct.pack("=QQQ", known, _NET if abi >= 4 else 0, _SCOPES if abi >= 6 else 0)[
        : 8 if abi < 4 else 16 if abi < 6 else 24
    ]
    rules = _checked(
        _syscall(_CREATE_RULESET, ctypes.c_char_p(attributes), len(attributes), 0),
        "landlock_create_ruleset",
    )
    try:
        _allow(rules, (*room.read, *_DEVICES), READ_FILE | READ_DIR, known)
        _allow(rules, room.write, READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV, known)
        _allow(rules, room.execute, READ_FILE | READ_DIR | EXECUTE, known)
        _checked(_syscall(_RESTRICT_SELF, rules, 0), "landlock_restrict_self")
    finally:
        os.close(rules)


def _allow(rules: int, paths: Iterable[str], access: int, known: int) -> None:
    for path in paths:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            # A rule for a file may have no right that only a folder can have.
            rights = access & known & (~0 if os.path.isdir(path) else ~READ_DIR)
            rule = struct.pack("=Qi", rights, fd)
            added = _syscall(_ADD_RULE, rules, _PATH_BENEATH, ctypes.c_char_p(rule), 0)
            _checked(added, "landlock_add_rule")
        finally:
            os.close(fd)


# --- seccomp -------------------------------------------------------------------------------------

# x86-64's numbers, <asm/unistd_64.h>. Whatever is not here fails with EPERM: sockets, new
# processes, signals to others, modes, owners, times and attributes of files, names of files,
# mounts, namespaces, tracing, io_uring, and all that is yet to come.
CALLS = {
    # files that are open, or that Landlock lets be opened
    **{"read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7},
    **{"lseek": 8, "ioctl": 16, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20},
    **{"access": 21, "pipe": 22, "select": 23, "dup": 32, "dup2": 33, "sendfile": 40},
    **{"fcntl": 72, "flock": 73, "fsync": 74, "fdatasync": 75, "ftruncate": 77, "getcwd": 79},
    **{"readlink": 89, "statfs": 137, "fstatfs": 138, "getdents64": 217, "fadvise64": 221},
    **{"epoll_wait": 232, "epoll_ctl": 233, "newfstatat": 262, "readlinkat": 267},
    **{"faccessat": 269, "pselect6": 270, "ppoll": 271, "fallocate": 285, "eventfd2": 290},
    **{"epoll_create1": 291, "dup3": 292, "pipe2": 293, "preadv": 295, "pwritev": 296},
    **{"copy_file_range": 326, "preadv2": 327, "pwritev2": 328, "statx": 332},
    **{"close_range": 436, "faccessat2": 439},
    # memory
    **{"mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "madvise": 28},
    # oneself
    **{"rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sigaltstack": 131},
    **{"getpid": 39, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108},
    **{"getppid": 110, "getgroups": 115, "getresuid": 118, "getresgid": 120, "gettid": 186},
    **{"umask": 95, "getrlimit": 97, "getrusage": 98, "times": 100, "arch_prctl": 158},
    **{"set_tid_address": 218, "set_robust_list": 273, "rseq": 334, "restart_syscall": 219},
    **{"sched_yield": 24, "futex": 202, "sched_getaffinity": 204, "membarrier": 324},
    **{"exit": 60, "exit_group": 231, "execve": 59},
    # the time, the machine, chance
    **{"nanosleep": 35, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230},
    **{"gettimeofday": 96, "time": 201, "getcpu": 309},
    **{"uname": 63, "sysinfo": 99, "getrandom": 318},
}
# On sockets that are there, for a room that `serves`.
SERVING = {
    **{"sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48, "listen": 50},
    **{"getsockname": 51, "getpeername": 52, "setsockopt": 54, "getsockopt": 55},
    **{"epoll_pwait": 281, "accept4": 288, "signalfd4": 289},
}
# Those of which only some are allowed, by an argument.
OPEN, OPENAT, CLONE, TGKILL, PRLIMIT64 = 2, 257, 56, 234, 302
# Its arguments lie in memory, where no filter looks. The C library uses clone if it is not there.
CLONE3 = 435
_CLONE_THREAD = 0x10000
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_TMPFILE & ~os.O_DIRECTORY

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 38, 22
_MODE_FILTER = 2
_AUDIT_ARCH_X86_64 = 0xC000003E
_RET_ALLOW, _RET_ERRNO, _RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
# struct seccomp_data
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
# Classic BPF: load a word, jump if equal, jump if any bit is set, return.
_LOAD, _EQUAL, _ANY, _RETURN = 0x20, 0x15, 0x45, 0x06


def _filter_calls(calls: Iterable[int], *, may_open_to_write: bool) -> None:
    program = _program(calls, os.getpid(), may_open_to_write=may_open_to_write)
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    _prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.c_char_p(header))


def _program(
    numbers: Iterable[int], pid: int, *, may_open_to_write: bool
) -> list[tuple[int, int, int, int]]:
    """(code, jump if true, jump if false, value), in order."""
    refuse, allow = (_RETURN, 0, 0, _RET_ERRNO | errno.EPERM), (_RETURN, 0, 0, _RET_ALLOW)
    lines = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _RET_KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    for number in numbers:
        lines += [(_EQUAL, 0, 1, number), allow]
    calls: dict[int, tuple[int, int, int]] = {
        CLONE: (0, _ANY, _CLONE_THREAD),
        TGKILL: (0, _EQUAL, pid),
        PRLIMIT64: (0, _EQUAL, 0),
    }
    for number, (argument, test, value) in calls.items():
        one = (_LOAD, 0, 0, _ARGUMENTS + 8 * argument)
        lines += [(_EQUAL, 0, 4, number), one, (test, 0, 1, value), allow, refuse]
    for number, argument in ((OPEN, 1), (OPENAT, 2)):
        if may_open_to_write:
            lines += [(_EQUAL, 0, 1, number), allow]
        else:
            one = (_LOAD, 0, 0, _ARGUMENTS + 8 * argument)
            lines += [(_EQUAL, 0, 4, number), one, (_ANY, 1, 0, _WRITING), allow, refuse]
    lines += [(_EQUAL, 0, 1, CLONE3), (_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS)]
    return [*lines, refuse]


# --- the kernel ----------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(number: int, *arguments: object) -> int:
    words = (ctypes.c_long(word) if isinstance(word, int) else word for word in arguments)
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    return result


def _prctl(option: int, *arguments: object) -> None:
    words = [ctypes.c_ulong(word) if isinstance(word, int) else word for word in arguments]
    zeros = [ctypes.c_ulong(0)] * (4 - len(words))
    _checked(_libc.prctl(ctypes.c_int(option), *words, *zeros), f"prctl {option}")


def _checked(result: int, call: str) -> int:
    if result < 0:
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(f"this kernel cannot confine a program: {call}: {reason}")
    return result


def main(arguments: list[str]) -> int:
    """Run the program that `command` has put into a line. Returns only with a failure's exit code,
    after a line on standard error."""
    settings = json.loads(arguments[0])
    room = Room(
        **{name: tuple(settings[name]) for name in ("read", "write", "execute")},
        memory=settings["memory"],
        size=settings["size"],
        env=tuple((name, value) for name, value in settings["env"]),
        serves=settings["serves"],
    )
    program = arguments[1:]
    try:
        enter(room)
        os.execve(program[0], program, dict(room.env))
    except ConfigError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"cannot run {program[0]}: {error.strerror}", file=sys.stderr)
    return 1
