"""What modprobe needs to find modules that depmod has not seen, such as those of a kernel that was
just built, and where they are.

depmod is not run in the tree, which is its user's: it sees links to the modules, in a folder of
ours, and what it writes is kept (`pyvmm.images.made_files`) until a module is built again.

$XDG_CACHE_HOME/pyvmm/tree-modules/HASH/    modules.dep and its like, `build`, and `kernel`, empty

A guest has that as /lib/modules/RELEASE, and the tree itself at `kernel` in it.
"""

from __future__ import annotations

import os
import tempfile
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.host import files, helper_box
from pyvmm.images import made_files, tools
from pyvmm.images.modules import UnreadTree, is_build_tree

_BUILT_IN = ("modules.builtin", "modules.builtin.modinfo")  # made with the kernel
_MOST_BUILT_IN = 32 << 20  # bytes; Debian's generic kernel's have 1 MiB
_RELEASE = "0.0"  # depmod takes what looks like one; it is nothing but a folder's name to it
_MOST_MEMORY = 2 << 30  # bytes; a compressed module is unpacked in it
_PATIENCE = 300.0  # seconds; some 2 for the 4,000 modules of Debian's generic kernel


class Served(NamedTuple):
    """The folder that is /lib/modules/RELEASE, and the one that is `kernel` in that."""

    lists: str
    modules: str


def make(tree: UnreadTree) -> Served:
    """The folders by which a guest finds the modules of `tree`. Raises ConfigError."""
    inner = "" if is_build_tree(tree.folder) else "kernel/"
    place = os.path.join(os.path.realpath(tree.folder), inner).rstrip("/")
    if os.path.realpath(place) != place:
        raise ConfigError(f"{place} is a link, and what it leads to may be no modules")
    paths = [path.removeprefix(inner) for path in tree.paths if path.startswith(inner)]

    def fill(folder: str) -> None:
        _run_depmod(place, paths, tree.folder, folder)
        os.mkdir(os.path.join(folder, "kernel"))
        if not inner:  # `make -C /lib/modules/RELEASE/build M=…`
            os.symlink("kernel", os.path.join(folder, "build"))

    lists = made_files.keep_folder("tree-modules", _mark(place, paths, tree.folder), fill)
    return Served(lists, place)


def _mark(place: str, paths: list[str], folder: str) -> str:
    """A name for the modules `paths` in `place` as they are now."""
    import hashlib

    digest = hashlib.sha256(os.fsencode(place))
    for path in (*(os.path.join(place, one) for one in paths), *_built_in(folder)):
        try:
            status = os.stat(path)
        except OSError:
            continue
        digest.update(b"\0%d %d " % (status.st_size, status.st_mtime_ns) + os.fsencode(path))
    return digest.hexdigest()[:32]


def _built_in(folder: str) -> list[str]:
    return [os.path.join(folder, name) for name in _BUILT_IN]


def _run_depmod(place: str, paths: list[str], folder: str, into: str) -> None:
    """Write depmod's lists of the modules `paths` in `place` into the folder `into`. depmod reads
    what strangers may have made, so it can write nothing else."""
    program = tools.require("depmod")
    with tempfile.TemporaryDirectory(dir=os.path.dirname(into)) as room:
        seen = os.path.join(room, "lib/modules", _RELEASE)
        for path in paths:
            link = os.path.join(seen, "kernel", path)
            os.makedirs(os.path.dirname(link), exist_ok=True)
            os.symlink(os.path.join(place, path), link)
        os.makedirs(seen, exist_ok=True)
        for path in _built_in(folder):
            try:
                content = files.read_regular(path, _MOST_BUILT_IN)
            except OSError:
                continue  # A kernel without modules has none.
            with open(os.path.join(seen, os.path.basename(path)), "wb") as file:
                file.write(content)
        with open(os.path.join(seen, "modules.order"), "wb") as file:
            file.writelines(b"kernel/%s\n" % os.fsencode(path) for path in paths)
        options = ["-C", "/dev/null", "-b", room, _RELEASE]
        boxed = helper_box.command([program, *options], [room], _MOST_MEMORY)
        tools.run(boxed, "depmod", timeout=_PATIENCE)
        for entry in os.scandir(seen):
            if entry.is_file(follow_symlinks=False):
                os.rename(entry.path, os.path.join(into, entry.name))
    if not os.path.isfile(os.path.join(into, "modules.dep")):
        raise ConfigError("depmod has written nothing")
