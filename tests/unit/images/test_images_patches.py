"""Faults of one version of a package that are mended in its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.images import lock, recipes
from pyvmm.images.lock import Pin
from pyvmm.images.patches import mend
from pyvmm.images.progress import Progress

PATCH = recipes.Patch("emu", "1.0", "usr/bin/emu", 4, "0102", "9090", "guests may hang")
PINS = [Pin("emu", "1.0", "00"), Pin("libc6", "2.41", "00")]
BYTES = b"\x7fELF\x01\x02\x03"


@pytest.fixture
def into(tmp_path: Path) -> Path:
    program = tmp_path / PATCH.file
    program.parent.mkdir(parents=True)
    program.write_bytes(BYTES)
    return tmp_path


def mended(into: Path, *patches: recipes.Patch, pins: list[Pin] = PINS) -> bytes:
    mend(str(into), patches, pins, Progress())
    return (into / PATCH.file).read_bytes()


def test_the_version_that_has_the_fault_is_mended(into: Path, capsys) -> None:
    assert mended(into, PATCH) == b"\x7fELF\x90\x90\x03"
    assert capsys.readouterr().err == ""


def test_another_version_is_left_as_it_is_and_that_is_said(into: Path, capsys) -> None:
    assert mended(into, PATCH, pins=[Pin("emu", "1.1", "00")]) == BYTES
    assert (
        "emu is 1.1; a fault is mended in 1.0 only, so guests may hang" in capsys.readouterr().err
    )
    assert mended(into, PATCH, pins=[]) == BYTES
    assert "emu is not there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [{"old": "0103"}, {"offset": 5}, {"offset": 100}, {"new": "90"}], ids=str
)
def test_a_patch_that_does_not_fit_changes_nothing(into: Path, wrong: dict) -> None:
    with pytest.raises(ConfigError, match=r"does not fit usr/bin/emu.*mend it"):
        mended(into, replace(PATCH, **wrong))
    assert (into / PATCH.file).read_bytes() == BYTES


def test_each_patch_of_the_recipes_is_for_the_version_that_is_pinned() -> None:
    """A newer version is pinned only after a look whether it has the fault, and where."""
    table = recipes.load()
    pins = lock.read(table.lock_file)
    patched = 0
    patched_ones = {
        **{f"programs-{name}": recipe.patches for name, recipe in table.programs.items()},
        **{f"kernel-{name}": recipe.patches for name, recipe in table.kernels.items()},
    }
    for name, patches in patched_ones.items():
        versions = {pin.package: pin.version for pin in pins.get(name, ())}
        for patch in patches:
            assert versions[patch.package] == patch.version
            patched += 1
    assert patched == 3
