"""A saved state of the emulated host's own machine: made once, it spares each run the boot.

QEMU saves its machine to a file and goes on from it. The moment is the one at which the kernel is
up, its modules are loaded, and no file system of this machine is mounted (init.sh): all before it
is the same for each run. $XDG_CACHE_HOME/pyvmm/emulated-host has

    state-KEY           QEMU's stream, and a record at its end
    state-KEY.refused   empty: QEMU or the kernel cannot save or go on; a day long the machine boots
    state-lock          held while one is made

KEY is a hash of all that such a machine is made of. A file appears under its name only when it is
whole; one that is damaged, or does not fit, is removed. There are at most `MOST` of them, and those
that have not been used for longest go first.
"""

from __future__ import annotations

import fcntl
import os
import select
import struct
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from enum import Enum

from pyvmm.emulated_host.architecture import emulated_machine
from pyvmm.emulated_host.cache import BootFiles, boot_files, cache_directory, hash_of
from pyvmm.emulated_host.launch import Launched, launch
from pyvmm.emulated_host.ports import MACHINE_PORTS
from pyvmm.emulated_host.qemu import STATE_SET, file_set, machine_arguments
from pyvmm.emulated_host.qmp import Qmp
from pyvmm.emulated_host.spec import EmulatedHostError, EmulatedHostSpec
from pyvmm.host.programs import find_program

MOST = 8  # of some 100 MB each
_FORMAT = 1
_RECORD = struct.Struct("<8s24sQII")  # see `_record`
_MAGIC = b"PYVMMEHS"
_MOST_BYTES = 1 << 30  # of all together, but that there is always one
_ROOM = 512 << 20  # bytes that are free on the disk before one is made
_REFUSED_FOR = 86_400.0  # seconds
_CHUNK = 1 << 20
_BOOT_PATIENCE = 120.0  # seconds; it takes three on an idle machine
_SAVE_PATIENCE = 60.0  # seconds; less than one
_STEP = 0.01
_MOST_SAID = 100  # bytes by the control port until then
_TSC_TOLERANCE = 0.0005  # what a kernel's clock can make up for, and more than measuring is off


@dataclass(frozen=True)
class SavedState:
    """An open state: `fd` is its file, at `path`. `tsc_khz` is the rate of the time-stamp counter
    that its kernel goes by."""

    path: str
    fd: int
    length: int
    crc: int
    tsc_khz: int

    def fits(self, spec: EmulatedHostSpec) -> bool:
        """True if it is intact, and this machine's counter runs as fast as that on which it was
        made. Takes some 50 ms, while QEMU starts."""
        khz = emulated_machine(spec.image.architecture).frequency_khz()
        if khz is None or abs(khz - self.tsc_khz) > self.tsc_khz * _TSC_TOLERANCE:
            return False
        return _crc(self.fd, self.length) == self.crc

    def remove(self) -> None:
        """It is made anew for the next run."""
        _unlink(self.path)

    def refuse(self) -> None:
        """QEMU will not go on from it, though it is intact: nor would it from another."""
        self.remove()
        _mark_refused(self.path)

    def close(self) -> None:
        """Close its file."""
        os.close(self.fd)


def saved_state(spec: EmulatedHostSpec, stop: int) -> SavedState | None:
    """The state for `spec`'s machine, made now if there is none; None if there can be none, if
    somebody else is making one, or if the descriptor `stop` becomes readable meanwhile.

    Raises ConfigError for a part of the image that is missing, EmulatedHostError.
    """
    if not emulated_machine(spec.image.architecture).SAVES_STATE or spec.image.is_foreign:
        return None
    path = os.path.join(cache_directory(), f"state-{_key(spec, boot_files(spec.image))}")
    found = _open(path)
    if found is not None or _is_refused(path):
        return found
    try:
        with _making() as mine:
            if not mine:
                return None
            found = _open(path)
            if found is None and not os.path.isdir(path) and _has_room():
                try:
                    _make(spec, path, stop)
                finally:
                    _tidy(path)
                found = _open(path)
            return found
    except OSError:
        return None  # a cache that cannot be written is not a reason to fail


def _key(spec: EmulatedHostSpec, boot: BootFiles) -> str:
    """A hash of all that the machine's state depends on."""
    # A file of QEMU, the kernel: by what it looks like, as reading them takes long.
    program, *words = spec.image.qemu
    found = program if "/" in program else find_program(program) or program
    files = [found, *(word for word in (*words, boot.kernel) if word.startswith("/"))]
    looks = [(word, _look(word)) for word in files]
    arguments = machine_arguments(spec, console_fd=0, qmp_fd=0, ports=())
    parameters = emulated_machine(spec.image.architecture).kernel_parameters(None)
    parts = (_FORMAT, spec.image.qemu, looks, arguments, MACHINE_PORTS, parameters, boot)
    return hash_of(repr(parts).encode())


def _look(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


# --- the file -------------------------------------------------------------------------------------


def _record(key: str, length: int, crc: int, tsc_khz: int) -> bytes:
    """What stands behind QEMU's stream, which ends by itself: whose state it is, its length in
    bytes, the CRC-32 of it, and the counter's rate."""
    return _RECORD.pack(_MAGIC, key.encode(), length, crc, tsc_khz)


def _open(path: str) -> SavedState | None:
    """The state at `path`, from now on the one that has been used last. A file that is not one, or
    is cut off, is removed."""
    try:
        # Not to wait for whoever writes to a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    size = os.fstat(fd).st_size
    try:
        record = os.pread(fd, _RECORD.size, max(0, size - _RECORD.size))
    except OSError:  # of a directory, a FIFO, a disk that fails
        record = b""
    if len(record) == _RECORD.size:
        magic, key, length, crc, tsc_khz = _RECORD.unpack(record)
        mine = magic == _MAGIC and key.decode(errors="replace") == path.rpartition("-")[2]
        if mine and 0 < length == size - _RECORD.size:
            with suppress(OSError):
                os.utime(path)
            return SavedState(path, fd, length, crc, tsc_khz)
    os.close(fd)
    _unlink(path)
    return None


def _crc(fd: int, length: int) -> int | None:
    """None if not all of it can be read."""
    # By pread(2): QEMU reads by the same open file, whose position is shared.
    buffer = memoryview(bytearray(_CHUNK))
    crc = at = 0
    while at < length:
        try:
            count = os.preadv(fd, [buffer[: length - at]], at)
        except OSError:  # what cannot be read is damaged
            count = 0
        if not count:
            return None
        crc = zlib.crc32(buffer[:count], crc)
        at += count
    return crc


def _refused(path: str) -> str:
    return f"{path}.refused"


def _is_refused(path: str) -> bool:
    try:
        return os.stat(_refused(path)).st_mtime > time.time() - _REFUSED_FOR
    except OSError:
        return False


def _mark_refused(path: str) -> None:
    with suppress(OSError):
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        os.close(os.open(_refused(path), flags, 0o600))
        os.utime(_refused(path))


def _tidy(newest: str) -> None:
    """Keep `MOST` files, `newest` among them. The caller holds the lock: what is only part of one
    is nobody's."""
    found = []
    for entry in os.scandir(os.path.dirname(newest)):
        if entry.name.endswith(_PART):
            _unlink(entry.path)
        elif entry.name.startswith("state-") and entry.name != _LOCK:
            status = entry.stat(follow_symlinks=False)
            found.append((entry.path == newest, status.st_mtime_ns, status.st_size, entry.path))
    total = 0
    for place, (is_newest, _, size, path) in enumerate(sorted(found, reverse=True)):
        total += size
        if not is_newest and (place >= MOST or total > _MOST_BYTES):
            _unlink(path)


# --- making one -----------------------------------------------------------------------------------

_LOCK, _PART = "state-lock", ".making"


@contextmanager
def _making() -> Iterator[bool]:
    """Hold the lock; False if somebody else does, who is not waited for."""
    place = os.path.join(cache_directory(), _LOCK)
    os.makedirs(os.path.dirname(place), exist_ok=True)
    fd = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)


def _has_room() -> bool:
    status = os.statvfs(cache_directory())
    return status.f_bavail * status.f_frsize >= _ROOM


def _make(spec: EmulatedHostSpec, path: str, stop: int) -> None:
    """Boot the machine of `spec`, and have QEMU save it to `path`. Raises OSError; nothing is there
    if it did not come to that."""
    partial = f"{path}{_PART}"
    tsc_khz = emulated_machine(spec.image.architecture).frequency_khz()
    if tsc_khz is None:
        return
    # What is left there may be anything, and somebody else's: it is not written to.
    _unlink(partial)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with os.fdopen(os.open(partial, flags, 0o600), "wb") as file:
        bare = replace(spec, disks=(), sinks=(), streams=(), folders=())
        launched = launch(bare)
        try:
            booted = _booted(launched, stop)
            if booted is _Booted.UNFIT:
                _mark_refused(path)
            if booted is not _Booted.YES:
                return
            try:
                _save(Qmp(launched.qmp), file.fileno())
            except EmulatedHostError:
                # It lives, and says no. It may also be that the disk is full, once it has begun.
                if launched.process.poll() is None and not os.fstat(file.fileno()).st_size:
                    _mark_refused(path)
                return
        finally:
            launched.kill()
            launched.close()
        # The checksum tells of a power failure, too.
        with open(partial, "r+b") as written:
            length = written.seek(0, os.SEEK_END)
            crc = _crc(written.fileno(), length)
            if crc is None:
                return
            written.write(_record(path.rpartition("-")[2], length, crc, tsc_khz))
        os.replace(partial, path)


def _unlink(path: str) -> None:
    with suppress(OSError):
        os.unlink(path)


class _Booted(Enum):
    YES, UNFIT, NO = range(3)


def _booted(launched: Launched, stop: int) -> _Booted:
    """Wait until the machine can be saved. It is unfit if its kernel lacks what that needs."""
    control = launched.port("control")
    ends = {end.fileno(): end for end in (control, launched.console, launched.messages)}
    poll = select.poll()
    for fd in (*ends, stop):
        poll.register(fd, select.POLLIN)
    give_up_at = time.monotonic() + _BOOT_PATIENCE
    said = b""
    while not {b"ready", b"loaded"} <= set(said.split()):
        ready = [fd for fd, _ in poll.poll(max(0.0, give_up_at - time.monotonic()) * 1000)]
        if not ready or stop in ready or len(said) > _MOST_SAID:
            return _Booted.NO
        for fd in ready:
            data = ends[fd].recv(4096)
            if not data:
                return _Booted.NO
            said += data if ends[fd] is control else b""
        if b"unfit" in said:
            return _Booted.UNFIT
    return _Booted.YES


def _save(qmp: Qmp, fd: int) -> None:
    """Raises EmulatedHostError if QEMU does not do it."""
    qmp.execute("add-fd", fd, **{"fdset-id": STATE_SET})
    qmp.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    qmp.execute("migrate", uri=f"file:{file_set(STATE_SET)}")
    give_up_at = time.monotonic() + _SAVE_PATIENCE
    while (status := qmp.execute("query-migrate").get("status")) != "completed":
        if status in ("failed", "cancelled") or time.monotonic() > give_up_at:
            raise EmulatedHostError("QEMU did not save its state")
        time.sleep(_STEP)
