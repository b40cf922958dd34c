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
import select
import shutil
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from socket import socket as Socket

from pyvmm.errors import ConfigError
from pyvmm.host import apart, box, confinement, handed, log, other_user, pausing
from pyvmm.host.apart import Supervised
from pyvmm.host.private_listener import connected_listener
from pyvmm.host.qcow2 import Layer, blockdev

PROGRAM = "qemu-storage-daemon"
_PACKAGES = "qemu-system-common qemu-utils"  # in Debian 12 it is in the first, in 13 in the second
_SETPRIV = ("setpriv", "util-linux")
EXPORT = "disk"
# The names of what is handed over: its connection, and what Supervised has.
_NAMES = ("storage-daemon", "storage-daemon-says", "storage-daemon-life", "storage-daemon-process")
_TAKES = (handed.take_pipe, handed.take_pipe, handed.need)
_PLACE = "/proc/self/fd/{}"  # by which another process that has the descriptor opens it again
_PATIENCE = 10.0  # seconds for a clean end, in which it writes what it holds back


class Serving:
    """A running daemon that serves the image at `path`. `socket` is our end of its NBD connection,
    for one client to take over."""

    def __init__(self, path: str, socket: Socket, says: int, ended: Callable[[], None]) -> None:
        """`says` is what it writes its messages to; at their end `ended` is called once."""
        self.path = path
        self.socket = socket
        self._log = log.RateLimited()
        self._said: deque[str] = deque(maxlen=8)
        self._serving = False
        hears = pausing.each_line(says, self._heard, ended)
        self._watcher: pausing.Watcher = pausing.Watcher(says, "storage-daemon-says", hears)

    def _heard(self, line: str) -> None:
        self._said.append(line.strip())
        if self._serving:
            self._log(f"{self.path}: {line.strip()}")

    def serving(self) -> None:
        """The image is open: from now on the user sees what the daemon says."""
        self._serving = True

    def why_it_failed(self) -> str:
        """Its last message, in one line, after the connection has ended."""
        self.close()
        text = " ".join(self._said)
        # It quotes the option in front of the reason.
        return text.rpartition("}: ")[2] or f"{PROGRAM} ended"

    def close(self) -> None:
        """End it, with all that it holds back written to the image."""
        self._serving = False
        self._end()
        if not self._watcher.wait(_PATIENCE):
            log.to_stderr(f"{self.path}: {PROGRAM} does not end{self._give_up()}")

    def _end(self) -> None:
        raise NotImplementedError

    def _give_up(self) -> str:
        raise NotImplementedError


class StorageDaemon(Serving):
    """One that is a child of ours."""

    def __init__(self, layers: Sequence[Layer], *, direct: bool) -> None:
        """Start it on an open qcow2 image with all that it builds on. Raises ConfigError if it
        cannot be started; what it thinks of the image shows when the connection is used
        (`why_it_failed`)."""
        _find(PROGRAM, _PACKAGES)
        setpriv = _find(*_SETPRIV)
        ours, self._listener = connected_listener()
        program, self._given = _command(layers, self._listener.fileno(), direct)
        self._argv = [setpriv, "--pdeathsig", "TERM", "--", *program]
        self._process: subprocess.Popen[bytes] | None = None
        self._why_not = ""
        self._started = threading.Event()
        # The death signal comes when the thread ends that started it, so one that stays.
        if threading.current_thread() is threading.main_thread():
            self._start()
        else:
            Thread = threading.Thread
            Thread(target=self._start_and_stay, name="storage-daemon", daemon=True).start()
            self._started.wait()
        if self._process is None:
            ours.close()
            raise _cannot_start(self._why_not)
        assert self._process.stderr is not None
        says = self._process.stderr.fileno()
        super().__init__(layers[0].image.path, ours, says, self._ended)

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
            self._why_not = error.strerror or "unknown error"

    def _start_and_stay(self) -> None:
        try:
            self._start()
        finally:
            self._started.set()
        if self._process is not None:
            self._process.wait()

    def _ended(self) -> None:
        assert self._process is not None
        self._process.wait()

    def _end(self) -> None:
        assert self._process is not None
        self._process.terminate()

    def _give_up(self) -> str:
        assert self._process is not None
        self._process.kill()
        self._watcher.wait(_PATIENCE)
        return " and is killed"


class _Handed(Serving):
    """One that another process has started for us (pyvmm.host.apart)."""

    def __init__(self, path: str, socket: Socket, program: Supervised) -> None:
        self._program = program
        self._ending = threading.Lock()
        super().__init__(path, socket, program.says, self._ended)

    def _ended(self) -> None:
        poll = select.poll()
        poll.register(self._program.process, select.POLLIN)
        poll.poll(_PATIENCE * 1000)  # for its files to be closed
        os.close(self._program.says)
        os.close(self._program.process)

    def _end(self) -> None:
        with self._ending:
            life, self._program = self._program.life, self._program._replace(life=-1)
        if life >= 0:
            os.close(life)

    def _give_up(self) -> str:
        # Whoever has started it may keep the other end of its messages.
        if self._watcher.stop():
            os.close(self._program.says)
            os.close(self._program.process)
        return ""


def start(layers: Sequence[Layer], *, direct: bool) -> Serving:
    """Start a daemon on an open qcow2 image for this process. Raises ConfigError; what it thinks of
    the image is told as StorageDaemon has it."""
    if not other_user.is_to_come():
        return StorageDaemon(layers, direct=direct)
    with ExitStack() as closing:
        names = start_apart(layers, closing, direct=direct)
        with apart.handed_here(names):
            return take_over(layers[0].image.path)


def start_apart(layers: Sequence[Layer], closing: ExitStack, *, direct: bool) -> dict[str, int]:
    """Start a daemon on an open qcow2 image for another process: the descriptors for that process
    by the names that `take_over` looks for. `closing` closes ours. Raises ConfigError."""
    _find(*_SETPRIV)
    ours, listener = connected_listener()
    closing.callback(ours.close)
    with listener:
        argv, given = _command(layers, listener.fileno(), direct)
        try:
            program = apart.supervise(argv, (listener.fileno(), *given), closing)
        except (OSError, ValueError) as error:
            raise _cannot_start(getattr(error, "strerror", "") or "it is gone") from None
    return dict(zip(_NAMES, (ours.fileno(), *program), strict=True))


def take_over(path: str) -> Serving:
    """The daemon that another process has started for us on the image at `path`. Raises ConfigError
    for what is none."""
    with ExitStack() as wrong:
        socket = handed.take_stream(_NAMES[0])
        wrong.callback(socket.close)
        fds = []
        for take, name in zip(_TAKES, _NAMES[1:], strict=True):
            fds.append(take(name))
            wrong.callback(os.close, fds[-1])
        made = _Handed(path, socket, Supervised(*fds))
        wrong.pop_all()
    return made


def _cannot_start(why: str) -> ConfigError:
    return ConfigError(f"cannot start {PROGRAM}: {why}", option="--disk")


def _command(
    layers: Sequence[Layer], listener: int, direct: bool
) -> tuple[list[str], tuple[int, ...]]:
    """The command line, and the descriptors that it names beside `listener`. Raises ConfigError."""
    program = _find(PROGRAM, _PACKAGES)
    read_only = layers[0].image.read_only
    arguments = _arguments(layers, listener, read_only=read_only, direct=direct)
    given = tuple(file.fd for layer in layers for file in layer.files)
    return _confined([program, *arguments], layers), given


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
