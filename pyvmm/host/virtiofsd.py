"""A directory of this machine as a file system that a guest can mount: virtiofsd, one process each.

It is told nothing but the directory, and a socket that is connected to us already, so nothing of it
has a name, and it ends when our end is closed, by whatever ends us. It sees no files but those of
the directory (its own sandbox: namespaces), and cannot make device nodes. An ordinary user's files
belong to root in the guest; what root starts passes owners on as they are.
"""

from __future__ import annotations

import os
import subprocess
import threading
from collections import deque
from collections.abc import Sequence

from pyvmm.errors import ConfigError
from pyvmm.host import box, log
from pyvmm.host.private_listener import connected_listener

PROGRAM = "virtiofsd"
_PATIENCE = 10.0  # seconds for its end, once our end of the socket is closed
_NOISE = ("Failure when trying to set the limit",)


class Virtiofsd:
    """A running virtiofsd that serves `folder`. `socket` is our end, for one front end to take."""

    def __init__(
        self, command: Sequence[str], folder: str, *, read_only: bool, sandbox: str = "namespace"
    ) -> None:
        """`command` is the beginning of its command line. Raises ConfigError if it cannot be
        started; what it says of the folder is in `why_it_ended`."""
        self.folder = folder
        self.socket, listener = connected_listener()
        self._said: deque[str] = deque(maxlen=8)
        self._log = log.RateLimited(prefix="virtiofsd: ")
        self._closing = False
        with listener:
            try:
                self._process = subprocess.Popen(
                    [
                        *command,
                        *_arguments(folder, listener.fileno(), read_only=read_only),
                        f"--sandbox={sandbox}",
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    pass_fds=(listener.fileno(),),
                    start_new_session=True,  # Ctrl-C is for us, not for it to die of
                )
            except OSError as error:
                self.socket.close()
                raise ConfigError(f"cannot start {PROGRAM}: {error.strerror}") from None
        box.may_signal(self._process.pid)
        self._thread = threading.Thread(target=self._listen, name="virtiofsd", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.rpartition("] ")[2].strip()[:200]
            if text and not text.startswith(_NOISE):
                self._said.append(text)
        self._process.wait()
        if not self._closing:
            self._log(f"{self.folder} is served no more: {self._last()}")

    def _last(self) -> str:
        return self._said[-1] if self._said else f"{PROGRAM} ended"

    def why_it_ended(self) -> str:
        """Its last message, once the connection has ended."""
        self._closing = True
        self._thread.join(_PATIENCE)
        return self._last()

    def close(self) -> None:
        """Be sure that it has gone; the socket must be closed already."""
        self._closing = True
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._process.kill()
            self._thread.join(_PATIENCE)


def _arguments(folder: str, listener: int, *, read_only: bool) -> list[str]:
    arguments = [
        f"--fd={listener}",
        f"--shared-dir={folder}",
        "--cache=auto",
        "--allow-direct-io",
        "--xattr",
        "--log-level=warn",
    ]
    if read_only:
        arguments.append("--readonly")
    if os.geteuid() == 0:
        arguments.append("--modcaps=-mknod")
    else:
        arguments += [
            f"--translate-uid=map:0:{os.geteuid()}:1",
            f"--translate-gid=map:0:{os.getegid()}:1",
        ]
    return arguments
