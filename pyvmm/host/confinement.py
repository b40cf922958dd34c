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
import os
import resource
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import starmap
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.host.call_names import NO_CALL, number_of, numbered

# The dynamic loader and the C library of this machine read these. They hold no secrets.
SYSTEM = ("/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class Room(NamedTuple):
    """Paths that are there; folders stand for all that is in them, and what is missing is skipped.

    `read` can be read, each file in `write` also written, and `execute` run. `memory` limits the
    bytes of address space and `size` those of each file that is written; 0: without limit. `env` is
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
    """True if this machine can `enter` any room."""
    return os.uname().machine in AUDIT_ARCHES and landlock_version() > 0


def command(room: Room, program: Sequence[str]) -> list[str]:
    """The command line that runs `program`, which begins with an absolute path, in `room`."""
    import json  # not for a process that enters a room itself

    return python(__name__, json.dumps(room._asdict()), *program)


def python(module: str, *arguments: str) -> list[str]:
    """The command line that calls `main` of a module of pyvmm with `arguments`, in a Python that
    has its standard library and pyvmm only; such a program `enter`s a room by itself."""
    return [sys.executable, "-I", "-S", "-B", "-c", _CALL, _ABOVE, module, *arguments]


def package_folders() -> Iterator[str]:
    """The folders of packages that this Python looks in; not those that a program adds to its path,
    which may be anybody's."""
    for path in sys.path:
        if os.path.basename(path) in ("site-packages", "dist-packages", "lib-dynload"):
            yield path


def own_folders() -> list[str]:
    """The folders that pyvmm, Python's own modules and those of packages are in."""
    return [_ABOVE, os.path.dirname(os.path.abspath(os.__file__)), *package_folders()]


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
    if os.uname().machine not in AUDIT_ARCHES:
        raise ConfigError(f"no program is confined on {os.uname().machine}")
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_AS, room.memory or None),
        (resource.RLIMIT_FSIZE, room.size or None),
    ):
        if value is not None:
            lower(limit, value)
    no_new_privileges()
    abi = landlock_version()
    if abi:
        restrict_files(_rules_of(room), abi)
    elif room.write:
        raise ConfigError(
            "this kernel cannot confine a program that reads foreign data: it has no Landlock",
            cure="use Linux 5.13 or newer, with landlock among its security modules (lsm=)",
        )
    calls = CALLS | SERVING if room.serves else CALLS
    _filter_calls(calls.values(), may_open_to_write=bool(abi))


def no_new_privileges() -> None:
    """No program that this thread becomes has more rights than it. Raises ConfigError."""
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def lower(limit: int, value: int) -> None:
    """Bring a limit of this process (resource.RLIMIT_*), hard and soft, down to `value`."""
    _, hard = resource.getrlimit(limit)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(limit, (value, value))


# --- Landlock ------------------------------------------------------------------------------------

_CREATE_RULESET = number_of("landlock_create_ruleset")
_ADD_RULE, _RESTRICT_SELF = map(number_of, ("landlock_add_rule", "landlock_restrict_self"))
_RULESET_VERSION = 1
_PATH_BENEATH = 1
# <linux/landlock.h>, LANDLOCK_ACCESS_FS_…
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
TRUNCATE, IOCTL_DEV = 1 << 14, 1 << 15
EVERYTHING = (1 << 16) - 1  # as far as the kernel knows it
_OF_FOLDERS = READ_DIR | 0x1FF0 | 1 << 13  # what a rule for a file may not have
# How many of the rights, from the lowest on, each version of the interface knows.
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
_RIGHTS_SINCE_5 = 16
_NET = 0b11  # LANDLOCK_ACCESS_NET_BIND_TCP and _CONNECT_TCP, since version 4
# LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and _SIGNAL, since version 6
SCOPE_ABSTRACT, SCOPE_SIGNAL = 1 << 0, 1 << 1
SCOPES = SCOPE_ABSTRACT | SCOPE_SIGNAL

# Paths, and the rights at each and at all that is in it.
FileRule = tuple[Iterable[str], int]


def landlock_version() -> int:
    """Of the kernel's interface; 0 where there is none."""
    return max(call_kernel(_CREATE_RULESET, 0, 0, _RULESET_VERSION), 0)


def _rules_of(room: Room) -> list[FileRule]:
    return [
        ((*room.read, *_DEVICES), READ_FILE | READ_DIR),
        (room.write, READ_FILE | WRITE_FILE | TRUNCATE | IOCTL_DEV),
        (room.execute, READ_FILE | READ_DIR | EXECUTE),
    ]


def restrict_files(rules: Iterable[FileRule], abi: int, *, scopes: int = SCOPES) -> None:
    """Let this thread, and those that it starts, open what `rules` allow and nothing else; no TCP,
    and none of `scopes`, as far as version `abi` of the interface can. Raises ConfigError."""
    known = (1 << _RIGHTS.get(abi, _RIGHTS_SINCE_5)) - 1
    attributes = struct.pack("=QQQ", known, _NET if abi >= 4 else 0, scopes if abi >= 6 else 0)[
        : 8 if abi < 4 else 16 if abi < 6 else 24
    ]
    ruleset = checked(
        call_kernel(_CREATE_RULESET, ctypes.c_char_p(attributes), len(attributes), 0),
        "landlock_create_ruleset",
    )
    try:
        for paths, access in rules:
            _allow(ruleset, paths, access, known)
        checked(call_kernel(_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    finally:
        os.close(ruleset)


def _allow(rules: int, paths: Iterable[str], access: int, known: int) -> None:
    for path in paths:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, PermissionError):
            continue
        try:
            # A rule for a file may have no right that only a folder can have.
            rights = access & known & (~0 if os.path.isdir(path) else ~_OF_FOLDERS)
            rule = struct.pack("=Qi", rights, fd)
            added = call_kernel(_ADD_RULE, rules, _PATH_BENEATH, ctypes.c_char_p(rule), 0)
            checked(added, "landlock_add_rule")
        finally:
            os.close(fd)


# --- seccomp -------------------------------------------------------------------------------------

# On files that are open, or that Landlock lets be opened; of memory, oneself, the time, the machine
# and chance. Whatever is not here fails with EPERM: sockets, new processes, signals to others,
# modes, owners, times and attributes of files, names of files, mounts, namespaces, tracing,
# io_uring, and all that is yet to come.
CALLS = numbered(
    """
    read write close stat fstat lstat poll lseek ioctl pread64 pwrite64 readv writev access pipe
    select dup dup2 sendfile fcntl flock fsync fdatasync ftruncate getcwd readlink statfs fstatfs
    getdents64 fadvise64 epoll_wait epoll_ctl newfstatat readlinkat faccessat pselect6 ppoll
    fallocate eventfd2 epoll_create1 dup3 pipe2 preadv pwritev copy_file_range preadv2 pwritev2
    statx close_range faccessat2 mmap mprotect munmap brk mremap madvise rt_sigaction
    rt_sigprocmask rt_sigreturn sigaltstack getpid getuid getgid geteuid getegid getppid getgroups
    getresuid getresgid gettid umask getrlimit getrusage times arch_prctl set_tid_address
    set_robust_list rseq restart_syscall sched_yield futex sched_getaffinity membarrier exit
    exit_group execve nanosleep clock_gettime clock_getres clock_nanosleep gettimeofday time
    getcpu uname sysinfo getrandom
    """
)
# On sockets that are there, for a room that `serves`.
SERVING = numbered(
    """
    sendto recvfrom sendmsg recvmsg shutdown listen getsockname getpeername setsockopt getsockopt
    epoll_pwait accept4 signalfd4
    """
)
# Those of which only some are allowed, by an argument.
# Architectures without open(2) have openat(2) alone.
OPEN, OPENAT = number_of("open"), number_of("openat")
CLONE, TGKILL, PRLIMIT64 = map(number_of, ("clone", "tgkill", "prlimit64"))
# Its arguments lie in memory, where no filter looks. The C library uses clone if it is not there.
CLONE3 = number_of("clone3")
_CLONE_THREAD = 0x10000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_TMPFILE & ~os.O_DIRECTORY

PR_SET_NO_NEW_PRIVS = 38
_SECCOMP, PRCTL = map(number_of, ("seccomp", "prctl"))
_SET_MODE_FILTER = 1
FILTER_TSYNC, FILTER_SPEC_ALLOW = 1 << 0, 1 << 2
FILTER_NEW_LISTENER, FILTER_TSYNC_ESRCH = 1 << 3, 1 << 4
# AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64 (<linux/audit.h>), by what uname(2) calls the architecture
AUDIT_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_RET_ALLOW, _RET_ERRNO, _RET_KILL = 0x7FFF0000, 0x00050000, 0x80000000
_RET_TRAP, _RET_USER_NOTIF = 0x00030000, 0x7FC00000
# struct seccomp_data
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16
# Classic BPF: load a word, jump if equal, jump if any bit is set, jump if not less, jump, return.
_LOAD, EQUAL, ANY, _AT_LEAST, _SKIP, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x05, 0x06
NONE = -ANY
# What passes goes on with the next line, what does not with the one behind.
_TESTS = {EQUAL: (EQUAL, 0, 1), ANY: (ANY, 0, 1), NONE: (ANY, 1, 0)}
_X32 = 0x40000000  # <asm/unistd.h>, __X32_SYSCALL_BIT

Line = tuple[int, int, int, int]
"""(code, jump if true, jump if false, value): struct sock_filter"""

_ALLOW: Line = (_RETURN, 0, 0, _RET_ALLOW)
_REFUSE: Line = (_RETURN, 0, 0, _RET_ERRNO | errno.EPERM)
_RAISE: Line = (_RETURN, 0, 0, _RET_TRAP)
_ASK: Line = (_RETURN, 0, 0, _RET_USER_NOTIF)
_BEGIN: tuple[Line, ...] = (
    (_LOAD, 0, 0, _ARCH),
    (EQUAL, 1, 0, AUDIT_ARCHES.get(os.uname().machine, 0)),
    (_RETURN, 0, 0, _RET_KILL),
    (_LOAD, 0, 0, _NUMBER),
)


def _filter_calls(calls: Iterable[int], *, may_open_to_write: bool) -> None:
    program = _program(calls, os.getpid(), may_open_to_write=may_open_to_write)
    install(program, 0)


def install(program: Sequence[Line], flags: int) -> int:
    """Make `program` a filter of this thread's calls, and of others' as `flags` say
    (SECCOMP_FILTER_FLAG_*); the listener's descriptor if they ask for one. Raises ConfigError."""
    done = make_call(filter_call(program, flags))
    if done > 0 and not flags & FILTER_NEW_LISTENER:
        raise ConfigError(f"this kernel cannot confine a program: thread {done} takes no filter")
    return checked(done, "seccomp")


def filter_call(program: Sequence[Line], flags: int) -> Call:
    """The system call by which `install` does it."""
    code = b"".join(starmap(_LINE.pack, program))
    header = struct.pack("@H6x", len(program))  # struct sock_fprog
    return _SECCOMP, _SET_MODE_FILTER, flags, (header, code)


_LINE = struct.Struct("=HBBI")

Check = tuple[int, int, Iterable[int]]
"""The number of an argument, a test (EQUAL, ANY, NONE), and the numbers that the argument equals,
or the bits of which it has any or none. Only the lower 32 bits of an argument are looked at."""


def _program(numbers: Iterable[int], pid: int, *, may_open_to_write: bool) -> list[Line]:
    checks = own_process_only(pid)
    if not may_open_to_write:
        checks |= {OPEN: (1, NONE, (WRITING,)), OPENAT: (2, NONE, (WRITING,))}
    return allow_list([*numbers, OPEN, OPENAT], checks)


def own_process_only(pid: int) -> dict[int, Check]:
    """Threads, not processes, and nothing that is done to other processes than `pid`."""
    return {
        CLONE: (0, ANY, (_CLONE_THREAD,)),
        TGKILL: (0, EQUAL, (pid,)),
        PRLIMIT64: (0, EQUAL, (0,)),
    }


def allow_list(
    numbers: Iterable[int],
    checks: Mapping[int, Check],
    *,
    raises: bool = False,
    silently: Iterable[int] = (),
    asks: bool = False,
) -> list[Line]:
    """A filter that lets calls pass that are among `checks` and fulfil theirs, or else among
    `numbers`. The checks come first: the kernel looks no calls up that always pass.

    The others fail; with `raises` by SIGSYS, whose handler gives them their result, but those that
    are refused `silently`, or, if it `asks`, by the filter's listener."""
    refuse = _RAISE if raises else _REFUSE
    refuse_quiet = _ASK if asks else _REFUSE
    quiet = set(silently) - {NO_CALL}
    lines = list(_BEGIN)
    checks = {number: check for number, check in checks.items() if number != NO_CALL}
    for number, (argument, test, values) in checks.items():
        block: list[Line] = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
        for value in values:
            block += [(*_TESTS[test], value), _ALLOW]
        block.append(refuse_quiet if number in quiet else refuse)
        lines += [(EQUAL, 1, 0, number), (_SKIP, 0, 0, len(block)), *block]
    for number in numbers:
        if number != NO_CALL:
            lines += [(EQUAL, 0, 1, number), _ALLOW]
    lines += [(EQUAL, 0, 1, CLONE3), (_RETURN, 0, 0, _RET_ERRNO | errno.ENOSYS)]
    for number in quiet - set(checks):
        lines += [(EQUAL, 0, 1, number), refuse_quiet]
    return [*lines, refuse]


def deny_list(numbers: Iterable[int], checks: Mapping[int, Check]) -> list[Line]:
    """A filter that lets no call pass of `numbers`, nor one that fulfils its check in `checks`."""
    lines = [*_BEGIN, (_AT_LEAST, 0, 1, _X32), _REFUSE]
    for number, (argument, test, values) in checks.items():
        block: list[Line] = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
        for value in values:
            block += [(*_TESTS[test], value), _REFUSE]
        block.append(_ALLOW)
        lines += [(EQUAL, 1, 0, number), (_SKIP, 0, 0, len(block)), *block]
    for number in numbers:
        lines += [(EQUAL, 0, 1, number), _REFUSE]
    return [*lines, _ALLOW]


# --- capabilities --------------------------------------------------------------------------------

_CAPGET, CAPSET = map(number_of, ("capget", "capset"))
_CAPABILITY_VERSION_3 = 0x20080522  # <linux/capability.h>
CAP_SYS_ADMIN = 21


def capability_header() -> bytes:
    """What capget(2) and capset(2) take for this thread."""
    return struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)


def capabilities() -> tuple[int, ...]:
    """Of this thread, in two halves, each: effective, permitted, inheritable."""
    sets = ctypes.create_string_buffer(24)
    checked(call_kernel(_CAPGET, ctypes.c_char_p(capability_header()), sets), "capget")
    return struct.unpack("=6I", sets.raw)


@contextmanager
def without(number: int) -> Iterator[None]:
    """Inside, this thread may use the capability `number` for nothing. It is below 32. Raises
    ConfigError."""
    usable, *others = capabilities()
    try:
        _set_capabilities(usable & ~(1 << number), *others)
        yield
    finally:
        _set_capabilities(usable, *others)


def _set_capabilities(*sets: int) -> None:
    checked(make_call((CAPSET, capability_header(), struct.pack("=6I", *sets))), "capset")


def has_capability(number: int) -> bool:
    """True if this thread may use it. `number` is below 32."""
    return bool(capabilities()[0] >> number & 1)


# --- the kernel ----------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)


def call_kernel(number: int, *arguments: object) -> int:
    """A system call without a wrapper of the C library; below 0 it has failed: ctypes.get_errno."""
    words = (ctypes.c_long(word) if isinstance(word, int) else word for word in arguments)
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    return result


Argument = int | bytes | tuple[bytes, bytes]
"""Of a system call: a number, the address of bytes, or that of bytes which have the address of
others behind them."""

Call = tuple[int, *tuple[Argument, ...]]
"""The number of a system call, and its arguments."""


def make_call(call: Call) -> int:
    """Make a system call in this thread; as call_kernel."""
    number, *arguments = call
    words: list[object] = []
    for argument in arguments:
        if isinstance(argument, tuple):
            first, other = argument
            address = ctypes.cast(ctypes.c_char_p(other), ctypes.c_void_p).value or 0
            argument = first + struct.pack("@P", address)
        words.append(argument if isinstance(argument, int) else ctypes.c_char_p(argument))
    return call_kernel(number, *words)


def prctl(option: int, *arguments: object) -> None:
    words = [ctypes.c_ulong(word) if isinstance(word, int) else word for word in arguments]
    zeros = [ctypes.c_ulong(0)] * (4 - len(words))
    checked(_libc.prctl(ctypes.c_int(option), *words, *zeros), f"prctl {option}")


def checked(result: int, call: str) -> int:
    if result < 0:
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(f"this kernel cannot confine a program: {call}: {reason}")
    return result


def main(arguments: list[str]) -> int:
    """Run the program that `command` has put into a line. Returns only with a failure's exit code,
    after a line on standard error."""
    import json

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
