"""Sockets that a user has named: whose they are, what they replace, what they leave behind."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.host import named_listener
from pyvmm.host.named_listener import NamedListener


@pytest.fixture(params=[0, 0o022, 0o777], ids="umask {:04o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_only_its_owner_may_connect_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with NamedListener(str(path)):
        assert not stat.S_IMODE(path.stat().st_mode) & ~0o600


def test_the_processes_umask_is_left_alone_for_other_threads_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def umask(mask: int) -> int:
        raise AssertionError(f"umask({mask:o})")

    monkeypatch.setattr(os, "umask", umask)
    NamedListener(str(tmp_path / "socket")).close()


def test_only_its_owner_may_connect_and_it_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with NamedListener(str(path)):
        found = path.stat()
        assert stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert os.listdir(tmp_path) == []


def test_a_dead_ones_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with NamedListener(str(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_live_ones_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with NamedListener(path):
        with pytest.raises(ConfigError, match=r"^--vsock: .*in use by a process"):
            NamedListener(path, option="--vsock")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)  # it still listens


def test_a_live_one_with_a_full_queue_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as live, socket.socket(socket.AF_UNIX) as waiting:
        live.bind(path)
        live.listen(0)
        waiting.connect(path)
        with pytest.raises(ConfigError, match="in use"):
            NamedListener(path)


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link"])
def test_what_is_no_socket_stays(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "socket"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="is there already and is not a socket"):
        NamedListener(str(path))
    assert os.path.lexists(path)


@pytest.mark.parametrize("name", ["", "a\0b", "missing/socket"])
def test_a_name_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--vsock: "):
        NamedListener(str(tmp_path / name) if name else "", option="--vsock")


def test_a_path_that_is_too_long_is_to_be_shortened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="File name too long; shorten its path"):
        NamedListener(str(tmp_path / (120 * "x")))
    assert os.listdir(tmp_path) == []


def test_what_somebody_else_put_in_its_place_stays(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with NamedListener(str(path)):
        path.unlink()
        path.write_text("another's")
    assert path.read_text() == "another's"


def test_what_is_replaced_is_in_that_folder_whatever_its_path_leads_to_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    his, mine = tmp_path / "his", tmp_path / "mine"
    his.mkdir()
    mine.mkdir()
    (mine / "socket").write_text("precious")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(his / "socket"))

    def swap(path: str) -> bool:
        his.rename(tmp_path / "before")  # as its owner can, at any moment
        his.symlink_to("mine")
        return False

    monkeypatch.setattr(named_listener, "_is_alive", swap)
    with pytest.raises(ConfigError, match="cannot listen"):
        NamedListener(str(his / "socket"))
    assert (mine / "socket").read_text() == "precious"
