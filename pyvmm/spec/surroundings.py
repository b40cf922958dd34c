"""The surroundings of a VM's monitor, which are not part of the VM: its box, its user, who may ask
it, and how long a guest has that is asked to power off.

Made from the same options as the VM itself (`pyvmm.spec.options`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Self

from pyvmm.errors import ConfigError
from pyvmm.spec.record import Record, replace

AUTO, STRICT, OFF = "auto", "strict", "off"
MODES = (AUTO, STRICT, OFF)

WATCH, CONTROL, EXEC = "watch", "control", "exec"
RIGHTS = (WATCH, CONTROL, EXEC)
"""Of whoever connects to a control socket: each has those before it as well."""

STOP_SECONDS = 30.0
"""The time that a guest may take after it was asked to power off, until its power is cut."""
_LONGEST_STOP = 86_400  # seconds

_SOCKET_OPTION = "--control-socket"
_MOST_SOCKETS = 8


class ControlSocket(Record):
    """One more control socket at `path`. Who connects has `rights`, one of RIGHTS; who may, its
    file says: its owner, and with `group` that group's members."""

    path: str
    rights: str = WATCH
    group: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """``PATH[,rights=RIGHTS][,group=NAME]``. Raises ConfigError."""
        path, *words = text.split(",")
        given: dict[str, str] = {}
        for word in words:
            key, equals, value = word.partition("=")
            if key not in ("rights", "group") or not equals or key in given:
                raise ConfigError(
                    f"{word!r:.100} says nothing about a control socket",
                    cure=f"PATH[,rights={'|'.join(RIGHTS)}][,group=NAME]",
                    option=_SOCKET_OPTION,
                )
            given[key] = value
        return cls(path, **given)

    def check(self) -> None:
        """Raises ConfigError."""
        if not self.path or "\0" in self.path:
            raise ConfigError(
                f"{self.path!r} cannot be a socket", cure="name a path", option=_SOCKET_OPTION
            )
        if self.rights not in RIGHTS:
            raise ConfigError(
                f"there are no rights {self.rights!r:.100}",
                cure=f"choose from {', '.join(RIGHTS)}",
                option=_SOCKET_OPTION,
            )


class Surroundings(Record):
    """`confine` is one of MODES. `allow_read` are paths that code of the user's may read once the
    monitor is confined. `user` is whom root's monitor becomes then: AUTO, ``BASE-LAST``, a name or
    ``UID:GID``; "" for AUTO with a box and nobody without. `cgroup` is the group of processes that
    it joins first, "" for none. `sockets` are more control sockets.
    `stop_timeout` are the seconds that a guest has to power off after a signal."""

    confine: str = AUTO
    allow_read: tuple[str, ...] = ()
    user: str = ""
    cgroup: str = ""
    sockets: tuple[ControlSocket, ...] = ()
    stop_timeout: float = STOP_SECONDS

    def with_paths(self, change: Callable[[str], str]) -> Self:
        """The same with all paths as `change` gives them."""
        return replace(
            self,
            allow_read=tuple(map(change, self.allow_read)),
            cgroup=change(self.cgroup) if "/" in self.cgroup else self.cgroup,
            sockets=tuple(replace(one, path=change(one.path)) for one in self.sockets),
        )

    def check_files(self) -> None:
        """Raises ConfigError."""
        for path in self.allow_read:
            if not os.path.exists(path):
                raise ConfigError(
                    f"{path} is not there", cure="name a file or a folder", option="--allow-read"
                )

    def as_values(self) -> dict[str, Any]:
        """The values of the options that it was made from."""
        sockets = [dict(vars(one)) for one in self.sockets]
        return {
            **{"confine": self.confine, "allow_read": list(self.allow_read), "user": self.user},
            **{"cgroup": self.cgroup, "control_socket": sockets},
            "stop_timeout": self.stop_timeout,
        }


NAMES = tuple(Surroundings().as_values())
USUAL = Surroundings()


def read_surroundings(values: Mapping[str, Any]) -> Surroundings:
    """The surroundings that the options among `values` describe, by their names. Raises
    ConfigError."""
    found = Surroundings(
        confine=values.get("confine") or AUTO,
        allow_read=tuple(_texts(values.get("allow_read"), "--allow-read")),
        user=values.get("user") or "",
        cgroup=values.get("cgroup") or "",
        sockets=tuple(map(_socket, _list(values.get("control_socket")))),
        stop_timeout=_seconds(values.get("stop_timeout")),
    )
    if len(found.sockets) > _MOST_SOCKETS:
        raise ConfigError(
            f"{len(found.sockets)} control sockets are too many",
            cure=f"name {_MOST_SOCKETS} at the most",
            option=_SOCKET_OPTION,
        )
    for one in found.sockets:
        one.check()
    if len({os.path.abspath(one.path) for one in found.sockets}) < len(found.sockets):
        raise ConfigError(
            "two control sockets have one path", cure="name another", option=_SOCKET_OPTION
        )
    return found


def _seconds(value: Any) -> float:
    if value is None:
        return STOP_SECONDS
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(
            f"{value!r:.100} is not a time", cure="a number of seconds", option="--stop-timeout"
        )
    if not 0 <= value <= _LONGEST_STOP:  # as what is not a number
        raise ConfigError(
            f"a guest cannot have {value!r:.100} seconds to power off",
            cure=f"choose from 0 to {_LONGEST_STOP}",
            option="--stop-timeout",
        )
    return float(value)


def _list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _texts(value: Any, option: str) -> list[str]:
    found = [os.fspath(one) if hasattr(one, "__fspath__") else one for one in _list(value)]
    for one in found:
        if not isinstance(one, str) or not one or "\0" in one:
            raise ConfigError(f"{one!r:.100} is not a path", cure="name a path", option=option)
    return found


def _socket(value: Any) -> ControlSocket:
    if isinstance(value, ControlSocket):
        return value
    if isinstance(value, str):
        return ControlSocket.parse(value)
    if isinstance(value, Mapping) and all(isinstance(word, str) for word in value.values()):
        try:
            return ControlSocket(**value)
        except TypeError:
            pass
    raise ConfigError(
        f"{value!r:.100} is not a control socket",
        cure="a text such as PATH,rights=watch, or a table with path, rights and group",
        option=_SOCKET_OPTION,
    )
