"""Control sockets for a group: nobody else's socket is given to it."""

from __future__ import annotations

import grp
import os
import socket
import stat
from pathlib import Path

import pytest

from pyvmm.control import doors, registry
from pyvmm.control.doors import Doors
from pyvmm.errors import ConfigError
from pyvmm.host.named_listener import NamedListener
from pyvmm.spec.surroundings import ControlSocket

GROUP = grp.getgrgid(os.getgid()).gr_name


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    with registry.register("one") as made:
        yield made


def test_a_group_gets_the_socket(vm: registry.Registration, tmp_path: Path) -> None:
    path = tmp_path / "door"
    with Doors([ControlSocket(str(path), "watch", GROUP)], vm) as made:
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        assert made.doors[0].socket.fileno() >= 0
    assert not path.exists()


@pytest.mark.parametrize("listens", [True, False])
def test_a_socket_that_somebody_puts_in_its_place_stays_as_it_is(
    vm: registry.Registration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listens: bool
) -> None:
    his, mine = tmp_path / "his", tmp_path / "mine"
    his.mkdir()
    mine.mkdir()

    def make(path: str, *, option: str) -> NamedListener:
        made = NamedListener(path, option=option)
        his.rename(tmp_path / "before")  # as its owner can, at any moment
        his.symlink_to("mine")
        return made

    monkeypatch.setattr(doors, "NamedListener", make)
    with socket.socket(socket.AF_UNIX) as secret:
        secret.bind(str(mine / "door"))
        os.chmod(mine / "door", 0o600)
        if listens:
            secret.listen(1)
        with pytest.raises(ConfigError, match="is not the socket that was made there any more"):
            Doors([ControlSocket(str(his / "door"), "watch", GROUP)], vm)
    assert stat.S_IMODE((mine / "door").stat().st_mode) == 0o600
