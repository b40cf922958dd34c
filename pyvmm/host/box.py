"""The box of a monitor: what a process that works on open things keeps, once all is open.

Layers, each of which stands without the others; decision 0410 says what each is for.

Namespaces, files and capabilities are each thread's own affair: threads that run already keep
them, those that are started later do not get them. The filter of calls is the whole process's, or
this thread's and those that it starts.
"""

from __future__ import annotations

import os
import resource
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.host import confinement as c
from pyvmm.host import namespaces, pausing
from pyvmm.host.call_names import number_of, numbered

PRIVILEGES, CAPABILITIES, LIMITS = "no-new-privileges", "capabilities", "limits"
FILES, CALLS = "files", "calls"
NAMESPACES, NETWORK, ROOT = "namespaces", "network", "root"
USER = "user"
# The first three take rights that the next ones give up.
_FIRST = (NAMESPACES, NETWORK, ROOT)
LAYERS = (*_FIRST, USER, LIMITS, CAPABILITIES, PRIVILEGES, FILES, CALLS)
_children: set[int] = set()


def may_signal(pid: int) -> None:
    """From a box that is entered later, signals may be sent to `pid`, a child of ours."""
    _children.add(pid)


class Needs(NamedTuple):
    """The needs of a monitor in the box beside open files, memory, threads and time.

    `ioctls` are numbers. `read` are paths, of files or of folders with all that is in them;
    `devices` those of device nodes that are opened.
    `uses_network`: has a network device, so the layer `network` is not for it.
    `hears_of_interfaces`: opens a socket of rtnetlink.
    `outside`: threads that run already start other programs later, and stay outside. `tells`: what
    is refused raises SIGSYS, which pyvmm.host.refusals hears; `answers` is given a listener
    (seccomp_unotify(2)) that is asked about calls that cannot. `change_user` makes this process
    another user, with all threads, or raises ConfigError; None for one that need not.
    """

    ioctls: tuple[int, ...] = ()
    read: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    uses_network: bool = False
    hears_of_interfaces: bool = False
    outside: bool = False
    tells: bool = False
    answers: Callable[[int], None] | None = None
    change_user: Callable[[], None] | None = None


class Box(NamedTuple):
    """The names of the layers that are on, and of those that are not: why."""

    on: tuple[str, ...] = ()
    off: tuple[tuple[str, str], ...] = ()


NO_BOX = Box()


def probe() -> Box:
    """The layers that this machine lets this user have; it takes some milliseconds."""
    from pyvmm.host import other_user

    layers = [layer for layer in LAYERS if layer != USER or not os.geteuid()]
    off = {layer: reason for layer in layers if layer != USER and (reason := _machine_lacks())}
    if USER in layers and (reason := other_user.why_none()):
        off[USER] = reason
    if not _machine_lacks():
        if not c.landlock_version():
            off[FILES] = _NO_LANDLOCK
        import subprocess

        trial = subprocess.run(c.python(__name__), capture_output=True, text=True, check=False)
        for layer, reason in zip(_FIRST, trial.stdout.splitlines(), strict=False):
            if reason:
                off[layer] = reason
    on = tuple(layer for layer in layers if layer not in off)
    return Box(on, tuple((layer, off[layer]) for layer in layers if layer in off))


def main(arguments: list[str]) -> int:
    """Try the layers that only a process of its own can try: a line for each, with why it cannot
    be had."""
    begin()
    for layer in _FIRST:
        try:
            _enter(layer, Needs())
            print()
        except ConfigError as error:
            print(error.message)
    return 0


def filters_calls() -> bool:
    """True if the layer `calls` is written for this machine."""
    return not _machine_lacks()


_NO_LANDLOCK = "this kernel has no Landlock, or it is switched off"


def _machine_lacks() -> str:
    machine = os.uname().machine
    return "" if machine in c.AUDIT_ARCHES else f"not written for {machine}"


# Why there are no rights over namespaces, if there are none.
_no_rights = ""
_in_user_namespace = False


def begin() -> None:
    """Take the rights that the first layers need, for the whole process, which has one thread
    still. What cannot be had is told by `enter`."""
    global _no_rights, _in_user_namespace
    if _machine_lacks() or not set(_FIRST) & set(LAYERS) or c.has_capability(c.CAP_SYS_ADMIN):
        return
    try:
        if not os.geteuid():
            # Root in a namespace of its own would be nobody to the files of other users.
            raise ConfigError("root without CAP_SYS_ADMIN has none")
        with pausing.paused():
            namespaces.for_all()
        _in_user_namespace = True
    except ConfigError as error:
        _no_rights = error.message


def enter(needs: Needs) -> Box:
    """Bring this process into the box, for good, with all layers that the kernel has."""
    on, off = [], []
    for layer in LAYERS:
        if layer == NETWORK and needs.uses_network:
            continue
        if layer == USER and needs.change_user is None:
            continue
        try:
            _enter(layer, needs)
            on.append(layer)
        except ConfigError as error:
            off.append((layer, error.message))
    return Box(tuple(on), tuple(off))


def stay_outside() -> None:
    """For a thread that starts other programs: give up what neither it nor they ever need, as far
    as the kernel can."""
    for call in outside_calls():
        c.make_call(call)


def outside_calls() -> Iterator[c.Call]:
    """The system calls by which `stay_outside` does it, for a process that begins as this one."""
    # What a user namespace has given is for those inside.
    which = frozenset(range(_MOST)) if _in_user_namespace else _NEVER_NEEDED
    for number in sorted(which):
        yield c.PRCTL, _PR_CAPBSET_DROP, number
    yield c.CAPSET, c.capability_header(), _kept(which)
    yield c.PRCTL, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0
    yield c.PRCTL, c.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0
    if not _machine_lacks():
        yield c.filter_call(_some_calls(), c.FILTER_SPEC_ALLOW)


def never_call() -> None:
    """Refuse this thread, and the programs that it becomes or starts, what none of them needs.
    Raises ConfigError."""
    if not _machine_lacks():
        c.install(_some_calls(), c.FILTER_SPEC_ALLOW)


def _enter(layer: str, needs: Needs) -> None:
    """Switch `layer` on. Raises ConfigError."""
    if layer == USER:
        if needs.change_user is not None:
            needs.change_user()
    elif reason := _machine_lacks():
        raise ConfigError(reason)
    elif layer in _FIRST:
        if _no_rights:
            raise ConfigError(_no_rights)
        if layer == ROOT:
            read, devices = _paths(needs)
            namespaces.root((*read, _SELF), (*devices, *_READ_DEVICES))
        elif layer == NETWORK:
            namespaces.network()
        elif not _in_user_namespace:  # which came with its own
            namespaces.of_others()
    elif layer == LIMITS:
        c.lower(resource.RLIMIT_CORE, 0)
        if not needs.outside:  # or else programs that are started later may want more
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            c.lower(resource.RLIMIT_NOFILE, soft)
    elif layer == CAPABILITIES:
        drop_capabilities(None)
    elif layer == PRIVILEGES:
        c.no_new_privileges()
    elif layer == FILES:
        _leave_files(needs)
    else:
        _filter(needs)


# --- capabilities --------------------------------------------------------------------------------

_PR_CAPBSET_DROP, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 24, 47, 4  # <linux/prctl.h>
_MOST = 64
# Of <linux/capability.h>: LINUX_IMMUTABLE, SYS_MODULE, SYS_RAWIO, SYS_PTRACE, SYS_PACCT, SYS_BOOT,
# SYS_TIME, AUDIT_WRITE, AUDIT_CONTROL, MAC_OVERRIDE, MAC_ADMIN, SYSLOG, WAKE_ALARM, BLOCK_SUSPEND,
# AUDIT_READ, PERFMON, BPF, CHECKPOINT_RESTORE. No program that is started later needs one of them.
_NEVER_NEEDED = frozenset({9, 16, 17, 19, 20, 22, 25, 29, 30, 32, 33, 34, 35, 36, 37, 38, 39, 40})


def drop_capabilities(which: frozenset[int] | None) -> None:
    """Give up `which`, or all of them, so that no program gets them back. Raises ConfigError."""
    let_no_program_have(which)
    c.checked(c.make_call((c.CAPSET, c.capability_header(), _kept(which))), "capset")
    with suppress(ConfigError):  # Linux before 4.3 has none
        c.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def let_no_program_have(which: frozenset[int] | None) -> None:
    """Whatever this thread becomes or starts gets none of the capabilities `which`, or none."""
    for number in range(_MOST):
        if which is None or number in which:
            try:
                c.prctl(_PR_CAPBSET_DROP, number)
            except ConfigError:
                # EINVAL: the kernel knows no more of them; EPERM: there is nothing to give up
                break


def _kept(which: frozenset[int] | None) -> bytes:
    """The capabilities without `which`, or without any, as capset takes them. Raises
    ConfigError."""
    # Two halves, each: effective, permitted, inheritable.
    gone = (1 << _MOST) - 1 if which is None else sum(1 << number for number in which)
    words = enumerate(c.capabilities())
    return struct.pack(
        "=6I", *(word & ~(gone >> 32 * (at // 3)) & 0xFFFFFFFF for at, word in words)
    )


# --- files ---------------------------------------------------------------------------------------

# Numbers of the process itself: statistics, messages.
_SELF = "/proc/self"
_own_folder = -1


def _leave_files(needs: Needs) -> None:
    global _own_folder
    abi = c.landlock_version()
    if not abi:
        raise ConfigError(_NO_LANDLOCK)
    # What is open stays in the kernel's memory, and with it the rule for it.
    with suppress(OSError):
        _own_folder = os.open(_SELF, os.O_PATH | os.O_CLOEXEC)
    output = c.READ_FILE | c.WRITE_FILE | c.TRUNCATE | c.IOCTL_DEV
    read, devices = _paths(needs)
    rules: list[c.FileRule] = [
        ((*read, *_READ_DEVICES, _SELF), c.READ_FILE | c.READ_DIR),
        ((*devices, *_terminals()), output),
    ]
    # Signals are for the filter to decide: some are for children of ours.
    c.restrict_files(rules, abi, scopes=c.SCOPE_ABSTRACT)


_READ_DEVICES = ("/dev/zero", "/dev/urandom")


def _paths(needs: Needs) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The paths that stay: files and folders to be read, and devices to be written."""
    return (*c.SYSTEM, *needs.read), ("/dev/null", *needs.devices)


def _terminals() -> Iterator[str]:
    """The standard streams that are opened once more, so that not to wait is our own affair."""
    for fd in (0, 1, 2):
        path = f"/proc/self/fd/{fd}"
        with suppress(OSError):
            mode = os.stat(path).st_mode
            named = os.readlink(path).startswith("/")  # a pipe without a name is open to all
            if named and (stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)):
                yield path


# --- calls ---------------------------------------------------------------------------------------

_IOCTL, _FCNTL, _KILL = map(number_of, ("ioctl", "fcntl", "kill"))
_SOCKET, _SOCKETPAIR = map(number_of, ("socket", "socketpair"))
_OPEN_CALLS = {"open": c.OPEN, "openat": c.OPENAT}
# Of open files, memory, threads and children, beside confinement.CALLS.
_MORE = numbered(
    """
    msync sync_file_range rt_sigtimedwait rt_sigsuspend pause wait4 waitid getpgrp getpgid getsid
    madvise setitimer getitimer memfd_create
    """
)
_BINDING = numbered("bind")
_NO_LONGER = ("execve",)
# fork, vfork and clone, before which the C library and Python block all signals
_MAKING_PROCESSES = (number_of("fork"), number_of("vfork"), c.CLONE)

_AF_UNIX, _AF_NETLINK = 1, 16  # <linux/socket.h>
_PR_SET_NAME = 15
# <asm-generic/ioctls.h>, <linux/fs.h>: terminals (no TIOCSTI, which types at others' terminals),
# open files, block devices; taps (<linux/if_tun.h>).
_IOCTLS = {
    **{"TCGETS": 0x5401, "TCSETS": 0x5402, "TCSETSW": 0x5403, "TCSETSF": 0x5404},
    **{"TCFLSH": 0x540B, "TIOCGPGRP": 0x540F, "TIOCGWINSZ": 0x5413, "FIONREAD": 0x541B},
    **{"FIONBIO": 0x5421, "FIONCLEX": 0x5450, "FIOCLEX": 0x5451},
    **{"BLKDISCARD": 0x1277, "BLKZEROOUT": 0x127F, "BLKGETSIZE64": 0x80081272},
    **{"BLKSSZGET": 0x1268, "BLKPBSZGET": 0x127B, "BLKIOMIN": 0x1278, "BLKIOOPT": 0x1279},
    **{"FICLONE": 0x40049409, "FICLONERANGE": 0x4020940D},
    # <linux/vhost.h>
    **{"VHOST_GET_FEATURES": 0x8008AF00, "VHOST_SET_FEATURES": 0x4008AF00},
    **{"VHOST_SET_OWNER": 0xAF01, "VHOST_RESET_OWNER": 0xAF02},
    **{"VHOST_SET_MEM_TABLE": 0x4008AF03, "VHOST_SET_VRING_NUM": 0x4008AF10},
    **{"VHOST_SET_VRING_ADDR": 0x4028AF11, "VHOST_SET_VRING_BASE": 0x4008AF12},
    **{"VHOST_GET_VRING_BASE": 0xC008AF12, "VHOST_SET_VRING_KICK": 0x4008AF20},
    **{"VHOST_SET_VRING_CALL": 0x4008AF21, "VHOST_SET_VRING_ERR": 0x4008AF22},
    **{"VHOST_NET_SET_BACKEND": 0x4008AF30},
    **{"TUNSETOFFLOAD": 0x400454D0, "TUNSETQUEUE": 0x400454D9, "TUNGETIFF": 0x800454D2},
}
# <linux/fcntl.h>: F_DUPFD to F_SETLKW, open-file-description locks, F_DUPFD_CLOEXEC, the size of
# pipes, seals. Not: who gets signals, leases, notices.
_FCNTLS = (*range(8), 36, 37, 38, 1030, 1031, 1032, 1033, 1034)


# <linux/seccomp.h>: SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
_OF_LISTENER = (0xC0502100, 0xC0182101)


def _filter(needs: Needs) -> None:
    """Raises ConfigError."""
    flags = c.FILTER_SPEC_ALLOW | (0 if needs.outside else c.FILTER_TSYNC)
    if needs.answers is not None:
        more = c.FILTER_NEW_LISTENER | (0 if needs.outside else c.FILTER_TSYNC_ESRCH)
        with suppress(ConfigError):  # Linux before 5.7 has no listener for all threads
            listener = c.install(_calls(needs, asks=True), flags | more)
            needs.answers(listener)
            return
    c.install(_calls(needs), flags)


def _calls(needs: Needs, *, asks: bool = False) -> list[c.Line]:
    """The filter of a monitor that starts no other program."""
    calls = {**c.CALLS, **c.SERVING, **_MORE, **_OPEN_CALLS}
    if needs.hears_of_interfaces:
        calls |= _BINDING
    checks: dict[int, c.Check] = {
        _IOCTL: (1, c.EQUAL, (*needs.ioctls, *_IOCTLS.values(), *(_OF_LISTENER if asks else ()))),
        _FCNTL: (1, c.EQUAL, _FCNTLS),
        _KILL: (0, c.EQUAL, (os.getpid(), *sorted(_children))),
        _SOCKET: (0, c.EQUAL, (_AF_NETLINK,) if needs.hears_of_interfaces else ()),
        _SOCKETPAIR: (0, c.EQUAL, (_AF_UNIX,)),
        c.PRCTL: (0, c.EQUAL, (_PR_SET_NAME,)),
        **c.own_process_only(os.getpid()),
    }
    if not c.landlock_version():  # which decides what is written, elsewhere
        checks |= {c.OPEN: (1, c.NONE, (c.WRITING,)), c.OPENAT: (2, c.NONE, (c.WRITING,))}
    numbers = [calls[name] for name in calls if name not in _NO_LONGER]
    return c.allow_list(numbers, checks, raises=needs.tells, silently=_MAKING_PROCESSES, asks=asks)


# What neither pyvmm nor a program that it starts ever does.
_NEVER = numbered(
    """
    ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd bpf perf_event_open userfaultfd
    add_key request_key keyctl init_module finit_module delete_module kexec_load kexec_file_load
    open_by_handle_at reboot swapon swapoff iopl ioperm acct quotactl settimeofday clock_settime
    adjtimex clock_adjtime sethostname setdomainname vhangup syslog setns fanotify_init fsopen
    fsmount move_mount open_tree mount_setattr io_uring_setup personality
    """
)
_TIOCSTI = 0x5412


def _some_calls() -> list[c.Line]:
    """The filter of a thread that starts other programs, which are under it as well."""
    return c.deny_list(_NEVER.values(), {_IOCTL: (1, c.EQUAL, (_TIOCSTI,))})
