"""The process that a container image runs: its configuration, with names turned into numbers by its
own files.

OCI image specification 1.1, "Image Configuration": Entrypoint, Cmd, Env, WorkingDir, User.
"""

from __future__ import annotations

import io
import posixpath
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from pyvmm.images.container.refusal import Refused, shown
from pyvmm.images.container.tree import Tree
from pyvmm.images.user_image import Process

_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_MOST_TEXT = 128 << 10  # bytes of arguments and environment; Linux takes no longer one
_FILE_LIMIT = 1 << 20
_MOST_FIELDS = 8  # of a line of /etc/passwd or /etc/group; there are 7 and 4
_VARIABLE = re.compile(r"[^=\0]+=[^\0]*", re.DOTALL)
_MOST_ID = (1 << 32) - 2


class Account(NamedTuple):
    """A line of /etc/passwd."""

    name: str
    uid: int
    gid: int
    home: str


def read(config: dict[str, Any], tree: Tree) -> Process:
    """The process that `config` describes, to be run in `tree`. Raises Refused."""
    env = [_text(line, "Env") for line in _list(config.get("Env"), "Env")]
    wrong = next((line for line in env if not _VARIABLE.fullmatch(line)), None)
    if wrong is not None:
        raise Refused(f"its Env has {shown(wrong)}, which is not a variable")
    account, groups = _account(_text(config.get("User") or "", "User"), tree)
    names = {line.partition("=")[0] for line in env}
    if "PATH" not in names:
        env.insert(0, _PATH)
    if "HOME" not in names:
        env.append(f"HOME={account.home}")
    process = Process(
        entrypoint=tuple(
            _text(word, "Entrypoint") for word in _list(config.get("Entrypoint"), "Entrypoint")
        ),
        command=tuple(_text(word, "Cmd") for word in _list(config.get("Cmd"), "Cmd")),
        env=tuple(env),
        cwd=_folder(_text(config.get("WorkingDir") or "/", "WorkingDir")),
        user=f"{account.uid}:{account.gid}",
        groups=groups,
    )
    words = (*process.argv(), *process.env)
    if sum(len(word.encode(errors="surrogatepass")) + 1 for word in words) > _MOST_TEXT:
        raise Refused("its arguments and environment are longer than Linux allows")
    return process


def _folder(path: str) -> str:
    if not path.startswith("/"):
        raise Refused(f"its WorkingDir is {shown(path)}, which is not an absolute path")
    return "/" + posixpath.normpath(path).lstrip("/")


def _account(user: str, tree: Tree) -> tuple[Account, tuple[int, ...]]:
    """The account that "", "UID", "NAME", "UID:GID" or "NAME:GROUP" means, and its other groups."""
    name, _, group = user.partition(":")
    accounts = _accounts(tree)
    if _is_number(name):
        uid = _id(name)
        found = next((one for one in accounts if one.uid == uid), Account("", uid, 0, "/"))
    else:
        default = None if name else Account("root", 0, 0, "/root")
        one = next((one for one in accounts if one.name == (name or "root")), default)
        if one is None:
            raise Refused(f"its User is {shown(user)}, which its /etc/passwd does not have")
        found = one
    groups = _groups(tree)
    if not group:
        others = sorted({gid for _, gid, members in groups if found.name in members} - {found.gid})
        return found, tuple(others)
    if _is_number(group):
        return found._replace(gid=_id(group)), ()
    for name, gid, _ in groups:
        if name == group:
            return found._replace(gid=gid), ()
    raise Refused(f"its User is {shown(user)}, whose group its /etc/group does not have")


def _is_number(text: str) -> bool:
    """True if all are digits: a number, whatever users and groups are called."""
    return text.isascii() and text.isdigit()


def _accounts(tree: Tree) -> list[Account]:
    found = []
    for fields in _lines(tree, "etc/passwd"):
        if len(fields) >= 6 and fields[2].isdigit() and fields[3].isdigit():
            home = fields[5] or "/"
            found.append(Account(fields[0], _id(fields[2]), _id(fields[3]), home))
    return found


def _groups(tree: Tree) -> list[tuple[str, int, list[str]]]:
    return [
        (fields[0], _id(fields[2]), [name for name in fields[3].split(",") if name])
        for fields in _lines(tree, "etc/group")
        if len(fields) >= 4 and fields[2].isdigit()
    ]


def _lines(tree: Tree, path: str) -> Iterator[list[str]]:
    for line in io.BytesIO(tree.read(path, _FILE_LIMIT)):
        text = line.decode("ascii", "surrogateescape").removesuffix("\n")
        yield text.split(":", _MOST_FIELDS)


def _id(digits: str) -> int:
    number = int(digits[:12])
    if number > _MOST_ID:
        raise Refused(f"{digits[:40]} is not a user or group")
    return number


def _list(value: object, what: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise Refused(f"its {what} is not a list")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise Refused(f"its {what} has something in it that is not a text")
    return value
