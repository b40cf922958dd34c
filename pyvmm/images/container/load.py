"""A saved container image as a tree: everything in it is read once, and checked."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from pyvmm.errors import ConfigError
from pyvmm.images.container import manifest, unpack
from pyvmm.images.container.layers import Budget, LayerStream
from pyvmm.images.container.manifest import Image
from pyvmm.images.container.members import members
from pyvmm.images.container.refusal import Refused, explained
from pyvmm.images.container.spool import Spool
from pyvmm.images.container.store import DirStore, Store, TarStore
from pyvmm.images.container.tree import Tree
from pyvmm.images.progress import Advance, Progress

_CHUNK = 1 << 20
KINDS = ("oci-archive", "docker-archive", "oci")


def split_source(kind: str, rest: str) -> tuple[str, str | None]:
    """The path in ``FILE[:NAME]``, and the image's name. Raises ConfigError if there is no such
    file, or it is not of the sort that `kind` wants."""
    path, name = rest, None
    if not rest:
        raise ConfigError(
            f"{kind}: of what?", cure=f"write {kind}:{'DIRECTORY' if kind == 'oci' else 'FILE'}"
        )
    if not os.path.exists(rest) and ":" in rest:
        # An image's name has colons too: the path is what there is.
        parts = rest.split(":")
        for count in range(len(parts) - 1, 0, -1):
            if os.path.exists(":".join(parts[:count])):
                path, name = ":".join(parts[:count]), ":".join(parts[count:])
                break
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", cure="check the path") from None
    wanted = stat.S_ISDIR if kind == "oci" else stat.S_ISREG
    if not wanted(mode):
        what = "a directory" if kind == "oci" else "a file"
        raise ConfigError(f"{path} is not {what}", cure=f"{kind}: is for one")
    return path, name or None


def load(
    kind: str,
    path: str,
    name: str | None,
    room: str,
    most: int,
    progress: Progress,
    architecture: str = manifest.NATIVE,
) -> tuple[Tree, Image]:
    """The image called `name` (None: the only one) for `architecture` of the archive or directory
    at `path`, in at most `most` bytes; its files' contents are in the folder `room`. Raises
    Refused, OSError."""
    with named(path):
        store = _open(kind, path, room, most, progress)
    choose = manifest.from_docker if kind == "docker-archive" else manifest.from_layout
    with named(store.where):
        image = choose(store, name, architecture)
    tree = Tree(Spool(os.path.join(room, "contents"), most))
    budget = Budget(2 * most)  # an upper layer may replace all that the lower ones have
    for number, layer in enumerate(image.layers, start=1):
        what = f"{store.where}: layer {number}"
        with (
            progress.bar(
                f"unpacking layer {number} of {len(image.layers)}", layer.size or 0
            ) as advance,
            named(what),
            store.open(layer.file) as stored,
        ):
            stream = LayerStream(
                stored,
                digest=layer.digest,
                size=layer.size,
                diff_id=layer.diff_id,
                budget=budget,
                advance=advance,
            )
            tree.next_layer()
            for member, content in members(stream):  # type: ignore[arg-type]
                tree.add(member, content)
            stream.finish()
    return tree, image


@contextmanager
def named(what: str) -> Iterator[None]:
    """Say of all that is wrong that it is in `what`."""
    try:
        with explained(what):
            yield
    except Refused as refused:
        if refused.message.startswith(what):
            raise
        raise Refused(f"{what}: {refused.message}", cure=refused.cure) from None


def _open(kind: str, path: str, room: str, most: int, progress: Progress) -> Store:
    if kind == "oci":
        return DirStore(path, path)
    with open(path, "rb") as file:
        if unpack.is_compressed(file):
            unpacked = os.path.join(room, "archive.tar")
            with progress.bar("unpacking the archive", os.fstat(file.fileno()).st_size) as advance:
                _unpack(file, path, unpacked, most, advance)
            return TarStore(path, unpacked)
    return TarStore(path, path)


def _unpack(file: IO[bytes], path: str, target: str, most: int, advance: Advance) -> None:
    with open(target, "wb") as writer:
        stream = LayerStream(
            file, digest=None, diff_id=None, budget=Budget(2 * most), advance=advance
        )
        while data := stream.read(_CHUNK):
            writer.write(data)
