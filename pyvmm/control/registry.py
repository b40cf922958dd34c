"""The running VMs of this user: a directory with a control socket for each, NAME.sock.

A VM is alive if somebody listens at its socket; a monitor that was killed leaves a socket that
refuses. The next process that finds it removes it, and with it the other sockets that the monitor
had: NAME.left lists them. One lock for the directory, held for moments, keeps two processes from
doing that at once. The output of VMs is in logs/ (vm_log).
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import leaving, named_listener, unix_sockets
from pyvmm.host.syscalls import Closable
from pyvmm.host.unix_sockets import Socket
from pyvmm.spec.names import SOCKET_SUFFIX, check_name

DEFAULT_NAME = "vm"

_LEFT, _GIVEN = ".left", ".given"
_LOCK = ".lock"
# Seconds, as fifty VMs that start at once on a busy machine take turns.
_LOCK_PATIENCE = 60.0
_MOST_SUFFIXES = 10_000


class NoPlace(ConfigError):
    """There is no directory for control sockets."""


def folder() -> str:
    """The directory, made if it is not there: $XDG_RUNTIME_DIR/pyvmm, or /run/user/UID/pyvmm, or
    else /tmp/pyvmm-UID.

    Only its owner has access. Raises NoPlace if none can be had.
    """
    uid = os.geteuid()
    for base in (os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{uid}"):
        if base.startswith("/") and _is_own_directory(base):
            return _private(os.path.join(base, "pyvmm"))
    return _private(f"/tmp/pyvmm-{uid}")


def _is_own_directory(path: str) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return own and os.access(path, os.W_OK | os.X_OK, effective_ids=True)


def _private(path: str) -> str:
    try:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        # Not os.stat: in /tmp somebody else may have put a link there.
        found = os.lstat(path)
    except OSError as error:
        raise NoPlace(
            f"no control socket can be made: {path}: {error.strerror}",
            cure="set XDG_RUNTIME_DIR to a directory of yours",
        ) from None
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not private or stat.S_IMODE(found.st_mode) & 0o077:
        raise NoPlace(
            f"{path} is not a directory that only you have access to",
            cure="remove it, or set XDG_RUNTIME_DIR to a directory of yours",
        )
    return path


class Registration(Closable):
    """A VM's `name` and the `listener` at its control socket, if it has one. Closing gives up
    both."""

    def __init__(self, name: str, path: str = "", listener: Socket | None = None) -> None:
        self.name = name
        self.path = path
        self.listener = listener

    @property
    def files(self) -> tuple[str, ...]:
        """The files that closing removes, as far as they are there."""
        if self.listener is None:
            return ()
        return _left_at(self.path), given_at(self.path), self.path

    def note(self, path: str) -> None:
        """This process has made a socket at `path`; whoever finds that it was killed removes it."""
        if self.listener is None or "\n" in path:
            return
        with suppress(OSError):  # then it stays, which is not a reason not to run
            absolute = os.path.abspath(path)
            found = os.lstat(absolute)
            line = os.fsencode(f"{found.st_dev} {found.st_ino} {absolute}\n")
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            fd = os.open(_left_at(self.path), flags, 0o600)
            try:
                os.write(fd, line)
            finally:
                os.close(fd)

    def close(self) -> None:
        if self.listener is None or self.listener.fileno() < 0:
            return
        with leaving.undisturbed():
            # First unlinked, then closed: nobody takes it for a dead VM's and puts his own there.
            for path in self.files:
                with suppress(OSError):
                    named_listener.remove(path)
            self.listener.close()


def register(name: str = "", default: str = DEFAULT_NAME) -> Registration:
    """Take `name` for a VM of this process; for "" the first of `default` (vm), vm-2, vm-3… that is
    free.

    Raises ConfigError if a VM of that name runs, or no socket can be made.
    """
    if name:
        check_name(name)
    place = folder()
    with _locked(place):
        for candidate in [name] if name else _numbered(default):
            path = _path(place, candidate)
            if not _alive(path):
                return Registration(candidate, path, _listen(path))
    raise ConfigError(
        f"a VM called {name!r} is running",
        cure=f"choose another name, or end it: pyvmm stop {name}",
        option="--name",
    )


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in range(2, _MOST_SUFFIXES):
        yield f"{name}-{number}"


def _listen(path: str) -> Socket:
    try:
        return unix_sockets.listen(path)
    except HostError as error:
        raise NoPlace(f"no control socket can be made: {error}") from None


def running() -> list[str]:
    """The names of the VMs that run, sorted. Sockets of dead ones are removed."""
    place = folder()
    found = (entry for entry in os.listdir(place) if entry.endswith(SOCKET_SUFFIX))
    names = [entry.removesuffix(SOCKET_SUFFIX) for entry in found]
    # Without the lock, for which VMs wait that start: each look is a connection, and they are many.
    dead = [name for name in names if not _answers(_path(place, name))]
    if dead:
        with _locked(place):
            dead = [name for name in dead if not _alive(_path(place, name))]
    return sorted(set(names) - set(dead))


def socket_path(name: str) -> str:
    """The path of a VM's control socket. Raises ConfigError for what cannot be a name."""
    check_name(name, option="")
    return _path(folder(), name)


def _path(place: str, name: str) -> str:
    return os.path.join(place, name + SOCKET_SUFFIX)


def _answers(path: str) -> bool:
    """True if a monitor listens at `path`."""
    try:
        with closing(unix_sockets.connect(path)) as connection:
            # Otherwise its keeper, which has the socket as well, is about to end.
            return not _has_ended(unix_sockets.peer(connection).pid)
    except HostError as error:
        # EAGAIN: too many wait already
        return error.errno not in (errno.ENOENT, errno.ECONNREFUSED)


def _alive(path: str) -> bool:
    """True if a monitor listens at `path`; a socket without one is removed, under the lock."""
    if _answers(path):
        return True
    if os.path.exists(path):
        from pyvmm.control import vm_log

        place, entry = os.path.split(path)
        vm_log.note_killed(place, entry.removesuffix(SOCKET_SUFFIX))
        _remove_left(path)
        with suppress(OSError):
            os.unlink(given_at(path))
        with suppress(OSError):
            os.unlink(path)
    return False


def _has_ended(pid: int) -> bool:
    """True if the process has, as far as can be known: one of another namespace has the number
    0."""
    try:
        process = os.pidfd_open(pid) if pid > 0 else -1
    except OSError as error:
        return error.errno == errno.ESRCH
    if process < 0:
        return False
    try:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        return bool(poll.poll(0))
    finally:
        os.close(process)


def given_at(path: str) -> str:
    """The path of the list of what the VM with its control socket at `path` was given."""
    return path.removesuffix(SOCKET_SUFFIX) + _GIVEN


def given_of(name: str) -> str:
    """The same by the VM's name. Raises ConfigError as `socket_path` does."""
    return given_at(socket_path(name))


def _left_at(path: str) -> str:
    """The path of the list of files that a VM leaves when it is killed."""
    return path.removesuffix(SOCKET_SUFFIX) + _LEFT


def _remove_left(path: str) -> None:
    """Remove the sockets that the dead VM with its control socket at `path` has left, unless
    somebody else is there by now."""
    listed = _left_at(path)
    try:
        with open(listed, "rb") as file:
            lines = file.read().splitlines()
    except OSError:
        return
    for line in lines:
        with suppress(OSError, ValueError):  # the last line may be half a line
            device, inode, path = os.fsdecode(line).split(" ", 2)
            place, name = os.path.split(path)
            # In that folder, whatever its path leads to in a moment: it may be another user's.
            folder = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
                same = (found.st_dev, found.st_ino) == (int(device), int(inode))
                if same and stat.S_ISSOCK(found.st_mode) and _is_dead(path):
                    os.unlink(name, dir_fd=folder)
            finally:
                os.close(folder)
    with suppress(OSError):
        os.unlink(listed)


def _is_dead(path: str) -> bool:
    try:
        unix_sockets.connect(path).close()
    except HostError as error:
        return error.errno == errno.ECONNREFUSED
    return False


@contextmanager
def _locked(place: str) -> Iterator[None]:
    try:
        fd = os.open(os.path.join(place, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise NoPlace(f"no control socket can be made in {place}: {error.strerror}") from None
    try:
        give_up_at = time.monotonic() + _LOCK_PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > give_up_at:
                    raise ConfigError(
                        f"another pyvmm has held {place}/{_LOCK} for seconds",
                        cure="end it: it hangs",
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)
