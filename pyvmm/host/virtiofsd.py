"""A directory of this machine as a file system that a guest can mount: virtiofsd, one process each.

It is told nothing but the directory, and a socket that is connected to us already, so nothing of it
has a name, and it ends when our end is closed, by whatever ends us. It sees no files but those of
the directory (its own sandbox: namespaces), and cannot make device nodes. An ordinary user's files
belong to root in the guest; what root starts passes owners on as they are.

Its sandbox has the directory as its root, by pivot_root(2), which refuses to have / in place of /.
So for / there is a bind mount of it elsewhere, in a namespace of its own, which this module enters
as a program before it becomes virtiofsd.

What a snapshot has of it are paths in the directory, which the virtiofsd of a restored VM opens. It
compares file handles, where the file system has some, so that a file in another's place is not
taken for that one; what it does not find is an error for the guest that uses it, and no more.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from socket import socket as Socket
from threading import Event
from typing import NoReturn

from pyvmm.errors import ConfigError
from pyvmm.host import box, confinement, handed, log, other_user, pausing
from pyvmm.host.private_listener import connected_listener
from pyvmm.host.syscalls import read_or_empty

PROGRAM = "virtiofsd"
_SOCKET, _SAYS = "virtiofsd", "virtiofsd-says"  # names of descriptors that are handed over
_PATIENCE = 10.0  # seconds for its end, once our end of the socket is closed
_MOMENT = 0.5  # seconds between the two
# <linux/sched.h>, <linux/mount.h>
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 1 << 12, 1 << 14, 1 << 18
# <fcntl.h>
_AT_FDCWD, _MAX_HANDLE_SZ = -100, 128
_SECOND_ROOT = "/sys"  # which is everywhere, and has nothing that virtiofsd needs
_NOBODY = 65534  # /proc/sys/kernel/overflowuid and overflowgid
# The second is what it says of every snapshot: what it has open is looked up while the VM stands
# still, and not before.
_NOISE = (
    *("Failure when trying to set the limit", "Front-end did not announce migration"),
    *("note: run with `RUST_BACKTRACE", "stack backtrace:"),
)


class Served:
    """A running virtiofsd that serves `folder`. `socket` is our end, for one front end to take."""

    def __init__(
        self,
        folder: str,
        socket: Socket,
        says: int,
        wait: Callable[[], object],
        kill: Callable[[], object] | None = None,
    ) -> None:
        """`says` is what it writes its messages to; at their end `wait` is called once. `kill` is
        for one that does not end, where it is a child of ours."""
        self.folder = folder
        self.socket = socket
        self._wait, self._kill = wait, kill
        self._said: deque[str] = deque(maxlen=8)
        self._log = log.RateLimited(prefix="virtiofsd: ")
        self._closing = Event()
        hears = pausing.each_line(says, self._heard, self._ended)
        self._watcher = pausing.Watcher(says, "virtiofsd", hears)

    def _heard(self, line: str) -> None:
        text = line.rpartition("] ")[2].strip()[:200]
        if text and not text.startswith(_NOISE):
            self._said.append(text)

    def _ended(self) -> None:
        self._wait()
        # Where its connection has been closed by us, `close` comes next.
        if not self._closing.wait(_MOMENT):
            self._log(f"{self.folder} is served no more: {self._last('ended')}")

    def _last(self, otherwise: str) -> str:
        return self._said[-1] if self._said else f"{PROGRAM} {otherwise}"

    def why_it_ended(self, otherwise: str = "ended") -> str:
        """Its last message, once the connection has ended; if there is none, `otherwise`, what it
        has done."""
        self.close()
        return self._last(otherwise)

    def close(self) -> None:
        """Be sure that it has gone; the socket must be closed already."""
        self._closing.set()
        if self._watcher.wait(_PATIENCE):
            return
        if self._kill is not None:
            self._kill()
            self._watcher.wait(_PATIENCE)
        elif self._watcher.stop():  # who has started it may keep the other end of its messages
            self._wait()


class Virtiofsd(Served):
    """One that is a child of ours."""

    def __init__(self, command: Sequence[str], folder: str, **how: bool) -> None:
        """As `serve` has it."""
        ours, listener = connected_listener()
        with listener:
            argv = _argv(command, folder, listener.fileno(), **how)
            try:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    pass_fds=(listener.fileno(),),
                    start_new_session=True,  # Ctrl-C is for us, not for it to die of
                )
            except OSError as error:
                ours.close()
                raise ConfigError(f"cannot start {PROGRAM}: {error.strerror}") from None
        box.may_signal(self._process.pid)
        assert self._process.stderr is not None
        says = self._process.stderr.fileno()
        super().__init__(folder, ours, says, self._process.wait, self._process.kill)


def serve(
    command: Sequence[str],
    folder: str,
    *,
    read_only: bool,
    keeps_owners: bool = False,
    tells_mounts: bool = True,
) -> Served:
    """Start one for this process. `command` is the beginning of its command line. With
    `keeps_owners` an ordinary user's files are that user's in the guest as well, and not root's;
    with `tells_mounts` the guest sees which directories are other file systems. Raises ConfigError
    if it cannot be started; what it says of the folder is in `why_it_ended`."""
    _check_namespaces(folder)
    how = {"read_only": read_only, "keeps_owners": keeps_owners, "tells_mounts": tells_mounts}
    if not other_user.is_to_come():
        return Virtiofsd(command, folder, **how)
    from pyvmm.host import apart

    with ExitStack() as closing:
        names = start_apart(command, folder, closing, **how)
        with apart.handed_here(names):
            return take_over(folder)


def start_apart(
    command: Sequence[str], folder: str, closing: ExitStack, **how: bool
) -> dict[str, int]:
    """Start one for another process, whose child it is no more than ours: the descriptors for that
    process by the names that `take_over` looks for. `closing` closes ours; `how` is as `serve` has
    it. Raises ConfigError."""
    from pyvmm.host import apart

    _check_namespaces(folder)
    ours, listener = connected_listener()
    closing.callback(ours.close)
    with listener:
        argv = _argv(command, folder, listener.fileno(), **how)
        try:
            says = apart.start(argv, (listener.fileno(),), closing)
        except OSError as error:
            raise ConfigError(f"cannot start {PROGRAM}: {error.strerror}") from None
    return {_SOCKET: ours.fileno(), _SAYS: says}


def take_over(folder: str) -> Served:
    """One that another process has started for us. Raises ConfigError for what is none."""
    socket = handed.take_stream(_SOCKET)
    try:
        says = handed.take_pipe(_SAYS)
    except BaseException:
        socket.close()
        raise
    return Served(folder, socket, says, partial(os.close, says))


def _check_namespaces(folder: str) -> None:
    """Raise ConfigError where it cannot have those that it shuts itself in with `folder`, as far as
    that can be known before: it does not say so itself."""
    if os.geteuid() == 0:
        if confinement.has_capability(confinement.CAP_SYS_ADMIN):
            return
        why, cure = "root without CAP_SYS_ADMIN has none", "start pyvmm with that capability"
    elif read_or_empty("/proc/sys/user/max_user_namespaces").strip() == "0":
        why, cure = "this place may have no user namespaces", "raise user.max_user_namespaces"
    else:
        return
    raise ConfigError(
        f"{folder} cannot be shared: {PROGRAM} needs namespaces, and {why}", cure=cure
    )


def _argv(
    command: Sequence[str],
    folder: str,
    listener: int,
    *,
    read_only: bool,
    keeps_owners: bool = False,
    tells_mounts: bool = True,
) -> list[str]:
    return [
        *_begin(command, folder),
        *_arguments(folder, listener, read_only=read_only),
        *_owners(keeps_owners),
        *([] if tells_mounts else ["--no-announce-submounts"]),
        "--sandbox=namespace",
    ]


def _begin(command: Sequence[str], folder: str) -> Sequence[str]:
    return confinement.python(__name__, *command) if folder == "/" else command


def main(arguments: list[str]) -> NoReturn:
    """Mount / on `_SECOND_ROOT`, where nobody else sees it, and become the program `arguments`."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.geteuid(), os.getegid()
    try:
        _check(libc.unshare(_CLONE_NEWNS if uid == 0 else _CLONE_NEWNS | _CLONE_NEWUSER))
        if uid != 0:
            for name, text in (("setgroups", "deny"), ("uid_map", uid), ("gid_map", gid)):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text if isinstance(text, str) else f"{text} {text} 1")
        _check(libc.mount(None, b"/", None, _MS_REC | _MS_PRIVATE, None))
        _check(libc.mount(b"/", os.fsencode(_SECOND_ROOT), None, _MS_REC | _MS_BIND, None))
        os.execv(arguments[0], arguments)
    except OSError as error:
        sys.exit(f"no namespace for it: {error.strerror}")


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _arguments(folder: str, listener: int, *, read_only: bool) -> list[str]:
    arguments = [
        f"--fd={listener}",
        f"--shared-dir={_SECOND_ROOT if folder == '/' else folder}",
        "--cache=auto",
        "--allow-direct-io",
        "--xattr",
        "--log-level=warn",
        "--migration-on-error=guest-error",
    ]
    if _has_handles(folder):
        arguments.append("--migration-verify-handles")
    if read_only:
        arguments.append("--readonly")
    return arguments


def _has_handles(folder: str) -> bool:
    """True if files there have handles, which no two files of the file system have in common."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = struct.pack("Ii", _MAX_HANDLE_SZ, 0) + bytes(_MAX_HANDLE_SZ)
    found = ctypes.create_string_buffer(handle)
    mount = ctypes.c_int()
    done: int = libc.name_to_handle_at(
        _AT_FDCWD, os.fsencode(folder), found, ctypes.byref(mount), 0
    )
    return done == 0


def _owners(keeps: bool) -> list[str]:
    """An ordinary user's virtiofsd knows that user alone: to it all other files are nobody's."""
    if os.geteuid() == 0:
        return ["--modcaps=-mknod"]
    uid, gid = (_NOBODY, _NOBODY) if keeps else (os.geteuid(), os.getegid())
    return [f"--translate-uid=map:0:{uid}:1", f"--translate-gid=map:0:{gid}:1"]
