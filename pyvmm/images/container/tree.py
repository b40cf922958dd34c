"""A container image's layers, put over one another in memory.

A layer is a tar archive of what it adds and changes; a file .wh.NAME takes away what lower layers
have at NAME, and .wh..wh..opq all that they have in its directory (OCI image specification, "Image
Layer Filesystem Changeset"). Links are followed within the tree only: its root is where .. ends.
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

from pyvmm.images.container.members import Member
from pyvmm.images.container.refusal import Refused, shown
from pyvmm.images.container.spool import Spool

_MIB = 1 << 20
MOST_NODES = 500_000
_MOST_DEPTH = 200
# What takes no node of its own takes time and memory all the same; no real image comes near.
_MOST_STEPS = 20_000_000  # from a directory to the next one, a slash in a name, or a member
_MOST_MEMORY = 256 * _MIB  # of all nodes and texts
_MOST_PATHS = 128 * _MIB  # bytes of all names that lead to a file, with the directories in them
# mke2fs looks at all names of a directory to add one: about 10 minutes for one of so many names.
_MOST_COMPARED = 100_000**2
_MOST_LINKS = 65_000  # names of one file; EXT4_LINK_MAX of the kernel
# What a node, a name in a directory, and an attribute take, beside their texts; as measured.
_NODE, _NAME, _ATTRIBUTE = 240, 120, 180
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
_NO_DEVICE = (0, 0)
_Children = dict[str, "tuple[Node, int]"]


@dataclass(slots=True, eq=False)
class Node:
    """A file of any kind; hard links are the same node under several names, and it is `linked`.

    `kind` is tarfile's, `start` and `size` say where a file's content is in the spool. A directory
    has its `children` with the layer that each came with, and `cleared` is the last layer that took
    away what lower layers have in it.
    """

    kind: bytes
    mode: int = 0o755
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    xattrs: Mapping[bytes, bytes] | None = None
    target: str = ""
    device: tuple[int, int] = _NO_DEVICE
    start: int = 0
    size: int = 0
    children: _Children | None = None
    cleared: int = -1
    linked: bool = False

    @property
    def is_directory(self) -> bool:
        return self.kind == tarfile.DIRTYPE

    def get(self, name: str) -> Node | None:
        """The entry of a directory at `name`."""
        found = None if self.children is None else self.children.get(name)
        return None if found is None else found[0]

    def put(self, name: str, node: Node, layer: int) -> None:
        if self.children is None:
            self.children = {}
        self.children[name] = (node, layer)

    def drop(self, name: str) -> None:
        if self.children is not None:
            self.children.pop(name, None)

    def drop_below(self, name: str, layer: int) -> None:
        """Take away what layers below `layer` have at `name`."""
        found = None if self.children is None else self.children.get(name)
        if found is None:
            return
        node, since = found
        if node.is_directory:
            node.clear_below(layer)
        if since < layer and not node.children:
            self.drop(name)

    def clear_below(self, layer: int) -> None:
        if self.cleared == layer:
            return  # nothing of a lower layer has come since
        self.cleared = layer
        for name in list(self.children or ()):
            self.drop_below(name, layer)


class Tree:
    """The files that the layers added so far make up; file contents go to `spool`."""

    def __init__(self, spool: Spool) -> None:
        self.root = Node(tarfile.DIRTYPE)
        self.spool = spool
        self._layer = 0
        self._made = 0
        self._steps = 0
        self._memory = 0

    def next_layer(self) -> None:
        """Begin the next layer: all that is added from now on is of it."""
        self._layer += 1

    def add(self, member: Member, content: IO[bytes] | None) -> None:
        """One member of a layer. Raises Refused for what no image may have."""
        self._step(1 + member.name.count("/"))
        path = split(member.name)
        if not path:
            if member.kind == tarfile.DIRTYPE:
                self._describe(self.root, member)
            return
        *folders, name = path
        parent = self._folder(folders, member.name)
        if name == _OPAQUE:
            parent.clear_below(self._layer)
        elif name.startswith(_WHITEOUT):
            self._white_out(parent, name.removeprefix(_WHITEOUT), member.name)
        elif member.kind == tarfile.LNKTYPE:
            self._link(parent, name, member)
        else:
            self._put(parent, name, member, content)

    def _white_out(self, parent: Node, name: str, whole: str) -> None:
        if name.startswith(_WHITEOUT):
            return  # aufs kept its own notes so
        if name in ("", ".", ".."):
            raise Refused(f"{shown(whole)} takes away nothing that has a name")
        parent.drop_below(name, self._layer)

    def _link(self, parent: Node, name: str, member: Member) -> None:
        self._step(member.link.count("/"))
        path = split(member.link)
        target = None
        if path:
            *folders, last = path
            # Nothing is made for a link: what it names is there, or it is not.
            folder = self._walk(folders, member.name, make=False)
            target = None if folder is None else folder.get(last)
        if target is None or target.is_directory:
            raise Refused(
                f"{shown(member.name)} is a hard link to {shown(member.link)}, which is not a file"
            )
        target.linked = True
        self._name(parent, name, target)

    def _put(self, parent: Node, name: str, member: Member, content: IO[bytes] | None) -> None:
        kind = _KINDS.get(member.kind)
        if kind is None:
            raise Refused(f"{shown(member.name)} is of the unknown kind {member.kind!r}")
        before = parent.get(name)
        if before is not None and kind == tarfile.DIRTYPE == before.kind:
            node = before
        else:
            node = self._new(kind)
        self._describe(node, member)
        if content is not None:
            node.start, node.size = self.spool.write(content, member.size, shown(member.name))
        self._name(parent, name, node)

    def _name(self, parent: Node, name: str, node: Node) -> None:
        self._take(_NAME + sys.getsizeof(name))
        parent.put(name, node, self._layer)

    def _describe(self, node: Node, member: Member) -> None:
        _describe(node, member)
        self._take(sys.getsizeof(node.target) if node.target else 0)
        for key, value in (node.xattrs or {}).items():
            self._take(_ATTRIBUTE + len(key) + len(value))

    def _take(self, size: int) -> None:
        """So much memory more. What is replaced or taken away later counts as well."""
        self._memory += size
        if self._memory > _MOST_MEMORY:
            raise Refused(
                f"its names, links and attributes take more than {_MOST_MEMORY // _MIB} MiB"
            )

    def _step(self, count: int = 1) -> None:
        self._steps += count
        if self._steps > _MOST_STEPS:
            raise Refused("its names lead through too many directories and links")

    def _new(self, kind: bytes) -> Node:
        self._made += 1
        if self._made > MOST_NODES:
            raise Refused(f"it has more than {MOST_NODES} files")
        self._take(_NODE)
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
            node = stack[-1].get(name)
            if node is None:
                if not make:
                    return None
                if _is_too_long(name):  # of a link's target: those of members are checked
                    raise Refused(f"{shown(whole)} lies behind a link with too long a name")
                node = self._new(tarfile.DIRTYPE)
                self._name(stack[-1], name, node)
            if node.kind == tarfile.SYMTYPE:
                hops += 1
                if hops > _MOST_HOPS:
                    raise Refused(f"{shown(whole)} lies behind links that lead nowhere")
                self._step(node.target.count("/"))
                if node.target.startswith("/"):
                    del stack[1:]
                left += [part for part in node.target.split("/")[::-1] if part not in ("", ".")]
            elif not node.is_directory:
                raise Refused(f"{shown(whole)} lies in {shown(name)}, which is not a directory")
            else:
                stack.append(node)
            if len(stack) > _MOST_DEPTH:
                raise Refused(f"{shown(whole)} lies deeper than {_MOST_DEPTH} directories")
        return stack[-1]

    # --- for those who look at it -------------------------------------------------------------

    def find(self, path: str) -> Node | None:
        """The entry at `path`, through links; None if there is nothing. Raises Refused."""
        left, hops = path, 0
        while True:
            parts = [part for part in left.split("/") if part not in ("", ".")]
            if not parts:
                return self.root
            *folders, name = parts
            folder = self._walk_if(folders)
            node = None if folder is None else folder.get(name)
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
        left = [("", iter((self.root.children or {}).items()))]
        while left:
            prefix, names = left[-1]
            for name, (node, _) in names:
                yield prefix + name, node
                if node.children:
                    left.append((f"{prefix}{name}/", iter(node.children.items())))
                    break
            else:
                left.pop()

    def files(self) -> Iterator[Node]:
        """All of it, each once, in any order."""
        seen: set[int] = set()
        left = [self.root]
        while left:
            node = left.pop()
            if node.linked:
                if id(node) in seen:
                    continue
                seen.add(id(node))
            yield node
            left += [child for child, _ in (node.children or {}).values()]

    def check_names(self) -> None:
        """Raise Refused if all names, as an archive has them, come to too much, or if a file
        system cannot have them."""
        total = compared = 0
        links: dict[int, int] = {}
        left = [(self.root, 0)]
        while left:
            node, length = left.pop()
            compared += len(node.children or ()) ** 2
            for name, (child, _) in (node.children or {}).items():
                whole = length + 1 + len(name)
                total += whole
                if child.linked:
                    links[id(child)] = links.get(id(child), 0) + 1
                if child.children:
                    left.append((child, whole))
        if total > _MOST_PATHS:
            raise Refused(f"the names of its files come to more than {_MOST_PATHS // _MIB} MiB")
        if compared > _MOST_COMPARED:
            raise Refused("it has too many files in one directory for mke2fs to add them")
        if max(links.values(), default=0) > _MOST_LINKS:
            raise Refused(f"it has a file of more than {_MOST_LINKS} names, which ext4 cannot have")
        kept = self.root.get("lost+found")  # which mke2fs makes, and would not take away whole
        if kept is not None and not kept.is_directory:
            raise Refused("its 'lost+found' is not a directory, as a file system's has to be")

    # --- for those who add to it --------------------------------------------------------------

    def directory(self, path: str, mode: int = 0o755) -> Node:
        """The directory at `path`; made with `mode` if it is not there. Raises Refused."""
        *folders, name = split(path)
        parent = self._folder(folders, path)
        if parent.get(name) is None:
            node = self._new(tarfile.DIRTYPE)
            node.mode = mode
            self._name(parent, name, node)
        return self._folder([*folders, name], path)

    def write(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A file with `data` at `path`, instead of what is there; through links to directories."""
        *folders, name = split(path)
        node = self._new(tarfile.REGTYPE)
        node.mode = mode
        node.start, node.size = self.spool.write(io.BytesIO(data), len(data), path)
        self._name(self._folder(folders, path), name, node)

    def link(self, path: str, target: str) -> None:
        """A symbolic link at `path`, instead of what is there."""
        *folders, name = split(path)
        node = self._new(tarfile.SYMTYPE)
        node.mode, node.target = 0o777, target
        self._name(self._folder(folders, path), name, node)


def split(name: str) -> list[str]:
    """The components of a member's name, or of what a hard link names: below the image's root, as
    container engines have it. Raises Refused for one that leads out of it."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            if parts:
                parts.pop()
            elif not name.startswith("/"):  # the root is its own parent
                raise Refused(f"{shown(name)} leads out of the image")
        elif part not in ("", "."):
            parts.append(part)
    if "\0" in name:
        raise Refused(f"{shown(name)} is not a name of a file")
    if any(map(_is_too_long, parts)):
        raise Refused(f"{shown(name)} is too long a name")
    if len(parts) > _MOST_DEPTH:
        raise Refused(f"{shown(name)} lies deeper than {_MOST_DEPTH} directories")
    return parts


def _is_too_long(name: str) -> bool:
    return len(name.encode("utf-8", "surrogateescape")) > _MOST_NAME


def _describe(node: Node, member: Member) -> None:
    node.mode, node.uid, node.gid = member.mode, member.uid, member.gid
    node.mtime = member.mtime
    node.xattrs = member.xattrs or None
    if node.kind == tarfile.SYMTYPE:
        target = member.link
        if (
            not target
            or "\0" in target
            or len(target.encode("utf-8", "surrogateescape")) > _MOST_PATH
        ):
            raise Refused(f"{shown(member.name)} is a link to no name of a file")
        node.target = target
    elif node.kind in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        node.device = member.device
        if not (0 <= node.device[0] < 1 << 12 and 0 <= node.device[1] < 1 << 20):
            raise Refused(f"{shown(member.name)} is a device that Linux has no number for")
