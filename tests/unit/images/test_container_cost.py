"""The memory that small archives cost to read, measured in a process of its own."""

from __future__ import annotations

import gzip
import hashlib
import io
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import pytest
from container_archives import INDEX, Layout, docker_archive, layer, member

from pyvmm.images.container.layers import Budget, LayerStream
from pyvmm.images.container.refusal import Refused
from pyvmm.images.container.store import Store

MIB = 1 << 20
# Python with this program's modules has some 25 MiB, a decompressor some more.
MOST = 110 * MIB

# Reads an archive as `image build` does, as far as the tar stream; says what it had of memory.
# Limits that grow with an archive are a sixteenth of the real ones, and so are the archives.
READ = """
import os, re, sys
from pyvmm.errors import ConfigError
from pyvmm.images.container import disk
from pyvmm.images.container.load import load
from pyvmm.images.container import tree as trees
from pyvmm.images.progress import Progress
why = ""
trees._MOST_MEMORY //= 16
trees._MOST_PATHS //= 16
try:
    tree, _ = load(sys.argv[1], sys.argv[2], None, sys.argv[3], 1 << 30, Progress(quiet=True))
    tree.check_names()
    with open(os.devnull, "wb") as sink:
        disk.write_tar(tree, sink, lambda size: None)
except ConfigError as error:
    why = str(error)
print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1], why)
"""


def cost(path: Path, kind: str = "oci-archive") -> tuple[int, str]:
    """The most memory, in bytes, and why it was refused."""
    room = path.parent / "room"
    room.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", READ, kind, str(path), str(room)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    peak, _, why = done.stdout.partition(" ")
    return int(peak) << 10, why.strip()


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **fields: str) -> bytes:
    """One block; quicker than `layer`, for hundreds of thousands."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(kind: bytes, *records: bytes) -> bytes:
    data = b""
    for one in records:
        length = len(one) + 2
        while len(b"%d " % length) + len(one) + 1 != length:
            length += 1
        data += b"%d %s\n" % (length, one)
    return header("x", kind, len(data)) + padded(data)


def behind_a_link() -> Iterator[bytes]:
    yield header("l", tarfile.SYMTYPE, linkname="/".join("a" * 19 for _ in range(195)))
    for number in range(2000):
        yield header(f"l/{number}")


def linked_twice() -> Iterator[bytes]:
    yield header("l", tarfile.SYMTYPE, linkname="/".join("a" * 19 for _ in range(195)))
    for number in range(1000):
        yield header(f"l/{number}")
        yield header(f"l/{number}h", tarfile.LNKTYPE, linkname=f"l/{number}")


def empty_directories() -> Iterator[bytes]:
    for number in range(300):
        yield header(f"{number}{'/d' * 45}", tarfile.DIRTYPE)


def wide_names() -> Iterator[bytes]:
    for number in range(30_000):
        yield header("\U0001f600" * 20 + str(number))


def attributes() -> Iterator[bytes]:
    for number in range(2000):
        yield pax(tarfile.XHDTYPE, *(b"SCHILY.xattr.user.%d=" % n for n in range(60)))
        yield header(str(number))


def long_links() -> Iterator[bytes]:
    target = ("\U0001f600" * 1000).encode()
    for number in range(4000):
        yield header("L", tarfile.GNUTYPE_LONGLINK, len(target)) + padded(target)
        yield header(str(number), tarfile.SYMTYPE)


def global_headers() -> Iterator[bytes]:
    for number in range(120):
        yield pax(tarfile.XGLTYPE, b"key%d=" % number + b"v" * 1_000_000)
    yield header("a")


def a_chain_of_headers() -> Iterator[bytes]:
    name = b"n" * 1_000_000
    for _ in range(120):
        yield header("L", tarfile.GNUTYPE_LONGNAME, len(name)) + padded(name)
    yield header("a")


def one_long_header() -> Iterator[bytes]:
    yield pax(tarfile.XHDTYPE, b"key=" + b"v" * (100 * MIB))
    yield header("a")


def a_sparse_map() -> Iterator[bytes]:
    numbers = padded(b"%d\n" % 1_000_000 + b"0\n" * 2_000_000)
    records = (b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.realsize=1")
    yield pax(tarfile.XHDTYPE, *records)
    yield header("s", size=len(numbers)) + numbers


def a_sparse_map_of_one_number() -> Iterator[bytes]:
    """Digits without end."""
    records = (b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.realsize=1")
    yield pax(tarfile.XHDTYPE, *records)
    yield header("s", size=200 * MIB)
    for _ in range(200):
        yield b"1" * MIB


def an_old_sparse_map() -> Iterator[bytes]:
    first = bytearray(header("s", tarfile.GNUTYPE_SPARSE, 0))
    first[482] = 1
    first[148:156] = b"        "
    first[148:156] = b"%06o\0 " % sum(first)
    yield bytes(first)
    yield (b"00000000000\0" * 42 + b"\1" + bytes(7)) * 40_000


def whiteouts() -> Iterator[bytes]:
    for number in range(30_000):
        yield header(f"d/.wh.{number}")


SHAPES = (
    *(behind_a_link, linked_twice, empty_directories, wide_names, attributes, long_links),
    *(global_headers, a_chain_of_headers, one_long_header, a_sparse_map, an_old_sparse_map),
    *(a_sparse_map_of_one_number, whiteouts),
)


def packed(blocks: Iterable[bytes]) -> bytes:
    """gzip, of whatever would not fit into memory."""
    pack = zlib.compressobj(1, wbits=31)
    return b"".join([*map(pack.compress, blocks), pack.compress(bytes(1024)), pack.flush()])


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_a_small_archive_takes_little_memory(tmp_path: Path, shape) -> None:
    found = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for block in shape():
            found.update(block)
            yield block

    stored = packed(hashed())
    found.update(bytes(1024))
    layout = Layout()
    layout.add(
        [stored], compress=lambda data: data, diff_ids=lambda: [f"sha256:{found.hexdigest()}"]
    )
    layout.archive(tmp_path / "image.tar")
    size = (tmp_path / "image.tar").stat().st_size
    peak, why = cost(tmp_path / "image.tar")
    assert peak < MOST, (peak >> 20, why)
    assert size < 8 * MIB, "nothing that is small"
    assert "memory" not in why.lower(), why


def test_an_archive_s_own_members_take_little_memory(tmp_path: Path) -> None:
    """The outer archive is looked through from end to end, whatever its members are called."""
    long = pax(tarfile.XHDTYPE, b"comment=" + b"c" * 1_000_000)
    blocks = (block for number in range(150) for block in (long, header(str(number))))
    whole = layer(*(member(name, data=data) for name, data in image().contents().items()))
    (tmp_path / "image.tar").write_bytes(packed((*blocks, whole)))
    peak, why = cost(tmp_path / "image.tar")
    assert peak < MOST and why == ""


def image() -> Layout:
    layout = Layout()
    layout.add([layer(member("a"))])
    return layout


@pytest.mark.parametrize("value", [b"[]", b"{}", b'{"a":0}', b"0"])
def test_json_of_many_values_takes_little_memory(tmp_path: Path, value: bytes) -> None:
    many = b"[" + b",".join([value] * (4_000_000 // (len(value) + 1))) + b"]"
    contents = {**image().contents(), "index.json": b'{"manifests": [], "x": ' + many + b"}"}
    path = tmp_path / "image.tar"
    path.write_bytes(gzip.compress(layer(*(member(n, data=d) for n, d in contents.items()))))
    peak, why = cost(path)
    assert peak < 100 * MIB and "index.json' says more than any image has to" in why


def test_json_may_have_just_as_many_values_as_it_may() -> None:
    class OneFile(Store):
        def __init__(self, values: int) -> None:
            self.data = b"[" + b",".join([b"0"] * values) + b"]"

        def open(self, name: str) -> IO[bytes]:
            return io.BytesIO(self.data)

    assert len(OneFile(200_000).json("a")) == 200_000
    with pytest.raises(Refused, match="says more than any image has to"):
        OneFile(200_001).json("a")
    store = OneFile(20_000)
    store._json_left = 2 * len(store.data)
    for _ in range(2):
        store.json("a")
    with pytest.raises(Refused, match="says more than any image has to"):
        store.json("a")  # as often as it is looked at


def test_indexes_of_indexes_are_looked_at_so_often_only(tmp_path: Path) -> None:
    """A thousand rows that name one index of a thousand rows, and so on."""
    layout = image()
    rows = layout.manifests
    for _ in range(2):
        found, size = layout.json_blob({"manifests": rows, "x": hashlib.sha256(b"").hexdigest()})
        rows = [{"mediaType": INDEX, "digest": found, "size": size}] * 1000
    layout.manifests = rows
    layout.archive(tmp_path / "image.tar")
    peak, why = cost(tmp_path / "image.tar")
    assert peak < 100 * MIB and "more than 1000 manifests" in why


def test_small_json_files_are_looked_at_so_often_only() -> None:
    class Many(Store):
        opened = 0

        def open(self, name: str) -> IO[bytes]:
            self.opened += 1
            return io.BytesIO(b"{}")

    store = Many()
    with pytest.raises(Refused, match="says more than any image has to"):
        for _ in range(10_000):
            store.json("index.json")
    assert 1000 < store.opened < 3000  # what one index may have, and it takes a second


def test_accounts_without_end(tmp_path: Path) -> None:
    from pyvmm.images.container import process
    from pyvmm.images.container.load import load
    from pyvmm.images.progress import Progress

    lines = b"::0:0::\n" * 100 + b":" * 100_000 + b"\nme:x:7:8::/home:/bin/sh\n" + b"\n" * 100_000
    path = docker_archive(tmp_path / "d.tar", [layer(member("etc/passwd", data=lines))])
    tree, _ = load("docker-archive", path, None, str(tmp_path), 64 * MIB, Progress(quiet=True))
    assert process.read({"User": "me"}, tree).user == "7:8"
    assert max(len(fields) for fields in process._lines(tree, "etc/passwd")) == 9


def test_a_gzip_header_without_end_is_read_in_large_pieces() -> None:
    class Counted(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1) -> bytes:
            self.reads += 1
            return super().read(size)

    has_name = 8  # a flag: a name follows, to the first NUL (RFC 1952, 2.3)
    stored = Counted(b"\x1f\x8b\x08" + bytes([has_name]) + bytes(6) + b"n" * MIB)
    stream = LayerStream(
        stored, digest=None, diff_id=None, budget=Budget(MIB), advance=lambda size: None
    )
    with pytest.raises(EOFError):
        stream.read(MIB)
    assert stored.reads < 100
