"""The cache holds whole images only; copies of a disk are sparse; keys follow the recipes."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm import images
from pyvmm.errors import ConfigError
from pyvmm.images import builder, cache, disk, recipes
from pyvmm.images.lock import Pin
from pyvmm.images.progress import Progress


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def nobody_waits() -> None:
    pytest.fail("the lock was taken by somebody else")


def test_an_image_is_there_when_it_is_whole(home: Path) -> None:
    with cache.building(nobody_waits):
        with cache.new_image("kernel-1", "k") as into:
            Path(into, "bzImage").write_bytes(b"kernel")
            assert not os.path.exists(cache.image("kernel-1", "k"))
        assert Path(cache.image("kernel-1", "k"), "bzImage").read_bytes() == b"kernel"


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ConfigError("no")])
def test_a_build_that_fails_leaves_nothing(home: Path, failure: BaseException) -> None:
    with (
        cache.building(nobody_waits),
        pytest.raises(type(failure)),
        cache.new_image("kernel-1", "k") as into,
    ):
        Path(into, "bzImage").write_bytes(b"half")
        raise failure
    assert os.listdir(home / "cache/pyvmm/building") == []
    assert os.listdir(home / "cache/pyvmm/images") == []


def test_a_full_disk_is_one_line_with_a_cure(home: Path) -> None:
    with (
        pytest.raises(ConfigError, match="No space left on device; free 3 GiB, or set XDG_CACHE"),
        cache.building(nobody_waits),
        cache.new_image("rootfs-x", "k"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_a_killed_build_left_is_removed_by_the_next(home: Path) -> None:
    left = home / "cache/pyvmm/building/tmpdead"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    with cache.building(nobody_waits):
        assert not left.exists()


def test_a_second_builder_waits_for_the_first(home: Path) -> None:
    waits = (
        "from pyvmm.images import cache\n"
        "with cache.building(lambda: print('waiting', flush=True)):\n"
        "    print('mine', flush=True)\n"
    )
    with cache.building(nobody_waits):
        second = subprocess.Popen(
            [sys.executable, "-c", waits], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        assert second.stdout is not None
        assert second.stdout.readline() == "waiting\n"
        assert second.poll() is None
    assert second.communicate(timeout=60)[0] == "mine\n"


def test_a_cache_that_cannot_be_written_is_one_line(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    with pytest.raises(ConfigError, match=r"/proc/none.*set XDG_CACHE_HOME to another place"):
        images.build(["kernel-6.1"])


def test_a_disk_without_room_is_told_before_apt_starts(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = list(os.statvfs(home))
    status[4] = 100  # f_bavail
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(status))
    with pytest.raises(ConfigError, match=r"cache/pyvmm: No space left on device; free 3 GiB"):
        images.build(["kernel-6.1"])


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "~")  # what is left of it where nobody knows
    with pytest.raises(ConfigError, match=r"no home directory.*set XDG_CACHE_HOME"):
        images.path("kernel-6.1")


def test_an_image_that_was_not_built_is_named_with_the_command(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"run: pyvmm image build kernel-6\.1"):
        images.artifacts()


def test_an_unknown_image_lists_the_known_ones(home: Path) -> None:
    with pytest.raises(ConfigError, match=r"no image 'kernel-2\.4'; there are agent, kernel-6\.1"):
        images.artifacts(kernel="2.4")


def test_a_changed_script_or_pin_makes_only_its_own_images_new(home: Path) -> None:
    folder = home / "recipes"
    shutil.copytree(recipes.folder(), folder)

    def keys() -> dict[str, str]:
        catalogue = builder.Catalogue(str(folder))
        return {name: catalogue.key(name) for name in catalogue.names()}

    first = keys()
    assert keys() == first
    with open(folder / "initramfs/init", "a") as file:
        file.write("# changed\n")
    second = keys()
    changed = {name for name in first if first[name] != second[name]}
    assert changed == {name for name in first if name.startswith("initramfs-")}

    text = (folder / "amd64.lock").read_text()
    (folder / "amd64.lock").write_text(text.replace("kernel-6.12 linux-", "kernel-6.12 lunix-"))
    third = keys()
    changed = {name for name in first if second[name] != third[name]}
    assert changed == {"kernel-6.12", "initramfs-6.12"}


def test_a_disk_s_copy_is_equal_sparse_and_writable(home: Path) -> None:
    source = home / "pristine"
    with open(source, "wb") as file:
        file.truncate(64 << 20)
        file.seek(5 << 20)
        file.write(b"data in the middle")
    source.chmod(0o444)
    target = home / "copy"
    disk.copy_sparse(str(source), str(target))
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks * 512 < 1 << 20
    with open(target, "r+b") as file:
        file.write(b"mine")
    assert source.read_bytes()[:4] == bytes(4)


def test_a_link_in_the_place_of_a_half_copy_is_not_followed(home: Path) -> None:
    other, target = home / "other", home / "copy"
    other.write_bytes(b"mine")
    (home / f"copy.{os.getpid()}.part").symlink_to(other)  # which can be guessed
    (home / "pristine").write_bytes(b"disk")
    disk.copy_sparse(str(home / "pristine"), str(target))
    assert (target.read_bytes(), other.read_bytes()) == (b"disk", b"mine")


def test_a_copy_that_fails_leaves_the_old_file(home: Path) -> None:
    target = home / "disk"
    target.write_bytes(b"old")
    with pytest.raises(ConfigError, match="cannot copy"):
        disk.copy_sparse(str(home / "none"), str(target))
    assert target.read_bytes() == b"old"
    assert sorted(os.listdir(home)) == ["disk"]


def test_images_that_no_recipe_makes_can_be_removed(home: Path) -> None:
    with cache.building(nobody_waits):
        for key in ("old", "new"):
            with cache.new_image("kernel-1", key):
                pass
    removed = cache.prune({cache.image("kernel-1", "new")})
    assert removed == [cache.image("kernel-1", "old")]
    assert os.path.isdir(cache.image("kernel-1", "new"))


def test_all_images_are_built_but_optional_ones_that_cannot_be(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image takes along those made from it; one that was asked for by name is an error."""
    made: list[str] = []

    def build(self: builder.Builder, name: str) -> None:
        if name in broken:
            raise ConfigError("the mirror is in pieces")
        made.append(name)

    monkeypatch.setattr(builder.Builder, "build", build)
    broken = {"kernel-7", "initramfs-s390x"}
    images.build()
    left = {"kernel-7", "initramfs-7", "initramfs-s390x"}
    left |= {"rootfs-arm64", "programs-lab-arm64"}  # are made only where they are asked for
    assert made == [name for name in images.names() if name not in left]
    said = capsys.readouterr().err
    assert said == (
        "pyvmm: kernel-7 is left out: the mirror is in pieces\n"
        "pyvmm: initramfs-s390x is left out: the mirror is in pieces\n"
    )
    with pytest.raises(ConfigError, match="in pieces"):
        images.build(["initramfs-7"])
    with pytest.raises(ConfigError, match="in pieces"):
        images.build(locked=True)
    broken = {"kernel-6.12"}
    with pytest.raises(ConfigError, match="in pieces"):
        images.build()


def test_a_refreshed_lock_keeps_the_pins_of_optional_images_that_cannot_be_had(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = home / "recipes"
    shutil.copytree(recipes.folder(), folder)
    catalogue = builder.Catalogue(str(folder))
    before = {name: catalogue.pins(name) for name in catalogue.names()}

    def current(self: builder.Builder, name: str) -> list[Pin]:
        if name == broken:
            raise ConfigError("the mirror is in pieces")
        return [Pin(name, "2", "0" * 64)]

    monkeypatch.setattr(builder.Builder, "current", current)
    broken = "kernel-7"
    builder.refresh_lock(catalogue, Progress())
    assert capsys.readouterr().err == "pyvmm: kernel-7 keeps its pins: the mirror is in pieces\n"
    after = builder.Catalogue(str(folder))
    assert after.pins("kernel-7") == before["kernel-7"] != []
    assert after.pins("kernel-6.1") == [Pin("kernel-6.1", "2", "0" * 64)]
    broken = "kernel-6.1"
    with pytest.raises(ConfigError, match="in pieces"):
        builder.refresh_lock(catalogue, Progress())
    assert builder.Catalogue(str(folder)).lock == after.lock


def test_what_an_image_needs_is_all_of_it_and_comes_first() -> None:
    """`missing` looks no further than at the needs of the images that are asked for."""
    catalogue = builder.Catalogue()
    names = catalogue.names()
    for name in names:
        needs = catalogue.needs(name)
        for need in needs:
            assert set(catalogue.needs(need)) <= set(needs), name
            assert names.index(need) < names.index(name), name
    assert "agent-arm64" in catalogue.needs("initramfs-arm64")
    assert catalogue.toolchain("s390x") is None  # there is no agent for it


def test_a_foreign_initramfs_is_no_part_of_a_vm_of_ours(home: Path) -> None:
    catalogue = builder.Catalogue()
    assert catalogue.recipes.guest_kernels == ["6.1", "6.12", "7"]
    assert catalogue.lock_name("initramfs-7") == "initramfs"
    assert catalogue.lock_name("initramfs-s390x") == "initramfs-s390x"
    foreign = catalogue.recipes.initramfs.for_kernel(catalogue.recipes.kernels["s390x"])
    assert "virtio-2" in foreign.modules and "virtio-27" not in foreign.modules
