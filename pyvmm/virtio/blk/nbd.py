"""A disk behind an NBD server, by libnbd: the protocol is its business, checked on its side.

libnbd's Python binding is built for the system's own interpreter only; its C interface is stable
(libnbd(3)) and small here, so ctypes calls it. Its handles may be used by several threads.
"""

from __future__ import annotations

import ctypes
import errno
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any

from pyvmm.errors import ConfigError, HostError
from pyvmm.host.files import SECTOR
from pyvmm.virtio.blk.backend import Backend, cut_all, scatter

LIBRARY = "libnbd.so.0"
CMD_FLAG_NO_HOLE = 1 << 1  # <libnbd.h> LIBNBD_CMD_FLAG_NO_HOLE
_LARGEST = 4 << 20  # bytes of one request, and of the buffers here and in the server for it
_SIZE, _U64, _U32, _HANDLE = ctypes.c_size_t, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p
_PROTOTYPES: dict[str, tuple[Any, ...]] = {  # result, arguments
    "nbd_create": (_HANDLE,),
    "nbd_close": (None, _HANDLE),
    "nbd_shutdown": (ctypes.c_int, _HANDLE, _U32),
    "nbd_set_export_name": (ctypes.c_int, _HANDLE, ctypes.c_char_p),
    "nbd_connect_socket": (ctypes.c_int, _HANDLE, ctypes.c_int),
    "nbd_get_size": (ctypes.c_int64, _HANDLE),
    "nbd_is_read_only": (ctypes.c_int, _HANDLE),
    "nbd_can_trim": (ctypes.c_int, _HANDLE),
    "nbd_can_zero": (ctypes.c_int, _HANDLE),
    "nbd_pread": (ctypes.c_int, _HANDLE, ctypes.c_void_p, _SIZE, _U64, _U32),
    "nbd_pwrite": (ctypes.c_int, _HANDLE, ctypes.c_void_p, _SIZE, _U64, _U32),
    "nbd_flush": (ctypes.c_int, _HANDLE, _U32),
    "nbd_trim": (ctypes.c_int, _HANDLE, _U64, _U64, _U32),
    "nbd_zero": (ctypes.c_int, _HANDLE, _U64, _U64, _U32),
    "nbd_get_errno": (ctypes.c_int,),
    "nbd_get_error": (ctypes.c_char_p,),
}


def load() -> Any:
    """The library with its functions' types. Raises ConfigError if it is not installed."""
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        raise ConfigError(
            "a qcow2 image needs libnbd", cure="apt-get install libnbd0", option="--disk"
        ) from None
    for name, (result, *arguments) in _PROTOTYPES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@contextmanager
def _ended_after(seconds: float | None, connection: socket.socket) -> Iterator[None]:
    """`connection` ends if that is not left in so many seconds: libnbd itself waits for ever."""
    if seconds is None:
        yield
        return
    over = Event()
    with connection.dup() as copy:

        def watch() -> None:
            if not over.wait(seconds):
                with suppress(OSError):  # it has ended
                    copy.shutdown(socket.SHUT_RDWR)

        watcher = Thread(target=watch, name="nbd-handshake", daemon=True)
        try:
            watcher.start()
        except RuntimeError:  # all that Python says of pthread_create's EAGAIN
            raise HostError(errno.EAGAIN, "thread for a handshake") from None
        try:
            yield
        finally:
            over.set()
            watcher.join()


class NbdBackend(Backend):
    """The export `name` of the NBD server behind the connected socket `connection`, taken over."""

    def __init__(
        self, library: Any, connection: socket.socket, name: str, *, patience: float | None = None
    ) -> None:
        """Negotiate; waits for the server, for `patience` seconds at most, None for ever. Raises
        HostError if it does not want us."""
        self._library = library
        self._handle = library.nbd_create()
        try:
            self._check(self._handle or -1, "nbd_create")
            self._call("nbd_set_export_name", name.encode(), what="export name")
            with _ended_after(patience, connection):
                self._call("nbd_connect_socket", connection.detach(), what="NBD handshake")
            self.size_sectors = self._call("nbd_get_size", what="size") // SECTOR
            self.read_only = bool(self._call("nbd_is_read_only", what="access"))
            self.can_discard = bool(self._call("nbd_can_trim", what="discard"))
            self._can_zero = bool(self._call("nbd_can_zero", what="write zeroes"))
        except BaseException:
            library.nbd_close(self._handle)
            raise

    def _call(self, function: str, *arguments: object, what: str) -> int:
        result: int = getattr(self._library, function)(self._handle, *arguments)
        self._check(result, what)
        return result

    def _check(self, result: int, what: str) -> None:
        if result < 0:
            # Both are kept per thread.
            number = self._library.nbd_get_errno() or errno.EIO
            raise HostError(number, f"NBD: {what}")

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        """See Backend. One request fills one buffer, so several views go through one of ours."""
        for pieces, count in cut_all(views, _LARGEST):
            if len(pieces) == 1:
                self._read(pieces[0], offset)
            else:
                data = memoryview(bytearray(count))
                self._read(data, offset)
                scatter(data, pieces)
            offset += count

    def _read(self, view: memoryview, offset: int) -> None:
        count = len(view)
        address = ctypes.byref(ctypes.c_char.from_buffer(view))
        what = f"read of {count} bytes at {offset:#x}"
        self._call("nbd_pread", address, count, offset, 0, what=what)

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        """See Backend."""
        for pieces, count in cut_all(views, _LARGEST):
            what = f"write of {count} bytes at {offset:#x}"
            self._call("nbd_pwrite", b"".join(pieces), count, offset, 0, what=what)
            offset += count

    def flush(self) -> None:
        """See Backend."""
        self._call("nbd_flush", 0, what="flush")

    def discard(self, offset: int, size: int) -> None:
        """See Backend."""
        if self.can_discard:
            what = f"discard of {size} bytes at {offset:#x}"
            self._call("nbd_trim", size, offset, 0, what=what)

    def write_zeroes(self, offset: int, size: int, may_unmap: bool) -> None:
        """See Backend."""
        if not self._can_zero:
            super().write_zeroes(offset, size, may_unmap)
            return
        flags = 0 if may_unmap else CMD_FLAG_NO_HOLE
        what = f"write zeroes of {size} bytes at {offset:#x}"
        self._call("nbd_zero", size, offset, flags, what=what)

    def close(self) -> None:
        """See Backend: take leave of the server."""
        if self._handle is not None:
            self._library.nbd_shutdown(self._handle, 0)
            self._library.nbd_close(self._handle)
            self._handle = None
