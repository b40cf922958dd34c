"""Archives of container images: what `pyvmm image build oci-archive:…` reads of a stranger's file.

Archives are written header by header here, from POSIX' and GNU's descriptions, with the place of
each number and text known, so that one of them lies and its checksum is right. A case raises
AssertionError, with what was written, if

- the tree of lawful layers is another one than that of a model with whiteouts, links and
  replacements, or comes out of `disk.write_tar` as something else, as Python's tarfile reads it,
- anything but a refusal of one line is raised,
- more is read than there is, more kept than was allowed, more asked for than there are bytes,
- a descriptor or a file is left.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import zstandard
from fuzz.damage import Number, harm, spoil, wrong
from fuzz.room import check_closed, open_files, room, told
from fuzz.snapshots import other

from pyvmm.errors import ConfigError
from pyvmm.images.container import disk, manifest, process
from pyvmm.images.container.layers import Budget, LayerStream
from pyvmm.images.container.load import load, named
from pyvmm.images.container.members import Member, members
from pyvmm.images.container.refusal import Refused
from pyvmm.images.container.spool import Spool
from pyvmm.images.container.tree import Tree
from pyvmm.images.progress import Progress
from pyvmm.testing.mmio_driver import Ring

MOST = 1 << 20  # bytes of contents that a case allows
_BLOCK = 512
_NAMES = ("a", "b", "c", "dir", "ü", "x" * 100, "long-" * 30)


_room = functools.cache(room)


# --- a writer -------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """A member as it is to be: `kind` is tarfile's type."""

    name: str
    kind: bytes = b"0"
    data: bytes = b""
    link: str = ""
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    xattrs: tuple[tuple[str, bytes], ...] = ()
    device: tuple[int, int] = (0, 0)
    holes: tuple[tuple[int, int], ...] = ()  # (offset, bytes) of data, if it is sparse
    size: int = 0  # if it is


_PLACES = (
    *(("name", 0, 100), ("mode", 100, 8), ("uid", 108, 8), ("gid", 116, 8), ("size", 124, 12)),
    *(("mtime", 136, 12), ("type", 156, 1), ("link", 157, 100), ("magic", 257, 8)),
    *(("major", 329, 8), ("minor", 337, 8), ("prefix", 345, 155)),
)


class Archive:
    """Blocks, and where each header is."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.headers: list[int] = []
        self.pax: list[tuple[int, int]] = []  # where extended headers' records are, and how long

    def header(self, kind: bytes, name: bytes, size: int, entry: Entry | None = None) -> None:
        block = bytearray(_BLOCK)

        def put(at: int, room: int, value: int) -> None:
            digits = f"{value:0{room - 1}o}".encode()
            if value < 0 or len(digits) >= room:
                digits = b"\x80" + (value % (1 << 8 * (room - 1))).to_bytes(room - 1, "big")
                if value < 0:
                    digits = b"\xff" + digits[1:]
                block[at : at + room] = digits
            else:
                block[at : at + room - 1] = digits

        one = entry or Entry("")
        block[:100] = name[:100].ljust(100, b"\0")
        put(100, 8, one.mode)
        put(108, 8, one.uid)
        put(116, 8, one.gid)
        put(124, 12, size)
        put(136, 12, one.mtime)
        block[156:157] = kind
        block[157:257] = one.link.encode("utf-8", "surrogateescape")[:100].ljust(100, b"\0")
        block[257:265] = b"ustar\x0000"
        put(329, 8, one.device[0])
        put(337, 8, one.device[1])
        self.headers.append(len(self.data))
        self.data += block
        self.sum(self.headers[-1])

    def sum(self, at: int) -> None:
        """Make the checksum of the header at `at` right."""
        block = self.data[at : at + _BLOCK]
        if len(block) == _BLOCK:
            total = sum(block) - sum(block[148:156]) + 8 * 32
            self.data[at + 148 : at + 156] = f"{total:06o}\0 ".encode()

    def body(self, data: bytes) -> None:
        self.data += data + bytes(-len(data) % _BLOCK)

    def extended(self, records: list[tuple[bytes, bytes]], kind: bytes = b"x") -> None:
        text = b""
        for key, value in records:
            rest = b" " + key + b"=" + value + b"\n"
            size = len(rest) + len(str(len(rest)))
            size = len(rest) + len(str(size))
            text += str(size).encode() + rest
        self.header(kind, b"pax", len(text))
        self.pax.append((len(self.data), len(text)))
        self.body(text)

    def add(self, rng: Random, entry: Entry) -> None:
        """A member, in one of the ways in which it can be said."""
        name = entry.name.encode("utf-8", "surrogateescape")
        link = entry.link.encode("utf-8", "surrogateescape")
        records: list[tuple[bytes, bytes]] = []
        for key, value in entry.xattrs:
            records.append((b"SCHILY.xattr." + key.encode(), value))
        long_name, long_link = len(name) > 100, len(link) > 100
        if long_name and rng.random() < 0.5:
            self.header(b"L", b"././@LongLink", len(name) + 1)
            self.body(name + b"\0")
        elif long_name or rng.random() < 0.1:
            records.append((b"path", name))
        if long_link and rng.random() < 0.5:
            self.header(b"K", b"././@LongLink", len(link) + 1)
            self.body(link + b"\0")
        elif long_link:
            records.append((b"linkpath", link))
        for key in ("uid", "gid", "mtime"):
            if rng.random() < 0.1:
                records.append((key.encode(), str(getattr(entry, key)).encode()))
        data = entry.data
        if entry.holes or entry.size:
            pairs = [number for one in entry.holes for number in one]
            if rng.random() < 0.5:
                records += [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")]
                records.append((b"GNU.sparse.realsize", str(entry.size).encode()))
                numbers = "".join(f"{one}\n" for one in (len(entry.holes), *pairs)).encode()
                data = numbers + bytes(-len(numbers) % _BLOCK) + data
            else:
                records.append((b"GNU.sparse.size", str(entry.size).encode()))
                records.append((b"GNU.sparse.map", ",".join(map(str, pairs)).encode()))
                if not pairs:
                    records.pop()
        if records:
            self.extended(records)
        size = len(data) if entry.kind in (b"0", b"\0", b"7") else 0
        self.header(entry.kind, name, size, entry)
        if size:
            self.body(data)

    def end(self) -> bytes:
        return bytes(self.data) + bytes(2 * _BLOCK)


def _lie(rng: Random, archive: Archive, note: list[str]) -> None:
    """Some of what the headers say is not so."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.random()
        if kind < 0.6 and archive.headers:
            at = rng.choice(archive.headers)
            name, place, room = rng.choice(_PLACES)
            start = at + place
            old = bytes(archive.data[start : start + room])
            if name in ("name", "link", "prefix"):
                new = rng.choice(_STRANGE_NAMES).ljust(room, b"\0")[:room]
            elif name == "type":
                new = rng.choice(
                    (b"0", b"1", b"2", b"3", b"5", b"6", b"7", b"g", b"x", b"L", b"S", b"z")
                )
            elif name == "magic":
                new = rng.choice((b"ustar  \0", b"ustar\x0000", bytes(8)))
            else:
                new = b"7"
                with suppress(ValueError):
                    value = int(old.strip(b"\0 ") or b"0", 8) if old[:1] < b"\x80" else 0
                    value = wrong(rng, value, 4) if rng.random() < 0.7 else rng.getrandbits(62)
                    octal = f"{value:o}".encode()
                    new = octal.rjust(room - 1, b"0") + b"\0" if len(octal) < room else b"\x80"
                if rng.random() < 0.3:
                    new = rng.choice(
                        (b"\xff" * room, b"\x80" + b"\0" * 3 + rng.randbytes(room), b"x9")
                    )
                new = new.ljust(room, b"\0")[:room]
            archive.data[start : start + room] = new
            if rng.random() < 0.95:
                archive.sum(at)
            note.append(f"{name} of the header at {at}: {new!r}")
        elif kind < 0.8 and archive.pax:
            at, size = rng.choice(archive.pax)
            part = archive.data[at : at + size]
            note.append("an extended header: " + spoil(rng, part))
            archive.data[at : at + size] = part[:size].ljust(size, b"\0")
        elif kind < 0.9 and len(archive.headers) > 1:
            first, second = sorted(rng.sample(archive.headers, 2))
            note.append(f"from {first} on as from {second} on")
            archive.data[first : first + _BLOCK] = archive.data[second : second + _BLOCK]
        else:
            note.append(spoil(rng, archive.data))


_STRANGE_NAMES = (
    *(
        b"..",
        b"../x",
        b"/",
        b"",
        b".",
        b"a/../../x",
        b"//a",
        b"a\nb",
        b"\xff\xfe",
        b"dir/",
        b"x" * 200,
    ),
    *(b".wh.", b".wh..", b".wh...", b".wh..wh..opq", b".wh..wh.aufs", b"dir/.wh.a", b"lost+found"),
    *(b"a" + b"/a" * 49, b"link/a", b"link"),
)


# --- a tree, and its model ------------------------------------------------------------------------


class _Node:
    def __init__(self, entry: Entry, kind: str) -> None:
        self.entry, self.kind = entry, kind


class _Model:
    """What layers come to, path by path; `odd` once something is not modelled."""

    def __init__(self) -> None:
        self.nodes: dict[str, tuple[_Node, int]] = {}
        self.root = Entry("", b"5", mode=0o755)
        self.layer = 0
        self.refused = self.odd = False

    def below(self, path: str) -> list[str]:
        return [one for one in self.nodes if one.startswith(path + "/")] if path else [*self.nodes]

    def _lower(self, paths: list[str]) -> None:
        """Take away those of lower layers; directories stay that have something left in them."""
        for path in sorted(paths, key=lambda one: -one.count("/")):
            _, since = self.nodes[path]
            if since < self.layer and not self.below(path):
                del self.nodes[path]

    def add(self, entry: Entry) -> None:
        parts = [part for part in entry.name.split("/") if part not in ("", ".")]
        if not parts:
            if entry.kind == b"5":
                self.root = entry
            return
        *folders, name = parts
        path = ""
        for part in folders:
            path = f"{path}/{part}" if path else part
            found = self.nodes.get(path)
            if found is None:
                self.nodes[path] = _Node(Entry(path, b"5", mode=0o755), "dir"), self.layer
            elif found[0].kind == "link":  # which are followed, as not modelled here
                self.odd = True
                return
            elif found[0].kind != "dir":
                self.refused = True
                return
        whole = f"{path}/{name}" if path else name
        if name == ".wh..wh..opq":
            self._lower(self.below(path))
        elif name.startswith(".wh."):
            gone = f"{path}/{name[4:]}" if path else name[4:]
            if gone in self.nodes:
                self._lower([*self.below(gone), gone])
        elif entry.kind == b"1":
            found = self.nodes.get(entry.link)
            if found is None or found[0].kind == "dir":
                self.refused = True
                return
            node = found[0]
            for one in self.below(whole):
                del self.nodes[one]
            self.nodes[whole] = node, self.layer
        else:
            kind = {b"5": "dir", b"2": "link", b"3": "char", b"6": "fifo"}.get(entry.kind, "file")
            if entry.kind == b"\0" and entry.name.endswith("/"):
                kind = "dir"
            before = self.nodes.get(whole)
            if before is not None and before[0].kind == kind == "dir":
                before[0].entry = entry
                self.nodes[whole] = before[0], self.layer
                return
            for one in self.below(whole):
                del self.nodes[one]
            self.nodes[whole] = _Node(entry, kind), self.layer


def _entries(rng: Random, *, plain: bool) -> list[Entry]:
    found: list[Entry] = []
    for _ in range(rng.choice((1, 2, 4, 8))):
        depth = rng.choice((0, 0, 1, 1, 2))
        name = "/".join(rng.choice(_NAMES[:5]) for _ in range(depth + 1))
        if rng.random() < 0.1:
            name = rng.choice(_NAMES)
        if not plain and rng.random() < 0.1:
            name = f"link/{name}"
        more: dict[str, Any] = {
            "mode": rng.choice((0o644, 0o755, 0o4755, 0o1777)),
            "uid": rng.choice((0, 1000, 65534, 1 << 21, (1 << 32) - 2)),
            "gid": rng.choice((0, 5)),
            "mtime": rng.choice((0, 10**9, (1 << 31) - 1)),
        }
        if rng.random() < 0.1:
            more["xattrs"] = (
                ("user.x", b"value"),
                ("security.capability", b"\1\0\0\2" + bytes(16)),
            )
        kind = rng.randrange(14)
        if kind < 4:
            data = rng.choice((b"", b"text", rng.randbytes(700), bytes(5000)))
            found.append(Entry(name, rng.choice((b"0", b"\0", b"7")), data, **more))
        elif kind < 7:
            kind_of, end = rng.choice(((b"5", ""), (b"5", "/"), (b"\0", "/")))
            found.append(Entry(name + end, kind_of, **more))
        elif kind == 7:
            # A link that leads somewhere makes paths that the model does not follow.
            target = (
                "nowhere" if plain else rng.choice(("dir", "..", "/", "link", "x" * 4000, "a/b"))
            )
            found.append(Entry(name, b"2", link=target, **more))
        elif kind == 8:
            known = [one.name for one in found if one.kind in (b"0", b"2")]
            found.append(Entry(name, b"1", link=rng.choice([*known, "a", "dir/a"]), **more))
        elif kind in (9, 10):
            folder, _, last = name.rpartition("/")
            gone = rng.choice((f".wh.{last}", ".wh..wh..opq"))
            found.append(Entry(f"{folder}/{gone}" if folder else gone, b"0"))
        elif kind == 11:
            found.append(
                Entry(name, b"3", device=(rng.randrange(1 << 12), rng.randrange(1 << 20)), **more)
            )
        elif kind == 12:
            found.append(Entry(name, b"6", **more))
        else:
            at, holes, data = 0, [], b""
            for _ in range(rng.randrange(4)):
                at += rng.randrange(2000)
                part = rng.randbytes(rng.choice((1, 512, 900)))
                holes.append((at, len(part)))
                data += part
                at += len(part)
            size = at + rng.randrange(1, 3000)
            if not plain and holes and rng.random() < 0.5:  # a map that cannot be
                number = rng.randrange(len(holes))
                start, length = holes[number]
                other = wrong(rng, start, 2), wrong(rng, length, 2)
                holes = rng.choice((holes[::-1], [*holes, holes[number]], [*holes, other]))
            found.append(Entry(name, b"0", data, holes=tuple(holes), size=size, **more))
    if not plain and rng.random() < 0.3:
        found.insert(
            rng.randint(0, len(found)), Entry("link", b"2", link=rng.choice(("dir", "link", "/")))
        )
    return found


def _content(entry: Entry) -> bytes:
    if not (entry.holes or entry.size):
        return entry.data
    made, at = bytearray(entry.size), 0
    for start, size in entry.holes:
        made[start : start + size] = entry.data[at : at + size]
        at += size
    return bytes(made)


def _headers(data: bytes) -> tuple[int, bool] | None:
    """How many members an archive has, and whether each header that is read has its own sum, and
    not more than 1 MiB; None for what takes more than a few lines to tell."""
    at, count = 0, 0
    while at + _BLOCK <= len(data):
        block = data[at : at + _BLOCK]
        if not any(block):
            return count, True
        digits = block[148:156].partition(b"\0")[0].strip(b" ")
        if not digits or digits.translate(None, b"01234567") or block[148] >= 0x80:
            return None
        plain = sum(block) - sum(block[148:156]) + 256
        signed = plain - 256 * sum(byte > 127 for byte in block[:148] + block[156:])
        if int(digits, 8) not in (plain, signed):
            return count, False
        kind, size = block[156:157], block[124:136].partition(b"\0")[0].strip(b" ")
        if kind == b"S" or block[124] >= 0x80 or size.translate(None, b"01234567"):
            return None
        body = data[at + _BLOCK : at + _BLOCK + int(size or b"0", 8)]
        if kind in b"xgX" and b"size" in body:
            return None
        if kind not in (b"x", b"g", b"X", b"L", b"K"):
            count += 1
        elif int(size or b"0", 8) > 1 << 20:
            return count, False
        is_empty = kind in (b"1", b"2", b"3", b"4", b"5", b"6")
        if kind == b"\0" and block[:100].partition(b"\0")[0].endswith(b"/"):
            return None
        at += _BLOCK + (0 if is_empty else -(-int(size or b"0", 8) // _BLOCK) * _BLOCK)
    return None


def _check_member(member: Member) -> None:
    """A member that nobody has refused makes sense."""
    if member.pieces is not None:
        last = 0
        for start, length in member.pieces:
            assert last <= start and length >= 0, "pieces that overlap"
            last = start + length
        assert last <= member.size, "pieces past the end"
        assert sum(length for _, length in member.pieces) <= member.stored, "more than is stored"
    assert 0 <= member.uid < 0xFFFF_FFFF and 0 <= member.gid < 0xFFFF_FFFF
    assert 0 <= member.mode <= 0o7777 and 0 <= member.mtime < 1 << 31 and member.size >= 0


def _leads_out(name: str) -> bool:
    depth = 0
    for part in name.split("/"):
        depth += (part not in ("", ".", "..")) - (part == "..")
        if depth < 0 and not name.startswith("/"):
            return True
        depth = max(0, depth)
    return False


def _check_sound(tree: Tree) -> None:
    """Each of its names is one, and nothing is what a file system cannot have."""
    for path, node in tree.walk():
        name = path.rpartition("/")[2]
        assert path == "." or (name not in ("", ".", "..") and "\0" not in name), path
        assert len(name.encode("utf-8", "surrogateescape")) <= 255 and path.count("/") < 200
        assert node.kind in (b"0", b"5", b"2", b"3", b"4", b"6"), node.kind
        assert 0 <= node.device[0] < 1 << 12 and 0 <= node.device[1] < 1 << 20
        assert node.start + node.size <= MOST
        assert len(node.target) < 4096 and (node.target or node.kind != b"2")
        assert node.children is None or node.is_directory


class _Counted(io.BytesIO):
    """An archive of which the reading is counted."""

    calls = 0

    def read(self, size: int | None = -1) -> bytes:
        self.calls += 1
        assert size is not None and 0 <= size <= 1 << 20, "it reads all at once"
        assert self.calls <= 100 + len(self.getbuffer()) // 64, f"{self.calls} calls"
        return super().read(size)


def _check_tree(tree: Tree, model: _Model) -> None:
    found = dict(tree.walk())
    found.pop(".")
    assert found.keys() == model.nodes.keys(), found.keys() ^ model.nodes.keys()
    ids: dict[int, int] = {}
    for path, node in found.items():
        wanted, _ = model.nodes[path]
        entry = wanted.entry
        said = {b"5": "dir", b"2": "link", b"3": "char", b"6": "fifo"}.get(node.kind, "file")
        assert said == wanted.kind, path
        assert (node.mode, node.uid, node.gid) == (entry.mode, entry.uid, entry.gid), path
        assert node.mtime == entry.mtime, path
        assert dict(node.xattrs or {}) == {key.encode(): value for key, value in entry.xattrs}
        assert ids.setdefault(id(node), id(wanted)) == id(wanted), path
        if said == "file":
            content = _content(entry)
            assert node.size == len(content), path
            assert tree.spool.read(node.start, node.size) == content, path
        elif said == "link":
            assert node.target == entry.link
        elif said == "char":
            assert node.device == entry.device


def _check_written(tree: Tree) -> None:
    """What mke2fs would get, as Python's own reader has it."""
    into = io.BytesIO()
    told: list[int] = []
    disk.write_tar(tree, into, told.append)
    into.seek(0)
    found = dict(tree.walk())
    with tarfile.open(fileobj=into, errors="surrogateescape") as archive:
        read = archive.getmembers()
        assert [one.name for one in read] == list(found), "other names, or in another order"
        seen: set[int] = set()
        for one in read:
            node = found[one.name]
            assert one.islnk() == (id(node) in seen), "a file of two names is two files"
            if not node.is_directory:
                seen.add(id(node))
            if not one.islnk():
                assert (one.mode, one.uid, one.gid) == (node.mode, node.uid, node.gid)
                assert one.type == (b"0" if node.kind in (b"\0", b"7") else node.kind)
            if one.isreg():
                content = archive.extractfile(one)
                assert content is not None
                assert content.read() == tree.spool.read(node.start, node.size), one.name
            elif one.islnk():
                assert found[one.linkname] is node
            elif one.issym():
                assert one.linkname == node.target


def _layers(rng: Random, note: list[str]) -> int:
    """Layers, member by member; how many members there were."""
    is_good = rng.random() < 0.35
    model = _Model()
    tree = Tree(Spool(str(_room() / "contents"), MOST))
    count = 0
    try:
        for _ in range(rng.choice((1, 1, 2, 3))):
            entries = _entries(rng, plain=is_good)
            archive = Archive()
            if rng.random() < 0.1:
                archive.extended([(b"comment", b"global")], b"g")
            for entry in entries:
                archive.add(rng, entry)
            note += [repr(one._replace(data=one.data[:8])) for one in entries]
            if not is_good:
                _lie(rng, archive, note)
            tree.next_layer()
            model.layer += 1
            if not is_good and rng.random() < 0.01:
                archive.extended([(b"comment", b"x" * (1 << 20))])
                archive.add(rng, Entry("large"))
            told = _headers(archive.end())
            stream = _Counted(archive.end())
            began = count
            with named("a layer"):
                for member, content in members(stream):
                    count += 1
                    _check_member(member)
                    tree.add(member, content)
                    assert not _leads_out(member.name), member.name
            if told is not None:
                assert told == (count - began, True), (told, count - began)
            for entry in entries:
                if not (model.refused or model.odd):
                    model.add(entry)
        assert not (is_good and model.refused), "that should be refused"
        if is_good and not model.odd:
            _check_tree(tree, model)
        _check_sound(tree)
        with suppress(Refused):
            tree.check_names()
            _check_written(tree)
            config = {"User": rng.choice(("", "0", "a", "1:2", "a:b")), "Env": ["A=b"]}
            process.read(config, tree)
    except Refused as refused:
        _one_line(refused)
        if is_good and not model.refused:
            # It may be refused at a member that the model has not heard of yet.
            for entry in entries:
                if not (model.refused or model.odd):
                    model.add(entry)
            assert model.refused or model.odd, refused
    finally:
        tree.spool.close()
    assert (_room() / "contents").stat().st_size <= MOST
    return count


def _one_line(error: ConfigError) -> None:
    text = str(error)
    assert text.isprintable() and len(text) < 1500, text


# --- a whole image --------------------------------------------------------------------------------


def _digest(data: bytes, kind: str = "sha256") -> str:
    return f"{kind}:{hashlib.new(kind, data).hexdigest()}"


_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": functools.partial(gzip.compress, compresslevel=1),
    "zstd": zstandard.ZstdCompressor(level=1).compress,
    "bzip2": functools.partial(bz2.compress, compresslevel=1),
    "xz": functools.partial(lzma.compress, preset=0),
}


def _change(rng: Random, value: Any, note: list[str]) -> Any:
    """Some other value somewhere in `value`."""
    holder, key = [value], 0
    inside: Any = value
    at: Any = holder
    while isinstance(inside, dict | list) and inside and rng.random() < 0.8:
        at = inside
        key = rng.choice(list(inside)) if isinstance(inside, dict) else rng.randrange(len(inside))
        inside = at[key]
    new = other(rng, inside)
    with suppress(ValueError):
        json.dumps(new)
        at[key] = new
        note.append(f"{key!r} is {new!r:.200}")
    return holder[0]


def _image(rng: Random, note: list[str]) -> int:
    """An image with its manifests: as an archive of two kinds, or as a directory."""
    kind = rng.choice(("oci", "oci-archive", "docker-archive"))
    is_good = rng.random() < 0.3
    files: dict[str, bytes] = {}
    layers = []
    for _ in range(rng.choice((1, 1, 2))):
        archive = Archive()
        archive.add(rng, Entry(rng.choice(_NAMES), b"0", rng.randbytes(30)))
        layers.append(archive.end())

    def blob(data: bytes) -> dict[str, Any]:
        digest = _digest(data, rng.choice(("sha256", "sha256", "sha512")))
        files["blobs/" + digest.replace(":", "/")] = data
        return {"digest": digest, "size": len(data)}

    def said(value: Any, much: float = 0.25) -> bytes:
        if not is_good and rng.random() < much:
            value = _change(rng, value, note)
        data = json.dumps(value).encode()
        if not is_good and rng.random() < 0.03:
            text = bytearray(data)
            note.append(f"JSON: {spoil(rng, text)}")
            data = bytes(text)
        return data

    config = said(
        {
            "os": "linux",
            "architecture": "amd64",
            "config": {"Cmd": ["/bin/sh"], "Env": ["A=b"]},
            "rootfs": {"type": "layers", "diff_ids": [_digest(one) for one in layers]},
        }
    )
    packers = [rng.choice(list(_PACKERS)) for _ in layers]
    stored = [_PACKERS[name](one) for name, one in zip(packers, layers, strict=True)]
    if not is_good and rng.random() < 0.3:
        which = rng.randrange(len(stored))
        text = bytearray(stored[which])
        note.append(f"layer {which}, {packers[which]}: {spoil(rng, text)}")
        stored[which] = bytes(text)
    if kind == "docker-archive":
        files["config.json"] = config
        for number, data in enumerate(stored):
            files[f"{number}/layer.tar"] = data
        row = {"Config": "config.json", "RepoTags": ["image:1"]}
        row["Layers"] = [f"{number}/layer.tar" for number in range(len(stored))]  # type: ignore[assignment]
        files["manifest.json"] = said([row])
    else:
        layer = "application/vnd.oci.image.layer.v1.tar"
        rows = [{"mediaType": layer, **blob(data)} for data in stored]
        text = said({"schemaVersion": 2, "config": blob(config), "layers": rows})
        row = {"mediaType": "application/vnd.oci.image.manifest.v1+json", **blob(text)}
        row["annotations"] = {"org.opencontainers.image.ref.name": "image:1"}  # type: ignore[assignment]
        if rng.random() < 0.2:
            text = said({"schemaVersion": 2, "manifests": [row]})
            row = {"mediaType": "application/vnd.oci.image.index.v1+json", **blob(text)}
        files["index.json"] = said({"schemaVersion": 2, "manifests": [row]})
        files["oci-layout"] = said({"imageLayoutVersion": "1.0.0"})
    if not is_good and rng.random() < 0.1:
        gone = rng.choice(list(files))
        note.append(f"{gone} is not there")
        del files[gone]
    place = _room() / "image"
    room = _room() / "room"
    room.mkdir()
    descriptors = open_files()
    tree: Tree | None = None
    try:
        if kind == "oci":
            _write_folder(rng, place, files, None if is_good else note)
        else:
            outer = Archive()
            for name, data in files.items():
                outer.add(rng, Entry(name, b"0", data))
            if not is_good and rng.random() < 0.2:
                _lie(rng, outer, note)
            place.write_bytes(_PACKERS[rng.choice(list(_PACKERS))](outer.end()))
        wanted = rng.choice((None, "image:1", "image:1", "another"))
        try:
            progress = Progress(quiet=True)
            tree, image = load(kind, str(place), wanted, str(room), MOST, progress, manifest.NATIVE)
        except Refused as refused:
            _one_line(refused)
            assert not is_good or wanted == "another", refused
        else:
            assert len(image.layers) == len(dict.fromkeys(range(len(image.layers))))
            if is_good:
                assert wanted != "another" and len(image.layers) == len(layers)
                names = {path for path, _ in tree.walk()} - {"."}
                assert names and len(names) <= 6
            with suppress(Refused):
                process.read(image.config, tree)
        assert {one.name for one in room.iterdir()} <= {"contents", "archive.tar"}
        assert sum(one.stat().st_size for one in room.iterdir()) <= 4 * MOST
    finally:
        if tree is not None:
            tree.spool.close()
        shutil.rmtree(room)
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    check_closed(descriptors)
    return len(files)


def _write_folder(
    rng: Random, place: Path, files: dict[str, bytes], note: list[str] | None
) -> None:
    place.mkdir()
    for name, data in files.items():
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if note is not None and rng.random() < 0.05:
            kind = rng.choice(("link", "fifo", "folder"))
            note.append(f"{name} is a {kind}")
            if kind == "link":
                file.symlink_to("/etc/passwd")
            elif kind == "fifo":
                os.mkfifo(file)
            else:
                file.mkdir()
            continue
        file.write_bytes(data)


# --- what is compressed ---------------------------------------------------------------------------

_UNPACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.decompress,
    "bzip2": bz2.decompress,
    "xz": functools.partial(lzma.decompress, format=lzma.FORMAT_XZ),
}


def _packed(rng: Random, note: list[str]) -> int:
    """A compressed layer, against the libraries' own functions for a whole text."""
    name = rng.choice([one for one in _PACKERS if one != "plain"])
    parts = [
        rng.choice((b"", b"text" * 50, bytes(100_000), rng.randbytes(3000)))
        for _ in range(rng.choice((1, 1, 2)))
    ]
    data = bytearray(b"".join(map(_PACKERS[name], parts)))
    whole: bytes | None = b"".join(parts)
    if rng.random() < 0.6:
        numbers: list[Number] = []
        harm(rng, data, numbers, note)
        whole = None
        if name in _UNPACKERS and data[:3] == _PACKERS[name](b"")[:3]:
            with suppress(Exception):
                whole = _UNPACKERS[name](bytes(data))
    note.append(f"{name}, {len(parts)} parts")
    budget = rng.choice((1 << 20, 1 << 20, 5000))
    told: list[int] = []
    stream = None
    found = b""
    stored = _Counted(bytes(data))
    try:
        with named("a layer"):
            stream = LayerStream(
                stored, digest=None, diff_id=None, budget=Budget(budget), advance=told.append
            )
            while piece := stream.read(size := rng.choice((1, 4096, 70_000))):
                assert len(piece) <= size
                found += piece
            stream.finish()
    except Refused as refused:
        _one_line(refused)
        usual = whole is not None and len(whole) <= budget and not note[:-1]
        assert not usual, refused
    else:
        assert len(found) <= budget
        if not note[:-1]:
            assert found == whole
    assert sum(told) <= len(data)
    return len(parts)


_WAYS = (_layers, _layers, _layers, _image, _packed)


def archive_case(rng: Random, ring: Ring) -> int:
    """One archive; how many parts it had."""
    note: list[str] = []
    way = rng.choice(_WAYS)
    with told(way, note):
        return way(rng, note)
