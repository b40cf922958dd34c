"""Saved container images become what their layers say, put over one another."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from container_archives import (
    INDEX,
    Layout,
    directory,
    docker_archive,
    hardlink,
    layer,
    member,
    symlink,
)

from pyvmm.errors import ConfigError
from pyvmm.images.container import guest, process
from pyvmm.images.container.load import load, split_source
from pyvmm.images.container.refusal import Refused
from pyvmm.images.container.tree import Node, Tree
from pyvmm.images.progress import Progress

MOST = 64 << 20


@pytest.fixture
def open_image(tmp_path: Path) -> Callable[..., Tree]:
    def open_image(layout: Layout, name: str | None = None) -> Tree:
        path = layout.archive(tmp_path / "image.tar")
        return load("oci-archive", path, name, str(tmp_path), MOST, Progress(quiet=True))[0]

    return open_image


@pytest.fixture
def over(open_image: Callable[..., Tree]) -> Callable[..., Tree]:
    """The tree of layers that are given as lists of members."""

    def over(*layers: list[tuple[tarfile.TarInfo, bytes]]) -> Tree:
        layout = Layout()
        layout.add(layer(*members) for members in layers)
        return open_image(layout)

    return over


def files(tree: Tree) -> dict[str, bytes | str]:
    """Contents of files, targets of symbolic links, of anything else its kind."""

    def look(node: Node) -> bytes | str:
        if node.kind == tarfile.REGTYPE:
            return tree.spool.read(node.start, node.size)
        return node.target or node.kind.decode()

    return {path: look(node) for path, node in tree.walk() if path != "."}


D = tarfile.DIRTYPE.decode()


def test_upper_layers_win(over) -> None:
    tree = over(
        [directory("d"), member("d/a", data=b"1"), member("b", data=b"1")],
        [member("d/a", data=b"two"), member("c", data=b"3")],
    )
    assert files(tree) == {"d": D, "d/a": b"two", "b": b"1", "c": b"3"}


def test_a_whiteout_takes_away_what_lower_layers_have(over) -> None:
    tree = over(
        [directory("d"), directory("d/e"), member("d/e/f", data=b"1"), member("g")],
        [member("d/.wh.e"), member(".wh.g"), member(".wh.never-there")],
    )
    assert files(tree) == {"d": D}


@pytest.mark.parametrize("first", [True, False])
def test_a_whiteout_spares_its_own_layer_wherever_it_stands(over, first: bool) -> None:
    out, new = [member(".wh.d")], [directory("d"), member("d/new", data=b"2")]
    tree = over([directory("d"), member("d/old", data=b"1")], out + new if first else new + out)
    assert files(tree) == {"d": D, "d/new": b"2"}


@pytest.mark.parametrize("first", [True, False])
def test_an_opaque_directory_has_only_its_own_layer(over, first: bool) -> None:
    out, new = [member("d/.wh..wh..opq")], [member("d/e/new", data=b"2")]
    tree = over(
        [directory("d"), member("d/old"), directory("d/e"), member("d/e/old")],
        [directory("d"), *(out + new if first else new + out)],
    )
    assert files(tree) == {"d": D, "d/e": D, "d/e/new": b"2"}


def test_a_whiteout_may_come_back_in_a_later_layer(over) -> None:
    tree = over([member("a", data=b"1")], [member(".wh.a")], [member("a", data=b"3")])
    assert files(tree) == {"a": b"3"}


def test_notes_of_aufs_are_no_files(over) -> None:
    assert files(over([directory(".wh..wh.plnk"), member(".wh..wh.aufs"), member("a")])) == {
        "a": b""
    }


def test_a_file_replaces_a_directory_and_the_other_way_round(over) -> None:
    tree = over(
        [directory("a"), member("a/b"), member("c")],
        [member("a", data=b"now a file"), directory("c"), member("c/d")],
    )
    assert files(tree) == {"a": b"now a file", "c": D, "c/d": b""}


def test_a_directory_that_comes_again_keeps_its_files_and_changes_its_owner(over) -> None:
    tree = over(
        [directory("d"), member("d/a")], [directory("d", mode=0o700, uid=5, gid=6, mtime=7)]
    )
    node = tree.find("/d")
    assert (node.mode, node.uid, node.gid, node.mtime) == (0o700, 5, 6, 7)
    assert "a" in node.children


def test_a_directory_that_is_not_there_is_made(over) -> None:
    tree = over([member("a/b/c", data=b"x", uid=7, gid=8)])
    assert files(tree) == {"a": D, "a/b": D, "a/b/c": b"x"}
    made = tree.find("a/b")
    assert (made.uid, made.gid, made.mode) == (0, 0, 0o755)


def test_long_names_as_older_tars_store_them(open_image) -> None:
    names = ["d" * 90 + "/" + "f" * 90, "x" * 100, "e" * 155 + "/" + "g" * 100]
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        archive = b"".join(tarfile.TarInfo(name).tobuf(format) for name in names)
        layout = Layout()
        layout.add([archive])
        found = files(open_image(layout))
        assert {name for name, kind in found.items() if kind == b""} == set(names)


def test_directories_as_the_oldest_tars_store_them(open_image) -> None:
    """Their kind is that of a file, and their name ends in a slash."""
    kinds = (("d/", tarfile.AREGTYPE), ("f", tarfile.AREGTYPE), ("g/", tarfile.REGTYPE))
    layout = Layout()
    layout.add([layer(*(member(name, kind) for name, kind in kinds), member("d/x"))])
    assert files(open_image(layout)) == {"d": D, "f": b"", "g": b"", "d/x": b""}


def test_numbers_may_fill_their_fields(open_image) -> None:
    archive = bytearray(layer(member("f", data=b"x")))
    fields = {100: b"00000644", 108: b"00001750", 116: b"00001751", 124: b"000000000001"}
    fields |= {136: b"000000000007", 148: b"        "}
    for place, digits in fields.items():
        archive[place : place + len(digits)] = digits
    archive[148:156] = b"%06o\0 " % sum(archive[:512])
    layout = Layout()
    layout.add([bytes(archive)])
    node = open_image(layout).find("f")
    assert (node.mode, node.uid, node.gid, node.size) == (0o644, 1000, 1001, 1)
    assert node.mtime == 7


def test_a_sparse_file_that_is_all_hole(over) -> None:
    for data, headers in (
        (b"0\n".ljust(512, b"\0"), {"GNU.sparse.realsize": "5000"}),
        (b"1\n5000\n0\n".ljust(512, b"\0"), {"GNU.sparse.realsize": "5000"}),
    ):
        headers |= {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "x"}
        tree = over([member("y", data=data, pax_headers=headers), member("z", data=b"z")])
        assert files(tree) == {"x": bytes(5000), "z": b"z"}


def test_of_a_name_that_comes_twice_the_last_one_counts(over) -> None:
    assert files(over([member("a", data=b"1"), member("a", data=b"2")])) == {"a": b"2"}


def test_hard_links_are_one_file_across_layers(over) -> None:
    tree = over([member("a", data=b"1", uid=9)], [hardlink("b", "a"), hardlink("c", "./b")])
    assert tree.find("a") is tree.find("b") is tree.find("c")


def test_a_hard_link_outlives_its_other_name(over) -> None:
    tree = over([member("a", data=b"1"), hardlink("b", "a")], [member(".wh.a")])
    assert files(tree) == {"b": b"1"}


def test_files_go_through_links_to_directories_as_in_a_running_container(over) -> None:
    tree = over(
        [directory("usr"), directory("usr/lib"), symlink("lib", "usr/lib")],
        [member("lib/x", data=b"1"), symlink("abs", "/usr"), member("abs/lib/y", data=b"2")],
    )
    assert files(tree) == {
        **{"usr": D, "usr/lib": D, "lib": "usr/lib", "abs": "/usr"},
        **{"usr/lib/x": b"1", "usr/lib/y": b"2"},
    }


def test_a_directory_replaces_a_link_of_a_lower_layer(over) -> None:
    tree = over([directory("d"), symlink("l", "d")], [directory("l"), member("l/f")])
    assert files(tree) == {"d": D, "l": D, "l/f": b""}


def test_owners_modes_times_devices_and_attributes_are_kept(over) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    [(info, _)] = [member("dev/sda", tarfile.BLKTYPE, devmajor=8, devminor=300, mode=0o660)]
    tree = over(
        [
            member("suid", uid=70000, gid=80000, mode=0o4755, mtime=1234567890.7),
            member("caps", xattrs={"security.capability": capability, "user.x": b"\xff\0="}),
            member("selinux", xattrs={"security.selinux": b"label", "user.overlay.origin": b""}),
            member("apple", xattrs={"com.apple.provenance": b"1", "user.": b"", "system.x": b"2"}),
            (info, b""),
            member("fifo", tarfile.FIFOTYPE),
        ]
    )
    suid = tree.find("suid")
    assert (suid.uid, suid.gid, suid.mode, suid.mtime) == (70000, 80000, 0o4755, 1234567890)
    assert tree.find("caps").xattrs == {b"security.capability": capability, b"user.x": b"\xff\0="}
    assert not tree.find("selinux").xattrs
    assert not tree.find("apple").xattrs  # which Linux has no namespaces for
    assert (tree.find("dev/sda").kind, tree.find("dev/sda").device) == (tarfile.BLKTYPE, (8, 300))
    assert tree.find("fifo").kind == tarfile.FIFOTYPE


def test_names_may_be_any_bytes(over) -> None:
    names = ["ü", "bad\udcff name", "with\nnewline", 'quote"and\\', "x" * 255, "a/" * 90 + "deep"]
    tree = over([member(name, data=b"1") for name in names])
    assert {tree.read(name, 9) for name in names} == {b"1"}


def test_absolute_names_begin_at_the_image_s_root(over) -> None:
    tree = over(
        [member("app/two", data=b"2"), hardlink("app/one", "/app/two"), member("/abs", data=b"a")],
        [directory("//d//"), hardlink("/../d/three", "/./app/x/../one"), member("/.wh.abs")],
    )
    assert files(tree) == {"app": D, "app/two": b"2", "app/one": b"2", "d": D, "d/three": b"2"}
    assert tree.find("app/two") is tree.find("d/three")


@pytest.mark.parametrize(
    "format", ["gnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"]
)
def test_sparse_files_as_gnu_tar_stores_them(open_image, tmp_path: Path, format: str) -> None:
    if shutil.which("tar") is None:
        pytest.skip("GNU tar is missing")
    pieces = [(n * (1 << 20), random.randbytes(4096 + n)) for n in range(1, 40)]
    with open(tmp_path / "sparse", "wb") as file:
        for place, data in pieces:
            file.seek(place)
            file.write(data)
        file.truncate(41 << 20)
    (tmp_path / "after").write_bytes(b"after")
    command = ["tar", "-c", "--sparse", *f"--format={format}".split(), "sparse", "after"]
    archive = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True).stdout
    assert len(archive) < 1 << 20
    layout = Layout()
    layout.add([archive])
    tree = open_image(layout)
    assert tree.read("sparse", 64 << 20) == (tmp_path / "sparse").read_bytes()
    assert tree.read("after", 9) == b"after"


@pytest.mark.parametrize("byte", [b"\0", b"\1", b"\xff"])
def test_large_and_sparse_files_come_whole(over, tmp_path: Path, byte: bytes) -> None:
    data = byte * (3 << 20) + b"end" + byte * (2 << 20)
    tree = over([member("a", data=b"before"), member("f", data=data)])
    assert tree.read("f", len(data)) == data
    taken = (tmp_path / "contents").stat().st_blocks * 512
    assert taken < 2 << 20 if byte == b"\0" else taken >= 5 << 20  # zeros take no room


# --- how they are stored --------------------------------------------------------------------------


OTHER_FRAME = b"\x50\x2a\x4d\x18\x04\0\0\0more"  # pzstd writes it first, zstd:chunked last


@pytest.mark.parametrize(
    "compress",
    [
        gzip.compress,
        zstandard.compress,
        bytes,
        lambda data: gzip.compress(data[:700]) + gzip.compress(data[700:]),
        lambda data: zstandard.compress(data[:700]) + zstandard.compress(data[700:]),
        lambda data: OTHER_FRAME + zstandard.compress(data),
        lambda data: zstandard.compress(data) + OTHER_FRAME,
        bz2.compress,
        lzma.compress,
        lambda data: bz2.compress(data[:700]) + bz2.compress(data[700:]),
        lambda data: lzma.compress(data[:700]) + bytes(8) + lzma.compress(data[700:]) + bytes(4),
    ],
    ids=[
        *("gzip", "zstd", "plain", "gzip in two members", "zstd in two frames"),
        *("zstd behind another frame", "zstd and another frame", "bzip2", "xz"),
        *("bzip2 in two streams", "xz in two streams"),
    ],
)
def test_layers_may_be_compressed(open_image, compress) -> None:
    layout = Layout()
    layout.add([layer(member("a", data=b"hello"))], compress=compress)
    assert files(open_image(layout)) == {"a": b"hello"}


def test_a_layer_may_have_nothing_in_it_not_even_its_end(over, open_image) -> None:
    layout = Layout()
    layout.add([layer(member("a")), b"", bytes(1024)])
    assert files(open_image(layout)) == {"a": b""}


def test_a_layout_may_be_a_directory(tmp_path: Path) -> None:
    layout = Layout()
    layout.add([layer(member("a", data=b"1"))])
    path = layout.folder(tmp_path / "layout")
    tree, image = load("oci", path, None, str(tmp_path), MOST, Progress(quiet=True))
    assert files(tree) == {"a": b"1"}
    assert image.digest == layout.manifests[0]["digest"]


def test_what_docker_save_writes(tmp_path: Path) -> None:
    path = docker_archive(
        tmp_path / "d.tar", [layer(member("a", data=b"1")), layer(member(".wh.a"), member("b"))]
    )
    tree, _ = load("docker-archive", path, None, str(tmp_path), MOST, Progress(quiet=True))
    assert files(tree) == {"b": b""}


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress], ids=["gzip", "xz"])
def test_a_compressed_archive_is_unpacked_first(tmp_path: Path, compress) -> None:
    path = Path(docker_archive(tmp_path / "d.tar", [layer(member("a", data=b"1"))]))
    path.write_bytes(compress(path.read_bytes()))
    tree, _ = load("docker-archive", str(path), None, str(tmp_path), MOST, Progress(quiet=True))
    assert files(tree) == {"a": b"1"}


def test_a_layer_that_tar_linked_is_found(tmp_path: Path) -> None:
    """tar has one file of two names once: `tar -C DIR -c .` of a saved image that was unpacked."""
    content = layer(member("a", data=b"1"))
    path = tmp_path / "d.tar"
    docker_archive(path, [content])
    folder = tmp_path / "saved"
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
        first = json.loads(archive.extractfile("manifest.json").read())[0]["Layers"][0]
    os.rename(folder / first, folder / "0" / "first")
    (folder / first).hardlink_to(folder / "0" / "first")
    subprocess.run(["tar", "-C", folder, "--sort=name", "-cf", path, "."], check=True)
    with tarfile.open(path) as archive:
        assert archive.getmember(f"./{first}").linkname == "./0/first"
    tree, _ = load("docker-archive", str(path), None, str(tmp_path), MOST, Progress(quiet=True))
    assert tree.read("a", 9) == b"1"


def test_a_layer_that_docker_save_linked_is_found(tmp_path: Path) -> None:
    one = layer(member("a", data=b"1"))
    path = docker_archive(
        tmp_path / "d.tar",
        [one],
        change=lambda row: row.update(Layers=["other/layer.tar"]),
        extra=[symlink("other/layer.tar", "../0/layer.tar")],
    )
    tree, _ = load("docker-archive", path, None, str(tmp_path), MOST, Progress(quiet=True))
    assert files(tree) == {"a": b"1"}


def test_of_several_images_one_is_named(open_image) -> None:
    layout = Layout()
    for name in ("one", "two:tag"):
        layout.add([layer(member(name, data=name.encode()))], name=name)
    assert files(open_image(layout, "two:tag")) == {"two:tag": b"two:tag"}
    with pytest.raises(Refused, match=r"2 images; name one, .*:NAME; there are 'one', 'two:tag'"):
        open_image(layout)
    with pytest.raises(Refused, match="no image called 'three'"):
        open_image(layout, "three")


def test_of_several_platforms_ours_is_taken_also_out_of_an_index_in_the_index(open_image) -> None:
    layout = Layout()
    for architecture in ("arm64", "amd64"):
        layout.add(
            [layer(member(architecture))],
            architecture=architecture,
            platform={"os": "linux", "architecture": architecture},
        )
    unknown = {"os": "unknown", "architecture": "unknown"}  # a build's attestation
    layout.add([layer(member("no"))], platform=unknown)
    inner, size = layout.json_blob({"schemaVersion": 2, "manifests": layout.manifests})
    layout.manifests = [{"mediaType": INDEX, "digest": inner, "size": size}]
    assert files(open_image(layout)) == {"amd64": b""}


def test_one_image_under_two_names_is_one(open_image) -> None:
    layout = Layout()
    first = layout.add([layer(member("a"))], name="one")
    second = {"org.opencontainers.image.ref.name": "two"}
    layout.manifests.append({**first, "annotations": second})
    for name in (None, "one", "two"):
        assert files(open_image(layout, name)) == {"a": b""}


def test_of_several_sorts_of_a_processor_the_plainest_is_taken(open_image) -> None:
    platform = {"os": "linux", "architecture": "amd64"}
    for sorts in (("v3", None), ("v3", "v2")):
        layout = Layout()
        for sort in sorts:
            more = {"variant": sort} if sort else {}
            layout.add([layer(member(f"for-{sort}"))], platform={**platform, **more})
        assert files(open_image(layout)) == {f"for-{sorts[1]}": b""}


def test_what_says_that_it_is_no_image_is_none(open_image) -> None:
    layout = Layout()
    layout.add([layer(member("a"))])
    layout.add([layer(member("signature"))])["artifactType"] = "application/spdx+json"
    assert files(open_image(layout)) == {"a": b""}


def test_containerd_s_names_are_found_as_people_say_them(open_image) -> None:
    layout = Layout()
    for name in ("alpine", "busybox"):
        layout.add([layer(member(name))], name="3")["annotations"] |= {
            "io.containerd.image.name": f"docker.io/library/{name}:3"
        }
    assert files(open_image(layout, "busybox:3")) == {"busybox": b""}
    with pytest.raises(Refused, match=r"name one, .*'docker.io/library/alpine:3'"):
        open_image(layout, "3")


def test_images_without_names_cannot_be_named(open_image) -> None:
    layout = Layout()
    for name in ("one", "two"):
        layout.add([layer(member(name))])
    with pytest.raises(Refused, match=r"has 2 images; save the one that you want alone"):
        open_image(layout)
    with pytest.raises(Refused, match="has no image called 'three' for linux/amd64"):
        open_image(layout, "three")


def test_two_images_of_one_name_cannot_be_told_apart(open_image, tmp_path: Path) -> None:
    layout = Layout()
    for name in ("one", "two"):
        layout.add([layer(member(name))], name="same")
    with pytest.raises(Refused, match="has 2 images called 'same'; save the one that you want"):
        open_image(layout, "same")


def test_what_is_saved_otherwise_is_told_with_how_to_read_it(tmp_path: Path) -> None:
    layout = Layout()
    layout.add([layer(member("a"))])
    oci = layout.archive(tmp_path / "oci.tar")
    docker = docker_archive(tmp_path / "docker.tar", [layer(member("a"))])
    exported = tmp_path / "exported.tar"
    exported.write_bytes(layer(directory("etc"), member("etc/passwd")))
    folder = tmp_path / "dir"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    for kind, path, cure in (
        ("docker-archive", oci, "use oci-archive:"),
        ("oci-archive", docker, "use docker-archive:"),
        ("oci-archive", str(exported), "docker export writes none"),
        ("docker-archive", str(exported), "docker export writes none"),
        ("oci", str(folder), "skopeo copy dir:"),
    ):
        with pytest.raises(Refused, match=cure):
            load(kind, path, None, str(tmp_path), MOST, Progress(quiet=True))
    with pytest.raises(ConfigError, match="write docker-archive:FILE"):
        split_source("docker-archive", "")


def platform(architecture: str) -> dict[str, str]:
    return {"os": "linux", "architecture": architecture}


def test_an_architecture_that_is_not_there_is_told_with_its_option(tmp_path: Path) -> None:
    """In an index of several, or by an image's configuration alone."""
    other = {"amd64": "arm64", "arm64": "amd64"}
    cure = {"amd64": "use --arch arm64", "arm64": "leave out --arch"}
    for number, (wanted, told) in enumerate((a, b) for a in other for b in (True, False)):
        layout = Layout()
        for one in (other[wanted], "riscv64") if told else (other[wanted],):
            layout.add(
                [layer(member(one))],
                architecture=one,
                platform=platform(one) if told else None,
            )
        path = layout.archive(tmp_path / f"{number}.tar")
        docker = tmp_path / f"docker-{number}.tar"
        docker_archive(docker, [layer(member("a"))], architecture=other[wanted])
        for kind, place in (("oci-archive", path), ("docker-archive", str(docker))):
            with pytest.raises(Refused) as caught:
                load(kind, place, None, str(tmp_path), MOST, Progress(quiet=True), wanted)
            said = str(caught.value)
            assert "\n" not in said
            assert said.endswith(f"; {cure[wanted]}, or save one for linux/{wanted}"), said
        layout.add([layer(member("mine"))], architecture=wanted, platform=platform(wanted))
        if told:
            path = layout.archive(tmp_path / f"{number}.tar")
            tree, _ = load(
                "oci-archive", path, None, str(tmp_path), MOST, Progress(quiet=True), wanted
            )
            assert [*files(tree)] == ["mine"]


def test_an_image_for_another_architecture_is_told(open_image) -> None:
    layout = Layout()
    layout.add([layer(member("a"))], architecture="riscv64")
    with pytest.raises(
        Refused, match=r"has an image for 'linux/riscv64'; save one for linux/amd64"
    ):
        open_image(layout)


def test_docker_names_have_latest_as_their_tag(tmp_path: Path) -> None:
    path = docker_archive(tmp_path / "d.tar", [layer(member("a"))], tags=["example:latest", "x:1"])
    for name in ("example", "example:latest", "x:1"):
        load("docker-archive", path, name, str(tmp_path), MOST, Progress(quiet=True))
    with pytest.raises(Refused, match=r"no image called 'y'; .*'example:latest', 'x:1'"):
        load("docker-archive", path, "y", str(tmp_path), MOST, Progress(quiet=True))


def test_a_path_with_colons_is_told_from_a_name(tmp_path: Path) -> None:
    file = tmp_path / "a:b.tar"
    file.write_bytes(b"")
    assert split_source("oci-archive", str(file)) == (str(file), None)
    assert split_source("oci-archive", f"{file}:x/y:1") == (str(file), "x/y:1")
    plain = tmp_path / "plain.tar"
    plain.write_bytes(b"")
    assert split_source("oci-archive", str(plain)) == (str(plain), None)
    for path, kind, why in (
        (tmp_path, "oci-archive", "is not a file; oci-archive: is for one"),
        (file, "oci", "is not a directory; oci: is for one"),
        (tmp_path / "no", "oci", "No such file"),
    ):
        with pytest.raises(ConfigError, match=why):
            split_source(kind, str(path))


# --- what they run --------------------------------------------------------------------------------

PASSWD = b"root:x:0:0::/root:/bin/sh\nweb:x:33:44::/srv:/bin/sh\n#x\nbroken\nsix:x:7:8::/six\n"
GROUP = b"root:x:0:\nweb:x:44:\nlog:x:4:web,other\nadm:x:9:other,web\nshort:x:5\nno:x:-:web\n\n"


@pytest.fixture
def tree(over) -> Tree:
    return over([member("etc/passwd", data=PASSWD), member("etc/group", data=GROUP)])


@pytest.mark.parametrize(
    ("user", "numbers", "groups", "home"),
    [
        ("", "0:0", (), "/root"),
        ("web", "33:44", (4, 9), "/srv"),
        ("33", "33:44", (4, 9), "/srv"),
        ("web:log", "33:4", (), "/srv"),
        ("six", "7:8", (), "/six"),
        ("1000", "1000:0", (), "/"),
        ("1000:2000", "1000:2000", (), "/"),
    ],
)
def test_the_user_becomes_numbers_by_the_image_s_own_files(
    tree, user: str, numbers: str, groups: tuple[int, ...], home: str
) -> None:
    found = process.read({"User": user}, tree)
    assert (found.user, found.groups) == (numbers, groups)
    assert f"HOME={home}" in found.env


def test_without_users_of_its_own_an_image_has_root(over) -> None:
    found = process.read({}, over([member("x")]))
    assert (found.user, found.groups) == ("0:0", ())
    assert "HOME=/root" in found.env


def test_a_link_that_leads_to_itself_is_no_list_of_users(over) -> None:
    tree = over([symlink("etc/passwd", "group"), symlink("etc/group", "/etc/passwd")])
    assert tree.read("etc/passwd", 99) == b""
    assert process.read({}, tree).user == "0:0"


def test_root_is_whoever_the_image_calls_so(over) -> None:
    tree = over([member("etc/passwd", data=b"root:x:0:5::/home/admin:/bin/sh\n")])
    found = process.read({}, tree)
    assert found.user == "0:5" and "HOME=/home/admin" in found.env


def test_entrypoint_command_and_environment(tree) -> None:
    config = {"Entrypoint": ["/e"], "Cmd": ["a b", "c"], "Env": ["X=1=2"], "WorkingDir": "/srv"}
    found = process.read(config, tree)
    assert found.argv() == ("/e", "a b", "c")
    assert found.argv(("other",)) == ("/e", "other")
    assert found.cwd == "/srv" and "X=1=2" in found.env
    assert any(line.startswith("PATH=/") for line in found.env)


@pytest.mark.parametrize(
    ("said", "meant"),
    [("/srv/", "/srv"), ("/.", "/"), ("//", "/"), ("//srv//www/.", "/srv/www"), ("/a/../b", "/b")],
)
def test_a_working_directory_is_where_it_leads(tree, said: str, meant: str) -> None:
    found = process.read({"WorkingDir": said}, tree)
    assert found.cwd == meant
    guest.prepare(tree, found, dict.fromkeys(("busybox", "agent", *guest.SCRIPTS), b""), name="x")
    assert tree.find(meant).is_directory


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"User": "nobody-knows"}, "which its /etc/passwd does not have"),
        ({"User": "web:nobody"}, "whose group its /etc/group does not have"),
        ({"User": "99999999999"}, "is not a user or group"),
        ({"User": 5}, "its User has something in it that is not a text"),
        ({"Env": ["novalue"]}, "which is not a variable"),
        ({"Env": ["=x"]}, "which is not a variable"),
        ({"Env": "A=b"}, "its Env is not a list"),
        ({"Cmd": [1]}, "its Cmd has something in it that is not a text"),
        ({"Cmd": ["a\0b"]}, "its Cmd has something in it that is not a text"),
        ({"Cmd": ["x" * 200_000]}, "longer than Linux allows"),
        ({"Env": [f"A={'€' * 50_000}"]}, "longer than Linux allows"),
        ({"Entrypoint": {"a": 1}}, "its Entrypoint is not a list"),
        ({"WorkingDir": "srv"}, "not an absolute path"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_refused(tree, config, why: str) -> None:
    with pytest.raises(Refused, match=why):
        process.read(config, tree)


def test_no_word_of_a_configuration_is_the_shell_s(tree, tmp_path: Path) -> None:
    """The script that the guest runs, run here, with its programs replaced by one that tells."""
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("busybox is missing (guest-images/system-packages.txt)")
    words = [
        *(
            "$(touch x)",
            "`touch x`",
            "'",
            '"',
            "a'b\"c",
            "\n",
            "; touch x",
            "&& touch x",
            "-u",
            "--",
        ),
        *("#", "!x", "\\", "*", "~", "", "$HOME", "a=b", "é", "\x1b[2J", "> x"),
    ]
    odd = ("-u", "-i", "$(x)", "a b", "'")
    env = [f"{name}={value}" for name, value in zip(odd, words, strict=False)]
    config = {
        "Entrypoint": ["-x;$(touch x)"],
        "Cmd": words,
        "Env": ["PATH=/", "HOME=/", *env, "-S=x", "--=y"],
        "WorkingDir": f"{tmp_path}/a'$(touch x) -b",
    }
    os.mkdir(f"{tmp_path}/a'$(touch x) -b")
    tell = tmp_path / "tell"
    tell.write_text(
        f"#!{sys.executable} -IS\nimport json, os, sys\n"
        "print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))\n"
    )
    tell.chmod(0o755)
    found = process.read(config, tree)
    script = guest.entry_script(found, "")
    script = script.replace("/.pyvmm/busybox", busybox).replace("/.pyvmm/agent", str(tell))
    (tmp_path / "entry").write_text(script)
    done = subprocess.run(
        [busybox, "sh", tmp_path / "entry"], capture_output=True, text=True, check=True
    )
    said, environment, folder = json.loads(done.stdout)
    assert said == ["--as", "0:0", "-x;$(touch x)", *words]
    expected = dict(line.split("=", 1) for line in config["Env"])
    assert {name: environment.get(name) for name in expected} == expected
    assert folder == config["WorkingDir"] and not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match="surrogates"):  # which `load.named` makes one line of
        guest.entry_script(process.read({"Cmd": ["\ud800"]}, tree), "").encode()


def test_the_guest_s_files_leave_the_image_s_alone(over) -> None:
    tree = over([member("etc/passwd", data=PASSWD), member("sbin/init", data=b"the image's own")])
    programs = {"busybox": b"B", "agent": b"A", "network": b"N"}
    programs["init"] = b"#!/bin/busybox sh\nagent=/sbin/pyvmm-agent\n/sbin/pyvmm-network\n"
    guest.prepare(tree, process.read({"User": "1000"}, tree), programs, name="web")
    found = files(tree)
    assert found["sbin/init"] == b"the image's own"
    assert found[".pyvmm/init"] == (b"#!/.pyvmm/busybox sh\nagent=/.pyvmm/agent\n/.pyvmm/network\n")
    assert found["etc/hostname"] == b"web\n"
    assert b"127.0.0.1" in found["etc/hosts"]
    assert found["etc/passwd"] == PASSWD + b"pyvmm1000:x:1000:0::/:/bin/sh\n"
    modes = {"dev": 0o755, "proc": 0o555, "sys": 0o555, "run": 0o755, "tmp": 0o1777, "etc": 0o755}
    modes |= dict.fromkeys(("etc/hosts", "etc/hostname", "etc/passwd"), 0o644)
    modes |= {f".pyvmm/{file}": 0o755 for file in (*programs, "entry")} | {".pyvmm": 0o755}
    assert {path: tree.find(path).mode for path in modes} == modes


@pytest.mark.parametrize(
    ("image", "shell"),
    [
        ([member("bin/sh"), member("usr/bin/sh")], "/bin/sh"),
        (
            [symlink("bin", "usr/bin"), symlink("usr/bin/sh", "dash"), member("usr/bin/dash")],
            "/bin/sh",
        ),
        ([member("usr/bin/sh")], "/usr/bin/sh"),
        ([directory("bin/sh")], "/.pyvmm/busybox sh"),
        ([], "/.pyvmm/busybox sh"),
    ],
)
def test_an_image_that_says_nothing_runs_its_shell(over, image, shell: str) -> None:
    tree = over([member("x"), *image])
    programs = dict.fromkeys(("busybox", "agent", *guest.SCRIPTS), b"ours")
    guest.prepare(tree, process.read({}, tree), programs, name="web")
    entry = tree.read(".pyvmm/entry", 9999).decode()
    assert entry.endswith(f"/.pyvmm/agent --as 0:0 {shell}\n")
    assert entry.startswith("#!/.pyvmm/busybox sh\ncd / || exit 126\n")


def test_an_image_cannot_put_its_own_files_in_place_of_the_guest_s(over) -> None:
    tree = over([directory("evil"), symlink(".pyvmm", "/evil"), symlink("etc", "/evil")])
    programs = {"busybox": b"B", "agent": b"A", "init": b"I", "network": b"N"}
    guest.prepare(tree, process.read({}, tree), programs, name="web")
    found = files(tree)
    assert (found[".pyvmm"], found[".pyvmm/init"]) == (D, b"I")
    assert found["evil/hostname"] == b"web\n"


@pytest.mark.parametrize(
    ("image", "replaced"),
    [
        ([directory("sbin")], True),
        ([directory("usr/sbin"), symlink("sbin", "usr/sbin")], True),
        ([member("bin/busybox", data=b"b"), symlink("sbin/reboot", "/bin/busybox")], True),
        ([member("bin/busybox", data=b"b"), hardlink("sbin/reboot", "bin/busybox")], True),
        ([member("sbin/reboot", data=b"the image's own")], False),
        ([symlink("sbin/reboot", "../bin/systemctl"), member("bin/systemctl")], False),
        ([member("sbin", data=b"no directory")], False),
        ([directory("bin")], False),
    ],
)
def test_a_guest_can_be_rebooted_by_name(over, image, replaced: bool) -> None:
    programs = dict.fromkeys(("busybox", "agent", *guest.SCRIPTS), b"ours")
    tree = over(image)
    guest.prepare(tree, process.read({}, tree), programs, name="web")
    assert tree.read(".pyvmm/reboot", 9) == b"ours"
    assert (tree.read("sbin/reboot", 9) == b"ours") == replaced
    assert tree.read("bin/busybox", 9) != b"ours"
