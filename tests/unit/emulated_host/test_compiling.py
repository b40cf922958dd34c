"""Modules compiled for another place: Python finds them there; what has changed is made anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from pyvmm.emulated_host import compiling, foreign
from pyvmm.emulated_host.spec import HostImage

TAG = sys.implementation.cache_tag


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "here/package"
    (folder / "inner").mkdir(parents=True)
    (folder / "test").mkdir()
    (folder / "lib-dynload").mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "inner/__init__.py").write_text("")
    (folder / "inner/one.py").write_text("value = 1\n")
    (folder / "inner/late.py").write_text("")
    (folder / "test/two.py").write_text("")
    (folder / "lib-dynload/three.py").write_text("")
    (folder / "wrong.py").write_text("print 'of another Python'\n")
    (folder / "nowhere.py").symlink_to("/nonexistent")
    (folder / "other.txt").write_text("")
    return folder


@pytest.fixture
def there(tmp_path: Path, source: Path) -> Path:
    """The place of `source`, after it was compiled for that. The sources are no Python any more, so
    that it shows what is read."""
    into, place = tmp_path / "into", tmp_path / "there"
    compiling.main(str(into), str(source), str(place / "package"), str(into / "0"))
    os.rename(source.parent, place)
    for module in place.rglob("*.py"):
        if not module.is_symlink():
            module.write_text("value = ?\n")
    return place


def run(tmp_path: Path, code: str, *collections: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        "PYTHONPATH": f"{tmp_path / 'into'}:{tmp_path / 'there'}",
        "PYVMM_COLLECTIONS": ":".join(map(str, collections or (tmp_path / "into/0",))),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/"
    )


def test_python_loads_what_was_compiled_for_where_it_is(tmp_path: Path, there: Path) -> None:
    code = "import package.inner.one as one; print(one.__cached__, one.value, one.__file__)"
    code += "\nimport package; print(*package.__path__, package.inner.__file__)"
    done = run(tmp_path, code)
    folder = there / "package"
    expected = f"{tmp_path}/into/0 1 {folder}/inner/one.py\n{folder} {folder}/inner/__init__.py\n"
    assert done.stdout == expected, done.stderr


def test_a_program_that_closes_all_descriptors_loads_more(tmp_path: Path, there: Path) -> None:
    code = "import os, package; os.closerange(3, 1000); fd = os.open('/dev/zero', 0)"
    assert run(tmp_path, f"{code}; import package.inner.late").returncode == 0


def test_a_failure_shows_the_line_of_the_source(tmp_path: Path, source: Path) -> None:
    into = tmp_path / "into"
    (source / "fails.py").write_text("\n\nraise ValueError('so it is')\n")
    compiling.main(str(into), str(source), str(source), str(into / "0"))
    done = run(tmp_path, "import package.fails")
    assert f'File "{source}/fails.py", line 3, in <module>\n    raise ValueError' in done.stderr


def test_modules_in_machine_code_are_found_without_a_search(tmp_path: Path) -> None:
    library = Path(sysconfig.get_config_var("DESTSHARED"))
    known = next(library.glob("_queue.*.so"), None)
    if known is None:
        pytest.skip("this Python has all of its modules built in")
    into, place = tmp_path / "into", tmp_path / "elsewhere"
    place.mkdir()
    shutil.copy(known, place)
    compiling.main(str(into), str(place), str(place), str(into / "0"))
    done = run(tmp_path, "import _queue; print(_queue.__file__)")
    assert done.stdout == f"{place / known.name}\n", done.stderr


def test_the_first_collection_that_has_a_module_counts(tmp_path: Path) -> None:
    into = tmp_path / "into"
    for number in (1, 2):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        (folder / "one.py").write_text(f"value = {number}\n")
        (folder / f"only{number}.py").write_text("")
        compiling.main(str(into), str(folder), str(folder), str(into / f"{number}"))
    done = run(tmp_path, "import one, only1, only2; print(one.value)", into / "2", into / "1")
    assert done.stdout == "2\n", done.stderr


@pytest.mark.parametrize("keep", [0, 3, 12, 40, -1])
def test_a_collection_that_is_cut_off_is_left_alone(tmp_path: Path, there: Path, keep: int) -> None:
    collection = tmp_path / "into/0"
    collection.write_bytes(collection.read_bytes()[:keep])
    (there / "package/__init__.py").write_text("print('from the source')\n")
    done = run(tmp_path, "import package", collection, tmp_path / "nowhere")
    assert (done.stdout, done.stderr) == ("from the source\n", "")


def test_a_collection_of_another_python_is_left_alone_and_made_anew(
    tmp_path: Path, source: Path
) -> None:
    collection = tmp_path / "into/0"
    words = (str(tmp_path / "into"), str(source), str(source), str(collection))
    compiling.main(*words)
    good = collection.read_bytes()
    collection.write_bytes(b"????" + good[4:])
    (source / "__init__.py").write_text("print('from the source')\n")
    done = run(tmp_path, f"import sys; sys.path.append({str(source.parent)!r})\nimport package")
    assert (done.stdout, done.stderr) == ("from the source\n", "")
    compiling.main(*words)
    assert collection.read_bytes()[:4] == good[:4]


def test_only_what_has_changed_is_compiled_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(compiling, "_code", lambda path, inside: compiled.append(inside) or b"N")
    collection = tmp_path / "into/0"

    def found() -> list[str]:
        compiled.clear()
        compiling.main(str(tmp_path / "into"), str(source), "/there/package", str(collection))
        return sorted(path.removeprefix("/there/package/") for path in compiled)

    every = ["__init__.py", "inner/__init__.py", "inner/late.py", "inner/one.py", "wrong.py"]
    assert found() == every
    inode = collection.stat().st_ino
    assert found() == [] and collection.stat().st_ino == inode
    (source / "inner/one.py").write_text("value = 12\n")
    assert found() == ["inner/one.py"]
    os.unlink(source / "inner/one.py")
    assert found() == []
    assert b"inner.one" not in collection.read_bytes(), "a module that is gone"
    collection.write_bytes(collection.read_bytes()[:30])
    assert found() == [name for name in every if name != "inner/one.py"]


def test_what_nobody_wants_any_more_goes(tmp_path: Path, source: Path) -> None:
    into = tmp_path / "into"
    (into / "usr").mkdir(parents=True)
    for name, seconds in (("usr/old.pyc", 0), ("0.77", 0), ("0.78", 9999), ("of", 0)):
        (into / name).write_text("")
        then = time.time() - seconds
        os.utime(into / name, (then, then))
    compiling.main(str(into), str(source), "/there", str(into / "0"))
    left = {path.name for path in into.iterdir()}
    assert left == {"sitecustomize.pyc", "0", "0.77", "of"}, "a file that somebody may still write"


def test_a_module_that_does_not_compile_is_tried_once(tmp_path: Path, source: Path) -> None:
    words = (str(tmp_path / "into"), str(source), "/there", str(tmp_path / "into/0"))
    compiling.main(*words)
    inode = (tmp_path / "into/0").stat().st_ino
    compiling.main(*words)
    assert (tmp_path / "into/0").stat().st_ino == inode


def test_the_python_inside_is_told_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    programs = tmp_path / "programs"
    (programs / "usr/lib/python3.99/encodings").mkdir(parents=True)
    (programs / "usr/lib/python3.99/encodings/__init__.py").write_text("")
    (programs / "usr/lib/python3.99/lib-dynload").mkdir()
    (programs / "usr/lib/python3.99/lib-dynload/fast.so").write_text("")
    foreign.compile_modules([sys.executable], str(programs))
    image = HostImage("kernel", "modules", "busybox", ("qemu",), "vax", str(programs))
    found = foreign.environment({}, image)
    into, *_ = found["PYTHONPATH"].split(":")
    # Before Python looks into collections.
    early = f"{found['PYTHONPYCACHEPREFIX']}/usr/lib/python3.99/encodings/__init__.{TAG}.pyc"
    assert os.path.exists(early) and os.path.exists(f"{into}/sitecustomize.pyc")
    paths = [Path(path) for path in found["PYVMM_COLLECTIONS"].split(":")]
    collections = [path.read_bytes() for path in paths if path.exists()]
    [ours] = [data for data in collections if b"pyvmm.errors" in data]
    assert os.fsencode("/run/machine" + os.path.dirname(foreign.__file__)) in ours
    assert sum(b"/usr/lib/python3.99" in data for data in collections) == 2  # and its lib-dynload


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
