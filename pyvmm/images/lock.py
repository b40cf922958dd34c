"""The lock file: which version of which package each image is made of, with its SHA-256.

One line per package, "IMAGE PACKAGE VERSION SHA256", sorted, so that a refresh is a readable diff.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from pyvmm.errors import ConfigError

_HEADER = (
    "# The Debian packages of the guest images: image, package, version, SHA-256 of the .deb.\n"
    "# Written by `pyvmm image lock`; do not edit.\n"
)


class Pin(NamedTuple):
    """One package's file: `sha256` is that of the .deb, in hexadecimal."""

    package: str
    version: str
    sha256: str


Lock = dict[str, list[Pin]]  # image name → its packages


def parse(text: str, path: str = "lock") -> Lock:
    """Raises ConfigError that names the line."""
    lock: Lock = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 4 or not _is_sha256(words[3]):
            raise ConfigError(
                f"{path}:{number}: not 'image package version sha256'",
                cure="take the file from the repository again",
            )
        lock.setdefault(words[0], []).append(Pin(*words[1:]))
    return lock


def render(lock: Lock) -> str:
    lines = [f"{image} {' '.join(pin)}\n" for image in sorted(lock) for pin in sorted(lock[image])]
    return _HEADER + "".join(lines)


def read(path: str) -> Lock:
    """The lock in `path`; an empty one where there is no such file. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8") as file:
            return parse(file.read(), path)
    except FileNotFoundError:
        return {}


def write(path: str, lock: Lock) -> None:
    """Replace `path` as a whole. Raises ConfigError."""
    try:
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            file.write(render(lock))
        os.replace(f"{path}.new", path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")
