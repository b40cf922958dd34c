"""ext4, XFS, Btrfs and FAT under the fuzzer, as far as the host reads a stranger's disk.

File systems are made by their own mkfs, as far as this machine has it. A reader of our own
(tests/fuzz/file_models.py) says which numbers it looks at for a path; some of them become other
ones, mostly at the edge of what they may be, and what it makes of the disk then is what has to come
out. A case raises AssertionError, with what was changed, if

- a file or a directory is another one than that reader's, or one of both refuses it,
- anything but an error of ours of one line is raised, or FileNotFoundError for what is not there,
- more may be looked at than is allowed, or less, by one byte,
- more is read than that, in bytes or in calls.
"""

from __future__ import annotations

import functools
import mmap
import random
import shutil
import struct
import zlib
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import partition_tables
import zstandard
from fuzz import file_models
from fuzz.damage import wrong
from fuzz.file_models import Model, Noted, Refused
from fuzz.room import room, told

from pyvmm.boot.btrfs import Btrfs
from pyvmm.boot.ext4 import Ext4
from pyvmm.boot.fat import Fat
from pyvmm.boot.file_system import FileSystem, Search
from pyvmm.boot.xfs import Xfs
from pyvmm.errors import ConfigError
from pyvmm.testing.mmio_driver import Ring

MIB = 1 << 20
_BUDGET = MIB  # bytes that may be looked at beside the files that are read
_MOST = 500_000
_KINDS: dict[str, tuple[Any, type[Model]]] = {
    "ext": (Ext4, file_models.Ext),
    "xfs": (Xfs, file_models.Xfs),
    "btrfs": (Btrfs, file_models.Btrfs),
    "fat": (Fat, file_models.Fat),
}
_SMALL = b"hello"
_PACKED = b"a line that is compressed\n" * 2000
_LONG = "boot/" + "./" * 170 + "small"  # a link that has no room in an inode


class _Change(NamedTuple):
    at: int
    data: bytes


class _Disk:
    """The bytes of an image, some of them changed; what is read of them is counted."""

    def __init__(self, data: mmap.mmap, changes: list[_Change]) -> None:
        self._data, self._changes = data, changes
        self.calls = self.bytes = 0

    def get(self, offset: int, size: int) -> bytes:
        data = self._data[offset : offset + size]
        for at, new in self._changes:
            if at < offset + size and at + len(new) > offset:
                low, high = max(at, offset), min(at + len(new), offset + len(data))
                made = data[: low - offset] + new[low - at : high - at]
                data = made + data[high - offset :]
        return data

    def read(self, offset: int, size: int) -> bytes:
        assert offset >= 0 and 0 <= size <= 4 * MIB, (offset, size)
        self.calls += 1
        self.bytes += size
        assert self.calls < 40_000, "it reads without an end"
        return self.get(offset, size)


class _Image(NamedTuple):
    kind: str
    data: mmap.mmap
    paths: list[str]
    files: dict[str, bytes]


# --- how they are made ----------------------------------------------------------------------------


def _tree(root: Path, *, links: bool) -> dict[str, bytes]:
    (root / "boot" / "grub").mkdir(parents=True)
    contents = {
        "/boot/small": _SMALL,
        "/boot/large": random.Random(1).randbytes(100_017),
        "/boot/grub/grub.cfg": b"linux /boot/vmlinuz root=/dev/vda\nboot\n" * 9,
        "/boot/vmlinuz": bytes(range(256)) * 40,
        "/boot/packed": _PACKED,
        "/boot/holes": b"".join(random.Random(n).randbytes(4096) + bytes(4096) for n in range(40)),
    }
    for path, data in contents.items():
        (root / path[1:]).write_bytes(data)
    with open(root / "boot/holes", "r+b") as file:
        file.truncate(0)
        for at in range(0, len(contents["/boot/holes"]), 8192):
            file.seek(at)
            file.write(contents["/boot/holes"][at : at + 4096])
        file.truncate(len(contents["/boot/holes"]))
    for folder, count in (("many", 120), ("some", 30), ("empty", 0)):
        (root / folder).mkdir()
        for number in range(count):
            (root / folder / f"a-rather-long-name-{number:03}").touch()
    if links:
        named = {"link": "boot/small", "up": "/../boot/./small", "loop": "loop", "long": _LONG}
        for name, target in named.items():
            (root / name).symlink_to(target)
        contents |= {"/link": _SMALL, "/up": _SMALL, "/long": _SMALL}
    return contents


def _fat(tree: Path, image: Path, size: int, *options: str) -> None:
    with open(image, "wb") as file:
        file.truncate(size)
    partition_tables.run("mkfs.vfat", *options, image)
    for path in sorted(tree.rglob("*")):
        inner = f"::{path.relative_to(tree)}"
        if path.is_dir():
            partition_tables.run("mmd", "-i", image, inner)
        else:
            partition_tables.run("mcopy", "-i", image, path, inner)


_FORMS: dict[str, tuple[str, ...]] = {
    "ext 4": ("mke2fs", "-t", "ext4"),
    "ext 4, small": ("mke2fs", "-t", "ext4", "-O", "64bit", "-I", "128", "-b", "1024"),
    "ext 4, large": ("mke2fs", "-t", "ext4", "-b", "65536", "-N", "200"),
    "ext 2": ("mke2fs", "-t", "ext2", "-b", "1024"),
    "xfs 5": ("mkfs.xfs",),
    "xfs 5, large": ("mkfs.xfs", "-b", "size=65536"),
    "xfs 4": ("mkfs.xfs", "-m", "crc=0", "-n", "ftype=0"),
    "btrfs": ("mkfs.btrfs", "-n", "4096", "-s", "4096"),
    "btrfs, mixed": ("mkfs.btrfs", "--mixed"),
    "fat 16": ("mmd", "-F", "16"),
    "fat 32": ("mmd", "-F", "32", "-s", "1"),
}


@functools.cache
def forms() -> list[str]:
    """Those that this machine can make; what it lacks is printed."""
    path = partition_tables._PATH
    missing = sorted({one for one, *_ in _FORMS.values() if not shutil.which(one, path=path)})
    if missing:
        print(f"file systems are left out: there is no {', '.join(missing)}", flush=True)
    return [form for form, (first, *_) in _FORMS.items() if first not in missing]


@functools.cache
def _image(form: str) -> _Image:
    place = room()
    kind = form.split(" ")[0].rstrip(",")
    files = _tree(place / "tree", links=kind != "fat")
    image = place / "image"
    _, *options = _FORMS[form]
    if kind == "xfs":
        partition_tables.xfs_of(place / "tree", image, *options)
    elif kind == "fat":
        _fat(place / "tree", image, (16 if "16" in form else 40) * MIB, *options)
    else:
        with open(image, "wb") as file:
            file.truncate((128 if kind == "btrfs" else 48 if "large" in form else 8) * MIB)
        command = (
            ("mke2fs", "-q", "-F", *options, "-d")
            if kind == "ext"
            else ("mkfs.btrfs", "-q", *options, "-r")
        )
        partition_tables.run(*command, place / "tree", image)
    with open(image, "r+b") as file:
        data = mmap.mmap(file.fileno(), 0)
    shutil.rmtree(place)
    paths = [*files, "/many", "/some", "/empty", "/", "/boot", "/boot/nothing", "/many/nothing/x"]
    made = _Image(kind, data, [*paths, "/boot/../boot/./small", "/x" * 40, "/loop"], files)
    if kind == "xfs" and "large" not in form:
        _as_tree(made)
    elif kind == "btrfs":
        _compressed(made, 1 if "mixed" in form else 3)
    for path, content in files.items():  # a reader that we did not write has put it there
        assert _model(made, [], MIB).file(path) == content, path
    return made


def _as_tree(image: _Image) -> None:
    """The extents of /boot/holes in a tree of two levels, at its last blocks: mkfs makes none."""
    data = image.data
    model: Any = _model(image, [], MIB)
    node = model.find("/boot/holes")
    start, end, form, _ = node.more
    [(_, count, at)] = model.pieces(node)
    assert form == 2 and count == 80
    first = int.from_bytes(data[start + 8 : start + 16], "big") >> 21 | (data[start + 7] & 1) << 43
    head = 72 if start % 512 == 176 else 24
    magic = b"BMA3" if head == 72 else b"BMAP"
    records = [(2 * n << 73 | first + 2 * n << 21 | 1).to_bytes(16, "big") for n in range(39)]
    # The last three blocks that are not zeros go, and with them what the file ends with.
    for index, part in ((73, records[:20]), (75, records[20:36])):
        block = magic + struct.pack(">HH", 0, len(part))
        block = block.ljust(head, b"\xff") + b"".join(part)
        data[at + index * 4096 : at + (index + 1) * 4096] = block.ljust(4096, b"\0")
    most = (4096 - head) // 16
    block = (magic + struct.pack(">HH", 1, 2)).ljust(head, b"\xff") + struct.pack(">QQ", 0, 40)
    block = block.ljust(head + 8 * most, b"\0") + struct.pack(">QQ", first + 73, first + 75)
    data[at + 77 * 4096 : at + 78 * 4096] = block.ljust(4096, b"\0")
    most = (end - start - 4) // 16
    root = struct.pack(">HHQ", 2, 1, 0).ljust(4 + 8 * most, b"\0") + struct.pack(">Q", first + 77)
    data[start : start + len(root)] = root
    inode = start - (176 if head == 72 else 100)
    data[inode + 5] = 3
    size = 72 * 4096
    data[inode + 56 : inode + 64] = size.to_bytes(8, "big")
    image.files["/boot/holes"] = image.files["/boot/holes"][:size]


def _compressed(image: _Image, method: int) -> None:
    """/boot/packed as zlib or zstd makes it, as mkfs does not."""
    data = image.data
    model: Any = _model(image, [], MIB)
    address, level, number = model.find("/boot/packed").more
    items = list(model.all((address, level), (number, 108, 0), (number, 108, (1 << 64) - 1)))
    [(_, at, _)] = items
    on_disk = int.from_bytes(data[at + 29 : at + 37], "little")
    packed = zlib.compress(_PACKED) if method == 1 else zstandard.compress(_PACKED)
    used = -(-len(packed) // 4096) * 4096
    assert used <= on_disk
    place = model.at(int.from_bytes(data[at + 21 : at + 29], "little"), on_disk)
    data[place : place + on_disk] = packed.ljust(on_disk, b"\xa5")
    data[at + 16] = method
    data[at + 29 : at + 37] = used.to_bytes(8, "little")


# --- a case ---------------------------------------------------------------------------------------


def _model(image: _Image, changes: list[_Change], left: int, most: int = _MOST) -> Any:
    model = _KINDS[image.kind][1](_Disk(image.data, changes).get, len(image.data), left)
    model.most = most
    model.open()
    return model


def _wanted(
    image: _Image, changes: list[_Change], path: str, left: int, most: int, *, noting: bool = False
) -> tuple[object, Model]:
    """What has to come, and the model that says so."""
    model = _KINDS[image.kind][1](_Disk(image.data, changes).get, len(image.data), left)
    model.most = most
    model.noted = [] if noting else None
    try:
        model.open()
        if path in image.files or (path[-1] != "/" and path.startswith("/boot/")):
            return model.file(path), model
        return model.names(path), model
    except Refused:
        return "refused", model
    except FileNotFoundError:
        return "nothing", model


def _found(disk: _Disk, image: _Image, path: str, left: int, most: int) -> object:
    search = Search()
    search.left = left
    try:
        system: FileSystem[Any]
        system = _KINDS[image.kind][0](disk.read, len(image.data), "the disk", search)
        if path in image.files or (path[-1] != "/" and path.startswith("/boot/")):
            pieces, got = [], 0
            for piece in system.read_file(path, most):
                got += len(piece)
                assert len(piece) <= MIB and got <= most, "more than it said"
                pieces.append(piece)
            return b"".join(pieces)
        return system.names(path)
    except FileNotFoundError:
        return "nothing"
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, error
        return "refused"


@functools.cache
def _usual(form: str, path: str) -> dict[str, list[Noted]]:
    """The numbers that are looked at for a path of a sound file system, by name."""
    _, model = _wanted(_image(form), [], path, MIB, _MOST, noting=True)
    return _by_name(model)


@functools.cache
def _edges(form: str) -> list[dict[str, list[tuple[Noted, int]]]]:
    """Each kind of edge that its numbers have: by the paths for which they are looked at, which
    numbers those are, and the value."""
    found: dict[object, dict[str, list[tuple[Noted, int]]]] = {}
    for path in _image(form).paths:
        for named in _usual(form, path).values():
            for one in named:
                for place, value in enumerate(one.edges):
                    if 0 <= value < 1 << 8 * one.size:
                        kind = one.name, len(one.edges), place
                        found.setdefault(kind, {}).setdefault(path, []).append((one, value))
    return list(found.values())


def _by_name(model: Model) -> dict[str, list[Noted]]:
    found: dict[str, list[Noted]] = {}
    for one in model.noted or ():
        found.setdefault(one.name, []).append(one)
    return found


def _damage(
    rng: Random, image: _Image, noted: dict[str, list[Noted]], changes: list[_Change]
) -> _Change:
    named = noted[rng.choice(list(noted))]
    one = rng.choice(named)
    old = _Disk(image.data, changes).get(one.at, one.size)
    value = int.from_bytes(old, one.order)  # type: ignore[arg-type]
    top = 1 << 8 * one.size
    edges = [edge for edge in one.edges if 0 <= edge < top and edge != value]
    kind = rng.random()
    if edges and kind < 0.7:
        new = rng.choice(edges)
    elif kind < 0.95:
        other = rng.choice(noted[rng.choice(list(noted))])
        same = _Disk(image.data, changes).get(other.at, other.size)
        new = wrong(rng, value, one.size, [int.from_bytes(same, one.order)])  # type: ignore[arg-type]
    else:
        size = rng.choice((4, 8, 16, 64))
        return _Change(one.at, rng.choice((bytes(size), rng.randbytes(size))))
    return _Change(one.at, new.to_bytes(one.size, one.order))  # type: ignore[arg-type]


def _file_system(rng: Random, note: list[str]) -> None:
    form = rng.choice(forms())
    image = _image(form)
    path = rng.choice(image.paths)
    most = _MOST
    if path in image.files and rng.random() < 0.15:
        most = max(0, len(image.files[path]) - rng.randrange(-1, 2))
    changes: list[_Change] = []
    noted = _usual(form, path)
    if rng.random() < 0.6:  # one edge, all as often
        by_path = rng.choice(_edges(form))
        path = rng.choice(list(by_path))
        there = by_path[path]
        one, value = rng.choice((there[0], there[-1], rng.choice(there)))
        changes.append(_Change(one.at, value.to_bytes(one.size, one.order)))  # type: ignore[arg-type]
        noted = _usual(form, path)
        if path not in image.files:
            most = _MOST
    for number in range(len(changes), rng.choice((0, 1, 1, 1, 1, 2, 3))):
        if number and rng.random() < 0.5:
            _, model = _wanted(image, changes, path, _BUDGET, most, noting=True)
            noted = _by_name(model) or noted
        changes.append(_damage(rng, image, noted, changes))
    left = _BUDGET
    wanted, model = _wanted(image, changes, path, left, most)
    if rng.random() < 0.15:
        left = max(0, model.spent - rng.choice((0, 0, 1, 1, 4096)))
        wanted, model = _wanted(image, changes, path, left, most)
    note.append(f"{form}, {path}, {left} left, most {most}")
    note += [f"{one.at:#x}: {one.data[:16].hex()}" for one in changes]
    disk = _Disk(image.data, changes)
    found = _found(disk, image, path, left, most)
    got = len(found) if isinstance(found, bytes) else 0
    assert disk.bytes <= 3 * left + 2 * got + (4 << 20), f"{disk.bytes} bytes"
    if model.unsure or (model.may_refuse and found == "refused"):
        return
    if found != wanted:
        raise AssertionError(f"found {found!r:.300}, not {wanted!r:.300}")


def file_system_case(rng: Random, ring: Ring) -> int:
    """One disk, one path; one step."""
    note: list[str] = []
    if forms():
        with told(_file_system, note):
            _file_system(rng, note)
    return 1
