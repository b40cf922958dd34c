"""An image in QEMU's own format, opened by qemu-storage-daemon and served over NBD to us alone.

The daemon gets a listening socket to which we are connected already, and takes one connection:
nobody else can come in between, nothing has to be waited for, and no name is left in the file
system. It gets the image, and what that builds on, as open descriptors (`pyvmm.host.qcow2`), whose
locks last until the last of us two has closed them; and it ends with us. Where the kernel can do
it, it works in a room in which there are no other files, and no network (`pyvmm.host.confinement`).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Sequence

from pyvmm.errors import ConfigError
from pyvmm.host import box, confinement, log, pausing
from pyvmm.host.private_listener import connected_listener
from pyvmm.host.qcow2 import Layer, blockdev

PROGRAM = "qemu-storage-daemon"
_PACKAGES = "qemu-system-common qemu-utils"  # in Debian 12 it is in the first, in 13 in the second
EXPORT = "disk"
_PLACE = "/proc/self/fd/{}"  # by which another process that has the descriptor opens it again
_PATIENCE = 10.0  # seconds for a clean end, in which it writes what it holds back


class StorageDaemon:
    """A running daemon. `socket` is our end of its NBD connection, for one client to take over."""

    def __init__(self, layers: Sequence[Layer], *, direct: bool) -> None:
        """Start it on an open qcow2 image with all that it builds on. Raises ConfigError if it
        cannot be started; what it thinks of the image shows when the connection is used
        (`why_it_failed`)."""
        self.path = layers[0].image.path
        programs = [_find(PROGRAM, _PACKAGES), _find("setpriv", "util-linux")]
        self.socket, listener = connected_listener()
        read_only = layers[0].image.read_only
        arguments = _arguments(layers, listener.fileno(), read_only=read_only, direct=direct)
        self._given = tuple(file.fd for layer in layers for file in layer.files)
        program = _confined([programs[0], *arguments], layers)
        self._argv = [programs[1], "--pdeathsig", "TERM", "--", *program]
        self._listener = listener
        self._log = log.RateLimited()
        self._said: deque[str] = deque(maxlen=8)
        self._serving = False
        self._process: subprocess.Popen[bytes] | None = None
        self._started = threading.Event()
        # The death signal comes when the thread ends that started it, so one that stays.
        if threading.current_thread() is threading.main_thread():
            self._start()
        else:
            Thread = threading.Thread
            Thread(target=self._start_and_stay, name="storage-daemon", daemon=True).start()
            self._started.wait()
        if self._process is None:
            self.socket.close()
            raise ConfigError(f"cannot start {PROGRAM}: {self.why_it_failed()}", option="--disk")
        assert self._process.stderr is not None
        fd = self._process.stderr.fileno()
        hears = pausing.each_line(fd, self._heard, self._ended)
        self._watcher: pausing.Watcher = pausing.Watcher(fd, "storage-daemon-says", hears)

    def _start(self) -> None:
        try:
            with self._listener:
                self._process = subprocess.Popen(
                    self._argv,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    bufsize=0,
                    pass_fds=(self._listener.fileno(), *self._given),
                    start_new_session=True,  # Ctrl-C is for us, not for it to die of
                )
            box.may_signal(self._process.pid)
        except OSError as error:
            self._said.append(error.strerror or "unknown error")

    def _start_and_stay(self) -> None:
        try:
            self._start()
        finally:
            self._started.set()
        if self._process is not None:
            self._process.wait()

    def _heard(self, line: str) -> None:
        self._said.append(line.strip())
        if self._serving:
            self._log(f"{self.path}: {line.strip()}")

    def _ended(self) -> None:
        assert self._process is not None
        self._process.wait()

    def serving(self) -> None:
        """The image is open: from now on the user sees what the daemon says."""
        self._serving = True

    def why_it_failed(self) -> str:
        """Its last message, in one line, after the connection has ended."""
        if self._process is not None:
            self.close()
        text = " ".join(self._said)
        # It quotes the option in front of the reason.
        return text.rpartition("}: ")[2] or f"{PROGRAM} ended"

    def close(self) -> None:
        """End it, with all that it holds back written to the image."""
        assert self._process is not None
        self._serving = False
        self._process.terminate()
        if not self._watcher.wait(_PATIENCE):
            log.to_stderr(f"{self.path}: {PROGRAM} does not end and is killed")
            self._process.kill()
            self._watcher.wait(_PATIENCE)


def _find(program: str, package: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise ConfigError(
            f"a qcow2 image needs {program}",
            cure=f"apt-get install --no-install-recommends {package}",
            option="--disk",
        )
    return os.path.realpath(found)


def _confined(program: list[str], layers: Sequence[Layer]) -> list[str]:
    """The command line that runs `program` with no files but `layers`, of which it can write those
    that are open for it."""
    if not confinement.available():
        log.to_stderr(f"this kernel cannot confine {PROGRAM}: it runs with all your rights")
        return program
    room = confinement.for_system_program(program[0], memory=0)
    files = [file for layer in layers for file in layer.files]
    room = room._replace(
        read=(*room.read, *(_PLACE.format(file.fd) for file in files if file.read_only)),
        write=tuple(_PLACE.format(file.fd) for file in files if not file.read_only),
        serves=True,
    )
    return confinement.command(room, program)


def _arguments(
    layers: Sequence[Layer], listener: int, *, read_only: bool, direct: bool
) -> list[str]:
    node = blockdev(layers, "disk", _PLACE.format, direct=direct)
    writable = "off" if read_only else "on"
    return [
        *("--blockdev", json.dumps(node)),
        *("--nbd-server", f"addr.type=fd,addr.str={listener},max-connections=1"),
        *("--export", f"type=nbd,id=export,node-name=disk,name={EXPORT},writable={writable}"),
    ]
