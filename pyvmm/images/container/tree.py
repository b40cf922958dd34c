"""A container image's layers, put over one another in memory.

A layer is a tar archive of what it adds and changes; a file .wh.NAME takes away what lower layers
have at NAME, and .wh..wh..opq all that they have in its directory (OCI image specification, "Image
Layer Filesystem Changeset"). Links are followed within the tree only: its root is where .. ends.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO

from pyvmm.images.container.members import xattrs
from pyvmm.images.container.refusal import Refused, shown
from pyvmm.images.container.spool import Spool

MOST_NODES = 500_000
_MOST_DEPTH = 200
# What takes no node of its own takes time and memory all the same; no real image comes near.
_MOST_STEPS = 50_000_000  # from a directory to the next one, or a member
_MOST_TEXT = 256 << 20  # bytes of link targets and extended attributes
_MOST_HOPS = 40  # MAXSYMLINKS of the kernel
_MOST_NAME = 255
_MOST_PATH = 4095
_WHITEOUT = ".wh."
_OPAQUE = ".wh..wh..opq"

_KINDS = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE), tarfile.REGTYPE),
    tarfile.GNUTYPE_SPARSE: tarfile.REGTYPE,
    **{kind: kind for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE)},
    tarfile.FIFOTYPE: tarfile.FIFOTYPE,
}


@dataclass(slots=True, eq=False)
class Node:
    """A file of any kind; hard links are the same node under several names.

    `kind` is tarfile's, `start` and `size` say where a file's content is in the spool. Of a
    directory `since` has the layer that each of its children came with, and `cleared` is the last
    one that took away what lower layers have in it.
    """

    kind: bytes
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)
    target: str = ""
    device: tuple[int, int] = (0, 0)
    start: int = 0
    size: int = 0
    children: dict[str, Node] = field(default_factory=dict)
    since: dict[str, int] = field(default_factory=dict)
    cleared: int = -1

    @property
    def is_directory(self) -> bool:
        return self.kind == tarfile.DIRTYPE

    def put(self, name: str, node: Node, layer: int) -> None:
        self.children[name] = node
        self.since[name] = layer

    def drop(self, name: str) -> None:
        self.children.pop(name, None)
        self.since.pop(name, None)

    def drop_below(self, name: str, layer: int) -> None:
        """Take away what layers below `layer` have at `name`."""
        node = self.children.get(name)
        if node is None:
            return
        if node.is_directory:
            node.clear_below(layer)
        if self.since[name] < layer and not node.children:
            self.drop(name)

    def clear_below(self, layer: int) -> None:
        if self.cleared == layer:
            return  # nothing of a lower layer has come since
        self.cleared = layer
        for name in list(self.children):
            self.drop_below(name, layer)


class Tree:
    """What the layers that were added so far make up; file contents go to `spool`."""

    def __init__(self, spool: Spool) -> None:
        self.root = Node(tarfile.DIRTYPE)
        self.spool = spool
        self._layer = 0
        self._made = 0
        self._steps = 0
        self._text = 0

    def next_layer(self) -> None:
        """What is added from now on is of the next layer."""
        self._layer += 1

    def add(self, member: tarfile.TarInfo, content: IO[bytes] | None) -> None:
        """One member of a layer. Raises Refused for what no image may have."""
        path = split(member.name)
        self._step()
        if not path:
            if member.isdir():
                self._describe(self.root, member)
            return
        *folders, name = path
        parent = self._folder(folders, member.name)
        if name == _OPAQUE:
            parent.clear_below(self._layer)
        elif name.startswith(_WHITEOUT):
            self._white_out(parent, name.removeprefix(_WHITEOUT), member.name)
        elif member.islnk():
            self._link(parent, name, member)
        else:
            self._put(parent, name, member, content)

    def _white_out(self, parent: Node, name: str, whole: str) -> None:
        if name.startswith(_WHITEOUT):
            return  # aufs kept its own notes so
        if name in ("", ".", ".."):
            raise Refused(f"{shown(whole)} takes away nothing that has a name")
        parent.drop_below(name, self._layer)

    def _link(self, parent: Node, name: str, member: tarfile.TarInfo) -> None:
        path = split(member.linkname)
        target = None
        if path:
            *folders, last = path
            # Nothing is made for a link: what it names is there, or it is not.
            folder = self._walk(folders, member.name, make=False)
            target = None if folder is None else folder.children.get(last)
        if target is None or target.is_directory:
            raise Refused(
                f"{shown(member.name)} is a hard link to {shown(member.linkname)}, which is no file"
            )
        parent.put(name, target, self._layer)

    def _put(
        self, parent: Node, name: str, member: tarfile.TarInfo, content: IO[bytes] | None
    ) -> None:
        kind = _KINDS.get(member.type)
        if kind is None:
            raise Refused(f"{shown(member.name)} is of the unknown kind {member.type!r}")
        before = parent.children.get(name)
        if before is not None and kind == tarfile.DIRTYPE == before.kind:
            node = before
        else:
            node = self._new(kind)
        self._describe(node, member)
        if content is not None:
            node.start, node.size = self.spool.write(content, member.size, shown(member.name))
        parent.put(name, node, self._layer)

    def _describe(self, node: Node, member: tarfile.TarInfo) -> None:
        _describe(node, member)
        self._text += len(node.target) + sum(map(len, node.xattrs.values()))
        if self._text > _MOST_TEXT:
            raise Refused(f"its links and attributes have more than {_MOST_TEXT >> 20} MiB")

    def _step(self) -> None:
        self._steps += 1
        if self._steps > _MOST_STEPS:
            raise Refused("its names lead through too many directories and links")

    def _new(self, kind: bytes) -> Node:
        self._made += 1
        if self._made > MOST_NODES:
            raise Refused(f"it has more than {MOST_NODES} files")
        return Node(kind)

    def _folder(self, path: list[str], whole: str) -> Node:
        found = self._walk(path, whole, make=True)
        assert found is not None
        return found

    def _walk(self, path: list[str], whole: str, *, make: bool) -> Node | None:
        """The directory at `path`, through symbolic links; made if it is not there, or None."""
        stack = [self.root]
        left = path[::-1]
        hops = 0
        while left:
            self._step()
            name = left.pop()
            if name == "..":
                if len(stack) > 1:  # the root is its own parent
                    stack.pop()
                continue
            node = stack[-1].children.get(name)
            if node is None:
                if not make:
                    return None
                node = self._new(tarfile.DIRTYPE)
                stack[-1].put(name, node, self._layer)
            if node.kind == tarfile.SYMTYPE:
                hops += 1
                if hops > _MOST_HOPS:
                    raise Refused(f"{shown(whole)} lies behind links that lead nowhere")
                if node.target.startswith("/"):
                    del stack[1:]
                left += [part for part in node.target.split("/")[::-1] if part not in ("", ".")]
            elif not node.is_directory:
                raise Refused(f"{shown(whole)} lies in {shown(name)}, which is no directory")
            else:
                stack.append(node)
            if len(stack) > _MOST_DEPTH:
                raise Refused(f"{shown(whole)} lies deeper than {_MOST_DEPTH} directories")
        return stack[-1]

    # --- for those who look at it -------------------------------------------------------------

    def find(self, path: str) -> Node | None:
        """What is at `path`, through links; None if there is nothing. Raises Refused."""
        left, hops = path, 0
        while True:
            parts = [part for part in left.split("/") if part not in ("", ".")]
            if not parts:
                return self.root
            *folders, name = parts
            folder = self._walk_if(folders)
            node = None if folder is None else folder.children.get(name)
            if node is None or node.kind != tarfile.SYMTYPE or hops == _MOST_HOPS:
                return node
            hops += 1
            left = node.target
            if not left.startswith("/"):
                left = "/".join([*folders, left])

    def _walk_if(self, folders: list[str]) -> Node | None:
        try:
            return self._walk(folders, "/".join(folders), make=False)
        except Refused:
            return None

    def read(self, path: str, most: int) -> bytes:
        """The first `most` bytes of the file at `path`; none if there is no such file."""
        node = self.find(path)
        if node is None or node.kind != tarfile.REGTYPE:
            return b""
        return self.spool.read(node.start, min(node.size, most))

    def walk(self) -> Iterator[tuple[str, Node]]:
        """All of it, the root first (called ".") and each directory in front of what is in it."""
        yield ".", self.root
        yield from _walk("", self.root)

    # --- for those who add to it --------------------------------------------------------------

    def directory(self, path: str, mode: int = 0o755) -> Node:
        """The directory at `path`; made with `mode` if it is not there. Raises Refused."""
        *folders, name = split(path)
        parent = self._folder(folders, path)
        if name not in parent.children:
            node = self._new(tarfile.DIRTYPE)
            node.mode = mode
            parent.put(name, node, self._layer)
        return self._folder([*folders, name], path)

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A file with `data` at `path`, instead of what is there; through links to directories."""
        import io

        *folders, name = split(path)
        node = self._new(tarfile.REGTYPE)
        node.mode = mode
        node.start, node.size = self.spool.write(io.BytesIO(data), len(data), path)
        self._folder(folders, path).put(name, node, self._layer)

    def link(self, path: str, target: str) -> None:
        """A symbolic link at `path`, instead of what is there."""
        *folders, name = split(path)
        node = self._new(tarfile.SYMTYPE)
        node.mode, node.target = 0o777, target
        self._folder(folders, path).put(name, node, self._layer)


def _walk(prefix: str, folder: Node) -> Iterator[tuple[str, Node]]:
    for name, node in folder.children.items():
        yield prefix + name, node
        if node.is_directory:
            yield from _walk(f"{prefix}{name}/", node)


def split(name: str) -> list[str]:
    """The components of a member's name. Raises Refused for one that does not lie below."""
    if name.startswith("/"):
        raise Refused(f"{shown(name)} is an absolute name")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise Refused(f"{shown(name)} leads out of the image")
    if "\0" in name:
        raise Refused(f"{shown(name)} is no name of a file")
    if any(len(part.encode("utf-8", "surrogateescape")) > _MOST_NAME for part in parts):
        raise Refused(f"{shown(name)} is too long a name")
    if len(parts) > _MOST_DEPTH:
        raise Refused(f"{shown(name)} lies deeper than {_MOST_DEPTH} directories")
    return parts


def _describe(node: Node, member: tarfile.TarInfo) -> None:
    node.mode, node.uid, node.gid = member.mode, member.uid, member.gid
    node.mtime = int(member.mtime)
    node.xattrs = xattrs(member)
    if node.kind == tarfile.SYMTYPE:
        target = member.linkname
        if (
            not target
            or "\0" in target
            or len(target.encode("utf-8", "surrogateescape")) > (_MOST_PATH)
        ):
            raise Refused(f"{shown(member.name)} is a link to no name of a file")
        node.target = target
    elif node.kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        node.device = (member.devmajor, member.devminor)
        if not (0 <= node.device[0] < 1 << 12 and 0 <= node.device[1] < 1 << 20):
            raise Refused(f"{shown(member.name)} is a device that Linux has no number for")
