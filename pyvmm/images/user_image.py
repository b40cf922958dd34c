"""The images a user has built, each a folder in the cache: a root disk and a record of it.

$XDG_CACHE_HOME/pyvmm/user/NAME/
    rootfs.ext4     the root disk; read-only
    image.json      what it was made from, when, and how it is booted
    packages        of a Debian one: "PACKAGE VERSION" lines
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from typing import Any

from pyvmm.errors import ConfigError
from pyvmm.host import user_cache

DISK = "rootfs.ext4"
RECORD = "image.json"
_FORMAT = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_RECORD_LIMIT = 4 << 20  # bytes


@dataclass(frozen=True)
class Process:
    """The command of a container image: `entrypoint` and `command` make up its arguments.

    `env` are "NAME=VALUE"; `cwd` is an absolute path; `user` is "UID:GID", `groups` are the other
    groups' numbers.
    """

    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    cwd: str = "/"
    user: str = "0:0"
    groups: tuple[int, ...] = ()

    def argv(self, command: tuple[str, ...] = ()) -> tuple[str, ...]:
        """The whole command line, with `command` in place of the image's own if there is one."""
        return (*self.entrypoint, *(command or self.command))

    @property
    def account(self) -> str:
        """The user and all groups, as the agent reads them: "UID:GID" or "UID:GID:GID,GID"."""
        return ":".join((self.user, *([",".join(map(str, self.groups))] if self.groups else [])))


@dataclass(frozen=True)
class UserImage:
    """`made_from` is the --from that it was built with and what that led to, `made_at` an ISO 8601
    date; `kernel` is the name of a guest kernel ("6.1")."""

    name: str
    made_from: str
    made_at: str
    kernel: str
    cmdline: str = ""
    has_agent: bool = False
    details: tuple[tuple[str, str], ...] = ()
    process: Process | None = None

    @property
    def folder(self) -> str:
        return path(self.name)


def check_name(name: str) -> None:
    """Raise ConfigError for a name that an image cannot have."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"an image cannot be called {name[:80]!r}",
            cure="use at most 63 small letters, digits, dots, dashes and underscores",
        )


def path(name: str) -> str:
    """The image's folder, there or not. `name` has been checked."""
    return os.path.join(_place(), name)


def names() -> list[str]:
    """Of all that have been built, sorted."""
    try:
        entries = os.listdir(_place())
    except OSError:
        return []
    return sorted(name for name in entries if _NAME.fullmatch(name))


def find(name: str) -> UserImage | None:
    """The image called `name`, None if there is none. Raises ConfigError for a broken record."""
    file = os.path.join(path(name), RECORD)
    try:
        with open(file, encoding="utf-8") as record:
            return _parse(name, json.loads(record.read(_RECORD_LIMIT)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file} is damaged: {error}", cure=f"pyvmm image rm {name}, and build it again"
        ) from None


def write_record(image: UserImage, into: str) -> None:
    """Write the record of `image` into the folder `into`. Raises OSError."""
    data = {"format": _FORMAT, **asdict(image)}
    del data["name"]
    with open(os.path.join(into, RECORD), "w", encoding="utf-8") as file:
        json.dump(data, file, indent=1)
        file.write("\n")


def _parse(name: str, data: dict[str, Any]) -> UserImage:
    if data.pop("format") != _FORMAT:
        raise ValueError("made by another version of pyvmm")
    process = data.pop("process")
    details = tuple((str(key), str(value)) for key, value in data.pop("details"))
    return UserImage(name, details=details, process=_process(process), **data)


def _process(data: dict[str, Any] | None) -> Process | None:
    if data is None:
        return None
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
    }
    return Process(**values)


def _place() -> str:
    return os.path.join(user_cache.folder(), "user")
