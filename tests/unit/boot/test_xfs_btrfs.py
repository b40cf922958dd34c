"""Files read out of what mkfs.xfs and mkfs.btrfs have made, and out of what strangers change."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import re
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import partition_tables
import pytest
import zstandard
from partition_tables import MIB, needs_tools

from pyvmm.boot import file_system
from pyvmm.boot.btrfs import Btrfs, Key
from pyvmm.boot.file_system import FileSystem
from pyvmm.boot.xfs import Xfs
from pyvmm.errors import ConfigError

pytestmark = needs_tools
LONG = "x" * 200
TARGET = f"boot/{LONG}/" + f"../{LONG}/" * 3 + "../small"  # has no room in an inode
PACKED = b"a line of a configuration that is compressed\n" * 1000  # a file of one extent


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    (root / "boot" / LONG).mkdir(parents=True)
    for folder, count in (("few", 20), ("many", 700)):
        (root / folder).mkdir()
        for number in range(count):
            (root / folder / f"a-rather-long-name-of-a-file-{number:04}").touch()
    (root / "boot" / "small").write_bytes(b"hello")
    (root / "boot" / "large").write_bytes(random.Random(1).randbytes(3 * MIB + 17))
    (root / "boot" / "packed").write_bytes(PACKED)
    links = {
        "vmlinuz": "boot/small",
        "absolute": "/boot/small",
        "up": "../../../boot/./../boot/small",
        "long": TARGET,
        "loop": "loop",
        "gone": "/somewhere/else",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    return root


XFS_FORMS = {
    "xfs 5": (),
    "xfs 5, small blocks": ("-b", "size=1024"),
    "xfs 5, large directory blocks": ("-n", "size=8192"),
    "xfs 4": ("-m", "crc=0"),
    "xfs 4, no types": ("-m", "crc=0", "-n", "ftype=0"),
    "xfs 5, nrext64": ("-i", "nrext64=1"),
}
BTRFS_FORMS = {
    "btrfs": (),
    "btrfs, mixed": ("--mixed",),
    "btrfs, large nodes": ("-n", "65536", "-d", "dup"),
}
FORMS = [*XFS_FORMS, *BTRFS_FORMS]


def make(tree: Path, path: Path, form: str) -> None:
    if form in XFS_FORMS:
        partition_tables.xfs_of(tree, path, *XFS_FORMS[form])
        return
    with open(path, "wb") as file:
        file.truncate(128 * MIB)
    partition_tables.run("mkfs.btrfs", "-q", *BTRFS_FORMS[form], "-r", tree, path)


@contextlib.contextmanager
def mapped(path: Path) -> Iterator[mmap.mmap]:
    """The image's bytes, to be changed, and not in the file."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as data:
        yield data


def opened(data: mmap.mmap, form: str, search: file_system.Search | None = None) -> FileSystem[Any]:
    kind = Xfs if form in XFS_FORMS else Btrfs
    return kind(lambda at, size: data[at : at + size], len(data), "the disk", search)


def read(system: FileSystem[Any], path: str, most: int = 8 * MIB) -> bytes:
    return b"".join(system.read_file(path, most))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tree: Path, tmp_path: Path, form: str) -> None:
    make(tree, tmp_path / "disk", form)
    with mapped(tmp_path / "disk") as data:
        system = opened(data, form)
        for name in ("small", "large", "packed"):
            assert read(system, f"/boot/{name}") == (tree / "boot" / name).read_bytes()
        for name in ("vmlinuz", "absolute", "up", "long"):
            assert read(system, f"/{name}") == b"hello", name
        for folder in ("few", "many"):
            names = [name for name in system.names(f"/{folder}") if name not in (".", "..")]
            assert names == sorted(os.listdir(tree / folder))
        assert system.names("/nothing") == []
        assert system.has("/boot/large") and not system.has("/boot/huge")
        assert not system.has("/gone")  # it leads to nothing in here
        with pytest.raises(FileNotFoundError):
            read(system, "/boot/small/below")
        with pytest.raises(ConfigError, match="is a chain of links without end"):
            read(system, "/loop")
        with pytest.raises(ConfigError, match="has 5 bytes, more than the 4 it may have"):
            read(system, "/boot/small", 4)
        with pytest.raises(ConfigError, match="/boot in the disk is not a file"):
            read(system, "/boot")


@pytest.mark.parametrize("form", ["xfs 5", "btrfs"])
def test_directories_are_not_searched_for_ever(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    make(tree, tmp_path / "disk", form)
    monkeypatch.setattr(file_system, "_MOST_LOOKED_AT", MIB)
    with mapped(tmp_path / "disk") as data:
        system = opened(data, form)
        with pytest.raises(ConfigError, match="too large to be searched"):
            for _ in range(1000):
                system.has("/many/none")


@pytest.mark.parametrize("form", ["xfs 5", "xfs 4", "btrfs"])
def test_damage_of_any_kind_is_one_line_and_costs_little(
    tree: Path, tmp_path: Path, form: str
) -> None:
    """Random bytes in all that leads to a file: what comes of it is an answer or a ConfigError."""
    make(tree, tmp_path / "disk", form)
    chance = random.Random(7)
    told = set()
    with mapped(tmp_path / "disk") as data:
        looked: set[int] = set()

        def note(at: int, size: int) -> bytes:
            if size < MIB:  # not what is in the large file
                looked.update(range(at // 64, (at + size) // 64))
            return data[at : at + size]

        kind = Xfs if form in XFS_FORMS else Btrfs
        system = kind(note, len(data), "the disk")
        paths = ("/boot/large", "/up", "/long", "/many/none", "/boot/packed")
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                read(system, path)
        places = sorted(at for at in looked if any(data[at * 64 : at * 64 + 64]))
        for _ in range(150):
            changed: dict[int, int] = {}
            for _ in range(chance.choice((1, 8, 200))):
                place = chance.choice(places) * 64 + chance.randrange(64)
                changed.setdefault(place, data[place])
                data[place] = chance.choice((0, 0xFF, chance.randrange(256)))
            search = file_system.Search()
            try:
                system = opened(data, form, search)
                for path in paths:
                    with contextlib.suppress(FileNotFoundError):
                        assert len(read(system, path)) <= 8 * MIB
            except ConfigError as error:
                told.add(str(error)[:60])
                assert "\n" not in str(error)
            for place, byte in changed.items():
                data[place] = byte
        assert read(opened(data, form), "/boot/small") == b"hello"
    assert len(told) > 5


def test_what_is_not_understood_of_xfs_is_refused(tree: Path, tmp_path: Path) -> None:
    make(tree, tmp_path / "disk", "xfs 5")
    with mapped(tmp_path / "disk") as data:
        data[218] |= 2
        with pytest.raises(ConfigError, match="features that are not understood: 0x200"):
            opened(data, "xfs 5")
        data[218:220] = b"\0\x10"  # somebody has found it damaged
        with pytest.raises(ConfigError, match=r"it says so itself; .*xfs_repair"):
            opened(data, "xfs 5")
        data[100:102] = b"\0\x03"
        with pytest.raises(ConfigError, match="is XFS of version 3"):
            opened(data, "xfs 5")
        data[:4] = b"XFSC"
        with pytest.raises(ConfigError, match="no superblock"):
            opened(data, "xfs 5")


def test_an_xfs_file_of_many_pieces(tree: Path, tmp_path: Path) -> None:
    """Its extents are in a tree of three levels, which is made here of one that has one piece:
    the blocks of the large file, every second of them, with holes and with one never written."""
    make(tree, tmp_path / "disk", "xfs 5")
    with mapped(tmp_path / "disk") as data:
        system = opened(data, "xfs 5")
        assert isinstance(system, Xfs)
        node = system._at("/boot/large")
        [piece] = system._pieces(node)
        assert piece.start is not None
        first = int.from_bytes(node.fork[:16], "big") >> 21 & (1 << 52) - 1
        content = data[piece.start : piece.start + piece.blocks * 4096]
        # The blocks at the end of the file become nodes of the tree.
        free = first + piece.blocks - 3

        def extent(logical: int, block: int, count: int = 1, unwritten: int = 0) -> bytes:
            return (unwritten << 127 | logical << 73 | block << 21 | count).to_bytes(16, "big")

        leaves = [
            b"".join(extent(2 * index, first + index) for index in range(200)),
            extent(400, first, 2, 1) + extent(410, first + 7, 3),
        ]
        header = struct.Struct(">4sHHQQQQ16sQII")
        nobody = (1 << 64) - 1
        for number, leaf in enumerate(leaves):
            at = piece.start + (piece.blocks - 2 + number) * 4096
            head = header.pack(
                b"BMA3", 0, len(leaf) // 16, *(nobody, nobody, 0, 0, bytes(16), 0, 0, 0)
            )
            data[at : at + 4096] = (head + leaf).ljust(4096, b"\0")
        most = (4096 - 72) // 16
        head = header.pack(b"BMA3", 1, 2, nobody, nobody, 0, 0, bytes(16), 0, 0, 0)
        inner = head + struct.pack(">QQ", 0, 400).ljust(most * 8, b"\0")
        inner += struct.pack(">QQ", free + 1, free + 2)
        at = piece.start + (piece.blocks - 3) * 4096
        data[at : at + 4096] = inner.ljust(4096, b"\0")
        place = system._place(node.number >> 3) + (node.number & 7) * 512
        room = len(node.fork)
        root = struct.pack(">HHQ", 2, 1, 0).ljust(4 + (room - 4) // 16 * 8, b"\0")
        root += struct.pack(">Q", free)
        data[place + 176 : place + 176 + len(root)] = root
        data[place + 5] = 3  # XFS_DINODE_FMT_BTREE
        data[place + 56 : place + 64] = (414 * 4096).to_bytes(8, "big")
        expected = bytearray(414 * 4096)
        for index in range(200):
            expected[index * 8192 : index * 8192 + 4096] = content[index * 4096 :][:4096]
        expected[410 * 4096 : 413 * 4096] = content[7 * 4096 : 10 * 4096]
        system = opened(data, "xfs 5")
        assert read(system, "/boot/large") == expected
        data[at + 4 : at + 6] = b"\0\2"  # a node of another level than the one above says
        with pytest.raises(ConfigError, match="damaged: a tree of extents"):
            read(opened(data, "xfs 5"), "/boot/large")


def test_a_link_of_xfs_in_a_huge_extent_costs_what_a_link_does(tree: Path, tmp_path: Path) -> None:
    make(tree, tmp_path / "disk", "xfs 5")
    asked = []
    with mapped(tmp_path / "disk") as data:
        system = opened(data, "xfs 5")
        assert isinstance(system, Xfs)
        number = system._entries(system._root())[b"long"]
        place = system._place(number >> 3) + (number & 7) * 512
        data[place + 176 + 13] |= 0x1F  # 21 bits that count the blocks
        data[place + 176 + 14 : place + 176 + 16] = b"\xff\xff"

        def note(at: int, size: int) -> bytes:
            asked.append(size)
            return data[at : at + size]

        assert read(Xfs(note, 1 << 50, "the disk"), "/long") == b"hello"
    assert max(asked) <= 1 << 16


def item_of(data: mmap.mmap, path: str) -> int:
    """Where in `data` the first extent of a file in a btrfs stands, in the copy that is read."""
    nodes = []

    def note(at: int, size: int) -> bytes:
        nodes.append((at, at + size))
        return data[at : at + size]

    def read_item() -> bytes:
        system = Btrfs(note, len(data), "the disk")
        node = system._at(path)
        key = Key(node.number, 108, 0)
        [(_, item)] = system._items(node.tree, key, key)
        return item

    item = read_item()
    found = {
        start + one.start()
        for start, end in list(nodes)
        for one in re.finditer(re.escape(item), data[start:end])
    }
    for at in found:
        data[at + 16] ^= 1  # a node that was split or changed has it still, where nobody looks
        is_read = read_item() != item
        data[at + 16] ^= 1
        if is_read:
            return at
    raise AssertionError("it is in no node")


@pytest.mark.parametrize("name", ["zlib", "zstd"])
def test_a_compressed_file_of_btrfs(tree: Path, tmp_path: Path, name: str) -> None:
    make(tree, tmp_path / "disk", "btrfs")
    with mapped(tmp_path / "disk") as data:
        at = item_of(data, "/boot/packed")
        _, on_disk, _, count = struct.unpack_from("<4Q", data, at + 21)
        system = opened(data, "btrfs")
        assert isinstance(system, Btrfs)
        place = data.find(PACKED[:4096])
        pack = zlib.compress if name == "zlib" else zstandard.ZstdCompressor().compress
        packed = pack(PACKED.ljust(on_disk, b"\0"))
        data[place : place + on_disk] = packed.ljust(on_disk, b"\xa5")
        data[at + 16] = 1 if name == "zlib" else 3
        used = -(-len(packed) // 4096) * 4096
        data[at + 29 : at + 37] = used.to_bytes(8, "little")
        system = opened(data, "btrfs")
        assert read(system, "/boot/packed") == PACKED
        # A piece from the middle of what was compressed, as after a rewrite.
        struct.pack_into("<QQ", data, at + 37, 4096, count - 4096)
        assert read(opened(data, "btrfs"), "/boot/packed")[:-4096] == PACKED[4096:]
        data[place + 10 : place + 20] = b"\xff" * 10
        with pytest.raises(ConfigError, match="damaged: a compressed file"):
            read(opened(data, "btrfs"), "/boot/packed")
        data[at + 16] = 2
        with pytest.raises(ConfigError, match="compressed with lzo, which is not read; give --ker"):
            read(opened(data, "btrfs"), "/boot/packed")
        data[at + 8 : at + 16] = (1 << 40).to_bytes(8, "little")  # unpacks to so much
        data[at + 16] = 3
        with pytest.raises(ConfigError, match="damaged: a file's extents"):
            read(opened(data, "btrfs"), "/boot/packed")


def test_what_is_not_understood_of_btrfs_is_refused(tree: Path, tmp_path: Path) -> None:
    make(tree, tmp_path / "disk", "btrfs")
    at = 0x1_0000
    with mapped(tmp_path / "disk") as data:
        data[at + 189] |= 0x10  # zoned
        with pytest.raises(ConfigError, match="features that are not understood: 0x1000"):
            opened(data, "btrfs")
        data[at + 189] &= 0xEF
        data[at + 136] = 2
        with pytest.raises(ConfigError, match="is one of 2 devices of a btrfs, which is not read"):
            opened(data, "btrfs")
        data[at + 136] = 1
        data[at + 148 : at + 152] = b"\0\0\0\1"
        with pytest.raises(ConfigError, match="impossible sizes"):
            opened(data, "btrfs")


def test_nodes_of_btrfs_of_which_all_children_are_one(tree: Path, tmp_path: Path) -> None:
    """A stranger's tree may have as many paths as it likes in a few nodes."""
    make(tree, tmp_path / "disk", "btrfs")
    with mapped(tmp_path / "disk") as data:
        system = opened(data, "btrfs")
        assert isinstance(system, Btrfs)
        top = system._top.tree
        start, length, byte = system._chunks[-1]
        size = system._node
        assert length > 9 * size
        for level in range(1, 9):
            address = start + level * size
            row = struct.pack("<QBQQQ", 256, 1, 0, address - size, 0)
            node = bytes(48) + struct.pack("<QQ16sQQIB", address, 0, bytes(16), 0, 0, 400, level)
            at = byte + level * size
            data[at : at + size] = (node + row * 400).ljust(size, b"\0")
        leaf = bytes(48) + struct.pack("<QQ16sQQIB", start, 0, bytes(16), 0, 0, 0, 0)
        data[byte : byte + size] = leaf.ljust(size, b"\0")
        system._kept.clear()
        search = system._search
        taken = 0
        take = search.take

        def count(size: int, where: str) -> None:
            nonlocal taken
            taken += 1
            take(size, where)

        search.take = count  # type: ignore[method-assign]
        tall = top._replace(address=start + 8 * size, level=8)
        with pytest.raises(ConfigError, match="too large to be searched"):
            list(system._items(tall, Key(255, 1, 0), Key(257, 1, 9)))
        assert taken <= (64 << 20) // 4096 + 1


@pytest.mark.parametrize("size", [0, 10000])
def test_items_of_btrfs_that_are_all_the_same_bytes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """What a leaf claims to hold may be many times what it has room for."""
    make(tree, tmp_path / "disk", "btrfs")
    with mapped(tmp_path / "disk") as data:
        system = opened(data, "btrfs")
        assert isinstance(system, Btrfs)
        start, _, byte = system._chunks[-1]
        node = system._node
        leaf, inner = (
            bytes(48) + struct.pack("<QQ16sQQIB", start + at, 0, bytes(16), 0, 0, 400, level)
            for at, level in ((0, 0), (node, 1))
        )
        leaf += struct.pack("<QBQII", 256, 84, 0, 0, size) * 400
        inner += struct.pack("<QBQQQ", 256, 84, 1, start, 0) * 400
        data[byte : byte + 2 * node] = leaf.ljust(node, b"\0") + inner.ljust(node, b"\0")
        system._kept.clear()
        monkeypatch.setattr(file_system, "_MOST_LOOKED_AT", MIB)
        system._search = file_system.Search()
        count = total = 0
        with pytest.raises(ConfigError, match="too large to be searched"):
            for _, item in system._items(
                system._top.tree._replace(address=start + node, level=1),
                *(Key(256, 84, 0), Key(256, 84, 9)),
            ):
                count += 1
                total += len(item)
    assert count <= MIB // 25 and total <= MIB


def test_what_is_unpacked_in_vain_of_btrfs_is_little(tree: Path, tmp_path: Path) -> None:
    make(tree, tmp_path / "disk", "btrfs")
    with mapped(tmp_path / "disk") as data:
        system = opened(data, "btrfs")
        assert isinstance(system, Btrfs)
        # An inline extent of no bytes: to zlib none is no limit.
        head = struct.pack("<QQBBHB", 0, 0, 1, 0, 0, 0)
        bomb = head + zlib.compress(bytes(32 * MIB))
        tracemalloc.start()
        try:
            assert b"".join(system._extent(bomb)) == b""
            assert tracemalloc.get_traced_memory()[1] < MIB
        finally:
            tracemalloc.stop()
        # 128 KiB that are read for one page, again and again.
        packed = zlib.compress(PACKED[:4096]).ljust(128 << 10, b"\0")
        with pytest.raises(ConfigError, match="too large to be searched"):
            for _ in range(1000):
                assert system._unpack(packed, 1, 4096, 0, 4096) == PACKED[:4096]


def test_a_directory_of_xfs_is_read_block_by_block(tree: Path, tmp_path: Path) -> None:
    """Its extent may have all the blocks that a directory may, and these may be small."""
    make(tree, tmp_path / "disk", "xfs 5")
    asked = []
    with mapped(tmp_path / "disk") as data:

        def note(at: int, size: int) -> bytes:
            asked.append(size)
            return data[at : at + size]

        system = Xfs(note, len(data), "the disk")
        assert max(piece.blocks for piece in system._pieces(system._at("/many"))) > 1
        assert len(system.names("/many")) >= 700
    assert max(asked) <= 4096


def test_names_of_a_path_count_in_directories_that_are_in_their_inodes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tree, tmp_path / "disk", "xfs 5")
    monkeypatch.setattr(file_system, "_MOST_LOOKED_AT", MIB)
    with mapped(tmp_path / "disk") as data:
        system = opened(data, "xfs 5")
        with pytest.raises(ConfigError, match="too large to be searched"):
            for _ in range(1000):
                system.has("/boot/none")
