"""Kernel modules: loaded in an order in which each finds what it needs."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.images import modules
from pyvmm.images.modules import ModuleTree

# As depmod writes it: a module's dependencies are complete, the nearest first.
DEP = """\
a/virtio.ko:
a/virtio_ring.ko: a/virtio.ko
a/virtio_blk.ko: a/virtio_ring.ko a/virtio.ko
kernel/net/net-failover.ko.xz: kernel/net/failover.ko.xz
kernel/net/failover.ko.xz:
"""


@pytest.fixture
def tree(tmp_path: Path) -> ModuleTree:
    folder = tmp_path / "6.1.0-test"
    (folder / "kernel" / "net").mkdir(parents=True)
    (folder / "modules.dep").write_text(DEP)
    (folder / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\n")
    (folder / "kernel" / "net" / "failover.ko.xz").write_bytes(lzma.compress(b"\x7fELF module"))
    return ModuleTree(str(folder))


def test_dependencies_come_first(tree: ModuleTree) -> None:
    assert tree.load_order(["virtio_blk"]) == ["virtio", "virtio_ring", "virtio_blk"]


def test_each_module_is_loaded_once(tree: ModuleTree) -> None:
    order = tree.load_order(["virtio_ring", "virtio_blk", "virtio"])
    assert order == ["virtio", "virtio_ring", "virtio_blk"]


def test_what_is_built_in_needs_no_loading(tree: ModuleTree) -> None:
    assert tree.load_order(["ext4"]) == []
    assert tree.is_builtin("ext4")


def test_dashes_and_underscores_are_the_same(tree: ModuleTree) -> None:
    assert tree.load_order(["net_failover"]) == ["failover", "net_failover"]
    assert modules.module_name("kernel/arch/x86/kvm/kvm-amd.ko") == "kvm_amd"


def test_a_module_that_the_kernel_has_not_is_named(tree: ModuleTree) -> None:
    with pytest.raises(ConfigError, match=r"6\.1\.0-test has no module 'virtio_mmio'"):
        tree.load_order(["virtio_mmio"])


def test_compressed_modules_are_unpacked(tree: ModuleTree) -> None:
    assert tree.contents("failover") == b"\x7fELF module"


def test_a_tree_without_depmods_files_is_an_error_with_a_cure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"modules\.dep is missing; run depmod"):
        ModuleTree(str(tmp_path))


def test_a_module_that_unpacks_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_MOST_MODULE", 16 << 20)
    for bad in (lzma.compress(bytes(17 << 20), preset=0), lzma.compress(b"x" * 99)[:-9], b"junk"):
        with pytest.raises(ConfigError, match="a kernel module is"):
            modules.unpacked(bad)
    assert modules.unpacked(lzma.compress(b"\x7fELF", preset=0)) == b"\x7fELF"
