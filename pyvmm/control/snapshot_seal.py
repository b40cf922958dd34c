"""A seal on specifications that give a guest a directory of this machine.

Anybody can write a snapshot, and a state is checked for what can be, not for what somebody wanted.
Disks and persistent memory of a restored VM write to nothing of this machine; a shared directory
does, a read-only one still shows all that is in it, and a back end at a socket may do either. So
only the user who has taken a snapshot with one can use it, where it was taken: its specification
bears a mark that is made with a key, which no snapshot has.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from typing import Any

from pyvmm.control import snapshot_store
from pyvmm.errors import ConfigError, HostError

_KEY_FILE = "snapshot-key"  # beside the store
_KEY_BYTES = 32


def seal(spec: Any) -> str:
    """The mark of the specification `spec`, plain data. Raises ConfigError without a place for the
    key, HostError if it cannot be read or made."""
    path = _key_path()
    try:
        key = _read(path)
        if not key:
            _make(path)
            key = _read(path)
    except OSError as error:
        raise HostError(error.errno or 0, f"the key {path}") from None
    if not key:
        raise ConfigError(f"{path} is not a key", cure="remove it, and take new snapshots")
    return _mark(spec, key)


def is_sealed(spec: Any, mark: object) -> bool:
    """True if `mark` is what `seal` has said of `spec`."""
    try:
        key = _read(_key_path())
    except OSError:
        return False
    return bool(key) and mark == _mark(spec, key)


def _key_path() -> str:
    return os.path.join(os.path.dirname(snapshot_store.folder()), _KEY_FILE)


def _mark(spec: Any, key: bytes) -> str:
    from _blake2 import blake2b  # hashlib would load OpenSSL

    text = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), key=key, digest_size=32).hexdigest()


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
