"""``--console virtio``: the terminal is a virtio-console's, /dev/hvc0 in the guest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyvmm.errors import ConfigError
from pyvmm.kinds.registry import Context
from pyvmm.spec.vm import DeviceSpec
from pyvmm.virtio.console.device import ConsoleDevice
from pyvmm.virtio.console.ends import TerminalEnd


@dataclass(frozen=True)
class Spec(DeviceSpec):
    """A console on the terminal, which replaces the serial port there."""

    kind: ClassVar[str] = "console"


class TerminalConsole(ConsoleDevice):
    """Its one port is `end`, to be joined to the terminal. Without MULTIPORT a driver has the port
    as soon as it is there, when the kernel opens its console."""

    def __init__(self) -> None:
        self.end = TerminalEnd()
        super().__init__(terminal=self.end)


def parse(text: str) -> Spec:
    """The device of ``--console virtio``. Raises ConfigError."""
    if text != "virtio":
        raise ConfigError(
            f"unknown console {text!r}", cure="use serial or virtio", option="--console"
        )
    return Spec()


def open_device(spec: Spec, context: Context) -> TerminalConsole:
    """A console that is not joined to a terminal yet."""
    return TerminalConsole()
