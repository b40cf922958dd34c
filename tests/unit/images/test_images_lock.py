"""The lock file: what is written is read back, and a damaged one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.images import lock, recipes
from pyvmm.images.builder import Catalogue
from pyvmm.images.lock import Pin

BASH = Pin("bash", "5.2.15-2+b7", "ab" * 32)
KERNEL = Pin("linux-image-6.1.0-50-cloud-amd64", "6.1.176-1", "cd" * 32)
BUSYBOX = Pin("busybox-static", "1:1.35.0-4+b1", "ef" * 32)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    lock.write(path, {"rootfs-x": [BUSYBOX, BASH], "kernel-6.1": [KERNEL]})
    assert lock.read(path) == {"kernel-6.1": [KERNEL], "rootfs-x": [BASH, BUSYBOX]}


def test_the_order_of_packages_does_not_change_the_file() -> None:
    assert lock.render({"a": [BASH, BUSYBOX]}) == lock.render({"a": [BUSYBOX, BASH]})


def test_no_file_is_no_pins(tmp_path: Path) -> None:
    assert lock.read(str(tmp_path / "none")) == {}


@pytest.mark.parametrize(
    "line",
    ["kernel-6.1 linux 6.1", f"a b c {'x' * 64}", f"a b c {'AB' * 32}", f"a b c d {'ab' * 32}"],
)
def test_a_damaged_line_is_named(line: str) -> None:
    with pytest.raises(ConfigError, match=r"images\.lock:2: not 'image package"):
        lock.parse(f"# comment\n{line}\n", "images.lock")


def test_every_image_of_the_recipes_is_pinned() -> None:
    catalogue = Catalogue()
    assert [name for name in catalogue.names() if not catalogue.pins(name)] == [
        *("agent", "agent-arm64"),  # of our own sources
    ]


def test_the_packages_a_root_disk_names_are_among_its_pins() -> None:
    pins = lock.read(recipes.load().lock_file)
    for variant, recipe in recipes.load().rootfs.items():
        pinned = {pin.package for pin in pins[f"rootfs-{variant}"]}
        assert set(recipe.packages) <= pinned
