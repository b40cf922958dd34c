"""The seal on specifications that give a guest files of this machine."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyvmm.control.snapshot_seal import is_sealed, seal
from pyvmm.errors import ConfigError

SPEC = {"name": "one", "devices": [["share", {"path": "/mine"}]]}


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the key will be."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "pyvmm" / "snapshot-key"


def test_only_what_was_sealed_is_sealed(key: Path) -> None:
    assert not is_sealed(SPEC, "")
    assert not key.exists(), "who only looks makes no key"
    mark = seal(SPEC)
    assert is_sealed(dict(reversed(SPEC.items())), mark)
    for other in ({**SPEC, "devices": [["share", {"path": "/yours"}]]}, None, [], "x"):
        assert not is_sealed(other, mark)
    for wrong in ("", None, mark[:-1], mark.upper(), 7, [mark]):
        assert not is_sealed(SPEC, wrong)


def test_a_key_is_its_users_own_and_stays(key: Path) -> None:
    mark = seal(SPEC)
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert seal(SPEC) == mark
    assert sorted(os.listdir(key.parent)) == ["snapshot-key", "snapshots"]
    key.unlink()
    assert not is_sealed(SPEC, mark)
    assert seal(SPEC) != mark


def test_one_key_is_made_by_many_at_once(key: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        marks = set(pool.map(seal, [SPEC] * 32))
    assert len(marks) == 1 and is_sealed(SPEC, marks.pop())
    assert sorted(os.listdir(key.parent)) == ["snapshot-key", "snapshots"]


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_damaged_key_is_none(key: Path, content: bytes) -> None:
    mark = seal(SPEC)
    key.write_bytes(content)
    assert not is_sealed(SPEC, mark)
    with pytest.raises(ConfigError, match="snapshot-key is not a key; remove it"):
        seal(SPEC)
