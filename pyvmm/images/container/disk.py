"""A tree into an ext4 file system: as a tar stream into mke2fs, which alone ever sees it.

mke2fs takes owners, modes, times, links and device nodes from the archive, so that neither root nor
fakeroot nor a mount is needed, and no such file comes to be on this machine. Extended attributes it
leaves out, all but one; `attributes` adds them. Both run where they can write to the file system's
file alone (`pyvmm.host.confinement`), and both take names as data.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from typing import IO

from pyvmm.errors import ConfigError
from pyvmm.host import confinement
from pyvmm.images import programs, tools
from pyvmm.images.container import attributes
from pyvmm.images.container.refusal import Refused
from pyvmm.images.container.tree import Node, Tree

LABEL = "pyvmm-root"
_MIB = 1 << 20
_FREE = 512 * _MIB  # what a guest may add by default; the image file is sparse
_SMALLEST = 1024 * _MIB
_BYTES_PER_INODE = 16384
_INODE_SIZE = 256
_MEMORY = 2 << 30  # bytes of address space for mke2fs, which has buffers of 16 MiB


def size_for(tree: Tree) -> int:
    """Bytes of a file system with room for `tree` and more."""
    return max(_SMALLEST, (_content(tree) * 5 // 4 + _FREE) // _MIB * _MIB)


def _content(tree: Tree) -> int:
    """Bytes of the blocks that `tree` takes at least."""
    return sum(-(-node.size // 1024) * 1024 + _INODE_SIZE for node in tree.files())


def make(
    tree: Tree, disk: str, size: int, tools_image: str, advance: Callable[[int], None]
) -> None:
    """Write the file system to `disk`; `tools_image` is the folder of programs-ext4.

    Raises ConfigError where the tree does not fit into `size` bytes.
    """
    too_small = Refused(
        f"the image does not fit into {size // _MIB} MiB", cure="give it a larger --size"
    )
    if _content(tree) > size:
        raise too_small
    tree.check_names()
    count = sum(1 for _ in tree.files())
    inodes = max(size // _BYTES_PER_INODE, count * 5 // 4 + 1024)
    command = [
        *programs.command(tools_image, "usr/sbin/mke2fs", "mke2fs"),
        *("-q", "-F", "-t", "ext4", "-L", LABEL, "-m", "0", "-N", str(inodes)),
        # Of a small disk too: a long link and the extended attributes have one block each.
        *("-b", "4096"),
        # No lazy initialisation: the guest's kernel would write behind the user's back.
        *("-E", "lazy_itable_init=0,lazy_journal_init=0"),
        # Of 2023: the libext2fs that adds attributes is this machine's, and may be older.
        *("-O", "^orphan_file"),
        *("-d", "-", disk, f"{size // 1024}k"),
    ]
    root = os.path.join(tools_image, "root")
    room = confinement.Room(
        read=(root,),
        write=(disk,),
        execute=(command[0],),
        memory=_MEMORY,
        size=size,
        env=(("LC_ALL", "C"), ("MKE2FS_CONFIG", os.path.join(root, "etc", "mke2fs.conf"))),
    )
    os.close(os.open(disk, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        tools.feed(
            confinement.command(room, command),
            "making the file system",
            lambda pipe: write_tar(tree, pipe, advance),
        )
        if any(node.xattrs for node in tree.files()):
            tools.feed(
                confinement.python(attributes.__name__, disk),
                "adding extended attributes",
                lambda pipe: pipe.writelines(_attributes(tree)),
            )
    except ConfigError as error:
        # It calls a full file system by different names, this one where it was a file's content.
        if any(words in error.message for words in ("allocate", "Operation not permitted")):
            raise too_small from None
        raise
    os.chmod(disk, 0o444)


def write_tar(tree: Tree, into: IO[bytes], advance: Callable[[int], None]) -> None:
    """`tree` as a pax archive. `advance` hears how many bytes of content were written."""
    # Where the hard links lead. Paths are long, so there is one only of those that are needed.
    first: dict[int, str] = {}
    with tarfile.open(
        fileobj=into,
        mode="w|",
        format=tarfile.PAX_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as archive:
        for path, node in tree.walk():
            link = first.setdefault(id(node), path) if node.linked else path
            member = _member(path, node, "" if link == path else link)
            pieces = tree.spool.pieces(node.start, member.size)
            archive.addfile(member, _Reader(pieces, advance) if member.size else None)
            archive.members.clear()  # type: ignore[attr-defined]


def _member(path: str, node: Node, link: str) -> tarfile.TarInfo:
    """Of `node` at `path`, or of a hard link there to the path `link`."""
    member = tarfile.TarInfo(path)
    member.type, member.mode, member.mtime = node.kind, node.mode, node.mtime
    member.uid, member.gid = node.uid, node.gid
    member.linkname, member.size = node.target, node.size
    member.devmajor, member.devminor = node.device
    if link:
        member.type, member.linkname, member.size = tarfile.LNKTYPE, link, 0
    if not (path.isascii() and member.linkname.isascii()):
        # Or libarchive would have to know a locale that has the name's characters.
        member.pax_headers = {"hdrcharset": "BINARY"}
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


def _attributes(tree: Tree) -> Iterator[bytes]:
    done: set[int] = set()
    for path, node in tree.walk():
        if node.xattrs and id(node) not in done:
            if node.linked:
                done.add(id(node))
            yield attributes.record(path.encode("utf-8", "surrogateescape"), node.xattrs)
