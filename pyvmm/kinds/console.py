"""``--console virtio``: the terminal is a virtio-console's, /dev/hvc0 in the guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pyvmm.errors import ConfigError
from pyvmm.kinds.interface import Context, Reader
from pyvmm.spec.options import Option
from pyvmm.spec.vm import DeviceSpec

if TYPE_CHECKING:
    from typing import TypedDict

    from pyvmm.kinds.border import Border, Crossing
    from pyvmm.platform.console import Console
    from pyvmm.platform.console_pump import InputPort
    from pyvmm.virtio.console.device import ConsoleDevice

    class Keywords(TypedDict, total=False):
        """The keywords that `pyvmm.VM` takes."""

        console: str | None


_SERIAL = "serial"

OPTIONS = (
    Option(
        "console",
        "--console",
        device="console",
        choices=(_SERIAL, "virtio", "virtio,packed"),
        help="What the terminal is in the guest: the serial port (the default), or a "
        "virtio-console (/dev/hvc0), which knows the terminal's size.",
    ),
)


class Spec(DeviceSpec):
    """A console on the terminal, which replaces the serial port there."""

    kind: ClassVar[str] = "console"
    console: ClassVar[str] = "hvc0"


def read(value: Any, option: Option, usual: Reader) -> list[DeviceSpec]:
    """The console, or none for the one that every machine has. Raises ConfigError."""
    return [] if value == _SERIAL else usual(value)


def parse(text: str) -> Spec:
    """The device of ``--console virtio``. Raises ConfigError."""
    if text != "virtio":
        raise ConfigError(
            f"unknown console {text!r}", cure="use serial or virtio", option="--console"
        )
    return Spec()


def plain(specs: list[Spec], option: Option) -> str | None:
    """The values that a file has for it."""
    if not specs:
        return None
    return "virtio,packed" if specs[0].packed else "virtio"


def open_device(spec: Spec, context: Context) -> ConsoleDevice:
    """A console that is not joined to a terminal yet. Without MULTIPORT a driver has its port as
    soon as it is there, when the kernel opens its console."""
    from pyvmm.virtio.console.device import ConsoleDevice
    from pyvmm.virtio.console.ends import TerminalEnd

    return ConsoleDevice(terminal=TerminalEnd())


def join_terminal(device: ConsoleDevice, console: Console) -> InputPort:
    """Give `console`, the terminal, to the device; where its input goes then."""
    from pyvmm.platform import window_size

    end = device.terminal
    assert end is not None
    end.attach(console.offer)
    console.watch_room(end.wake)
    console.watch_size(device.set_size)
    window_size.follow(device.set_size)
    return end


def cross(spec: Spec, border: Border) -> Crossing:
    """The terminal is here, and so is its size."""
    from pyvmm.kinds.border import Crossing

    return Crossing(spec, sizes_terminal=True)
