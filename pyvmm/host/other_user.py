"""Becoming another user, for good: for a monitor that root has started."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from pyvmm.errors import ConfigError

_OPTION = "--user"


class OtherUser(NamedTuple):
    """The user to become, without other groups."""

    uid: int
    gid: int

    @classmethod
    def named(cls, text: str) -> OtherUser:
        """The user called `text`, or ``UID:GID``. Raises ConfigError."""
        uid, colon, gid = text.partition(":")
        if colon and uid.isdecimal() and gid.isdecimal() and max(len(uid), len(gid)) < 10:
            found = cls(int(uid), int(gid))
        else:
            found = cls._by_name(text)
        if not found.uid or not found.gid:
            raise ConfigError(
                f"{text!r:.100} is root, or in its group",
                cure="make a user for this: useradd --system NAME",
                option=_OPTION,
            )
        if os.geteuid():
            raise ConfigError(
                "only root can become another user", cure="start pyvmm as root", option=_OPTION
            )
        return found

    @classmethod
    def _by_name(cls, name: str) -> OtherUser:
        import pwd

        try:
            found = pwd.getpwnam(name)
        except (KeyError, ValueError):
            raise ConfigError(
                f"there is no user {name!r:.100}",
                cure="make one: useradd --system NAME; or say UID:GID",
                option=_OPTION,
            ) from None
        return cls(found.pw_uid, found.pw_gid)

    def become(self) -> None:
        """Be that user, with all threads and without any capability. Raises OSError."""
        os.setgroups(())
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)

    def check_reads(self, folders: Iterable[str]) -> None:
        """Raise ConfigError for one of `folders` that he cannot read. To be called before there are
        other threads."""
        wanted = list(folders)
        child = os.fork()
        if not child:
            missing = len(wanted)
            try:
                self.become()
                for number, path in enumerate(wanted):
                    if os.path.exists(path) and os.access(path, os.R_OK):
                        continue
                    missing = number
                    break
                else:
                    missing = 255
            finally:
                os._exit(missing)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != 255:
            path = wanted[code] if 0 <= code < len(wanted) else "anything"
            raise ConfigError(
                f"user {self.uid} cannot read {path}, where Python's modules are",
                cure="install pyvmm where all can read it, in /opt, say",
                option=_OPTION,
            )
