"""What a VM's monitor is asked to do, by the VM's control socket: for `VM`, and for the commands
`pyvmm pause`, `resume`, `disk resize` and `balloon`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from pyvmm.control.client import patiently
from pyvmm.spec.sizes import parse_memory

PATIENCE = 60.0  # seconds for an answer; a disk that shrinks waits for its requests


class InMonitor(ABC):
    """The part of `VM` that its monitor answers."""

    @abstractmethod
    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The monitor's answer to the control socket's `method`."""

    def status(self) -> dict[str, Any]:
        """What it is and whether it runs: the control socket's `status`."""
        return self._ask("status")

    def stats(self) -> dict[str, Any]:
        """Its statistics: the control socket's `stats`."""
        return self._ask("stats")

    def pause(self) -> None:
        """Have it stand still: no vCPU runs, no device works, until `resume`."""
        self._ask("pause")

    def resume(self) -> None:
        """Have it go on."""
        self._ask("resume")

    def resize_disk(self, disk: str, size: int | str | None = None, *, shrink: bool = False) -> int:
        """Give the disk called `disk` ("disk0", or its id) `size` bytes, and its image too; without
        a size it takes over what its image has by now. Its size. Raises ControlError for what
        cannot be had."""
        params: dict[str, Any] = {} if size is None else {"size": _bytes(size)}
        if shrink:
            params["shrink"] = True
        return int(self._ask("disk.resize", disk=disk, **params)["size"])

    @property
    def balloon(self) -> BalloonControl:
        """The balloon of a VM that has one."""
        return BalloonControl(self)


class ByName(InMonitor):
    """The running VM of that name, for one question or two."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        return patiently(
            self._name, lambda client: client.call(method, patience=PATIENCE, **params)
        )


class BalloonControl:
    """The memory that a guest is asked to give back."""

    def __init__(self, vm: InMonitor) -> None:
        """`VM.balloon` is one."""
        self._vm = vm

    def set(self, size: int | str) -> None:
        """Want `size` bytes of the guest's memory; 0 gives it all back. Returns at once."""
        self._vm._ask("balloon.set", size=_bytes(size))

    def stats(self) -> dict[str, Any]:
        """What is wanted (`target`), given (`actual`) and more: the control socket's
        `balloon.stats`."""
        return self._vm._ask("balloon.stats")


def _bytes(size: int | str) -> int:
    return parse_memory(size, option="SIZE") if isinstance(size, str) else size
