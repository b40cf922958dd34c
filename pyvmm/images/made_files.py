"""Files that a start makes and a guest boots from, kept under the hash of their content.

$XDG_CACHE_HOME/pyvmm/made/HASH.SUFFIX

Equal content is one file. A guest that reboots reads its files again, so none goes while it may be
in use: only those that nobody has wanted for a week, when there are many. Other folders of the
cache are kept in the same way, by names that their makers choose.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO

from pyvmm.errors import ConfigError
from pyvmm.host import user_cache

_MANY = 16
_OLD_SECONDS = 7 * 24 * 3600
_UNFINISHED = ".unfinished-"


def keep(pieces: Iterable[bytes], suffix: str, most: int = 4 << 30) -> str:
    """The path of a file of these `pieces`. Raises ConfigError where it cannot be written, or where
    they are more than `most` bytes together."""
    import hashlib

    folder = os.path.join(user_cache.folder(), "made")
    digest, size = hashlib.sha256(), 0
    try:
        with _unfinished(folder) as file:
            for piece in pieces:
                size += len(piece)
                if size > most:
                    raise ConfigError(f"a file of more than {most >> 20} MiB is too large to boot")
                digest.update(piece)
                file.write(piece)
            file.flush()
            path = os.path.join(folder, f"{digest.hexdigest()[:32]}{suffix}")
            os.replace(file.name, path)
    except OSError as error:
        raise _unwritable(folder, error) from None
    _forget_old(folder, path)
    return path


def keep_folder(folder: str, name: str, fill: Callable[[str], None]) -> str:
    """The path of the folder `name` in the cache's `folder`: as it is there, or an empty one that
    `fill` has filled. Raises ConfigError where it cannot be written, and what `fill` raises."""
    folder = os.path.join(user_cache.folder(), folder)
    path = os.path.join(folder, name)
    if os.path.isdir(path):
        with suppress(OSError):
            os.utime(path)  # by which it is known that somebody wants it
        return path
    try:
        with _unfinished_folder(folder) as room:
            content = os.path.join(room, name)
            os.mkdir(content)
            fill(content)
            try:
                os.rename(content, path)
            except OSError:
                if not os.path.isdir(path):  # where it is, another run has made the same one
                    raise
    except OSError as error:
        raise _unwritable(folder, error) from None
    _forget_old(folder, path)
    return path


def _unwritable(folder: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot write {folder}: {error.strerror}", cure="set XDG_CACHE_HOME to another place"
    )


def keep_as(folder: str, name: str, content: bytes) -> None:
    """Keep `content` as the file `name` in the cache's `folder`, of which old ones go. A cache that
    cannot be written is not a reason to fail."""
    folder = os.path.join(user_cache.folder(), folder)
    path = os.path.join(folder, name)
    with suppress(OSError):
        with _unfinished(folder) as file:
            file.write(content)
            file.flush()
            os.replace(file.name, path)
        _forget_old(folder, path)


@contextmanager
def _unfinished(folder: str) -> Iterator[BinaryIO]:
    """A new file in `folder`, to be renamed when it is whole; it goes if it is not. Raises
    OSError."""
    _forget_unfinished(folder)
    while True:
        path = os.path.join(folder, f"{_UNFINISHED}{os.getpid()}-{os.urandom(8).hex()}")
        with open(path, "xb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not os.fstat(file.fileno()).st_nlink:
                    continue  # Somebody was here before the lock was, and took it for left.
                yield file
                return
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(path)


@contextmanager
def _unfinished_folder(folder: str) -> Iterator[str]:
    """A new folder in `folder` that goes at the end, with all that is still in it. Raises
    OSError."""
    import tempfile

    _forget_unfinished(folder)
    while True:
        with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder) as room:
            try:
                locked = os.open(room, os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(locked, fcntl.LOCK_EX)
                if not os.path.isdir(room):
                    continue  # as in `_unfinished`
                yield room
                return
            finally:
                os.close(locked)


def _forget_unfinished(folder: str) -> None:
    """Remove what processes that were killed have left in `folder`, which is there then. Raises
    OSError."""
    os.makedirs(folder, exist_ok=True)
    for entry in list(os.scandir(folder)):
        if not entry.name.startswith(_UNFINISHED):
            continue
        with suppress(OSError), ExitStack() as closing:
            left = os.open(entry.path, os.O_RDONLY)
            closing.callback(os.close, left)
            # Whoever is at work on it has it locked, and the kernel unlocks it when he dies.
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                os.unlink(entry.path)


def _forget_old(folder: str, fresh: str) -> None:
    with suppress(OSError):
        others = [entry for entry in os.scandir(folder) if entry.path != fresh]
        if len(others) <= _MANY:
            return
        for entry in others:
            with suppress(FileNotFoundError):  # another run's doing
                if time.time() - entry.stat().st_mtime <= _OLD_SECONDS:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)
