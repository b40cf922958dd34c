"""Files that a start makes and a guest boots from, kept under the hash of their content.

$XDG_CACHE_HOME/pyvmm/made/HASH.SUFFIX

Equal content is one file. A guest that reboots reads its files again, so none goes while it may be
in use: only those that nobody has wanted for a week, when there are many.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress

from pyvmm.errors import ConfigError
from pyvmm.host import user_cache

_MANY = 16
_OLD_SECONDS = 7 * 24 * 3600


def keep(pieces: Iterable[bytes], suffix: str, most: int = 4 << 30) -> str:
    """The path of a file of these `pieces`. Raises ConfigError where it cannot be written, or where
    they are more than `most` bytes together."""
    import hashlib

    folder = os.path.join(user_cache.folder(), "made")
    partial = os.path.join(folder, f".{os.getpid()}{suffix}")
    digest, size = hashlib.sha256(), 0
    try:
        os.makedirs(folder, exist_ok=True)
        with open(partial, "wb") as file:
            for piece in pieces:
                size += len(piece)
                if size > most:
                    raise ConfigError(f"a file of more than {most >> 20} MiB is too large to boot")
                digest.update(piece)
                file.write(piece)
        path = os.path.join(folder, f"{digest.hexdigest()[:32]}{suffix}")
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(
            f"cannot write {folder}: {error.strerror}", cure="set XDG_CACHE_HOME to another place"
        ) from None
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial)
    _forget_old(folder, path)
    return path


def _forget_old(folder: str, fresh: str) -> None:
    with suppress(OSError):
        files = [entry for entry in os.scandir(folder) if entry.path != fresh]
        if len(files) <= _MANY:
            return
        for entry in files:
            if time.time() - entry.stat().st_mtime > _OLD_SECONDS:
                os.unlink(entry.path)
