"""The initramfs archive: read back as the kernel reads it, and by cpio(1) where there is one."""

from __future__ import annotations

import gzip
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from pyvmm.host import cpio
from pyvmm.images import initramfs
from pyvmm.images.modules import ModuleTree
from pyvmm.images.recipes import InitramfsRecipe

ENTRIES = [
    cpio.directory("dev"),
    cpio.character_device("dev/console", 5, 1),
    cpio.regular("init", b"#!/bin/sh\n", 0o755),
    cpio.symlink("sh", "init"),
    cpio.regular("empty", b""),
]


def read(data: bytes) -> list[tuple[str, int, tuple[int, int], bytes]]:
    """(name, mode, device, data) up to the trailer, from the format's description alone."""
    found = []
    at = 0
    while True:
        assert data[at : at + 6] == b"070701"
        assert at % 4 == 0
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        size, name_size = fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        at = (at + 110 + name_size + 3) & ~3
        if name == b"TRAILER!!!\0":
            assert at == len(data)
            return found
        content = data[at : at + size]
        found.append((name[:-1].decode(), fields[1], (fields[9], fields[10]), content))
        at = (at + size + 3) & ~3


def test_what_is_archived_is_read_back() -> None:
    assert read(cpio.archive(ENTRIES)) == [
        ("dev", stat.S_IFDIR | 0o755, (0, 0), b""),
        ("dev/console", stat.S_IFCHR | 0o600, (5, 1), b""),
        ("init", stat.S_IFREG | 0o755, (0, 0), b"#!/bin/sh\n"),
        ("sh", stat.S_IFLNK | 0o777, (0, 0), b"init"),
        ("empty", stat.S_IFREG | 0o644, (0, 0), b""),
    ]


def test_the_system_s_cpio_agrees() -> None:
    if not shutil.which("cpio"):
        pytest.skip("cpio(1) is not installed")
    listing = subprocess.run(
        ["cpio", "-itv"], input=cpio.archive(ENTRIES), capture_output=True, check=True
    ).stdout.decode()
    lines = listing.splitlines()
    assert [line.split()[0] for line in lines] == [
        "drwxr-xr-x", "crw-------", "-rwxr-xr-x", "lrwxrwxrwx", "-rw-r--r--",
    ]  # fmt: skip
    assert "5,   1" in lines[1]
    assert lines[3].endswith("sh -> init")


@pytest.mark.parametrize("name", ["", "/init", "a\0b"])
def test_a_name_the_format_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a name"):
        cpio.archive([cpio.regular(name, b"")])


def test_modules_that_only_compressed_lists_need_are_compressed(tmp_path: Path) -> None:
    names = ("virtio", "virtio_blk", "libnvdimm", "virtio_pmem")
    (tmp_path / "modules.dep").write_text(
        "a/virtio.ko:\na/virtio_blk.ko: a/virtio.ko\na/libnvdimm.ko:\n"
        "a/virtio_pmem.ko: a/libnvdimm.ko a/virtio.ko\n"
    )
    (tmp_path / "modules.builtin").touch()
    (tmp_path / "a").mkdir()
    for name in names:
        (tmp_path / "a" / f"{name}.ko").write_bytes(b"\x7fELF" + name.encode())
    lists = {"virtio-2": ("virtio_blk",), "virtio-27": ("virtio_pmem",)}
    tree = ModuleTree(str(tmp_path))

    def files(compressed: tuple[str, ...]) -> dict[str, bytes]:
        found = read(cpio.archive(initramfs.module_entries(lists, tree, compressed)))
        return {name: data for name, _, _, data in found if ".ko" in name}

    assert {f"modules/{name}.ko" for name in names} == set(files(()))
    some = files(("virtio-27",))
    assert {name for name in some if name.endswith(".gz")} == {
        "modules/libnvdimm.ko.gz",
        "modules/virtio_pmem.ko.gz",
    }
    assert some["modules/virtio.ko"] == b"\x7fELFvirtio"
    assert gzip.decompress(some["modules/libnvdimm.ko.gz"]) == b"\x7fELFlibnvdimm"
    assert some == files(("virtio-27",)), "an image is the same whenever it is made"


def test_the_initramfs_has_each_list_in_loading_order_and_each_module_once(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text("a/virtio.ko:\na/virtio_blk.ko: a/virtio.ko\n")
    (tmp_path / "modules.builtin").write_text("a/virtio_pci.ko\n")
    (tmp_path / "a").mkdir()
    for name in ("virtio", "virtio_blk"):
        (tmp_path / "a" / f"{name}.ko").write_bytes(b"\x7fELF" + name.encode())
    recipe = InitramfsRecipe(
        busybox="busybox-static",
        applets=("sh",),
        modules={"transport-pci": ("virtio_pci",), "virtio-2": ("virtio_blk",), "x": ("virtio",)},
    )
    programs = {"bin/busybox": b"busybox", "init": b"script", "bin/pyvmm-helpers": b"helpers"}
    entries = initramfs.entries(recipe, ModuleTree(str(tmp_path)), programs)
    names = [(name, data) for name, _, _, data in read(cpio.archive(entries))]
    assert dict(names)["modules/virtio-2"] == b"virtio\nvirtio_blk\n"
    assert dict(names)["modules/transport-pci"] == b""
    assert [name for name, _ in names if name.endswith(".ko")] == [
        "modules/virtio.ko",
        "modules/virtio_blk.ko",
    ]
    assert ("init", b"script") in names
    assert ("bin/sh", b"busybox") in names
    links = {(f"bin/{helper}", b"pyvmm-helpers") for helper in initramfs.HELPERS}
    assert links <= set(names)
