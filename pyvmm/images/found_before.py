"""The places where an image's files were found last time: reading the recipes and hashing them anew
takes a fifth of a start.

$XDG_CACHE_HOME/pyvmm/known.json has paths by name, and what all files that decide about them looked
like: the recipes', and this package's own. If any of them has changed since, or a path is not there
any more, nothing is known.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

from pyvmm.host import user_cache
from pyvmm.images import recipes

_LIMIT = 1 << 20


def find(name: str) -> list[str] | None:
    """The paths that were remembered as `name`, all of which are there; None if nothing is known.

    Raises ConfigError where there are no recipes.
    """
    try:
        with open(_file(), encoding="utf-8") as file:
            data = json.loads(file.read(_LIMIT))
        paths = data["paths"].get(name) if data["state"] == _state() else None
        found = [str(path) for path in paths] if paths else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # It is made again.
    return found if found and all(map(os.path.exists, found)) else None


def remember(name: str, paths: Sequence[str]) -> None:
    """Keep what was found; a cache that cannot be written is not a reason to fail."""
    state, kept = _state(), {}
    with suppress(OSError, ValueError, TypeError, KeyError):
        with open(_file(), encoding="utf-8") as file:
            data = json.loads(file.read(_LIMIT))
        kept = dict(data["paths"]) if data["state"] == state else {}
    kept[name] = list(paths)
    with suppress(OSError):
        temporary = f"{_file()}.{os.getpid()}"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump({"state": state, "paths": kept}, file)
        os.replace(temporary, _file())


def _file() -> str:
    return os.path.join(user_cache.folder(), "known.json")


def _state() -> list[list[object]]:
    """Path, time and size of every file that decides what an image is made of."""
    own = os.path.dirname(os.path.abspath(__file__))
    return sorted([*_look(recipes.folder()), *_look(own)])


def _look(folder: str) -> Iterator[list[object]]:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            if entry.name != "__pycache__":
                yield from _look(entry.path)
        else:
            found = entry.stat()
            yield [entry.path, found.st_mtime_ns, found.st_size]
