"""A program for this machine's Python of the version that an emulated host of another architecture
has: it compiles the modules that are in that host, as compiled ones are alike on both.

    python3 compiling.py INTO (SOURCE PLACE)…

What is below the folder SOURCE here is below PLACE there. The compiled modules are put below INTO
as Python looks for them by PYTHONPYCACHEPREFIX=INTO. Those that are there already, of these very
files, are left; those of no file are removed.
"""

from __future__ import annotations

import importlib.util
import os
import py_compile
import sys
from contextlib import suppress

_LEFT_OUT = {"__pycache__", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter"}
_LEFT_OUT |= {"turtledemo", "unittest"}
_HEADER = 16  # bytes: a magic number, flags, and the source's time and size


def main(into: str, *folders: str) -> None:
    """Compile what is in pairs of `folders`. A module that is no Python of this version is left."""
    wanted = set()
    for source, place in zip(folders[::2], folders[1::2], strict=True):
        for folder, names, files in os.walk(source):
            names[:] = sorted(set(names) - _LEFT_OUT)
            inside = os.path.normpath(os.path.join(place, os.path.relpath(folder, source)))
            for name in files:
                if name.endswith(".py"):
                    wanted.add(_compile(os.path.join(folder, name), f"{inside}/{name}", into))
    for folder, _, files in os.walk(into, topdown=False):
        for path in (f"{folder}/{name}" for name in files if name.endswith(".pyc")):
            if path not in wanted:
                with suppress(OSError):
                    os.unlink(path)
        with suppress(OSError):
            os.rmdir(folder)  # which is refused while there is anything in it


def _compile(source: str, inside: str, into: str) -> str:
    """The path of the compiled module, there or not."""
    target = f"{into}{inside.removesuffix('.py')}.{sys.implementation.cache_tag}.pyc"
    # A link that leads nowhere, or a file in another Python's words, is none of ours.
    with suppress(OSError, py_compile.PyCompileError):
        if not _is_of(source, target):
            py_compile.compile(source, cfile=target, dfile=inside, doraise=True)
    return target


def _is_of(source: str, target: str) -> bool:
    """True if `target` is `source` compiled (PEP 552 has its header)."""
    about = os.stat(source)
    numbers = (0, int(about.st_mtime), about.st_size)
    words = b"".join((number & 0xFFFFFFFF).to_bytes(4, "little") for number in numbers)
    with suppress(OSError), open(target, "rb") as file:
        return file.read(_HEADER) == importlib.util.MAGIC_NUMBER + words
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])
