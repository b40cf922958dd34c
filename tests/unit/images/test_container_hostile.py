"""Hostile container images: each is refused in one line, and nothing outside is read or written."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from container_archives import (
    INDEX,
    Layout,
    digest,
    directory,
    docker_archive,
    hardlink,
    layer,
    member,
    symlink,
)
from descriptors import open_descriptors

from pyvmm.errors import ConfigError
from pyvmm.images.container import layers, manifest, members, store
from pyvmm.images.container import tree as trees
from pyvmm.images.container.load import load
from pyvmm.images.container.refusal import Refused, explained, shown
from pyvmm.images.container.tree import Tree
from pyvmm.images.progress import Progress

MOST = 16 << 20
Open = Callable[..., Tree]


@pytest.fixture
def room(tmp_path: Path) -> Path:
    (tmp_path / "room").mkdir()
    return tmp_path / "room"


@pytest.fixture
def open_image(tmp_path: Path, room: Path) -> Open:
    def open_image(image: Layout | str, kind: str = "oci-archive", most: int = MOST) -> Tree:
        path = image if isinstance(image, str) else image.archive(tmp_path / "image.tar")
        return load(kind, path, None, str(room), most, Progress(quiet=True))[0]

    return open_image


def of(*members: tuple[tarfile.TarInfo, bytes]) -> Layout:
    layout = Layout()
    layout.add([layer(directory("d"), member("d/f", data=b"x")), layer(*members)])
    return layout


def pax(name: str, **headers: str) -> tuple[tarfile.TarInfo, bytes]:
    return member(name, pax_headers=headers)


def raw(data: bytes) -> Layout:
    """A layer that is not what `tarfile` would write."""
    layout = Layout()
    layout.add([data])
    return layout


REFUSED = [
    (of(member("../x")), "'../x' leads out of the image"),
    (of(member("d/../../x")), "leads out of the image"),
    (of(directory("..")), "leads out of the image"),
    (of(pax("x", path="../../x")), "leads out of the image"),
    (of(pax("x", path="a\0b")), "not a name of a file"),
    (of(member("x" * 256)), "too long a name"),
    (of(symlink("link", "d/" + "x" * 256), member("link/y")), "too long a name"),
    (of(member("a/" * 201 + "x")), "deeper than 200 directories"),
    (of(hardlink("h", "/etc/passwd")), "a hard link to '/etc/passwd', which is not a file"),
    (of(hardlink("h", "../../etc/passwd")), "leads out of the image"),
    (of(hardlink("h", "missing")), "a hard link to 'missing', which is not a file"),
    (of(hardlink("h", "d")), "a hard link to 'd', which is not a file"),
    (of(hardlink("h", ".")), "which is not a file"),
    (of(symlink("l", "x" * 4097)), "a link to no name of a file"),
    (of(symlink("l", "")), "a link to no name of a file"),
    (of(symlink("a", "b"), symlink("b", "a"), member("a/x")), "links that lead nowhere"),
    (of(member("d/f/x")), "'d/f/x' lies in 'f', which is not a directory"),
    (of(member("d/.wh.")), "takes away nothing that has a name"),
    (of(member("d/.wh...")), "takes away nothing that has a name"),
    (of(member("s", b"s")), "of the unknown kind"),
    (of(member("n", tarfile.CHRTYPE, devmajor=4096)), "a device that Linux has no number for"),
    (of(member("x", uid=1 << 32)), "belongs to 4294967296"),
    (of(pax("x", uid="-5")), "belongs to -5"),
    (of(pax("x", gid="99999999999")), "belongs to 99999999999"),
    (of(member("x", xattrs={"user.big": b"x" * 5000})), "too large for ext4"),
    (of(member("x", xattrs={"user." + "a" * 251: b"x"})), "has an attribute called"),
    (of(member("x", xattrs={"user.a\0b": b"x"})), "has an attribute called"),
    (of(member("x", xattrs={f"user.{n}": b"" for n in range(90)})), "too large for ext4"),
    (raw(layer(member("x", data=b"x" * 2000))[:1000]), "is cut short|is damaged"),
    (raw(layer(member("x", data=b"12345"))[:517]), "is cut short"),
    (raw(layer(member("a"), member("b"))[:700] + b"junk" * 300), "broken tar header"),
    (raw(b"not a tar archive at all" * 100), "is damaged|broken tar header"),
]


@pytest.mark.parametrize(("image", "why"), REFUSED, ids=[why[:40] for _, why in REFUSED])
def test_what_no_image_may_have_is_refused_in_one_line(
    open_image: Open, image: Layout, why: str
) -> None:
    with pytest.raises(ConfigError, match=why) as refused:
        open_image(image)
    text = str(refused.value)
    assert "\n" not in text and text.isprintable() and len(text) < 600
    assert "image.tar: layer" in text


def test_a_write_through_a_link_stays_in_the_image(open_image: Open, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    tree = open_image(
        of(
            symlink("up", "../../../../.."),
            symlink("there", str(outside)),
            member("up/a", data=b"1"),
            member("there/b", data=b"2"),
        )
    )
    assert tree.read("a", 9) == b"1"
    assert tree.read(f"{outside}/b", 9) == b"2"
    assert os.listdir(outside) == []


def test_a_link_bomb_ends(open_image: Open) -> None:
    links = [symlink(f"l{n}", f"l{n + 1}/l{n + 1}" if n < 60 else ".") for n in range(61)]
    with pytest.raises(Refused, match="links that lead nowhere"):
        open_image(of(*links, member("l0/x")))


# --- sizes ----------------------------------------------------------------------------------------


def test_files_that_are_larger_than_allowed(open_image: Open, room: Path) -> None:
    with pytest.raises(Refused, match="more than 1 MiB; allow more with --size"):
        open_image(of(member("big", data=bytes(2 << 20))), most=1 << 20)
    assert sum(file.stat().st_blocks * 512 for file in room.iterdir()) < 1 << 20


def claims(size: int) -> bytes:
    """A header of a file of `size` bytes, and no content."""
    info = tarfile.TarInfo("bomb")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [1 << 40, 1 << 62, 8 << 30])
def test_a_file_that_claims_to_be_huge(open_image: Open, size: int) -> None:
    with pytest.raises(Refused, match="more than 16 MiB"):
        open_image(raw(claims(size) + bytes(1024)))


def test_a_file_of_negative_size(open_image: Open) -> None:
    with pytest.raises(Refused, match=r"negative size|is damaged"):
        open_image(raw(claims(-512) + bytes(1024)))
    with pytest.raises(Refused, match=r"negative size|is damaged"):
        open_image(of(pax("x", size="-512")))


def test_a_sparse_file_that_claims_to_be_huge(open_image: Open) -> None:
    headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 50), "GNU.sparse.name": "x"}
    with pytest.raises(Refused, match="more than 16 MiB"):
        open_image(of(member("x", data=b"1", pax_headers=headers)))


@pytest.mark.parametrize(
    ("map", "why"),
    [
        ("0,2,1,2", "pieces overlap"),
        ("4,1,0,1", "pieces overlap"),
        ("0,-1", "broken tar header|pieces overlap"),
        ("0,2,2", "pieces that are not there"),
        ("0,2,6,3", "pieces that are not there"),  # longer than the file
        ("0,5", "pieces that are not there"),  # than what is stored
    ],
)
def test_a_sparse_file_whose_map_cannot_be(open_image: Open, map: str, why: str) -> None:
    headers = {"GNU.sparse.map": map, "GNU.sparse.size": "8", "GNU.sparse.name": "x"}
    with pytest.raises(Refused, match=why):
        open_image(of(member("x", data=b"1234", pax_headers=headers)))


def old_sparse(blocks: int) -> bytes:
    """A file of GNU's first sparse format: four pieces in its header, 21 in each block more."""
    info = tarfile.TarInfo("old")
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    piece = b"00000000000\0" * 2
    header[386:482] = piece * 4
    header[482:495] = (b"\1" if blocks else b"\0") + b"00000000000\0"
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    more = [piece * 21 + (b"\1" if left else b"\0") + bytes(7) for left in range(blocks)[::-1]]
    return bytes(header) + b"".join(more)


def test_a_sparse_file_of_pieces_without_end(
    open_image: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 4 + 2 * 21
    monkeypatch.setattr(members, "_MOST_PIECES", most)
    assert open_image(raw(old_sparse(2))).find("old") is not None
    lines = b"%d\n" % most + b"0\n0\n" * most
    map = ",".join(["0,0"] * most)
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    data = lines.ljust(-(-len(lines) // 512) * 512, b"\0")
    open_image(of(member("x", data=data, pax_headers=headers)))
    open_image(of(pax("x", **{"GNU.sparse.map": map, "GNU.sparse.size": "9"})))
    bad = b"%d\n" % (most + 1) + lines
    data = bad.ljust(-(-len(bad) // 512) * 512, b"\0")
    for image in (
        raw(old_sparse(4)),
        of(member("x", data=data, pax_headers=headers)),
        of(pax("x", **{"GNU.sparse.map": f"{map},0,0", "GNU.sparse.size": "9"})),
    ):
        with pytest.raises(Refused, match=f"a sparse file of more than {most} pieces"):
            open_image(image)


def test_an_old_sparse_file_s_numbers_may_fill_their_fields(open_image: Open) -> None:
    archive = bytearray(old_sparse(0))
    archive[386:482] = b"000000000001" * 2 + bytes(72)
    archive[124:136], archive[483:495] = b"00000000001\0", b"000000000003"
    archive[148:156] = b"        "
    archive[148:156] = b"%06o\0 " % sum(archive[:512])
    data = bytes(archive) + b"x".ljust(512, b"\0")
    assert open_image(raw(data)).read("old", 9) == b"\0x\0"


@pytest.mark.parametrize(("place", "length"), [(124, 12), (108, 8), (116, 8)])
def test_a_number_to_the_base_of_256_counts_as_a_whole(
    open_image: Open, place: int, length: int
) -> None:
    """Of a size, a user, a group."""
    archive = bytearray(claims(0) + bytes(1024))
    archive[place : place + length] = b"\x80\x01" + bytes(length - 3) + b"\1"
    archive[148:156] = b"        "
    archive[148:156] = b"%06o\0 " % sum(archive[:512])
    with pytest.raises(Refused, match=r"more than 16 MiB|belongs to 281474976710657"):
        open_image(raw(bytes(archive)))


@pytest.mark.parametrize("time", ["never", "nan", "inf", "-inf", "1e999", "-7", "0x10"])
def test_a_time_that_is_none_is_1970(open_image: Open, time: str) -> None:
    found = open_image(of(member("x", mtime=5, pax_headers={"mtime": time}))).find("x")
    assert found is not None and found.mtime == 0


def with_records(records: bytes) -> bytes:
    """A file behind an extended header that holds just these bytes."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    header = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512, b"\0")
    return header + layer(member("x", data=b"1"))


@pytest.mark.parametrize(
    "records",
    [
        b"10 path=ab",  # without a newline
        b"11 path=abc",
        b"99 path=ab\n",  # longer than all there is
        b"12 pathabcd\n",  # no equals sign
        b"5 pat\nh=1234\n",  # one that belongs to the next record
        b"0 path=ab\n",
        b"x path=ab\n",
        b"path=ab\n",
        b" 10 path=ab\n",
    ],
)
def test_extended_headers_that_are_broken(open_image: Open, records: bytes) -> None:
    assert open_image(raw(with_records(b"12 path=abc\n"))).read("abc", 9) == b"1"
    assert open_image(raw(with_records(b"")[:512] + layer(member("x")))).find("x") is not None
    with pytest.raises(Refused, match="broken tar header"):
        open_image(raw(with_records(records)))


@pytest.mark.parametrize("place", [0, 100, 124, 148, 156, 257, 345, 511])
def test_a_header_whose_sum_is_wrong(open_image: Open, place: int) -> None:
    archive = bytearray(layer(member("x", data=b"1")))
    archive[place] ^= 1
    with pytest.raises(Refused, match="broken tar header"):
        open_image(raw(bytes(archive)))


@pytest.mark.parametrize(
    "compress", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress]
)
def test_a_layer_that_inflates_without_end(open_image: Open, compress) -> None:
    layout = Layout()
    # Behind the archive's end, where nobody would look but for the digest.
    layout.add([layer(member("a")) + bytes(64 << 20)], compress=compress)
    with pytest.raises(Refused, match="unpack to more than 32 MiB; allow more with --size"):
        open_image(layout)


def test_a_zstd_frame_that_wants_all_memory(open_image: Open) -> None:
    layout = Layout()
    # A frame with a window of 1 GiB (RFC 8878, 3.1.1.1.2), of which the first block is raw.
    frame = b"\x28\xb5\x2f\xfd" + b"\x00\xa0" + (1 | 512 << 3).to_bytes(3, "little") + bytes(512)
    layout.add([bytes(512)], compress=lambda data: frame)
    with pytest.raises(Refused, match="requires too much memory"):
        open_image(layout)


def test_an_xz_stream_that_wants_all_memory(open_image: Open) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 256 << 20}]
    layout = Layout()
    layout.add([layer(member("a"))], compress=lambda data: lzma.compress(data, filters=filters))
    with pytest.raises(Refused, match="Memory usage limit exceeded"):
        open_image(layout)


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data + b"junk"])
def test_streams_that_are_damaged(open_image: Open, compress, damage) -> None:
    layout = Layout()
    layout.add([layer(member("a"))], compress=lambda data: damage(compress(data)))
    with pytest.raises(Refused, match="layer 1 is damaged"):
        open_image(layout)


@pytest.mark.parametrize("what", ["manifest", "config", "layer"])
@pytest.mark.parametrize("size", [1, 1 << 40, -1, "5", 1.5, True])
def test_a_size_that_is_not_what_there_is(open_image: Open, what: str, size: Any) -> None:
    def change(manifest: dict[str, Any]) -> None:
        if what != "manifest":
            ({"config": manifest["config"], "layer": manifest["layers"][0]}[what])["size"] = size

    layout = Layout()
    descriptor = layout.add([layer(member("a"))], change=change)
    if what == "manifest":
        descriptor["size"] = size
    with pytest.raises(Refused, match=r"is to have|is not a size"):
        open_image(layout)


def test_too_many_files(open_image: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "MOST_NODES", 100)
    with pytest.raises(Refused, match="more than 100 files"):
        open_image(of(*(member(str(n)) for n in range(101))))
    with pytest.raises(Refused, match="more than 100 files"):
        open_image(of(member("a/" * 101)))


def test_steps_without_end(open_image: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "_MOST_STEPS", 5000)
    deep = "d/" * 150
    for endless in (
        [directory(deep)] * 40,
        [member("d/.wh.x")] * 2600,
        [symlink("l", deep), *[hardlink("l/h", "d/f")] * 40],
        [symlink("l", "d" + "/" * 4000), member("l/f"), member("l/f")],
        [member("d/" + "x/../" * 6000)],
        [member("f"), hardlink("h", "./" * 6000 + "f")],
    ):
        with pytest.raises(Refused, match="through too many directories and links"):
            open_image(of(directory(deep), *endless))


def test_a_directory_is_cleared_once_a_layer(open_image: Open) -> None:
    """Or that many opaque directories of that many files would take hours."""
    many = layer(*(member(f"d/{number}") for number in range(20_000)))
    layout = Layout()
    layout.add([many, layer(*(member("d/.wh..wh..opq") for _ in range(20_000)), member("d/x"))])
    assert [path for path, _ in open_image(layout).walk()] == [".", "d", "d/x"]


def test_steps_are_counted_one_by_one(open_image: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """A member, the slashes in its name, the directories and links on its way."""
    layout = raw(
        layer(*[member("a/b/c")] * 3, symlink("l", "a/b"), hardlink("h", "a/b/c"), member("l/c"))
    )
    steps = 3 * (1 + 2 + 2) + 1 + (1 + 2 + 2) + (1 + 1 + 1 + 1 + 2)
    monkeypatch.setattr(trees, "_MOST_STEPS", steps)
    open_image(layout)
    monkeypatch.setattr(trees, "_MOST_STEPS", steps - 1)
    with pytest.raises(Refused, match="lead through too many directories and links"):
        open_image(layout)


def test_names_that_no_file_system_takes(open_image: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """mke2fs would take hours for one directory of all names, and lose count of a file's names."""
    monkeypatch.setattr(trees, "_MOST_COMPARED", 100**2)
    monkeypatch.setattr(trees, "_MOST_LINKS", 100)
    open_image(of(*(member(f"{n % 7}/{n}") for n in range(200)))).check_names()
    with pytest.raises(Refused, match="too many files in one directory"):
        open_image(of(*(member(f"d/{n}") for n in range(101)))).check_names()
    links = [hardlink(f"{n % 7}/{n}", "f") for n in range(100)]
    open_image(of(member("f"), *links[1:])).check_names()
    with pytest.raises(Refused, match="more than 100 names"):
        open_image(of(member("f"), *links)).check_names()


def test_text_without_end(open_image: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "_MOST_MEMORY", 1 << 20)
    for endless in (
        [symlink("l", "x" * 4000)] * 300,
        [member("f", xattrs={"user.x": b"x" * 2000})] * 600,
        [member(f"{'x' * 250}{n}") for n in range(3000)],
    ):
        with pytest.raises(Refused, match="names, links and attributes take more than 1 MiB"):
            open_image(of(*endless))


def test_a_header_that_is_read_as_a_whole_is_bounded(open_image: Open) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("h")
        info.type, info.size = kind, 1 << 33
        with pytest.raises(Refused, match="a header of 8589934592 bytes"):
            open_image(raw(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096)))


def test_headers_without_end(open_image: Open) -> None:
    info = tarfile.TarInfo("h")
    info.type = tarfile.GNUTYPE_LONGNAME
    info.size = 2
    one = info.tobuf(tarfile.GNU_FORMAT) + b"x\0".ljust(512, b"\0")
    with pytest.raises(Refused, match="it has a header of 104"):
        open_image(raw(one * 5000 + bytes(1024)))


# --- digests --------------------------------------------------------------------------------------


def change_layer(layout: Layout, data: bytes) -> Layout:
    """Other bytes under the first layer's digest."""
    manifest = json.loads(layout.files["blobs/" + layout.manifests[0]["digest"].replace(":", "/")])
    layout.files["blobs/" + manifest["layers"][0]["digest"].replace(":", "/")] = data
    return layout


def test_a_layer_that_is_not_what_its_digest_says(open_image: Open) -> None:
    layout = change_layer(of(), gzip.compress(layer(member("evil"))))
    with pytest.raises(Refused, match="it is not what sha256:"):
        open_image(layout)


def test_a_layer_that_was_cut_short(open_image: Open) -> None:
    stored = gzip.compress(layer(directory("d"), member("d/f", data=random.randbytes(5000))))
    with pytest.raises(Refused, match=r"is damaged|is not what"):
        open_image(change_layer(of(), stored[:2000]))


def test_a_layer_that_unpacks_to_something_else(open_image: Open, tmp_path: Path) -> None:
    layout = Layout()
    layout.add([layer(member("a"))], compress=lambda data: gzip.compress(layer(member("b"))))
    with pytest.raises(Refused, match="it unpacks to something else than sha256:"):
        open_image(layout)
    path = docker_archive(tmp_path / "d.tar", [layer(member("a"))])
    data = Path(path).read_bytes()
    index = data.index(b"0/layer.tar")
    Path(path).write_bytes(data[:index] + data[index:].replace(b"a\0\0\0", b"b\0\0\0", 1))
    with pytest.raises(Refused):
        open_image(path, "docker-archive")


@pytest.mark.parametrize("which", ["manifest", "config"])
def test_a_manifest_or_configuration_that_is_not_what_its_digest_says(
    open_image: Open, which: str
) -> None:
    layout = of()
    name = "blobs/" + layout.manifests[0]["digest"].replace(":", "/")
    if which == "config":
        digest_ = json.loads(layout.files[name])["config"]["digest"]
        name = "blobs/" + digest_.replace(":", "/")
    layout.files[name] = layout.files[name] + b" "
    with pytest.raises(Refused, match=r"what is to be sha256:.*… is not"):
        open_image(layout)


# --- manifests ------------------------------------------------------------------------------------

OUTSIDE = ["sha256:../../../../etc/passwd", "../../etc/passwd", "/etc/passwd", "md5:" + "0" * 32]


@pytest.mark.parametrize("bad", [*OUTSIDE, "sha256:" + "A" * 64, 5, None, ["x"]])
@pytest.mark.parametrize("kind", ["oci-archive", "oci"])
def test_a_digest_is_a_digest_and_no_path(
    open_image: Open, tmp_path: Path, bad: Any, kind: str
) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["layers"][0]["digest"] = bad

    layout = Layout()
    layout.add([layer(member("a"))], change=change)
    image = layout if kind == "oci-archive" else layout.folder(tmp_path / "layout")
    with pytest.raises(Refused, match="is not a digest"):
        open_image(image, kind)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "missing"])
def test_docker_s_names_are_those_of_members(open_image: Open, tmp_path: Path, name: str) -> None:
    for key, value in (("Layers", [name]), ("Config", name)):
        path = docker_archive(
            tmp_path / "d.tar",
            [layer(member("a"))],
            change=lambda row, key=key, value=value: row.update({key: value}),
        )
        with pytest.raises(Refused, match=r"has no '"):
            open_image(path, "docker-archive")


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../etc/passwd", "layer.tar"])
def test_a_layer_that_is_a_link_out_of_the_archive(
    open_image: Open, tmp_path: Path, target: str
) -> None:
    path = docker_archive(
        tmp_path / "d.tar",
        [layer(member("a"))],
        change=lambda row: row.update(Layers=["x/layer.tar"]),
        extra=[symlink("x/layer.tar", target)],
    )
    with pytest.raises(Refused, match=r"has no 'x/layer.tar'|has no '"):
        open_image(path, "docker-archive")


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"manifests": 5}',
    b'{"manifests": [5]}',
    b'{"manifests": [{"mediaType": 1, "digest": []}]}',
    b'{"manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json"}]}',
    b'{"manifests": [{"platform": "x", '
    b'"mediaType": "application/vnd.oci.image.manifest.v1+json"}]}',
    b"[" * 100_000,
    b"1" * 10_000,
    b"\xff\xfe",
    b'{"manifests": []}',
]


@pytest.mark.parametrize("text", GARBAGE, ids=[ascii(text[:40]) for text in GARBAGE])
def test_garbage_instead_of_an_index(open_image: Open, text: bytes, tmp_path: Path) -> None:
    layout = Layout()
    files = {**layout.contents(), "index.json": text}
    path = tmp_path / "image.tar"
    path.write_bytes(layer(*(member(name, data=data) for name, data in files.items())))
    with pytest.raises(Refused) as refused:
        open_image(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", GARBAGE, ids=[ascii(text[:40]) for text in GARBAGE])
def test_garbage_instead_of_docker_s_manifest(
    open_image: Open, text: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "image.tar"
    path.write_bytes(layer(member("manifest.json", data=text)))
    with pytest.raises(Refused) as refused:
        open_image(str(path), "docker-archive")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("layers", [], "0 layers"),
        ("layers", {}, "layers is not what it has to be"),
        ("layers", [1], "says 1|is not what it has to be"),
        ("config", None, "is not what it has to be"),
        ("config", {"digest": "sha256:" + "0" * 64}, "has no"),
    ],
)
def test_a_manifest_that_makes_no_sense(open_image: Open, key: str, value: Any, why: str) -> None:
    layout = Layout()
    layout.add([layer(member("a"))], change=lambda manifest: manifest.update({key: value}))
    with pytest.raises(Refused, match=why):
        open_image(layout)


def test_manifests_without_end(
    open_image: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_MOST_MANIFESTS", 3)
    for count in (3, 4):
        layout = of()
        layout.manifests *= count
        path = tmp_path / "d.tar"
        docker_archive(path, [layer(member("a"))])
        with tarfile.open(path) as archive:
            files = [(one, archive.extractfile(one).read()) for one in archive]  # type: ignore[union-attr]
        rows = json.loads(files[-1][1])
        files[-1] = member("manifest.json", data=json.dumps(rows * count).encode())
        path.write_bytes(layer(*files))
        if count == 3:
            open_image(layout)
            open_image(str(path), "docker-archive")
            continue
        for image, kind in ((layout, "oci-archive"), (str(path), "docker-archive")):
            with pytest.raises(Refused, match="more than 3 manifests"):
                open_image(image, kind)


def test_what_a_library_says_is_cut() -> None:
    with pytest.raises(Refused) as refused, explained("image.tar"):
        raise ValueError("x" * 500 + "\nmore")
    assert refused.value.message == f"image.tar is damaged: {'x' * 200}"
    with (
        pytest.raises(Refused, match=r"image\.tar is damaged: MemoryError"),
        explained("image.tar"),
    ):
        raise MemoryError


def test_an_image_of_no_layers_or_too_many(
    open_image: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "_MOST_LAYERS", 3)
    for count in range(5):
        layout = Layout()
        layout.add([layer(member("a"))] * count)
        if 0 < count <= 3:
            open_image(layout)
            continue
        with pytest.raises(Refused, match=f"has {count} layers; use 1 to 3"):
            open_image(layout)


def test_an_index_that_contains_itself_in_spirit(open_image: Open) -> None:
    layout = of()
    for _ in range(6):
        inner, size = layout.json_blob({"manifests": layout.manifests})
        layout.manifests = [{"mediaType": INDEX, "digest": inner, "size": size}]
    with pytest.raises(Refused, match="indexes within indexes"):
        open_image(layout)


def test_a_json_file_without_end(open_image: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_JSON_LIMIT", 1 << 10)
    layout = of()
    layout.files["oci-layout"] = b'{"imageLayoutVersion": "1.0.0", "x": "' + b"x" * 2000 + b'"}'
    with pytest.raises(Refused, match="has more than"):
        open_image(layout)


@pytest.mark.parametrize("version", ["2.0.0", "", None])
def test_a_layout_of_another_version(open_image: Open, version: str | None) -> None:
    layout = of()
    layout.files["oci-layout"] = json.dumps({"imageLayoutVersion": version}).encode()
    with pytest.raises(Refused, match="another version than 1"):
        open_image(layout)


def test_a_directory_s_blobs_that_are_no_files(open_image: Open, tmp_path: Path) -> None:
    layout = of()
    path = Path(layout.folder(tmp_path / "layout"))
    blob = path / "blobs" / layout.manifests[0]["digest"].replace(":", "/")
    blob.unlink()
    os.mkfifo(blob)  # nobody will ever write to it
    with pytest.raises(Refused, match="has no"):
        open_image(str(path), "oci")


@pytest.mark.parametrize("linked", ["blob", "algorithm", "blobs", "index.json", "oci-layout"])
@pytest.mark.parametrize("leads", ["out", "in", "by an absolute path"])
def test_a_directory_whose_files_are_links(
    open_image: Open, tmp_path: Path, linked: str, leads: str
) -> None:
    """They would be read as whoever builds the image, wherever they lead."""
    layout = of()
    path = Path(layout.folder(tmp_path / "layout"))
    blob = path / "blobs" / layout.manifests[0]["digest"].replace(":", "/")
    link = {"blob": blob, "algorithm": blob.parent, "blobs": path / "blobs"}.get(
        linked, path / linked
    )
    target = (tmp_path if leads == "out" else path) / "elsewhere"
    link.rename(target)
    up = os.path.relpath(target, link.parent)
    link.symlink_to(target if leads == "by an absolute path" else up)
    before = open_descriptors()
    with pytest.raises(ConfigError, match="is a symbolic link, or lies behind one") as refused:
        open_image(str(path), "oci")
    assert "cp -rL" in str(refused.value)
    assert open_descriptors() == before
    # The directory itself may be one: its path is the user's.
    link.unlink()
    target.rename(link)
    (tmp_path / "by-name").symlink_to(path)
    assert open_image(str(tmp_path / "by-name"), "oci").read("d/f", 9) == b"x"


# --- the archive itself ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"x", bytes(10240), b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"not a tar" * 1000],
    ids=["empty", "short", "zeros", "gzip", "zstd", "text"],
)
@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_a_file_that_is_no_archive(
    open_image: Open, tmp_path: Path, data: bytes, kind: str
) -> None:
    path = tmp_path / "image.tar"
    path.write_bytes(data)
    with pytest.raises(Refused, match=r"image.tar"):
        open_image(str(path), kind)


def test_an_archive_that_was_cut_short_anywhere(open_image: Open, tmp_path: Path) -> None:
    whole = Path(of(member("x", data=b"x" * 3000)).archive(tmp_path / "whole.tar")).read_bytes()
    path = tmp_path / "image.tar"
    end = whole.rstrip(b"\0").__len__()
    for length in range(0, end, 512):
        path.write_bytes(whole[:length])
        with pytest.raises(Refused):
            open_image(str(path))


def test_members_of_long_names(
    open_image: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MOST_FILES", 20)
    path = tmp_path / "image.tar"
    image = of()
    files = [member(name, data=data) for name, data in image.contents().items()]
    path.write_bytes(layer(*files, *(member("x" * 1000 + str(n)) for n in range(4))))
    open_image(str(path))
    for more in (member("x" * 3000), symlink("l", "x" * 3000)):
        path.write_bytes(layer(*files, more, member("y" * 2500)))
        with pytest.raises(Refused, match="more than 20 files"):
            open_image(str(path))


def test_a_name_is_shown_in_plain_letters() -> None:
    for name in ("ü", "\u202e", "\x1b[2J", "a\nb", "bad\udcff", "x" * 500):
        assert shown(name).isascii() and shown(name).isprintable() and len(shown(name)) <= 120
    assert shown("a'b c") == '"a\'b c"'


def test_too_many_members(
    open_image: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MOST_FILES", 10)
    path = tmp_path / "image.tar"
    path.write_bytes(layer(*(member(str(n)) for n in range(11))))
    with pytest.raises(Refused, match="more than 10 files"):
        open_image(str(path))


@pytest.mark.parametrize("seed", range(8))
def test_changed_bytes_are_refused_or_make_no_difference(
    open_image: Open, tmp_path: Path, seed: int
) -> None:
    """Digests find any change of what is in a blob; what is around must not matter, or be told."""
    chance = random.Random(seed)
    whole = Path(of(member("x", data=b"1")).archive(tmp_path / "whole.tar")).read_bytes()
    path = tmp_path / "image.tar"
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 4))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            assert open_image(str(path)).read("x", 9) == b"1"
        except Refused as refused:
            assert "\n" not in str(refused)


@pytest.mark.parametrize("seed", range(8))
def test_layers_of_changed_bytes_with_right_digests(open_image: Open, seed: int) -> None:
    """The maker of an image can make digests too: here only the checks of members stand guard."""
    chance = random.Random(seed)
    whole = layer(
        directory("d"),
        member("d/f", data=b"x" * 700, xattrs={"user.a": b"1"}),
        hardlink("h", "d/f"),
        symlink("l", "d"),
        member("l/" + "n" * 120, mtime=1.5),
        member("s", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}, data=b"1"),
    )
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 4))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        for start in range(0, len(data), 512):  # a header that tarfile believes
            block = data[start : start + 512]
            if block[257:262] == b"ustar":
                block[148:156] = b"        "
                data[start + 148 : start + 156] = b"%06o\0 " % sum(block)
        try:
            open_image(raw(bytes(data)))
        except Refused as refused:
            assert "\n" not in str(refused)


def test_a_budget_is_for_all_layers_together() -> None:
    budget = layers.Budget(1000)
    data = bytes(600)
    for _ in range(2):
        stream = layers.LayerStream(
            io.BytesIO(zlib.compress(data, wbits=31)),
            digest=None,
            diff_id=digest(data),
            budget=budget,
            advance=lambda size: None,
        )
        if _ == 0:
            stream.finish()
        else:
            with pytest.raises(Refused, match="unpack to more than"):
                stream.finish()


def test_members_are_not_kept_by_the_library() -> None:
    data = layer(*(member(str(n)) for n in range(50)))
    assert sum(1 for _ in members.members(io.BytesIO(data))) == 50
