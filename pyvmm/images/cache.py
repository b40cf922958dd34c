"""The cache: finished images only, each in a folder named after what it was made from.

$XDG_CACHE_HOME/pyvmm (default ~/.cache/pyvmm):
    images/NAME-KEY/   one image's files; KEY is a hash of its recipe and of everything it uses
    apt/               apt's lists
    building/          what is being made; renamed into images/ when it is whole
    lock               held while building
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

from pyvmm.errors import ConfigError
from pyvmm.host.user_cache import folder

_ROOM = 1 << 30  # bytes; a large image takes somewhat more, and fails in good order


def image(name: str, key: str) -> str:
    """The image's folder, which may not exist yet."""
    return os.path.join(folder(), "images", f"{name}-{key}")


@contextlib.contextmanager
def building(waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the cache's lock; `waiting` is called first if another process has it.

    What an interrupted build left behind is removed, as with the lock held nobody works on it.
    """
    with explain_os_errors():
        os.makedirs(os.path.join(folder(), "images"), exist_ok=True)
        fd = os.open(os.path.join(folder(), "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(fd, fcntl.LOCK_EX)
        shutil.rmtree(_workshop(), ignore_errors=True)
        with explain_os_errors():
            os.makedirs(_workshop(), exist_ok=True)  # what a killed build's children still write
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def new_image(name: str, key: str) -> Iterator[str]:
    """An empty folder to fill; it becomes the image at the end, and is removed on any failure."""
    with new_folder(image(name, key)) as content:
        yield content


@contextlib.contextmanager
def new_folder(target: str) -> Iterator[str]:
    """An empty folder to fill; at the end it takes the place of `target`, there or not."""
    with explain_os_errors(), workspace() as room:
        content = os.path.join(room, "content")
        os.mkdir(content)
        yield content
        _flush(content)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.lexists(target):
            os.rename(target, os.path.join(room, "old"))
        os.rename(content, target)


@contextlib.contextmanager
def workspace() -> Iterator[str]:
    """A folder for files that are not kept."""
    room = tempfile.mkdtemp(dir=_workshop())
    os.chmod(room, 0o755)  # apt's and fakechroot's helpers may be other users
    try:
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)


@contextlib.contextmanager
def explain_os_errors() -> Iterator[None]:
    """A full or read-only disk is the user's to mend, in one line."""
    try:
        yield
    except OSError as error:
        cure = "set XDG_CACHE_HOME to another place"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            cure = f"free 3 GiB, or {cure}"
        where = error.filename or folder()
        raise ConfigError(f"{where}: {error.strerror}", cure=cure) from None


def require_room() -> None:
    """Raises ConfigError if there is too little room for any build.

    Looked at beforehand, since apt's http client waits without end when the disk gets full.
    """
    with explain_os_errors():
        os.makedirs(folder(), exist_ok=True)
        status = os.statvfs(folder())
        if status.f_bavail * status.f_frsize < _ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder())


def remove(path: str) -> None:
    """Remove a folder of the cache, whose lock the caller holds: at once, then bit by bit."""
    with explain_os_errors(), workspace() as room:
        os.rename(path, os.path.join(room, "old"))


def prune(keep: set[str]) -> list[str]:
    """Remove the images whose paths are not in `keep`; the paths of the removed ones."""
    images = os.path.join(folder(), "images")
    names = sorted(os.listdir(images)) if os.path.isdir(images) else []
    stale = [path for name in names if (path := os.path.join(images, name)) not in keep]
    with explain_os_errors():
        for path in stale:
            shutil.rmtree(path)
    return stale


def _flush(image_folder: str) -> None:
    """The image's own files reach the disk before its name does; a module tree is not worth it."""
    for entry in os.scandir(image_folder):
        if entry.is_file():
            fd = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


def _workshop() -> str:
    return os.path.join(folder(), "building")
