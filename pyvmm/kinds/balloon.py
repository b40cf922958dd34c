"""``--balloon [size=SIZE][,free-page-reporting][,deflate-on-oom]``: memory that comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyvmm.errors import ConfigError
from pyvmm.kinds.registry import Context
from pyvmm.spec.vm import DeviceSpec, parse_memory
from pyvmm.virtio.balloon.device import BalloonDevice

_OPTION = "--balloon"
_USAGE = "use [size=SIZE][,free-page-reporting][,deflate-on-oom][,packed]"
_PAGE = 4096
_MOST_PAGES = (1 << 32) - 1  # num_pages is a le32


@dataclass(frozen=True)
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
            size = parse_memory(value, option=_OPTION)
        elif key in flags and not equals:
            flags[key] = True
        else:
            raise ConfigError(f"unknown option {option!r}", cure=_USAGE, option=_OPTION)
    return Spec(size, flags["free-page-reporting"], flags["deflate-on-oom"])


def check(spec: Spec) -> Spec:
    """`spec`, or ConfigError for a size that cannot be written down."""
    if not 0 <= spec.size <= _MOST_PAGES * _PAGE:
        raise ConfigError(f"a size of {spec.size} bytes", cure="ask for less", option=_OPTION)
    return spec


def open_device(spec: Spec, context: Context) -> BalloonDevice:
    """The device; nothing is opened."""
    return BalloonDevice(
        target=spec.size, reporting=spec.reporting, deflate_on_oom=spec.deflate_on_oom
    )
