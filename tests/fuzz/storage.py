"""The storage of disks by itself: files, O_DIRECT, overlays and overlays of overlays, against a
model that is a few hundred bytes arrays long; and overlays' files that somebody has damaged.

A case draws everything from one `random.Random`. It raises AssertionError, with the steps so far,
if

- a byte reads as another one than was written, now or after the disk was opened again, was saved as
  an overlay of its image, or got another size,
- the image under an overlay changes,
- anything but an error of ours is raised, and one of those where nobody did wrong.
"""

from __future__ import annotations

import atexit
import errno
import functools
import hashlib
import itertools
import mmap
import os
import shutil
import signal
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from fuzz.nbd_server import Server
from fuzz.room import check_closed, open_files
from fuzz.shortage import short_of_descriptors

from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.host import handed, holes
from pyvmm.host.files import SECTOR, open_image
from pyvmm.testing.mmio_driver import Ring
from pyvmm.virtio.blk import backend as backend_module
from pyvmm.virtio.blk import direct, nbd, overlay, overlay_file, saved_overlay
from pyvmm.virtio.blk.backend import Backend, FileBackend
from pyvmm.virtio.blk.direct import DirectBackend
from pyvmm.virtio.blk.nbd import NbdBackend
from pyvmm.virtio.blk.overlay import OverlayBackend, open_snapshot, scratch_file
from pyvmm.virtio.blk.overlay_file import MAGIC, is_unused, open_overlay
from pyvmm.virtio.blk.overlay_layout import PAGE, layout_for
from pyvmm.virtio.blk.saved_overlay import file_of, open_saved

# Where the host may fail while a disk is in use, and while one is opened or ends.
_TRANSFERS: tuple[tuple[Any, str], ...] = (
    *((backend_module, name) for name in ("_preadv", "_pwritev")),
    *((module, "preadv_all") for module in (backend_module, direct)),
    *((module, "pwritev_all") for module in (backend_module, direct, overlay)),
    *((os, name) for name in ("fdatasync", "ftruncate", "pwrite")),
    (holes, "_fallocate"),
)
_OPENINGS: tuple[tuple[Any, str], ...] = (
    *((os, name) for name in ("open", "fsync", "ftruncate", "lseek", "pread", "preadv", "pwrite")),
    (os, "fdatasync"),
    *((module, "preadv_all") for module in (backend_module, overlay_file, saved_overlay)),
    (mmap, "mmap"),
)
_SHORT = ("_preadv", "_pwritev", "preadv_all", "pwritev_all")
_ERRORS = (errno.EIO, errno.ENOSPC, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_LARGEST = 160  # sectors of an image
_CONTENT = bytes(range(1, 256)) * (_LARGEST * SECTOR // 255 + 1)
_GROWN = 3 * _LARGEST


@functools.cache
def _libnbd() -> Any:
    """libnbd, or None."""
    try:
        return nbd.load()
    except ConfigError:
        return None


_NBD = ("nbd",) if _libnbd() is not None else ()


@functools.cache
def _folder() -> Path:
    """Of this process, on a file system with direct I/O where there is one."""
    for parent in (None, "/var/tmp"):
        folder = Path(tempfile.mkdtemp(prefix="pyvmm-fuzz-", dir=parent))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        probe = folder / "probe"
        probe.write_bytes(bytes(PAGE))
        with suppress(OSError):
            os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
            return folder
    return folder


@functools.cache
def _fill_caches() -> None:
    """What is loaded when it is first needed opens files."""
    holes._fallocate()
    hashlib.blake2b(b"")


class _Case:
    """One disk and its model."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.steps: list[str] = []
        self.image, self.changes = _folder() / "image", _folder() / "changes"
        self.saved = _folder() / "saved"
        for path in (self.changes, self.saved):
            path.unlink(missing_ok=True)
        size = SECTOR * rng.choice((1, 7, 8, 9, 64, _LARGEST))
        self.model = bytearray(_CONTENT[:size])
        self.image.write_bytes(self.model)
        self.base_bytes = bytes(self.model)
        self.over = rng.choice(("file", "direct", "overlay", "overlay", "snapshot", *_NBD))
        self.note(f"{self.over} of {size} bytes")
        self.opened: list[Backend] = []  # all of them, the lowest first
        self.server: Server | None = None
        self.in_vain = False
        self.kept_sizes: set[int] = set()  # of which an overlay's file may have either
        self._open_in_vain()
        self.disk = self._open()

    def note(self, step: str) -> None:
        self.steps.append(step)

    # --- opening ---------------------------------------------------------------------------------

    def _add(self, disk: Backend) -> Backend:
        self.opened.append(disk)
        return disk

    def _raw(self, read_only: bool) -> Backend:
        if self.over == "direct" or self.rng.random() < 0.2:
            with suppress(ConfigError):  # no direct I/O here
                image = open_image(str(self.image), read_only, direct=True)
                try:
                    return self._add(DirectBackend(image))
                except BaseException:
                    image.close()
                    raise
        with self._handed(str(self.image), read_only):
            return self._add(FileBackend(open_image(str(self.image), read_only)))

    @contextmanager
    def _handed(self, path: str, read_only: bool = False) -> Iterator[None]:
        """Somebody else may have opened what is at `path`, if there is something."""
        if self.in_vain or self.rng.random() < 0.7 or not os.path.exists(path):
            yield
            return
        with handed.Descriptors([os.open(path, os.O_RDONLY if read_only else os.O_RDWR)]) as owner:
            with handed.files({path: owner.fds[0]}, owner):
                yield
            assert not owner.fds, "it was not taken"

    def _snapshot(self, base: Backend) -> Backend:
        """With a file for the changes that somebody has made, which may not do."""
        needed = layout_for(base.size_sectors * SECTOR).file_size
        way = self.rng.choice(("ours", "ours", "handed", "short", "pipe"))
        if way == "ours" or self.in_vain:
            return open_snapshot(base)
        if way == "pipe":
            fd, other = os.pipe()
            os.close(other)
        else:
            fd = scratch_file(needed - SECTOR if way == "short" else needed)
        with handed.Descriptors([fd]) as owner, handed.files({overlay.SCRATCH: fd}, owner):
            try:
                made = open_snapshot(base)
            except ConfigError:
                assert way != "handed" and not owner.fds
            else:
                assert way == "handed"
                return made
        return open_snapshot(base)

    def _open_in_vain(self) -> None:
        """On a host that may fail at each call, or has no more descriptors: whatever comes of it,
        nothing is left open."""
        if self.rng.random() < 0.7 or self.over == "nbd":
            return
        self.note("opened on a host that fails")
        _fill_caches()
        files = open_files()
        scarce = short_of_descriptors(self.rng.randrange(6))
        self.in_vain = True
        with scarce if self.rng.random() < 0.5 else self._failing(_OPENINGS):
            try:
                self._open().share()
            except PyvmmError as error:
                assert "\n" not in str(error)
            finally:
                self.in_vain = False
        self.close()
        check_closed(files)

    def _open(self) -> Backend:
        if self.over in ("file", "direct"):
            return self._raw(read_only=False)
        if self.over == "nbd":
            return self._add(self._served())
        base = self._raw(read_only=True)
        if self.over == "overlay":
            with self._handed(str(self.changes)):
                return self._add(open_overlay(base, str(self.changes)))
        if self.saved.exists():
            base = self._add(open_saved(base, str(self.saved)))
        return self._add(self._snapshot(base))

    def _served(self) -> Backend:
        plain = self.rng.random() < 0.3
        self.server = Server(self.model[:], Random(self.rng.random()), read_only=False, plain=plain)
        patience = self.rng.choice((None, 60))
        return NbdBackend(_libnbd(), self.server.connection, "disk", patience=patience)

    def close(self) -> None:
        while self.opened:
            self.opened.pop().close()
        if self.server is not None:
            self.server.close()

    # --- what is done to it ----------------------------------------------------------------------

    def _place(self) -> tuple[int, int]:
        """Offset and size of whole sectors."""
        sectors = len(self.model) // SECTOR
        first = self.rng.choice((0, self.rng.randrange(sectors), sectors - 1))
        count = self.rng.choice((1, 1, 2, 8, 9, sectors))
        return first * SECTOR, min(count, sectors - first) * SECTOR

    def _views(self, size: int, data: bytes = b"") -> list[memoryview]:
        """Memory in pieces, as a driver has it: aligned or not."""
        rng = self.rng
        shift = rng.choice((0, 0, 1, SECTOR))
        whole = memoryview(bytearray(shift) + (data or bytearray(size)))[shift:]
        many = 1100 if size > 1100 and not rng.randrange(20) else 0
        cuts = sorted(rng.randint(0, size) for _ in range(many or rng.choice((0, 0, 1, 3))))
        edges = [0, *cuts, size]
        return [whole[a:b] for a, b in itertools.pairwise(edges)]

    def read(self) -> None:
        offset, size = self._place()
        views = self._views(size)
        self.note(f"read {size} at {offset}, {len(views)} pieces")
        self.disk.readv(views, size, offset)
        self._same(b"".join(views), offset)

    def _same(self, data: bytes, offset: int) -> None:
        expected = self.model[offset : offset + len(data)]
        if data != expected:
            place = next(at for at in range(len(data)) if data[at] != expected[at])
            raise AssertionError(
                f"byte {offset + place} is {data[place]:#x}, not {expected[place]:#x}"
            )

    def write(self) -> None:
        offset, size = self._place()
        data = self.rng.randbytes(size)
        views = self._views(size, data)
        self.note(f"write {size} at {offset}, {len(views)} pieces")
        self.disk.writev(views, size, offset)
        self.model[offset : offset + size] = data

    def zero(self) -> None:
        offset, size = self._place()
        self.note(f"zero {size} at {offset}")
        self.disk.write_zeroes(offset, size, self.rng.random() < 0.5)
        self.model[offset : offset + size] = bytes(size)

    def discard(self) -> None:
        """What it reads as from now on is the storage's business."""
        offset, size = self._place()
        self.note(f"discard {size} at {offset}")
        self.disk.discard(offset, size)
        data = bytearray(size)
        self.disk.readv([memoryview(data)], size, offset)
        self.model[offset : offset + size] = data

    def flush(self) -> None:
        self.note("flush")
        self.disk.flush()

    def expect(self) -> None:
        offset, size = self._place()
        self.disk.expect(size, offset)
        assert self.disk.misses >= 0

    def resize(self) -> None:
        if not self.disk.can_resize:
            return
        if self.rng.random() < 0.2:
            self._resize_of_a_device()
            return
        size = SECTOR * self.rng.choice((1, 8, 15, 16, 40, _LARGEST, _GROWN, 1 << 40))
        self.note(f"resize to {size}")
        try:
            assert self.disk.storage_for(size) >= size
            self.disk.resize(size if size < 1 << 40 else None)
        except HostError as error:
            plain = self.over in ("file", "direct", "nbd")
            assert size == SECTOR << 40 and not plain, error
            return
        self._has_become(self.disk.size_sectors * SECTOR)
        self.kept_sizes = set()

    def _resize_of_a_device(self) -> None:
        """A block device has the size that it has, and so has what keeps changes on one."""
        image = getattr(self.disk, "_image", None)
        if image is None:
            return
        self.note("resize on a block device")
        image.is_block_device = True
        try:
            with suppress(HostError):
                self._resize_or_not()
            if isinstance(self.disk, OverlayBackend):
                with suppress(HostError):
                    self.disk.resize(None)
                    raise AssertionError("an overlay has a size without being told")
            else:
                assert self.disk.size_sectors * SECTOR == self.image.stat().st_size
        finally:
            image.is_block_device = False
        self._compare()

    def again(self) -> None:
        """Closed and opened again."""
        if self.over == "snapshot":
            return
        self.note("again")
        size = len(self.model)
        self.close()
        if self.server is not None:
            assert self.server.data == self.model
        self._open_in_vain()
        self.disk = self._open()
        if self.over == "overlay":
            assert is_unused(str(self.changes)) in (True, False)
        now = self.disk.size_sectors * SECTOR
        assert now == size or now in self.kept_sizes
        self._has_become(now)

    def save(self) -> None:
        """The changes become an overlay's file, which is read as a layer from now on."""
        if not isinstance(self.disk, OverlayBackend):
            return
        try:
            size, pieces = file_of(self.disk)
        except HostError:
            return
        self.note("saved")
        with open(_folder() / "next", "wb") as file:
            os.ftruncate(file.fileno(), size)
            for at, data in pieces:
                os.pwrite(file.fileno(), data, at)
        self.close()
        os.rename(_folder() / "next", self.saved)
        self.over = "snapshot"
        self.disk = self._open()
        assert self.disk.size_sectors * SECTOR == len(self.model)

    def share(self) -> None:
        """From now on processes use it one after the other, each of which is killed: the next one
        has what it wrote."""
        if self.rng.random() < 0.7 or self.over == "nbd":
            return
        self.disk.share()
        offset, size = self._place()
        data = self.rng.randbytes(size)
        self.note(f"another process writes {size} at {offset}")
        child = os.fork()
        if not child:
            try:
                self.disk.writev([memoryview(data)], size, offset)
            finally:
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        self.model[offset : offset + size] = data
        self._compare()

    def close_badly(self) -> None:
        """What is not stored when the disk is closed may be lost, if the host fails then."""
        if not isinstance(self.disk, OverlayBackend) or self.over != "overlay":
            return
        self.note("closed on a host that fails")
        assert os.path.samestat(os.fstat(self.disk.fd), os.stat(self.changes))
        self.disk.flush()
        offset, size = self._place()
        data = self.rng.randbytes(size)
        self.disk.writev([memoryview(data)], size, offset)
        lines: list[str] = []
        places = ((os, "fdatasync"), (overlay, "pwritev_all"))
        with self._failing(places), mock.patch.object(overlay.log, "to_stderr", lines.append):
            self.opened.pop().close()
        self.close()
        self.disk = self._open()
        if self.disk.size_sectors * SECTOR != len(self.model):
            assert self.disk.size_sectors * SECTOR in self.kept_sizes
            self._has_become(self.disk.size_sectors * SECTOR)
            size = max(0, min(size, len(self.model) - offset))
            data = data[:size]
        now = bytearray(size)
        self.disk.readv([memoryview(now)], size, offset)
        assert lines or now == data, "it is lost, and nobody was told"
        self.model[offset : offset + size] = now
        self._compare()

    @contextmanager
    def _failing(self, places: Sequence[tuple[Any, str]] = _TRANSFERS) -> Iterator[None]:
        """A host that fails at some calls, or does a part of what they ask for."""
        rng, likely = self.rng, self.rng.choice((0.1, 0.2, 0.5))

        def sometimes(real: Callable[..., Any], is_transfer: bool) -> Callable[..., Any]:
            def call(*arguments: Any, **named: Any) -> Any:
                if rng.random() < likely:
                    if is_transfer and rng.random() < 0.3:
                        return max(0, real(*arguments, **named) - SECTOR)
                    raise OSError(rng.choice(_ERRORS), "a fault")
                return real(*arguments, **named)

            return call

        with ExitStack() as patches:
            for module, name in places:
                real = getattr(module, name)
                wrapped = sometimes(real, name in _SHORT)
                patches.enter_context(mock.patch.object(module, name, wrapped))
            yield

    def faults(self) -> None:
        """Requests fail or do what they say; where one has failed that changes the disk, its own
        range may be anything afterwards, and nothing else may be."""
        unknown: list[tuple[int, int]] = []
        if self.server is not None:
            self.server.fails = 0.4
        with self._failing():
            for _ in range(3):
                self._try(unknown)
        if self.server is not None:
            self.server.fails = 0.0
        for offset, size in unknown:
            size = min(size, len(self.model) - offset)
            if size > 0:
                data = bytearray(size)
                self.disk.readv([memoryview(data)], size, offset)
                self.model[offset : offset + size] = data
        self._compare()

    def _try(self, unknown: list[tuple[int, int]]) -> None:
        offset, size = self._place()
        way = self.rng.choice(("read", "write", "write", "zero", "discard", "flush", "resize"))
        self.note(f"{way} of {size} at {offset} on a host that fails")
        data = self.rng.randbytes(size) if way == "write" else bytes(size)
        try:
            if way == "read":
                into = self._views(size)
                self.disk.readv(into, size, offset)
                if not unknown:
                    self._same(b"".join(into), offset)
            elif way == "write":
                self.disk.writev(self._views(size, data), size, offset)
            elif way == "zero":
                self.disk.write_zeroes(offset, size, self.rng.random() < 0.5)
            elif way == "discard":
                unknown.append((offset, size))
                self.disk.discard(offset, size)
            elif way == "flush":
                self.disk.flush()
            elif self.disk.can_resize:
                self._resize_or_not()
        except HostError as error:
            assert "\n" not in str(error)
            if way in ("write", "zero"):
                unknown.append((offset, size))
        else:
            if way in ("write", "zero"):
                self.model[offset : offset + size] = data

    def _resize_or_not(self) -> None:
        """A size that cannot be had leaves one of the two, and what both have is as before."""
        size = SECTOR * self.rng.choice((8, 40, _LARGEST, _GROWN))
        before = len(self.model)
        try:
            self.disk.resize(size)
        finally:
            now = self.disk.size_sectors * SECTOR
            assert now in (before, size), f"{now} bytes, not {before} or {size}"
            if now == before:  # the host may have failed also as that was put back
                self.kept_sizes = {before, size}
            self._has_become(now)

    def _has_become(self, size: int) -> None:
        self.model = self.model[:size] + bytes(max(0, size - len(self.model)))
        if self.over in ("file", "direct"):
            self.base_bytes = self.base_bytes[:size]

    def _compare(self) -> None:
        data = bytearray(len(self.model))
        self.disk.readv([memoryview(data)], len(data), 0)
        self._same(bytes(data), 0)

    def _look_again(self) -> None:
        data = bytearray(len(self.model))
        self.disk.readv([memoryview(data)], len(data), 0)
        self.model = data

    def nonsense(self) -> None:
        """The server says what it must not: a request fails, and all that follow may."""
        if self.server is None:
            return
        self.note("nonsense")
        self.server.errs = 0.5
        for way in (self.read, self.write, self.zero, self.discard, self.flush) * 2:
            with suppress(HostError, AssertionError):  # the data may be anything, too
                way()
        self.close()
        with suppress(HostError):
            self.server = Server(self.model[:], self.rng, read_only=True, plain=True)
            self.server.errs = 0.5
            self._add(NbdBackend(_libnbd(), self.server.connection, "disk", patience=60))
        raise _Ended

    def cut_short(self) -> None:
        """Somebody cuts the image short, and gives it back its length."""
        if self.over not in ("file", "direct"):
            return
        size = self.image.stat().st_size
        os.truncate(self.image, size // 2)
        with suppress(HostError):
            self.disk.readv([memoryview(bytearray(len(self.model)))], len(self.model), 0)
        with suppress(HostError):
            self.disk.resize(None)
        os.truncate(self.image, size)
        self.disk.resize(None)
        self._look_again()

    def run(self) -> None:
        ways = (
            *(self.read, self.read, self.write, self.write, self.write, self.zero, self.discard),
            *(self.flush, self.expect, self.resize, self.again, self.save, self.share),
            *(self.faults, self.cut_short, self.nonsense, self.close_badly),
        )
        for _ in range(self.rng.randint(1, 16)):
            self.rng.choice(ways)()
        data = bytearray(len(self.model))
        self.disk.readv([memoryview(data)], len(data), 0)
        self._same(bytes(data), 0)
        if self.over in ("overlay", "snapshot"):
            assert self.image.read_bytes() == self.base_bytes, "an overlay's image has changed"
        if self.over == "overlay":
            self._damaged()

    # --- damage ----------------------------------------------------------------------------------

    def _damaged(self) -> None:
        """A file that is not what it was: it is refused, or is some overlay."""
        rng = self.rng
        self.close()
        kept = self.changes.read_bytes()[: PAGE + 64]
        head = bytearray(kept)
        way = rng.randrange(5)
        if way == 0:
            head[rng.randrange(84)] ^= 1 << rng.randrange(8)
        elif way == 1:  # by somebody who knows the checksum
            at, value = rng.choice(((8, 1), (8, 3), (12, 13), (16, 0), (24, 0), (56, 0), (64, 0)))
            more = rng.choice((0, 1, 511, SECTOR, PAGE, 1 << 40, (1 << 64) - 1))
            struct.pack_into("<I" if at < 16 else "<Q", head, at, value or more)
            self._sum(head, 56 if int.from_bytes(head[8:12], "little") == 1 else 80)
        elif way == 2:  # one of the first version
            head[8:12] = (1).to_bytes(4, "little")
            self._sum(head, 56)
        elif way == 3:
            os.truncate(self.changes, rng.choice((0, 100, PAGE, PAGE + 1)))
        else:
            head[: len(MAGIC)] = rng.randbytes(len(MAGIC))
        self.note(f"damaged, way {way}")
        if way != 3:
            with open(self.changes, "r+b") as file:
                file.write(head)
        base = self._raw(read_only=True)
        how = open_overlay if rng.random() < 0.7 else open_saved
        try:
            disk = self._add(how(base, str(self.changes)))
        except PyvmmError as error:
            assert "\n" not in str(error)
            return
        data = bytearray(min(disk.size_sectors * SECTOR, 1 << 20))
        with suppress(HostError):
            disk.readv([memoryview(data)], len(data), 0)
            if how is open_overlay:
                disk.writev([memoryview(data)], len(data), 0)

    def _sum(self, head: bytearray, at: int) -> None:
        struct.pack_into("<I", head, at, zlib.crc32(head[:at]))


class _Ended(Exception):
    """There is nothing left to compare."""


def storage_case(rng: Random, ring: Ring) -> int:
    """One disk's storage, whatever the ring; how many steps there were."""
    case = _Case(rng)
    try:
        case.run()
    except _Ended:
        pass
    except BaseException as error:
        error.add_note("\n".join(case.steps))
        raise
    finally:
        case.close()
    return len(case.steps)
