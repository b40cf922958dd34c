"""The control sockets of a VM: the first, and others beside it for those who may only do some
things."""

from __future__ import annotations

import _socket
import os
import stat
from collections.abc import Iterable
from contextlib import closing
from typing import NamedTuple

from pyvmm.control.registry import Registration
from pyvmm.errors import ConfigError, HostError
from pyvmm.host import unix_sockets
from pyvmm.host.named_listener import NamedListener
from pyvmm.host.syscalls import Closable
from pyvmm.host.unix_sockets import Socket
from pyvmm.spec.surroundings import EXEC, ControlSocket

_OPTION = "--control-socket"
MAX_CLIENTS = 32
MAX_AT_DOOR = 8


class Door(NamedTuple):
    """A listening socket. Who connects has `rights`, one of RIGHTS; with `owner_only` connections
    of other users are closed at once. At most `most` clients have come in by it; unless it is for
    its owner only, those whose connections have become others count as well. Connections come by
    the channel `passes` (pyvmm.monitor.broker), if there is one, until that ends."""

    socket: Socket
    rights: str = EXEC
    owner_only: bool = True
    most: int = MAX_CLIENTS
    passes: _socket.socket | None = None


class Doors(Closable):
    """The sockets, listening; closing removes them."""

    def __init__(self, sockets: Iterable[ControlSocket], registration: Registration) -> None:
        """Raises ConfigError if one cannot be had, or if the VM has no first one."""
        if registration.listener is None:
            raise ConfigError(
                "a VM without a control socket of its own has no others",
                cure="set XDG_RUNTIME_DIR to a directory of yours",
                option=_OPTION,
            )
        self._listeners: list[NamedListener] = []
        self.doors: list[Door] = []
        try:
            for one in sockets:
                group = _group_of(one.group) if one.group else None
                listener = NamedListener(one.path, option=_OPTION)
                self._listeners.append(listener)
                if group is not None:
                    _admit(listener, group)
                self.doors.append(Door(listener.socket, one.rights, False, MAX_AT_DOOR))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._listeners:
            self._listeners.pop().close()


def _group_of(name: str) -> int:
    """Raises ConfigError."""
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        raise ConfigError(
            f"there is no group {name!r:.100}", cure="getent group lists them", option=_OPTION
        ) from None


def _admit(listener: NamedListener, group: int) -> None:
    """Let members of `group` connect. Raises ConfigError."""
    path = listener.path
    try:
        # The socket itself, and not what somebody has put in its place: in a folder of another
        # user's that may be a way to any socket of ours.
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            place = f"/proc/self/fd/{fd}"
            if not stat.S_ISSOCK(os.fstat(fd).st_mode) or not _leads_to(place, listener):
                raise ConfigError(
                    f"{path} is not the socket that was made there any more",
                    cure="name one in a directory of yours",
                    option=_OPTION,
                )
            os.chown(place, -1, group)
            os.chmod(place, 0o660)
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be given to its group: {error.strerror}",
            cure="be a member of it",
            option=_OPTION,
        ) from None


def _leads_to(place: str, listener: NamedListener) -> bool:
    """True if a connection to `place` comes to `listener`."""
    try:
        with closing(unix_sockets.connect_here(place)) as ours:
            # To one end of a connection, the process at the other is the one that listens.
            is_ours = unix_sockets.peer(ours).pid == os.getpid()
            return is_ours and bool(ours.getpeername() == listener.socket.getsockname())
    except HostError:
        return False
