"""Locks on disk images that a second pyvmm and QEMU both notice.

An image is locked the way QEMU locks its own (block/file-posix.c there), so that each sees the
other: an open file description takes *shared* open-file-description locks (fcntl(2), F_OFD_SETLK)
on single bytes, one byte for each thing it does with the image and one for each thing it does not
let others do. Taking first and looking second, whether somebody holds the opposite byte, means that
two who come at the same moment may both be turned away but can never both get in. Shared locks,
because those can also be taken on a file that is open for reading only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from pyvmm.host.syscalls import read_or_empty

# struct flock of fcntl(2): l_type, l_whence, l_start, l_len, l_pid, in the ABI's own alignment.
_FLOCK = struct.Struct("@hhqqi4x")

DOES = 100  # first byte of "I do this with the image"
FORBIDS = 200  # first byte of "nobody else may do this with the image"
READ, WRITE, RESIZE = 0, 1, 3  # offsets from both

# A file system without such locks (some network and FUSE ones) answers with one of these.
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LocksUnsupported(Exception):
    """The file system has no open-file-description locks."""


def lock_image(fd: int, *, read_only: bool) -> bool:
    """Lock the open image `fd` until it is closed; False, and no lock held, if others forbid it.

    A writer tolerates nobody else; readers tolerate readers. Raises LocksUnsupported, or OSError
    where the kernel refuses for another reason.
    """
    does = (READ,) if read_only else (READ, WRITE)
    forbids = (WRITE, RESIZE) if read_only else (READ, WRITE, RESIZE)
    try:
        for act in does:
            _set(fd, fcntl.F_RDLCK, DOES + act, 1)
        for act in forbids:
            _set(fd, fcntl.F_RDLCK, FORBIDS + act, 1)
        taken = any(_held_by_other(fd, FORBIDS + act) for act in does) or any(
            _held_by_other(fd, DOES + act) for act in forbids
        )
        if taken:
            _set(fd, fcntl.F_UNLCK, DOES, FORBIDS + RESIZE + 1 - DOES)
    except BlockingIOError:
        return False  # Somebody holds an exclusive lock, as neither pyvmm nor QEMU would.
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise LocksUnsupported from None
        raise
    return not taken


def holder(fd: int) -> str:
    """The process that holds a lock on the open file `fd`: ``"qemu-system-x86 (PID 1234)"``, or "".

    The kernel does not tell the owner of an open-file-description lock, but every process's own
    list of open files says which of them are locked (proc(5), /proc/PID/fdinfo). Processes of other
    users stay hidden unless we are root.
    """
    wanted = os.fstat(fd)
    # Ourselves first: a helper of ours may hold the same lock.
    for pid in (str(os.getpid()), *os.listdir("/proc")):
        if pid.isdigit() and _holds_lock(pid, wanted, own_fd=fd):
            return f"{read_or_empty(f'/proc/{pid}/comm').strip() or 'a process'} (PID {pid})"
    return ""


def take_byte(fd: int, number: int) -> bool:
    """Have the byte `number` of the open file `fd` for oneself until it is closed, where the file
    system has such locks; False if somebody else has it."""
    try:
        _set(fd, fcntl.F_WRLCK, number, 1)
    except OSError as error:
        return error.errno in _UNSUPPORTED
    return True


def _set(fd: int, kind: int, start: int, length: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, length, 0))


def _held_by_other(fd: int, byte: int) -> bool:
    # Would an exclusive lock collide? Our own locks never do.
    question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question)
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _holds_lock(pid: str, wanted: os.stat_result, own_fd: int) -> bool:
    try:
        fds = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False  # It ended meanwhile, or is not ours to look at.
    for fd in fds:
        if pid == str(os.getpid()) and fd == str(own_fd):
            continue
        try:
            found = os.stat(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        # Of several descriptors for one file some may be without a lock (a plain reader's).
        same = os.path.samestat(found, wanted)
        if same and "\nlock:" in read_or_empty(f"/proc/{pid}/fdinfo/{fd}"):
            return True
    return False
