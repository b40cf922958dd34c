"""A tree into an ext4 file system: as a tar stream into mke2fs, which alone ever sees it.

mke2fs takes owners, modes, times, links, device nodes and file capabilities from the archive, so
that neither root nor fakeroot nor a mount is needed, and no such file comes to be on this machine.
The other extended attributes it leaves out; debugfs adds them.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import IO

from pyvmm.errors import ConfigError
from pyvmm.images import programs, tools
from pyvmm.images.container.refusal import Refused, shown
from pyvmm.images.container.tree import Node, Tree

LABEL = "pyvmm-root"
_MIB = 1 << 20
_FREE = 512 * _MIB  # what a guest may add by default; the image file is sparse
_SMALLEST = 1024 * _MIB
_BYTES_PER_INODE = 16384
_INODE_SIZE = 256
_BY_MKE2FS = "security.capability"


def size_for(tree: Tree) -> int:
    """Bytes of a file system with room for `tree` and more."""
    return max(_SMALLEST, (_content(tree) * 5 // 4 + _FREE) // _MIB * _MIB)


def _content(tree: Tree) -> int:
    """Bytes of the blocks that `tree` takes at least."""
    nodes = {id(node): node for _, node in tree.walk()}
    return sum(-(-node.size // 1024) * 1024 + _INODE_SIZE for node in nodes.values())


def make(
    tree: Tree, disk: str, size: int, tools_image: str, room: str, advance: Callable[[int], None]
) -> None:
    """Write the file system to `disk`; `tools_image` is the folder of programs-ext4.

    Raises ConfigError where the tree does not fit into `size` bytes.
    """
    too_small = Refused(
        f"the image does not fit into {size // _MIB} MiB", cure="give it a larger --size"
    )
    if _content(tree) > size:
        raise too_small
    count = sum(1 for _ in tree.walk())
    inodes = max(size // _BYTES_PER_INODE, count * 5 // 4 + 1024)
    command = [
        *programs.command(tools_image, "usr/sbin/mke2fs", "mke2fs"),
        *("-q", "-t", "ext4", "-L", LABEL, "-m", "0", "-N", str(inodes)),
        # Of a small disk too: a long link and the extended attributes have one block each.
        *("-b", "4096"),
        # No lazy initialisation: the guest's kernel would write behind the user's back.
        *("-E", "lazy_itable_init=0,lazy_journal_init=0"),
        *("-d", "-", disk, f"{size // 1024}k"),
    ]
    settings = os.path.join(tools_image, "root", "etc", "mke2fs.conf")
    try:
        tools.feed(
            command,
            "making the file system",
            lambda pipe: write_tar(tree, pipe, advance),
            env={"MKE2FS_CONFIG": settings},
        )
    except ConfigError as error:
        # It calls a full file system by different names, this one where it was a file's content.
        if any(words in error.message for words in ("allocate", "Operation not permitted")):
            raise too_small from None
        raise
    _add_attributes(tree, disk, tools_image, room)
    os.chmod(disk, 0o444)


def write_tar(tree: Tree, into: IO[bytes], advance: Callable[[int], None]) -> None:
    """`tree` as a pax archive. `advance` hears how many bytes of content were written."""
    paths: dict[int, str] = {}
    with tarfile.open(
        fileobj=into,
        mode="w|",
        format=tarfile.PAX_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as archive:
        for path, node in tree.walk():
            member = _member(path, node)
            first = paths.setdefault(id(node), path)
            if first != path:
                member.type, member.linkname, member.size = tarfile.LNKTYPE, first, 0
            pieces = tree.spool.pieces(node.start, member.size)
            archive.addfile(member, _Reader(pieces, advance) if member.size else None)
            archive.members.clear()  # type: ignore[attr-defined]


def _member(path: str, node: Node) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.type, member.mode, member.mtime = node.kind, node.mode, node.mtime
    member.uid, member.gid = node.uid, node.gid
    member.linkname, member.size = node.target, node.size
    member.devmajor, member.devminor = node.device
    if _BY_MKE2FS in node.xattrs:
        value = node.xattrs[_BY_MKE2FS].decode("utf-8", "surrogateescape")
        member.pax_headers = {f"SCHILY.xattr.{_BY_MKE2FS}": value}
    return member


class _Reader(io.RawIOBase):
    def __init__(self, pieces: Iterator[bytes], advance: Callable[[int], None]) -> None:
        self._pieces, self._advance, self._left = pieces, advance, b""

    def read(self, size: int = -1) -> bytes:
        while len(self._left) < size:
            piece = next(self._pieces, b"")
            if not piece:
                break
            self._left += piece
        data, self._left = self._left[:size], self._left[size:]
        self._advance(len(data))
        return data


def _add_attributes(tree: Tree, disk: str, tools_image: str, room: str) -> None:
    commands: list[str] = []
    done: set[int] = set()
    for path, node in tree.walk():
        others = {name: value for name, value in node.xattrs.items() if name != _BY_MKE2FS}
        if not others or id(node) in done:
            continue
        done.add(id(node))
        if "\n" in path or "\r" in path:
            raise Refused(f"{shown(path)} has extended attributes and a line's end in its name")
        quoted = '"/' + path.replace('"', '""') + '"'
        for name, value in others.items():
            file = os.path.join(room, f"attribute{len(commands)}")
            with open(file, "wb") as writer:
                writer.write(value)
            commands.append(f'ea_set -f {file} {quoted} "{name}"\n')
    if not commands:
        return
    program = programs.command(tools_image, "usr/sbin/debugfs", "debugfs")
    script = os.path.join(room, "attributes")
    with open(script, "w", encoding="utf-8", errors="surrogateescape") as writer:
        writer.writelines(commands)
    said = tools.feed(
        [*program, "-w", "-f", script, disk], "adding extended attributes", lambda pipe: None
    )
    # It ends with 0 whatever it could not do; its version is all that it has to say.
    complaints = [line for line in said.splitlines() if line and not line.startswith("debugfs ")]
    if complaints:
        raise Refused(f"an extended attribute cannot be set: {complaints[0][:200]}")
