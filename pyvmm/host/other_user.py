"""Another user, whom a monitor that root has started becomes, for good."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.host import confinement, locks

AUTO = "auto"
_OPTION = "--user"
# Numbers that nobody gives to accounts: of systemd's list (UIDS-GIDS.md, "Summary") those above
# containers' and above sssd's for domains; then those of its DynamicUser=, for containers, whose
# own are 65,536 mostly.
_USUAL = (range(2_013_265_920, 2_147_352_576), range(61_184, 65_520))
_MOST_TRIED = 1 << 10
_FEW = 1 << 16  # numbers; with fewer it is looked who has processes
_LOCK = "pyvmm-users.lock"  # a byte of it for each number that is in use
_RUN = "/run"
# <linux/capability.h>: to become somebody, and to end what he runs
_NEEDED = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}

_is_to_come = False


def expect() -> None:
    """This process is going to be another user, who can signal no program that it starts before:
    from now on all that serve it are started apart (pyvmm.host.apart)."""
    global _is_to_come
    _is_to_come = True


def is_to_come() -> bool:
    """True if `expect` was called."""
    return _is_to_come


class OtherUser(NamedTuple):
    """The user to become, without other groups. `is_own`: he was made for one VM, and nobody knows
    him. He is nobody else's for as long as the descriptor `lock` is open anywhere; without one (-1)
    he is by chance."""

    uid: int
    gid: int
    is_own: bool = False
    lock: int = -1

    @classmethod
    def wanted(cls, text: str, place: str) -> OtherUser:
        """The user called `text`, or ``UID:GID``; a new one of the numbers ``BASE-LAST``, or for
        AUTO of those that are for this. `place` is a folder of root's. Raises ConfigError."""
        if text == AUTO:
            return cls._new(_USUAL, place)
        base, dash, last = text.partition("-")
        if dash and _is_number(base) and _is_number(last):
            users = range(int(base), int(last) + 1)
            if not users or not users[0]:
                raise ConfigError(
                    f"{text!r:.100} are no users", cure="BASE-LAST, from 1 on", option=_OPTION
                )
            return cls._new((users,), place)
        return cls.named(text)

    @classmethod
    def named(cls, text: str) -> OtherUser:
        """The user called `text`, or ``UID:GID``. Raises ConfigError."""
        uid, colon, gid = text.partition(":")
        if colon and _is_number(uid) and _is_number(gid):
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

    @classmethod
    def _new(cls, users: tuple[range, ...], place: str) -> OtherUser:
        mapped = list(_mapped(users))
        reason = _why_none(mapped)
        if not reason:
            for uid, lock in _free(mapped, place):
                return cls(uid, uid, is_own=True, lock=lock)
            reason = "all users that are for this are in use"
        raise ConfigError(reason, cure="name one that can be had", option=_OPTION)

    def become(self) -> None:
        """Be that user, with all threads and without any capability. Raises OSError."""
        os.setgroups(())
        os.setresgid(self.gid, self.gid, self.gid)
        os.setresuid(self.uid, self.uid, self.uid)

    def can(self, test: Callable[[], str]) -> str:
        """The answer of `test` as that user, who is root again after it. Raises OSError."""
        uid, gid, groups = os.geteuid(), os.getegid(), os.getgroups()
        os.setgroups(())
        try:
            os.setegid(self.gid)
            os.seteuid(self.uid)
            return test()
        finally:
            os.seteuid(uid)
            os.setegid(gid)
            os.setgroups(groups)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= 10 and int(text) < (1 << 32) - 1


def why_none() -> str:
    """The reason why there is no user of its own for a VM here; "" if there is."""
    return _why_none(list(_mapped(_USUAL)))


def _why_none(mapped: list[range]) -> str:
    if os.geteuid():
        return "only root can become another user"
    lacking = [name for name, number in _NEEDED.items() if not confinement.has_capability(number)]
    if lacking:
        return f"root without {' and '.join(lacking)} is no other user"
    if _read("/proc/self/setgroups").strip() == "deny":
        return "groups cannot be given up in this user namespace"
    if not mapped:
        return "this user namespace has no such users (/proc/self/uid_map)"
    return ""


def unreadable(path: str) -> str:
    """The first of what is at `path`, a file or a folder with all that is in it, that this user
    cannot read; "" if there is none."""
    if not os.path.isdir(path):
        readable = os.access(path, os.R_OK, effective_ids=True) or _is_missing(path)
        return "" if readable else path
    if not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
        return path
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            inside = os.path.join(folder, name)
            with suppress(OSError):
                mode = os.R_OK | (os.X_OK if name in folders else 0)
                if not os.access(inside, mode, effective_ids=True) and not _is_missing(inside):
                    return inside
    return ""


def _is_missing(path: str) -> bool:
    """True if nothing is there, or a link to nothing, and False where this user may not look."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        pass
    return False


def _free(mapped: list[range], place: str) -> Iterator[tuple[int, int]]:
    """One of `mapped` whom nobody has, with the descriptor of the lock; nothing if there is
    none."""
    known = _read("/etc/passwd") + _read("/etc/group")
    lock = _lock_file(place)
    for stretch in mapped:
        # By chance none of many has processes.
        running = _running() if len(stretch) <= _FEW else frozenset[int]()
        # Chance keeps those apart who do not see one another's locks, as in containers.
        first = _random()
        for step in range(min(len(stretch), _MOST_TRIED)):
            uid = stretch[(first + step) % len(stretch)]
            if uid in running or f":{uid}:" in known:
                continue
            if lock < 0 or locks.take_byte(lock, uid):
                yield uid, lock
                return
        if len(stretch) > _MOST_TRIED:
            # No chance: somebody has locked them, for the next VM to stay root's.
            others = (stretch[_random() % len(stretch)] for _ in range(_MOST_TRIED))
            for uid in others:
                if uid not in running and f":{uid}:" not in known:
                    yield uid, lock
    if lock >= 0:
        os.close(lock)


def _running() -> frozenset[int]:
    """The users that have processes: of a VM whose keeper was killed, or a service's that systemd
    has made one for."""
    found = set[int]()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        for line in _read(f"/proc/{name}/status").splitlines():
            if line.startswith("Uid:"):
                found.update(map(int, line.split()[1:]))
    return frozenset(found)


def _random() -> int:
    return int.from_bytes(os.urandom(8), "little")


def _lock_file(place: str) -> int:
    """Its descriptor; -1 if there can be none."""
    for folder in filter(None, (_RUN, place)):
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with suppress(OSError):  # such as a full file system
            found = os.stat(folder)
            if not found.st_uid and not found.st_mode & 0o022:
                return os.open(os.path.join(folder, _LOCK), flags, 0o600)
    return -1


def _mapped(users: tuple[range, ...]) -> Iterator[range]:
    """Those of `users` that are users here, and groups, too."""
    uids, gids = (list(_stretches(f"/proc/self/{kind}_map")) for kind in ("uid", "gid"))
    for one in users:
        for uid in uids:
            for gid in gids:
                found = range(
                    max(one.start, uid.start, gid.start, 1), min(one.stop, uid.stop, gid.stop)
                )
                if found:
                    yield found


def _stretches(path: str) -> Iterator[range]:
    for line in _read(path).splitlines():
        inside, _, count = map(int, line.split())
        yield range(inside, inside + count)


def _read(path: str) -> str:
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
