"""Files read out of file systems that mke2fs has made, and out of what strangers make of those."""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time
from pathlib import Path

import partition_tables
import pytest
from partition_tables import MIB, needs_tools

from pyvmm.boot import file_system
from pyvmm.boot.ext4 import Ext4
from pyvmm.errors import ConfigError

pytestmark = needs_tools
SIZE = 16 * MIB
LONG = "x" * 90  # a link that has no room in its inode


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    (root / "boot" / LONG).mkdir(parents=True)
    (root / "many").mkdir()
    for number in range(700):
        (root / "many" / f"a-rather-long-name-of-a-file-{number:04}").touch()
    (root / "boot" / "small").write_bytes(b"hello")
    (root / "boot" / "large").write_bytes(random.Random(1).randbytes(3 * MIB + 17))
    with open(root / "boot" / "sparse", "wb") as file:
        for offset in range(0, 4 * MIB, MIB):
            file.seek(offset)
            file.write(b"here")
        file.truncate(5 * MIB)
    links = {
        "vmlinuz": "boot/small",
        "absolute": "/boot/small",
        "up": "../../../boot/./../boot/small",
        "long": f"boot/{LONG}/../small",
        "loop": "loop",
        "gone": "/somewhere/else",
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    return root


FORMS = {
    "ext2, small blocks": ("-t", "ext2", "-b", "1024"),
    "ext3": ("-t", "ext3", "-b", "2048"),
    "ext4": ("-t", "ext4"),
    "ext4, 64bit, small inodes": ("-t", "ext4", "-O", "64bit", "-I", "128", "-b", "1024"),
    "ext4, no extents": ("-t", "ext4", "-O", "^extents,^64bit"),
}


def make(tree: Path, path: Path, *options: str) -> bytes:
    with open(path, "wb") as file:
        file.truncate(SIZE)
    partition_tables.run("mke2fs", "-q", "-F", *options, "-d", tree, path)
    return path.read_bytes()


def opened(data: bytes) -> Ext4:
    return Ext4(lambda offset, size: data[offset : offset + size], len(data), "the disk")


def read(system: Ext4, path: str, most: int = 8 * MIB) -> bytes:
    return b"".join(system.read_file(path, most))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(tree: Path, tmp_path: Path, form: str) -> None:
    system = opened(make(tree, tmp_path / "disk", *FORMS[form]))
    for name in ("small", "large", "sparse"):
        assert read(system, f"/boot/{name}") == (tree / "boot" / name).read_bytes()
    for name in ("vmlinuz", "absolute", "up", "long"):
        assert read(system, f"/{name}") == b"hello"
    assert system.names("/many") == sorted([".", "..", *os.listdir(tree / "many")])
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


def test_large_directories_are_not_searched_for_ever(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_system, "_MOST_LOOKED_AT", MIB)
    system = opened(make(tree, tmp_path / "disk", "-t", "ext4"))
    with pytest.raises(ConfigError, match="too large to be searched"):
        for _ in range(1000):
            system.has("/many/none")


def test_a_path_that_no_kernel_would_follow(tree: Path, tmp_path: Path) -> None:
    system = opened(make(tree, tmp_path / "disk", "-t", "ext4"))
    assert system.has("/." * 2000 + "/boot/small")
    assert not system.has("/." * 200_000 + "/boot/small")


def test_a_small_directory_with_a_large_tree_of_extents(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes read of the tree count as well."""
    system = opened(make(tree, tmp_path / "disk", "-t", "ext4", "-b", "1024"))
    root = system._inode(2)
    leaf = system._by_extents(root)[0].physical + 40
    node = struct.pack("<HHHHI", 0xF30A, 4, 4, 1, 0) + struct.pack("<IIHH", 0, leaf, 0, 0) * 4
    bad = root._replace(block=node.ljust(60, b"\0"), size=1)
    original = system._bytes
    empty = struct.pack("<HHHHI", 0xF30A, 0, 80, 0, 0).ljust(1024, b"\0")
    monkeypatch.setattr(
        system, "_bytes", lambda at, size: empty if at == leaf * 1024 else original(at, size)
    )
    before = system._search.left
    assert system._entries(bad) == {}
    assert system._search.left == before - 1 - 4 * 1024


def test_what_is_not_understood_is_refused(tree: Path, tmp_path: Path) -> None:
    data = bytearray(make(tree, tmp_path / "disk", "-t", "ext4"))
    data[1024 + 0x60] |= 0x10  # META_BG: the group descriptors are elsewhere
    with pytest.raises(ConfigError, match="features that are not understood: 0x10"):
        opened(bytes(data))
    with pytest.raises(ConfigError, match="no superblock"):
        opened(bytes(4096))


def test_damage_of_any_kind_is_one_line_and_costs_little(tree: Path, tmp_path: Path) -> None:
    """Random bytes in all that leads to a file: what comes of it is an answer or a ConfigError."""
    whole = make(tree, tmp_path / "disk", "-t", "ext4", "-b", "1024")
    chance = random.Random(7)
    used = [at for at in range(0, len(whole), 512) if any(whole[at : at + 512])]
    meta = [at for at in used if at < 2 * MIB]
    refused = 0
    for _ in range(120):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 4, 64))):
            place = chance.choice(meta) + chance.randrange(512)
            data[place] = chance.choice((0, 0xFF, chance.randrange(256)))
        began = time.process_time()
        try:
            system = opened(bytes(data))
            for path in ("/boot/large", "/up", "/many/none", "/loop"):
                with contextlib.suppress(FileNotFoundError):
                    read(system, path)
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)
        assert time.process_time() - began < 20
    assert refused > 10
