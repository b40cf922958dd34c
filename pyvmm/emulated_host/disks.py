"""Resizing the disks of a running emulated host, asked for by the monitor inside.

The monitor inside is trusted only with these disks: it can write all of them, and so may give them
another size, and may do no more.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from threading import Lock, Thread

from pyvmm.emulated_host.qemu import SECTOR
from pyvmm.emulated_host.qmp import Qmp
from pyvmm.emulated_host.spec import EmulatedHostError, EmulatedHostSpec, HostDisk
from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.host.unix_sockets import Socket

_PATIENCE = 10.0  # seconds for a request to arrive, once somebody has connected
_MAX_LINE = 8192
_MAX_SIZE = 1 << 63


class DiskService:
    """Answers requests to resize a disk: a line of JSON each way, one request a connection.

    {"path": "/images/data.img", "size": 4294967296}    or null, for what the image has by now
    {"size": 4294967296}                                or {"error": "..."}
    """

    def __init__(self, spec: EmulatedHostSpec, qmp: Qmp) -> None:
        self._disks = {os.path.realpath(disk.path): (n, disk) for n, disk in enumerate(spec.disks)}
        self._qmp = qmp
        self._busy = Lock()

    def add(self, path: str, number: int, disk: HostDisk) -> None:
        """`disk`, which is number `number`, is known inside by `path` from now on."""
        self._disks[path] = number, disk

    def drop(self, path: str) -> None:
        """Forget the disk that was known by `path`, as it has gone."""
        self._disks.pop(path, None)

    def connect(self) -> Socket:
        """The other end of a connection; a thread answers at ours. Raises HostError, EAGAIN while
        there is another."""
        if not self._busy.acquire(blocking=False):
            raise HostError(errno.EAGAIN, "resize of two disks at once")
        try:
            ours, theirs = unix_sockets.pair()
        except HostError:
            self._busy.release()
            raise
        connection = socket.socket(fileno=ours.detach())
        Thread(target=self._serve, args=(connection,), name="resize", daemon=True).start()
        return theirs

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                connection.settimeout(_PATIENCE)
                connection.sendall(json.dumps(self._answer(connection)).encode() + b"\n")
        except OSError:
            pass  # nobody waits for the answer any more
        finally:
            self._busy.release()

    def _answer(self, connection: socket.socket) -> dict[str, object]:
        line = b""
        while not line.endswith(b"\n") and len(line) < _MAX_LINE:
            data = connection.recv(_MAX_LINE)
            if not data:
                break
            line += data
        try:
            request = json.loads(line)
            return {"size": self._resize(request["path"], request["size"])}
        except (EmulatedHostError, HostError) as error:
            return {"error": str(error)}
        except (ValueError, KeyError, TypeError, RecursionError):
            return {"error": "not a request to resize a disk"}

    def _resize(self, path: object, size: object) -> int:
        if not isinstance(path, str) or path not in self._disks:
            raise EmulatedHostError(f"{path!r:.200} is none of the disks")
        index, disk = self._disks[path]
        if size is None:
            size = _size_now(disk)
        elif disk.read_only:
            raise EmulatedHostError(f"{path} is read-only")
        if type(size) is not int or not 0 < size < _MAX_SIZE or size % SECTOR:
            raise EmulatedHostError(f"no disk has {size!r:.100} bytes")
        self._qmp.execute("block_resize", **{"node-name": f"disk{index}", "size": size})
        return size


def _size_now(disk: HostDisk) -> int:
    if disk.layers:
        raise EmulatedHostError(f"{disk.path}: an image of format qcow2 needs a size")
    fd = -1
    try:
        if disk.fd is not None:
            size = os.lseek(disk.fd, 0, os.SEEK_END)
        else:
            fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
            size = os.lseek(fd, 0, os.SEEK_END)
    except OSError as error:
        raise HostError(error.errno or 0, f"size of {disk.path}") from None
    finally:
        if fd >= 0:
            os.close(fd)
    return size - size % SECTOR
