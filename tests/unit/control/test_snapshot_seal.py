"""The seal on snapshots that give a guest files of this machine."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pyvmm.control.snapshot_seal import is_sealed, seal
from pyvmm.errors import ConfigError, HostError
from pyvmm.host.birth import born_ns

SPEC = {"name": "one", "devices": [["share", {"path": "/mine"}]]}
STATE: dict[str, Any] = {
    "spec": SPEC,
    "machine": {"board": {"rip": 7}},
    "files": {"memory": 8, "share-0": 3},
}


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the key will be."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "pyvmm" / "snapshot-key"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A snapshot's files."""
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "memory").write_bytes(bytes(8))
    (folder / "share-0").write_bytes(b"abc")
    return folder


def sealed(folder: Path) -> dict[str, Any]:
    return {**STATE, "seal": seal(STATE, str(folder))}


def test_only_what_was_sealed_is_sealed(key: Path, folder: Path) -> None:
    assert not is_sealed({**STATE, "seal": ""}, str(folder))
    assert not key.exists(), "who only looks makes no key"
    state = sealed(folder)
    assert is_sealed(dict(reversed(state.items())), str(folder))
    assert is_sealed({**state, "checksum": "x", "format": "pyvmm", "version": 1}, str(folder))
    for wrong in ("", None, state["seal"][:-1], state["seal"].upper(), 7, [state["seal"]]):
        assert not is_sealed({**state, "seal": wrong}, str(folder))


@pytest.mark.parametrize(
    "change",
    [
        {"spec": {**SPEC, "devices": [["share", {"path": "/yours"}]]}},
        {"spec": None},
        {"machine": {"board": {"rip": 8}}},
        {"more": 1},
        {"files": {"memory": 8, "share-0": 4}},
        {"files": {"memory": 8}},
        {"files": {"memory": 8, "../one/share-0": 3}},
        {"files": {"memory": 8, "share-1": 3}},
        {"files": {"memory": 8, "share\0": 3}},
        {"files": [["memory"], 7]},
        {"files": 7},
    ],
)
def test_a_state_is_sealed_as_a_whole(key: Path, folder: Path, change: dict[str, Any]) -> None:
    state = sealed(folder)
    assert not is_sealed({**state, **change}, str(folder))
    assert is_sealed(state, str(folder))
    del state["files"]
    assert not is_sealed(state, str(folder))


def _copied(path: Path) -> None:
    """With another inode, and the same of all that its maker can say of it."""
    shutil.copy2(path, f"{path}.new")
    os.replace(f"{path}.new", path)


def _made_anew(path: Path) -> None:
    """Where the same inode is taken again, which only some file systems do."""
    found, data = path.stat(), path.read_bytes()
    path.unlink()
    for number in range(64):
        path.write_bytes(data)
        if path.stat().st_ino == found.st_ino:
            break
        path.rename(f"{path}.{number}")
    else:
        path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def _written(path: Path) -> None:
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))


def _linked(path: Path) -> None:
    path.rename(f"{path}.old")
    path.symlink_to(f"{path}.old")


@pytest.mark.parametrize("change", [_copied, _made_anew, _written, _linked, Path.unlink])
@pytest.mark.parametrize("file", ["memory", "share-0"])
def test_files_are_those_that_were_taken(
    key: Path, folder: Path, file: str, change: Callable[[Path], None]
) -> None:
    if change is _made_anew and not born_ns(str(folder / file)):
        pytest.skip("this file system does not keep when a file was made")
    state = sealed(folder)
    change(folder / file)
    assert not is_sealed(state, str(folder))


def test_a_snapshot_may_be_linked_to_and_called_otherwise(key: Path, folder: Path) -> None:
    state = sealed(folder)
    other = folder.with_name("two")
    folder.rename(other)
    os.link(other / "memory", folder.with_name("memory-1"))
    assert is_sealed(state, str(other))
    folder.with_name("memory-1").unlink()
    assert is_sealed(state, str(other))


def test_files_that_are_not_there_are_told(key: Path, folder: Path) -> None:
    (folder / "memory").unlink()
    with pytest.raises(HostError, match="files of the snapshot in "):
        seal(STATE, str(folder))


def test_a_key_is_its_users_own_and_stays(key: Path, folder: Path) -> None:
    state = sealed(folder)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert sealed(folder) == state
    assert sorted(os.listdir(key.parent)) == ["snapshot-key", "snapshots"]
    key.unlink()
    assert not is_sealed(state, str(folder))
    assert sealed(folder) != state


def test_one_key_is_made_by_many_at_once(key: Path, folder: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        marks = {state["seal"] for state in pool.map(sealed, [folder] * 32)}
    assert len(marks) == 1 and is_sealed({**STATE, "seal": marks.pop()}, str(folder))
    assert sorted(os.listdir(key.parent)) == ["snapshot-key", "snapshots"]


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_damaged_key_is_none(key: Path, folder: Path, content: bytes) -> None:
    state = sealed(folder)
    key.write_bytes(content)
    assert not is_sealed(state, str(folder))
    with pytest.raises(ConfigError, match="snapshot-key is not a key; remove it"):
        sealed(folder)
