"""Modules compiled for another place: Python finds them there; what has changed is made anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pyvmm.emulated_host import compiling, foreign


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "here/package"
    (folder / "inner").mkdir(parents=True)
    (folder / "test").mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "inner/one.py").write_text("value = 1\n")
    (folder / "test/two.py").write_text("")
    (folder / "wrong.py").write_text("print 'of another Python'\n")
    (folder / "nowhere.py").symlink_to("/nonexistent")
    (folder / "other.txt").write_text("")
    return folder


def made(into: Path) -> set[str]:
    return {str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()}


def test_python_loads_what_was_compiled_for_where_it_is(tmp_path: Path, source: Path) -> None:
    into, there = tmp_path / "into", tmp_path / "there"
    compiling.main(str(into), str(source), str(there / "package"))
    tag = sys.implementation.cache_tag
    below = str(there / "package").lstrip("/")
    assert made(into) == {f"{below}/__init__.{tag}.pyc", f"{below}/inner/one.{tag}.pyc"}
    os.rename(source.parent, there)
    code = "import package.inner.one as one; print(one.__cached__, one.value, one.__file__)"
    environment = {"PYTHONPATH": str(there), "PYTHONPYCACHEPREFIX": str(into)}
    # Whether it read that one shows as its source is no Python any more, of the same time and size.
    module = there / "package/inner/one.py"
    about = module.stat()
    module.write_text("value = ?\n")
    os.utime(module, ns=(about.st_atime_ns, about.st_mtime_ns))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/"
    )
    compiled = into / below / f"inner/one.{tag}.pyc"
    assert done.stdout == f"{compiled} 1 {module}\n", done.stderr


def test_only_what_has_changed_is_compiled_again(tmp_path: Path, source: Path) -> None:
    into = tmp_path / "into"

    def compiled() -> dict[str, int]:
        compiling.main(str(into), str(source), "/there")
        return {name: (into / name).stat().st_ino for name in made(into)}

    before = compiled()
    assert compiled() == before
    (source / "inner/one.py").write_text("value = 12\n")
    [changed] = {name for name, inode in compiled().items() if inode != before[name]}
    assert changed.startswith("there/inner/one.")
    (into / changed).write_bytes(b"cut off")
    compiled()
    assert b"cut off" not in (into / changed).read_bytes()
    os.unlink(source / "inner/one.py")
    assert set(compiled()) == set(before) - {changed}, "a module that is gone"
    assert not (into / "there/inner").exists()


def test_the_python_inside_is_told_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "programs/usr/lib/python3.99").mkdir(parents=True)
    (tmp_path / "programs/usr/lib/python3.99/late.py").write_text("")
    foreign.compile_modules([sys.executable], str(tmp_path / "programs"))
    prefix = Path(foreign.environment({})["PYTHONPYCACHEPREFIX"])
    tag = sys.implementation.cache_tag
    assert (prefix / f"usr/lib/python3.99/late.{tag}.pyc").exists()
    errors = os.path.realpath(foreign.__file__).replace("emulated_host/foreign.py", "errors")
    assert Path(f"{prefix}/run/machine{errors}.{tag}.pyc").exists()


def test_what_belongs_to_no_pyvmm_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    python, programs = [sys.executable], str(tmp_path / "programs")
    ours = Path(foreign._compiled())
    folder = ours.parent
    (folder / "usr/lib").mkdir(parents=True)  # that nobody answers for
    os.utime(folder / "usr", (1, 1))
    (folder / "new").mkdir()  # as it is before another start says whose it is
    there, gone = tmp_path / "there", tmp_path / "gone"
    there.mkdir()
    made = []
    for number, whose in enumerate((there, gone, *[there] * foreign._MOST_COMPILED)):
        made.append(folder / f"{number}")
        made[-1].mkdir()
        (made[-1] / "of").write_bytes(b"%b\0%b" % (bytes(there), bytes(whose)))
        os.utime(made[-1] / "of", (number, number))
    foreign.compile_modules(python, programs)
    left = {path.name for path in folder.iterdir()}
    newest = {path.name for path in made[3:]}
    assert left == {ours.name, "new", *newest} and len(newest) == foreign._MOST_COMPILED - 1
    assert any(ours.rglob("*.pyc")) and there.exists()
    foreign.compile_modules(python, programs)
    assert {path.name for path in folder.iterdir()} == left


def test_a_python_that_does_not_run_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    foreign.compile_modules(["/bin/false"], str(tmp_path))
    foreign.compile_modules(["/nonexistent"], str(tmp_path))
