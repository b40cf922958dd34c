"""The store of snapshots: a directory with one directory for each, of their owner alone.

    NAME/state.json    what the VM was, as text: version, specification, machine, disks, checksum
    NAME/memory        its RAM, in the order of addresses; holes are zeroes
    NAME/memory-N      where `memory` has only what had changed, the files below it: links to those
                       of another snapshot
    NAME/disk-N        what its disk N differs in from its image: an overlay
    NAME/working-set   what of its memory one that was restored from it has used: a hint
    NAME/KIND-N        all that its device N of that kind has, as of persistent memory (pmem-0)

Nothing in it is believed: the state is checked value by value by whoever restores itself from it.
A snapshot that is being made has another name until all of it is on the storage, so that it is
there whole or not at all; what a killed process has left is removed by the next one. This is the
only place that writes snapshots.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

from pyvmm.errors import ConfigError, HostError
from pyvmm.host.syscalls import Closable
from pyvmm.spec.names import check_name

FORMAT, VERSION = "pyvmm snapshot", 1
WITH_LAYERS = 2  # the version of those whose memory is several files
STATE, MEMORY = "state.json", "memory"
WORKING_SET = "working-set"
MOST_STATE = 64 << 20  # bytes of state.json
_MOST_TRIALS = 1000  # to make a directory that nobody takes for left behind
_NEW, _OLD, _ONCE = ".new-", ".old-", ".once-"


def device_file(kind: str, index: int) -> str:
    """The name of the file for device number `index` of its kind: a disk's has its changes."""
    return f"{kind}-{index}"


def folder() -> str:
    """The directory of all snapshots, made if it is not there: $XDG_STATE_HOME/pyvmm/snapshots, by
    default in ~/.local/state. Raises ConfigError if it cannot be had, or is not its owner's
    alone."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not base.startswith("/"):
        base = os.path.expanduser("~/.local/state")
    path = os.path.join(base, "pyvmm", "snapshots")
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(
            f"there is no place for snapshots: {path}: {error.strerror}",
            cure="set XDG_STATE_HOME to a directory of yours",
        ) from None
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(
            f"{path} is not a directory that only you have access to", cure=f"chmod 700 {path}"
        )
    return path


def names() -> list[str]:
    """Those that there are, and whole."""
    place = folder()
    _sweep(place)
    return sorted(name for name in os.listdir(place) if not name.startswith("."))


class Saved(NamedTuple):
    """An open snapshot: its name, its directory, and what its state says, unchecked but for form
    and checksum."""

    name: str
    path: str
    state: Mapping[str, Any]


@contextmanager
def reading(name: str) -> Iterator[Saved]:
    """The snapshot called `name`, which nobody removes meanwhile. Raises ConfigError."""
    check_name(name, option="")
    path = os.path.join(folder(), name)
    with held(path):
        yield Saved(name, path, read_state(path))


@contextmanager
def held(path: str) -> Iterator[Callable[[], None]]:
    """Nobody removes the snapshot in the directory `path` meanwhile, unless what is yielded is
    called. Raises ConfigError if there is none."""
    name = os.path.basename(path)
    with ExitStack() as holding:
        fd = _open_folder(path, name)
        holding.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"the snapshot {name} is being removed", cure="use another") from None
        if not _is_there(path, fd):  # it was removed just now
            raise _unknown(name)
        # Closed, not unlocked: a folder that is open leads out of a monitor's own root.
        yield holding.close


def _open_folder(path: str, name: str) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise _unknown(name) from None
        raise ConfigError(f"{path}: {error.strerror}", cure="see who owns it") from None
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        os.close(fd)
        raise ConfigError(
            f"the snapshot {path} is not yours alone to write", cure="take one of your own"
        )
    return fd


def _is_there(path: str, fd: int) -> bool:
    """True if `path` is the directory `fd` still, now that it is locked."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _unknown(name: str) -> ConfigError:
    return ConfigError(f"there is no snapshot {name!r}", cure="pyvmm snapshot list shows all")


def read_state(path: str) -> dict[str, Any]:
    """The state of the snapshot in the directory `path`. Raises ConfigError for a text that is not
    such a state, is of another version or damaged."""
    import json

    try:
        text = read_file(os.path.join(path, STATE), MOST_STATE)
    except OSError as error:
        raise _bad(path, f"{STATE}: {error.strerror}") from None
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        raise _bad(path, "its state is damaged: not JSON") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise _bad(path, "its state is of another kind")
    version = state.get("version")
    if type(version) is not int or version != (WITH_LAYERS if "below" in state else VERSION):
        raise ConfigError(
            f"the snapshot {path} has version {version!r:.20}",
            cure=f"this pyvmm reads versions {VERSION} and {WITH_LAYERS}; restore it with the "
            "pyvmm that made it",
        )
    if state.get("checksum") != checksum(state):
        raise _bad(path, "its state is damaged: the checksum differs")
    return state


def read_file(path: str, most: int) -> bytes:
    """The bytes of a regular file of `most` bytes at most, which is not a link. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"{found.st_size} bytes, {most} at most")
        with open(fd, "rb", closefd=False) as file:
            return file.read(most)
    finally:
        os.close(fd)


def _bad(path: str, what: str) -> ConfigError:
    return ConfigError(f"the snapshot {path} cannot be used: {what}", cure="take a new one")


def checksum(state: Mapping[str, Any]) -> str:
    """Of all that `state` says but for this."""
    import json
    from _blake2 import blake2b  # hashlib would load OpenSSL

    rest = {key: value for key, value in state.items() if key != "checksum"}
    try:
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    except (ValueError, RecursionError):
        return ""
    return blake2b(text.encode(), digest_size=32).hexdigest()


class Writer(Closable):
    """A snapshot that is being made, in the directory `made`; it will be at `path`. What is not
    finished is removed by `close`."""

    def __init__(self, name: str = "") -> None:
        """Without a name it is for those who begin with it now, and nobody finds it later: it goes
        when none of them needs it any more. Raises ConfigError for a name that is taken or cannot
        be, HostError."""
        self._is_for_now = not name
        if name:
            check_name(name, option="")
        self.name = name or f"{_ONCE}{os.urandom(6).hex()}"
        self._place = folder()
        _sweep(self._place)
        self.path = os.path.join(self._place, self.name)
        if os.path.lexists(self.path):
            raise ConfigError(
                f"there is a snapshot {name!r} already", cure=f"pyvmm snapshot rm {name}"
            )
        self._closing = ExitStack()
        try:
            self.made, self._folder = self._new_folder()
        except OSError as error:
            raise HostError(error.errno or 0, f"making of a snapshot in {self._place}") from None
        self._files: dict[str, int] = {}

    def _new_folder(self) -> tuple[str, int]:
        """An empty directory that has a maker, so that no `_sweep` removes it: its path, and a
        descriptor of it. Raises OSError."""
        for _ in range(_MOST_TRIALS):
            path = os.path.join(self._place, f"{_NEW}{os.getpid()}-{os.urandom(6).hex()}")
            with ExitStack() as closing:
                os.mkdir(path, 0o700)
                closing.callback(_remove_tree, path)
                try:
                    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue  # a sweep was quicker than the lock
                closing.callback(os.close, fd)
                # Shared, as it stays so when the directory has its name, and others read it.
                fcntl.flock(fd, fcntl.LOCK_SH)
                if not _is_there(path, fd):
                    continue
                self._closing = closing.pop_all()
                return path, fd
        raise OSError(errno.EBUSY, "other processes remove it")

    def make(self, file: str, size: int) -> None:
        """Begin `file` of the snapshot, `size` bytes of zeroes. Raises HostError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(os.path.join(self.made, file), flags, 0o600)
            self._closing.callback(os.close, fd)
            self._files[file] = fd
            os.ftruncate(fd, size)
        except OSError as error:
            raise HostError(error.errno or 0, f"making of the snapshot's {file}") from None

    def write(self, file: str, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` there. Raises HostError (ENOSPC)."""
        rest = memoryview(data)
        try:
            while rest:
                done = os.pwrite(self._files[file], rest, offset)
                rest, offset = rest[done:], offset + done
        except OSError as error:
            raise HostError(error.errno or 0, f"writing of the snapshot's {file}") from None

    def link(self, file: str, path: str) -> None:
        """Have `file` of the snapshot be the file at `path`, which is never written. Raises
        HostError."""
        try:
            os.link(path, os.path.join(self.made, file), follow_symlinks=False)
        except OSError as error:
            raise HostError(error.errno or 0, f"making of the snapshot's {file}") from None

    def finish(self, state: Mapping[str, Any]) -> None:
        """Write `state` and have the snapshot be there, on the storage. Raises ConfigError if
        somebody has made one of that name meanwhile, HostError."""
        import json

        version = WITH_LAYERS if "below" in state else VERSION
        whole = {**state, "format": FORMAT, "version": version}
        whole["checksum"] = checksum(whole)
        text = json.dumps(whole, indent=1).encode()
        self.make(STATE, len(text))
        self.write(STATE, 0, text)
        try:
            if not self._is_for_now:
                for fd in (*self._files.values(), self._folder):
                    os.fsync(fd)
            # Of a directory onto another one: only if that is empty, which a snapshot never is.
            os.rename(self.made, self.path)
            try:
                _sync_folder(self._place)
            except OSError:
                os.rename(self.path, self.made)  # for `close`: who hears of a failure has nothing
                raise
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise ConfigError(
                    f"there is a snapshot {self.name!r} already",
                    cure=f"pyvmm snapshot rm {self.name}",
                ) from None
            raise HostError(error.errno or 0, f"naming of the snapshot {self.path}") from None

    def close(self) -> None:
        self._closing.close()
        if self._is_for_now:
            _sweep(self._place)


def remove(name: str) -> None:
    """Remove a snapshot. VMs that were restored from it go on: they keep its files open. Raises
    ConfigError if there is none, or it is needed: a VM is being restored, or is in an emulated
    host, which looks for the files itself."""
    check_name(name, option="")
    place = folder()
    path = os.path.join(place, name)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        raise _unknown(name) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = os.path.join(place, f"{_OLD}{os.getpid()}-{os.urandom(6).hex()}")
        os.rename(path, gone)
        _remove_tree(gone)
    except BlockingIOError:
        raise ConfigError(
            f"a VM is being restored from the snapshot {name}, or runs from it in an emulated host",
            cure="pyvmm ps shows which",
        ) from None
    except OSError as error:
        raise HostError(error.errno or 0, f"removing of {path}") from None
    finally:
        os.close(fd)


def write_note(path: str, file: str, data: bytes) -> None:
    """Put `data` into `file` of the snapshot in the directory `path`, whole or not at all: what
    nobody relies on, and may be another one later. Raises HostError."""
    made = os.path.join(path, f"{_NEW}{file}-{os.urandom(6).hex()}")
    try:
        fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as writer:
            writer.write(data)
        os.rename(made, os.path.join(path, file))
    except OSError as error:
        with suppress(OSError):
            os.unlink(made)
        raise HostError(error.errno or 0, f"writing of the snapshot's {file}") from None


def size_of(path: str) -> int:
    """The bytes of storage that a snapshot takes."""
    total = 0
    with suppress(OSError):
        for entry in os.scandir(path):
            total += entry.stat(follow_symlinks=False).st_blocks * 512
    return total


def _sweep(place: str) -> None:
    """Remove what processes have left that were killed: they hold no lock any more."""
    for name in os.listdir(place):
        if not name.startswith((_NEW, _OLD, _ONCE)):
            continue
        path = os.path.join(place, name)
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove_tree(path)
            finally:
                os.close(fd)


def _remove_tree(path: str) -> None:
    """A directory of files, as snapshots are, unless somebody else has made it; nothing is
    followed."""
    with suppress(FileNotFoundError):
        for entry in os.scandir(path):
            if entry.is_dir(follow_symlinks=False):
                import shutil

                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)
        os.rmdir(path)


def _sync_folder(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
