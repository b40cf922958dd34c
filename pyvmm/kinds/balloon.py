"""``--balloon [size=SIZE][,free-page-reporting][,deflate-on-oom]``: memory that comes back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from pyvmm.errors import ConfigError
from pyvmm.kinds.interface import Context, Running
from pyvmm.spec.options import OPTIONAL, Option, unknown_option
from pyvmm.spec.sizes import parse_memory
from pyvmm.spec.vm import DeviceSpec

if TYPE_CHECKING:
    from typing import TypedDict

    from pyvmm.control.protocol import Method
    from pyvmm.kinds.interface import Table
    from pyvmm.virtio.balloon.device import BalloonDevice

    class Keywords(TypedDict, total=False):
        """The keywords that `pyvmm.VM` takes."""

        balloon: Spec | bool | str | Table


_FLAG = "--balloon"
_SYNTAX = "[size=SIZE][,free-page-reporting][,deflate-on-oom][,packed]"
_PAGE = 4096
_MOST_PAGES = (1 << 32) - 1  # num_pages is a le32

OPTIONS = (
    Option(
        "balloon",
        _FLAG,
        metavar=_SYNTAX,
        device="balloon",
        shape=OPTIONAL,
        help="Add a virtio-balloon device, which takes SIZE of the guest's memory (none at first; "
        "see `pyvmm balloon`). With free-page-reporting memory that the guest has freed comes back "
        "by itself.",
    ),
)


class Spec(DeviceSpec):
    """A balloon that wants `size` bytes at first. With `reporting` pages that are free just now
    come back too; with `deflate_on_oom` the guest may take pages back when it has none left."""

    kind: ClassVar[str] = "balloon"

    size: int = 0
    reporting: bool = False
    deflate_on_oom: bool = False


def parse(text: str) -> Spec:
    """The device of ``--balloon TEXT``. Raises ConfigError."""
    size, flags = 0, {"free-page-reporting": False, "deflate-on-oom": False}
    for option in filter(None, text.split(",")):
        key, equals, value = option.partition("=")
        if key == "size" and value:
            size = parse_memory(value, option=_FLAG)
        elif key in flags and not equals:
            flags[key] = True
        else:
            known = ("size", *flags, "packed")
            raise unknown_option(option, known, usage=f"use {_SYNTAX}", flag=_FLAG)
    return Spec(size, flags["free-page-reporting"], flags["deflate-on-oom"])


def check(spec: Spec) -> Spec:
    """`spec`, or ConfigError for a size that cannot be written down."""
    if not 0 <= spec.size <= _MOST_PAGES * _PAGE:
        raise ConfigError(f"a size of {spec.size} bytes", cure="ask for less", option=_FLAG)
    return spec


def open_device(spec: Spec, context: Context) -> BalloonDevice:
    """The device; nothing is opened."""
    from pyvmm.virtio.balloon.device import BalloonDevice

    return BalloonDevice(
        target=spec.size, reporting=spec.reporting, deflate_on_oom=spec.deflate_on_oom
    )


# --- at run time ----------------------------------------------------------------------------------


def methods(running: Running) -> dict[str, Method]:
    """The methods of the control socket for a balloon."""
    from pyvmm.control.protocol import Method, watches

    return {
        "balloon.set": Method(partial(_set, running), needs={"size": int}),
        "balloon.stats": Method(partial(_stats, running), right=watches),
    }


def _set(running: Running, size: int) -> dict[str, Any]:
    """Have the balloon want `size` bytes. Raises ConfigError if there is none, or no such size."""
    balloon = _device(running)
    balloon.set_target(size, running.spec.memory)
    return {"size": balloon.target}


def _stats(running: Running) -> dict[str, Any]:
    """The balloon's aim, the memory that the guest has given, and its kernel's statistics."""
    balloon = _device(running)
    statistics = dict(balloon.statistics())
    return {**balloon.stats(), "resident": running.resident(), "memory": statistics}


def _device(running: Running) -> BalloonDevice:
    for _, device in running.of_kind("balloon"):
        found: BalloonDevice = device
        return found
    raise ConfigError("the VM has no balloon", cure="run it with --balloon")
