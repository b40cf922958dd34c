"""The board that this machine's guests have: the only module that chooses by architecture."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pyvmm.errors import ConfigError
from pyvmm.machine.board.board import Board


def _x86() -> Board[Any]:
    from pyvmm.machine.board.x86 import X86Board

    return X86Board()


def _arm64() -> Board[Any]:
    from pyvmm.machine.board.arm64 import Arm64Board

    return Arm64Board()


BOARDS: dict[str, Callable[[], Board[Any]]] = {"x86_64": _x86, "aarch64": _arm64}
"""By what uname(2) calls the architecture. A board's modules are imported when it is chosen."""


def board_for(architecture: str) -> Board[Any]:
    """The board of `architecture`, as uname(2) calls it. Raises ConfigError if there is none."""
    make = BOARDS.get(architecture)
    if make is None:
        raise ConfigError(
            f"pyvmm has no machine for the architecture {architecture}",
            cure=f"use a host that is one of {', '.join(BOARDS)}",
        )
    return make()


_UNAME = {"arm64": "aarch64"}  # the kernel's name, by that of a specification


def uname_of(arch: str) -> str:
    """The name by uname(2) of the architecture `arch` of a specification; "" is this machine's."""
    return _UNAME.get(arch, arch) or os.uname().machine


def is_foreign(arch: str) -> bool:
    """True if a guest of a specification's `arch` cannot run on this machine's own processor."""
    return uname_of(arch) != os.uname().machine


def board_of(arch: str) -> Board[Any]:
    """The board of a specification's `arch`. Raises ConfigError if there is none."""
    return board_for(uname_of(arch))


def board_of_host() -> Board[Any]:
    """The board of the architecture that this process runs on. Raises ConfigError."""
    return board_for(os.uname().machine)
