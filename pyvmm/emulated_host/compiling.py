"""A program for this machine's Python of the version that an emulated host of another architecture
has: it compiles the modules that are in that host, as compiled ones are alike on both.

    python3 compiling.py INTO (SOURCE PLACE FILE)…

What is below the folder SOURCE here is below PLACE there: a package, or a folder with modules. They
are put into the collection FILE (collected.py), and those that Python loads before it looks into
collections where it looks by PYTHONPYCACHEPREFIX=INTO. What has been compiled of these very files
is left as it is. INTO/sitecustomize.pyc is collected.py.
"""

from __future__ import annotations

import importlib.util
import marshal
import os
import py_compile
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from typing import Any, NamedTuple

_LEFT_OUT = {"__pycache__", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter"}
_LEFT_OUT |= {"turtledemo", "unittest"}
_EARLY = ("encodings", "encodings.aliases", "encodings.utf_8")
_HEADER = 16  # bytes of a compiled module: a magic number, flags, and the source's time and size
_MAGIC = importlib.util.MAGIC_NUMBER
_SIZE = 8  # bytes of the size of a collection's index
_OLD_SECONDS = 3600  # of a file that nobody writes any more


class _Module(NamedTuple):
    """A module's file here, its path below the folder of them all, its time and size."""

    path: str
    below: str
    about: tuple[int, int]

    @property
    def is_code(self) -> bool:
        return not self.path.endswith(".py")

    @property
    def is_package(self) -> bool:
        return os.path.basename(self.path) == "__init__.py"


def main(into: str, *folders: str) -> None:
    """Compile what is in `folders`, by threes: source, place, collection. A module that is no
    Python of this version is left out."""
    os.makedirs(into, exist_ok=True)
    loader = os.path.join(os.path.dirname(os.path.abspath(__file__)), "collected.py")
    first = os.path.join(into, "sitecustomize.pyc")
    py_compile.compile(loader, cfile=first, doraise=True)
    wanted = {first}
    for source, place, target in zip(folders[::3], folders[1::3], folders[2::3], strict=True):
        above, folder = source, place
        if os.path.exists(os.path.join(source, "__init__.py")):
            above, folder = os.path.dirname(source), os.path.dirname(place)
        modules = dict(_modules(source, above))
        _collect(modules, folder, target)
        wanted.add(target)
        for name in set(_EARLY) & modules.keys():
            inside = f"{folder}/{modules[name].below}"
            wanted.add(_compile(modules[name].path, inside, into))
    _remove_others(into, wanted)


def _modules(source: str, above: str) -> Iterator[tuple[str, _Module]]:
    """All that are below `source`, by their names as seen from the folder `above`."""
    for folder, names, files in os.walk(source):
        names[:] = sorted(name for name in set(names) - _LEFT_OUT if name.isidentifier())
        below = os.path.relpath(folder, above)
        package = [] if below == "." else below.split(os.sep)
        for file in files:
            stem, _, kind = file.partition(".")
            # A link that leads nowhere is none of ours.
            with suppress(OSError):
                if kind == "py" or kind.endswith("so"):
                    path = os.path.join(folder, file)
                    about = os.stat(path)
                    words = package if stem == "__init__" else [*package, stem]
                    yield (
                        ".".join(words),
                        _Module(
                            path, "/".join([*package, file]), (about.st_mtime_ns, about.st_size)
                        ),
                    )


def _collect(modules: dict[str, _Module], folder: str, target: str) -> None:
    """Write the collection `target` of `modules`, which are below `folder` there."""
    sources = {name: module.about for name, module in modules.items()}
    before, codes = _read(target)
    if before == sources:
        return
    index: dict[str, object] = {}
    parts: list[bytes] = []
    start = 0
    for name, module in modules.items():
        if module.is_code:
            index[name] = module.below
            continue
        code = codes.get(name) if before.get(name) == module.about else None
        code = code or _code(module.path, f"{folder}/{module.below}")
        if code:
            index[name] = (start, len(code), module.is_package)
            parts.append(code)
            start += len(code)
    listed = marshal.dumps(sources)
    head = marshal.dumps((folder, index, (start, len(listed))))
    partial = f"{target}.{os.getpid()}"
    with open(partial, "wb") as file:
        file.write(b"".join([_MAGIC, len(head).to_bytes(_SIZE, "little"), head, *parts, listed]))
    os.replace(partial, target)


def _read(target: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The sources and the code in the collection `target`; nothing if it is none."""
    with suppress(OSError, ValueError, EOFError, TypeError), open(target, "rb") as file:
        data = file.read()
        head = len(_MAGIC) + _SIZE
        end = head + int.from_bytes(data[len(_MAGIC) : head], "little")
        if data.startswith(_MAGIC):
            _, index, (start, size) = marshal.loads(data[head:end])
            sources = marshal.loads(data[end + start : end + start + size])
            rows = {name: row for name, row in index.items() if not isinstance(row, str)}
            codes = {name: data[end + at : end + at + size] for name, (at, size, _) in rows.items()}
            return sources, codes
    return {}, {}


def _code(path: str, inside: str) -> bytes:
    """The module at `path` compiled, as the file `inside`; b"" if it is another Python's."""
    with suppress(OSError, SyntaxError, ValueError), open(path, "rb") as file:
        return marshal.dumps(SourceFileLoader("", inside).source_to_code(file.read(), inside))
    return b""


def _compile(source: str, inside: str, into: str) -> str:
    """The path of the compiled module, there or not."""
    target = f"{into}{inside.removesuffix('.py')}.{sys.implementation.cache_tag}.pyc"
    with suppress(OSError, py_compile.PyCompileError):
        if not _is_of(source, target):
            py_compile.compile(source, cfile=target, dfile=inside, doraise=True)
    return target


def _remove_others(into: str, wanted: set[str]) -> None:
    """Remove compiled modules that are not `wanted`, and what somebody has left half written."""
    for folder, _, files in os.walk(into, topdown=False):
        for path in (f"{folder}/{name}" for name in files):
            with suppress(OSError):
                is_old = time.time() - os.stat(path).st_mtime > _OLD_SECONDS
                if path not in wanted and (path.endswith(".pyc") or is_old):
                    os.unlink(path)
        with suppress(OSError):
            os.rmdir(folder)  # which is refused while there is anything in it


def _is_of(source: str, target: str) -> bool:
    """True if `target` is `source` compiled (PEP 552 has its header)."""
    about = os.stat(source)
    numbers = (0, int(about.st_mtime), about.st_size)
    words = b"".join((number & 0xFFFFFFFF).to_bytes(4, "little") for number in numbers)
    with suppress(OSError), open(target, "rb") as file:
        return file.read(_HEADER) == _MAGIC + words
    return False


if __name__ == "__main__":
    main(*sys.argv[1:])
