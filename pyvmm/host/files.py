"""Disk image files: opened, sized and locked, or refused in one line that says what to do.

No format is ever probed for: whatever an image begins with, it is raw bytes, unless its name or the
user says otherwise. (Guests write to the first sector too; a monitor that probed it could be talked
into opening any file of the host.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from copy import copy
from weakref import WeakSet

from pyvmm.errors import ConfigError, how_many
from pyvmm.host import handed, locks

SECTOR = 512
IOV_MAX = 1024  # <linux/uio.h> UIO_MAXIOV: the most segments of one preadv(2) or pwritev(2)
QCOW2_MAGIC = b"QFI\xfb"
# <linux/fs.h>, in the order of ImageFile.block_sizes
BLKSSZGET, BLKPBSZGET, BLKIOMIN, BLKIOOPT = 0x1268, 0x127B, 0x1278, 0x1279
_ANOTHER = "another disk of this VM"
_Transfer = Callable[[int, list[memoryview], int], int]


class ImageFile:
    """An open image. `size` is in bytes, whole sectors of 512; `hints` are lines for the user, of
    things that are legal but probably not meant. `block_sizes` of a block device are those of its
    logical and physical block and of its minimum and optimal request, in bytes. Closing it gives up
    the lock."""

    def __init__(
        self,
        path: str,
        fd: int,
        size: int,
        read_only: bool,
        hints: tuple[str, ...] = (),
        is_block_device: bool = False,
        block_sizes: tuple[int, int, int, int] | None = None,
    ) -> None:
        self.path = path
        self.fd = fd
        self.size = size
        self.read_only = read_only
        self.hints = hints
        self.is_block_device = is_block_device
        self.block_sizes = block_sizes

    def duplicate(self) -> ImageFile:
        """The same image, with a descriptor of its own."""
        other = copy(self)
        other.fd = os.dup(self.fd)
        return other

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_handed: WeakSet[ImageFile] = WeakSet()  # that somebody else has opened


def open_image(
    path: str,
    read_only: bool = False,
    direct: bool = False,
    raw: bool = True,
    *,
    option: str = "--disk",
) -> ImageFile:
    """Open and lock the disk image, a regular file or a block device, at `path`.

    `direct`: with O_DIRECT, past the page cache. Without `raw` its size and what it begins with are
    for somebody else to judge. Never blocks. Raises ConfigError for whatever cannot be a disk,
    naming the cure, and the `option` that asked for it.
    """
    try:
        return _open_image(path, read_only, direct, raw)
    except ConfigError as error:
        raise ConfigError(error.message, cure=error.cure, option=option) from None


def _open_image(path: str, read_only: bool, direct: bool, raw: bool) -> ImageFile:
    if not path or "\0" in path:
        raise ConfigError("the path of the image is empty or has a NUL in it")
    fd = _open_here(path, read_only) if (given := handed.take(path)) is None else given
    try:
        kind = stat.S_IFMT(os.fstat(fd).st_mode)
        _check_kind(path, kind)
        if given is not None:
            use_handed(path, fd, read_only)
        os.set_blocking(fd, True)
        size = os.lseek(fd, 0, os.SEEK_END)
        hints = _lock(path, fd, read_only)
        if raw:
            hints = (*_check_size(path, size), *hints, *_look_at_start(path, fd))
        if direct:
            _make_direct(path, fd)  # from here on reads have to be aligned
    except OSError as error:
        os.close(fd)
        raise _cannot_open(path, error, read_only) from None
    except BaseException:
        os.close(fd)
        raise
    block = stat.S_ISBLK(kind)
    sizes = _block_sizes(fd) if block else None
    image = ImageFile(path, fd, size - size % SECTOR, read_only, hints, block, sizes)
    if given is not None:
        _handed.add(image)
    return image


def _open_here(path: str, read_only: bool) -> int:
    # Looked at before it is opened: opening a device node or a FIFO can have effects of its own.
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except OSError as error:
        raise _cannot_open(path, error, read_only) from None
    _check_kind(path, kind)
    return _open(path, kind, read_only)


def use_handed(path: str, fd: int, read_only: bool = False) -> None:
    """Make what was handed over as `path` what it would be if it had been opened here. Raises
    ConfigError for what cannot be, OSError."""
    status = os.fstat(fd)
    _check_kind(path, stat.S_IFMT(status.st_mode))
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    wanted = (os.O_RDONLY, os.O_RDWR) if read_only else (os.O_RDWR,)
    if flags & os.O_PATH or flags & os.O_ACCMODE not in wanted:
        raise ConfigError(
            f"the descriptor of {path} cannot be {'read' if read_only else 'written'}",
            cure="open it so, or add ,readonly",
        )
    # A lock belongs to the open file, and says nothing where that comes a second time.
    for other in list(_handed):
        both_read = read_only and other.read_only
        if other.fd >= 0 and not both_read and os.path.samestat(os.fstat(other.fd), status):
            raise _in_use(path, _ANOTHER, read_only)
    # Reads may not be aligned, and with O_APPEND all writes would go to the end (pwrite(2)).
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~(os.O_DIRECT | os.O_APPEND))


def _block_sizes(fd: int) -> tuple[int, int, int, int] | None:
    try:
        answers = [
            fcntl.ioctl(fd, request, bytes(4))
            for request in (BLKSSZGET, BLKPBSZGET, BLKIOMIN, BLKIOOPT)
        ]
    except OSError:
        return None
    logical, physical, minimum, optimal = (struct.unpack("=I", answer)[0] for answer in answers)
    return logical, physical, minimum, optimal


def read_regular(path: str, most: int) -> bytes:
    """All of the regular file at `path`, which may be a stranger's: a FIFO is not waited for, and a
    device is not read.

    Raises OSError: EINVAL for what is not a regular file, EFBIG for one of more than `most` bytes.
    """
    if "\0" in path:
        raise OSError(errno.EINVAL, "the path has a NUL in it")
    return read_open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), most)


def read_open(fd: int, most: int) -> bytes:
    """The same of the file that `fd` is, which is closed."""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(most + 1)
    finally:
        os.close(fd)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"more than {most >> 20} MiB")
    return data


def preadv_all(fd: int, views: list[memoryview], offset: int) -> int:
    """Read from `offset` on into `views` until they are full or the file ends; bytes read.

    Takes any number of views and goes on after a short transfer (a signal is os.preadv's own
    business). Raises OSError; the views may then hold some of the data.
    """
    return _transfer(os.preadv, fd, views, offset)


def pwritev_all(fd: int, views: list[memoryview], offset: int) -> int:
    """Write all of `views` at `offset`; bytes written, fewer only if the file takes no more.

    Raises OSError like `preadv_all`.
    """
    return _transfer(os.pwritev, fd, views, offset)


def _transfer(call: _Transfer, fd: int, views: list[memoryview], offset: int) -> int:
    total = sum(map(len, views))
    done = 0
    rest = list(views)
    while done < total:
        count = call(fd, rest[:IOV_MAX], offset + done)
        if count <= 0:
            break
        done += count
        rest = _without_first(rest, count)
    return done


def _without_first(views: list[memoryview], count: int) -> list[memoryview]:
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []


def _check_kind(path: str, kind: int) -> None:
    if kind in (stat.S_IFREG, stat.S_IFBLK):
        return
    names = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a character device",
        stat.S_IFSOCK: "a socket",
    }
    raise ConfigError(
        f"{path} is {names.get(kind, 'not a file')}",
        cure="give it a raw disk image or a block device",
    )


def _open(path: str, kind: int, read_only: bool) -> int:
    # O_NONBLOCK, in case it became a FIFO since we looked.
    flags = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    flags |= os.O_RDONLY if read_only else os.O_RDWR
    if kind == stat.S_IFBLK and not read_only:
        flags |= os.O_EXCL  # refused while the host has it mounted (open(2))
    try:
        return os.open(path, flags)
    except OSError as error:
        raise _cannot_open(path, error, read_only) from None


def _make_direct(path: str, fd: int) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise ConfigError(
            f"{path} is on a file system without direct I/O",
            cure="leave out ,direct",
        ) from None


def _cannot_open(path: str, error: OSError, read_only: bool) -> ConfigError:
    cure = {
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "check the path",
        errno.EBUSY: "unmount it or stop whatever uses it",
    }.get(error.errno or 0, "")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        readable = not read_only and os.access(path, os.R_OK, effective_ids=True)
        cure = f"add ,readonly ({path},readonly)" if readable else "check its permissions"
    reason = os.strerror(error.errno or 0)
    return ConfigError(f"cannot open {path}: {reason}", cure=cure)


def _check_size(path: str, size: int) -> tuple[str, ...]:
    if size < SECTOR:
        has = f"has {how_many(size, 'byte')}, less than one sector of {SECTOR}"
        what = has if size else "is empty"
        raise ConfigError(f"{path} {what}", cure=f"truncate -s 1G {path} makes a blank disk of it")
    if tail := size % SECTOR:
        return (f"{path}: not a whole sector, its last {how_many(tail, 'byte')} stay hidden",)
    return ()


def _lock(path: str, fd: int, read_only: bool) -> tuple[str, ...]:
    try:
        if locks.lock_image(fd, read_only=read_only):
            return ()
    except locks.LocksUnsupported:
        return (f"{path}: its file system has no locks: see that nothing else uses the image",)
    who = locks.holder(fd)
    if who.endswith(f"(PID {os.getpid()})"):
        who = _ANOTHER
    raise _in_use(path, who or "another process", read_only)


def _in_use(path: str, who: str, read_only: bool) -> ConfigError:
    cure = "stop it first, or give each its own copy"
    if who == _ANOTHER:
        cure = "give each disk an image of its own"
    if not read_only:
        cure += ", or open it ,readonly everywhere"
    return ConfigError(f"{path} is in use by {who}", cure=cure)


def _look_at_start(path: str, fd: int) -> tuple[str, ...]:
    if os.pread(fd, len(QCOW2_MAGIC), 0) != QCOW2_MAGIC:
        return ()
    return (
        f"{path} looks like a QCOW2 image but is served raw, byte for byte; "
        "to use what is in it: ,format=qcow2",
    )
