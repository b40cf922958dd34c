"""Remembered paths of images count until something changes that decides on them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm import images
from pyvmm.errors import ConfigError
from pyvmm.images import builder, found_before, recipes

PARTS = ("agent", "kernel-6.1", "initramfs-6.1", "rootfs-minbase")
FILES = {"kernel": "vmlinux", "initramfs": "initramfs.cpio", "rootfs": "rootfs.ext4"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes of our own, and a cache that has what they make."""
    folder = tmp_path / "recipes"
    shutil.copytree(recipes.folder(), folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(recipes.FOLDER_VARIABLE, str(folder))
    have()
    return tmp_path


def have() -> None:
    catalogue = builder.Catalogue()
    for name in PARTS:
        path = Path(catalogue.path(name))
        (path / "lib/modules/6.1").mkdir(parents=True, exist_ok=True)
        if name != "agent":
            (path / FILES[name.partition("-")[0]]).touch()


def test_the_second_time_the_recipes_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    first = images.machine_image(None, make=False)

    def fail(*args: object) -> None:
        raise AssertionError("the recipes are read")

    monkeypatch.setattr(recipes, "load", fail)
    assert images.machine_image(None, make=False) == first
    assert images.machine_image("debian", make=False) == first


def test_a_changed_recipe_or_script_or_pin_is_noticed(home: Path) -> None:
    before = images.machine_image(None, make=False)
    for file in ("recipes/initramfs/init", "recipes/rootfs/pyvmm-init", "recipes/amd64.lock"):
        with open(home / file, "a") as writer:
            writer.write("# changed\n")
        changed = file != "recipes/amd64.lock"  # a comment makes no other image of a lock
        if changed:
            with pytest.raises(ConfigError, match="has not been built"):
                images.machine_image(None, make=False)
            have()
        after = images.machine_image(None, make=False)
        assert (after != before) == changed
        before = after


def test_what_was_removed_is_not_known(home: Path) -> None:
    image = images.machine_image(None, make=False)
    os.unlink(image.disk)
    shutil.rmtree(os.path.dirname(image.disk))
    with pytest.raises(ConfigError, match="rootfs-minbase has not been built"):
        images.machine_image(None, make=False)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": [], "paths": 5}', "\0" * 100])
def test_a_broken_memory_is_made_again(home: Path, text: str) -> None:
    image = images.machine_image(None, make=False)
    file = home / "cache/pyvmm/found_before.json"
    file.write_text(text)
    assert images.machine_image(None, make=False) == image
    assert found_before.find("debian") == [image.kernel, image.initrd, image.disk]


def test_a_cache_that_cannot_be_written_does_not_matter(home: Path) -> None:
    (home / "cache/pyvmm/found_before.json").mkdir()
    assert images.machine_image(None, make=False).name == "debian"


def test_a_known_image_costs_no_heavy_imports() -> None:
    images.machine_image(None, make=False)
    script = (
        "import sys; from pyvmm import images; images.machine_image(None, make=True);"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    heavy = {"subprocess", "tempfile", "shutil", "hashlib", "tomllib", "pyvmm.images.builder"}
    assert not heavy & set(done.stdout.split())
