"""Loads modules out of collections of compiled ones, which compiling.py writes.

An emulated host of another architecture has this as `sitecustomize`, which Python imports at its
start (its documentation of `site`). $PYVMM_COLLECTIONS has the paths of collections, with colons
between; what is in none of them is looked for as ever. All that it imports is a part of the
interpreter: a module in a file of its own is three requests by 9p, which a collection spares.

A collection is the magic number of Python's compiled modules, the size of its index in 8 bytes, the
index, and what the index tells of: code objects, and a list of sources that is compiling.py's own.
Index, code and list are as marshal writes them. The index is the folder that modules are below;
where each of them is by its name: (start, size, whether it is a package), counted from the index's
end, or the path below that folder of one in machine code; and where the list is: (start, size).
"""

import marshal
import os
import sys
from _frozen_importlib import ModuleSpec
from _frozen_importlib_external import MAGIC_NUMBER, ExtensionFileLoader, SourceFileLoader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

VARIABLE = "PYVMM_COLLECTIONS"
_HEAD = len(MAGIC_NUMBER) + 8


class Collection:
    """The collection at `path`. Raises OSError, ValueError, EOFError or TypeError if it is not one
    of this Python's, or not whole."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._data = memoryview(b"")
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            head = os.read(self._fd, _HEAD)
            if not head.startswith(MAGIC_NUMBER):
                raise ValueError("of another Python")
            size = int.from_bytes(head[len(MAGIC_NUMBER) :], "little")
            self._folder, self._modules, sources = marshal.loads(os.pread(self._fd, size, _HEAD))
            self._start = _HEAD + size
            if os.fstat(self._fd).st_size != self._start + sum(sources):
                raise ValueError("cut off")
        except BaseException:
            os.close(self._fd)
            raise

    def map(self) -> bool:
        """Have all of it as memory, and close the file: whoever closes all descriptors does not
        lose the modules that come later. False if that cannot be."""
        try:
            import mmap

            self._data = memoryview(mmap.mmap(self._fd, 0, prot=mmap.PROT_READ))
        except (ImportError, OSError):
            return False
        finally:
            os.close(self._fd)
        return True

    def spec(self, name: str) -> ModuleSpec | None:
        """Where the module `name` is loaded from, if it is in here."""
        found = self._modules.get(name)
        if found is None:
            return None
        if isinstance(found, str):
            path = f"{self._folder}/{found}"
            spec = ModuleSpec(name, ExtensionFileLoader(name, path), origin=path)
            spec.has_location = True
            return spec
        start, size, is_package = found
        stem = f"{self._folder}/{name.replace('.', '/')}"
        path = f"{stem}/__init__.py" if is_package else f"{stem}.py"
        start += self._start
        loader = _Loader(name, path, self._data[start : start + size])
        spec = ModuleSpec(name, loader, origin=path, is_package=is_package)
        spec.has_location = True
        spec.cached = self._path
        if is_package:
            spec.submodule_search_locations = [stem]
        return spec


class _Loader(SourceFileLoader):
    """Loads a source's `code`, compiled."""

    def __init__(self, name: str, path: str, code: memoryview) -> None:
        super().__init__(name, path)
        self._code = code

    def get_code(self, fullname: str) -> "CodeType":
        code: CodeType = marshal.loads(self._code)
        return code


class Finder:
    """Finds modules in `collections`, the first that has one."""

    def __init__(self, collections: "Sequence[Collection]") -> None:
        self.collections = collections

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
        for collection in self.collections:
            spec = collection.spec(name)
            if spec is not None:
                return spec
        return None


def install(paths: "Sequence[str]") -> None:
    """Find modules in the collections at `paths` from now on, before Python looks for files. Those
    that are not there, or of another Python, are left out."""
    found = []
    for path in paths:
        try:
            found.append(Collection(path))
        except (OSError, ValueError, EOFError, TypeError):
            continue
    finder = Finder(found)
    # Behind those that find what is in the interpreter.
    sys.meta_path.insert(len(sys.meta_path) - 1, finder)
    finder.collections = [collection for collection in found if collection.map()]


if __name__ == "sitecustomize":
    install(os.environ.get(VARIABLE, "").split(":"))
