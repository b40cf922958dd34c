"""Control sockets beside the first, for those who may only do some things."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from pyvmm.control.registry import Registration
from pyvmm.control.server import MAX_AT_DOOR, Door
from pyvmm.errors import ConfigError
from pyvmm.host.named_listener import NamedListener
from pyvmm.host.syscalls import Closable
from pyvmm.spec.surroundings import ControlSocket

_OPTION = "--control-socket"


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
                    _admit(one.path, group)
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


def _admit(path: str, group: int) -> None:
    """Let members of `group` connect. Raises ConfigError."""
    try:
        # The socket itself, and not what somebody may put in its place.
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if not stat.S_ISSOCK(os.fstat(fd).st_mode):
                raise ConfigError(f"{path} is no socket any more", cure="name one", option=_OPTION)
            place = f"/proc/self/fd/{fd}"
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
