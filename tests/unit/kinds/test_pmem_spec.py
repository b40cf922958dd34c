"""--pmem as it is written, and which files are refused, each in one line with its cure."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.host.files import open_image
from pyvmm.kinds import pmem, registry
from pyvmm.kinds.border import Border
from pyvmm.kinds.interface import Context
from pyvmm.kinds.pmem import Spec as Pmem
from pyvmm.kinds.vm_spec import from_json, make_spec, to_json, validate
from pyvmm.spec.vm import VmSpec

MIB = 1 << 20


def sized(folder: Path, size: int, name: str = "memory") -> str:
    path = folder / name
    with path.open("wb") as file:
        file.truncate(size)
    return str(path)


def opened(path: str, closing: ExitStack, *, read_only: bool = False) -> list[tuple[int, bool]]:
    """Open a device on `path`; what of it became memory."""
    mapped: list[tuple[int, bool]] = []

    def map_file(fd: int, size: int, read_only: bool, private: object) -> int:
        mapped.append((size, read_only))
        return 4 << 30

    context = Context("vm", None, closing, None, map_file)
    registry.open_device(Pmem(path, read_only, "pmem0"), context)
    return mapped


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("a.img", Pmem("a.img")),
        ("a.img,readonly", Pmem("a.img", True)),
        ("a.img,ro,packed", Pmem("a.img", True, packed=True)),
        ("a,,b.img,packed", Pmem("a,b.img", packed=True)),
    ],
)
def test_forms(text: str, spec: Pmem) -> None:
    assert registry.parse("pmem", text) == spec


@pytest.mark.parametrize("text", ["", ",readonly", "a.img,rw", "a.img,readonly=1", "a.img,"])
def test_what_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--pmem.*use FILE"):
        validate(make_spec({"kernel": "k", "pmem": text}))


def test_each_is_called_as_in_the_guest_and_crosses_as_text() -> None:
    values = {"kernel": "k", "pmem": ["a", {"path": "b", "read_only": True}]}
    spec = validate(make_spec(values))
    assert spec.devices == (Pmem("a", name="pmem0"), Pmem("b", True, "pmem1"))
    assert from_json(to_json(spec)) == spec
    assert spec.keeps
    assert not validate(make_spec({"kernel": "k", "pmem": "b,readonly"})).keeps


def test_the_name_is_ours_alone() -> None:
    with pytest.raises(ConfigError, match="name"):
        make_spec({"kernel": "k", "pmem": {"path": "a", "name": "x"}})


@pytest.mark.parametrize("size", [2 * MIB, 66 * MIB])
@pytest.mark.parametrize("read_only", [False, True])
def test_whole_pieces_of_2_mib_are_memory(tmp_path: Path, size: int, read_only: bool) -> None:
    with ExitStack() as closing:
        path = sized(tmp_path, size)
        assert opened(path, closing, read_only=read_only) == [(size, read_only)]


@pytest.mark.parametrize(
    ("size", "cure"),
    [(0, "2M"), (1, "2M"), (2 * MIB - 1, "2M"), (2 * MIB + 100, "4M"), (5 * MIB, "6M")],
)
def test_other_sizes_are_refused_with_the_next_one_up(tmp_path: Path, size: int, cure: str) -> None:
    path = sized(tmp_path, size)
    with ExitStack() as closing, pytest.raises(ConfigError) as error:
        opened(path, closing)
    assert str(error.value) == (
        f"--pmem: {path} has {size} bytes, and memory comes in pieces of 2 MiB; "
        f"truncate -s {cure} {path} mends it"
    )
    os.truncate(path, int(cure[:-1]) * MIB)
    with ExitStack() as closing:
        assert opened(path, closing)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "is a directory"),
        (lambda path: os.mkfifo(path), "is a FIFO"),
    ],
)
def test_what_is_no_file_is_refused(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / "memory")
    with ExitStack() as closing, pytest.raises(ConfigError, match=f"--pmem: .*{said}"):
        opened(str(tmp_path / "memory"), closing)


def test_a_file_that_is_in_use_is_refused(tmp_path: Path) -> None:
    path = sized(tmp_path, 2 * MIB)
    with ExitStack() as closing:
        opened(path, closing)
        with pytest.raises(ConfigError, match=r"--pmem: .* is in use"):
            opened(path, closing)
        with pytest.raises(ConfigError, match=r"--disk: .* is in use"):
            open_image(path)
    with ExitStack() as closing:
        opened(path, closing, read_only=True)
        opened(path, closing, read_only=True)
        with pytest.raises(ConfigError, match="is in use"):
            opened(path, closing)


def test_into_the_emulated_host_it_goes_as_a_disk_that_stays_locked(tmp_path: Path) -> None:
    path = sized(tmp_path, 2 * MIB)
    (tmp_path / "link").symlink_to(path)
    spec = Pmem(str(tmp_path / "link"), name="pmem0")
    with ExitStack() as closing:
        crossing = pmem.cross(spec, Border(closing, lambda path, option: path))
        assert crossing.spec == replace(spec, path=path)
        [disk] = crossing.disks
        assert not disk.read_only and disk.fd is not None
        assert os.path.samestat(os.fstat(disk.fd), os.stat(path))
        with pytest.raises(ConfigError, match="in use"):
            opened(path, closing)


def test_paths_of_a_file_are_relative_to_it() -> None:
    spec = pmem.with_paths(Pmem("a.img"), lambda path: f"/folder/{path}")
    assert spec == Pmem("/folder/a.img")
    assert VmSpec("k", devices=(spec,)).keeps
