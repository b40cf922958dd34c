"""Processes of pyvmm's that are Python import nothing from the current directory, which may be one
that a guest writes to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.host import own_python

ROOT = Path(__file__).resolve().parents[3]
# Python imports the first by itself, and pyvmm.machine.board the other.
WRITTEN = ("sitecustomize.py", "struct.py")


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, in which a guest has written modules; they leave a mark."""
    for name in WRITTEN:
        (tmp_path / name).write_text(f"open({str(tmp_path / 'mark')!r}, 'a').write({name!r})")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", [None, "", ":", ":/nowhere", "/nowhere:", "/nowhere::/either"])
def test_a_child_imports_nothing_from_an_unnamed_current_directory(
    shared: Path, monkeypatch: pytest.MonkeyPatch, path: str | None
) -> None:
    if path is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", path)
    done = subprocess.run(
        own_python.command("pyvmm.machine.board"),
        env=own_python.environment(),
        capture_output=True,
        text=True,
    )
    assert done.stderr == "usage: python -m pyvmm.machine.board KERNEL TARGET\n"
    assert not (shared / "mark").exists()


def test_what_is_named_stays_and_means_the_same_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "src::/more:.")
    assert own_python.environment()["PYTHONPATH"] == f"{tmp_path}/src:/more:{tmp_path}"
    given = {"A": "b"}
    assert own_python.environment(given) == given


def test_a_current_directory_that_is_gone_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("PYTHONPATH", "src:")
    before = list(sys.path)
    own_python.leave_current_directory(as_module=True)
    assert sys.path == before
    assert own_python.environment()["PYTHONPATH"] == "src"


@pytest.mark.parametrize(
    ("path", "is_left"), [(":/more", True), ("/more", False), (":.", False), ("", False)]
)
def test_a_process_leaves_it_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, is_left: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", path)
    here = os.getcwd()
    monkeypatch.setattr(sys, "path", ["/first", here, "/last"])
    own_python.leave_current_directory()
    assert sys.path == (["/first", "/last"] if is_left else ["/first", here, "/last"])


def test_no_other_place_begins_a_python() -> None:
    """confinement.python has no packages, and no environment; the keeper asks whether there is a
    Python at all."""
    having = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("pyvmm/**/*.py")
        if "sys.executable" in path.read_text()
    }
    assert having == {
        "pyvmm/host/confinement.py",
        "pyvmm/host/own_python.py",
        "pyvmm/monitor/keeper.py",
    }
