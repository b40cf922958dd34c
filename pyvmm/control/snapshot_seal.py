"""A seal on snapshots that give a guest a directory or a back end of this machine.

Anybody can write a snapshot, and a state is checked for what can be, not for what somebody wanted.
Disks and persistent memory of a restored VM write to nothing of this machine; a shared directory
does, a read-only one still shows all that is in it, and a back end at a socket may do either. So
only the user who has taken a snapshot with one can use it, where it was taken: its state bears a
mark that is made with a key, which no snapshot has.

The mark is of all that the state says, and of which files lie beside it. Their bytes are not read,
as a restore must not take longer the more memory there is: a file is known by its inode and by when
it was made and last written. So what has been away, and may have been changed there, is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pyvmm.control import snapshot_store
from pyvmm.errors import ConfigError, HostError

_NOT_SEALED = frozenset({"seal", "checksum", "format", "version"})  # said last, or the same in all
_KEY_FILE = "snapshot-key"  # beside the store
_KEY_BYTES = 32


def seal(state: Mapping[str, Any], path: str) -> str:
    """The mark of `state` and of its files in the directory `path`, which are not written any more.
    Raises ConfigError without a place for the key, HostError if key or files cannot be had."""
    place = _key_path()
    try:
        key = _read(place)
        if not key:
            _make(place)
            key = _read(place)
    except OSError as error:
        raise HostError(error.errno or 0, f"the key {place}") from None
    if not key:
        raise ConfigError(f"{place} is not a key", cure="remove it, and take new snapshots")
    try:
        return _mark(state, path, key)
    except OSError as error:
        raise HostError(error.errno or 0, f"files of the snapshot in {path}") from None


def is_sealed(state: Mapping[str, Any], path: str) -> bool:
    """True if the `seal` in `state` is what `seal` has said of it and of its files, in `path`."""
    try:
        key = _read(_key_path())
        return bool(key) and state.get("seal") == _mark(state, path, key)
    except (OSError, ValueError, TypeError, KeyError):  # for files of a stranger that are none
        return False


def _key_path() -> str:
    return os.path.join(os.path.dirname(snapshot_store.folder()), _KEY_FILE)


def _mark(state: Mapping[str, Any], path: str, key: bytes) -> str:
    """Raises OSError, ValueError, TypeError or KeyError for files that cannot be a snapshot's."""
    from _blake2 import blake2b  # hashlib would load OpenSSL

    said = {name: value for name, value in state.items() if name not in _NOT_SEALED}
    files = [_identity(path, name) for name in sorted(state["files"])]
    text = json.dumps([said, files], sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), key=key, digest_size=32).hexdigest()


def _identity(folder: str, name: str) -> list[int]:
    """What tells a file from any other one that was there or will be. Raises OSError, ValueError or
    TypeError."""
    if "/" in name:
        raise ValueError(name)
    from pyvmm.host.birth import born_ns  # which few need

    path = os.path.join(folder, name)
    found = os.lstat(path)
    # Not by st_ctime, which changes as soon as another snapshot links to the file.
    return [found.st_ino, found.st_size, found.st_mtime_ns, born_ns(path)]


def _read(path: str) -> bytes:
    """The key; b"" if there is none, or no whole one. Raises OSError."""
    try:
        key = snapshot_store.read_file(path, 1024)
    except FileNotFoundError:
        return b""
    return key if len(key) == _KEY_BYTES else b""


def _make(path: str) -> None:
    """A new key, unless somebody was quicker. Raises OSError."""
    new = f"{path}.{os.getpid()}-{os.urandom(6).hex()}"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(os.urandom(_KEY_BYTES))
        with suppress(FileExistsError):
            os.link(new, path)
    finally:
        os.unlink(new)
