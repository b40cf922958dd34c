"""``--rng``: a virtio-rng device, random numbers for the guest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pyvmm.kinds.interface import Context, limiter
from pyvmm.spec import rates
from pyvmm.spec.options import FLAG, Option, unknown_option
from pyvmm.spec.vm import DeviceSpec

if TYPE_CHECKING:
    from typing import TypedDict

    from pyvmm.kinds.interface import Table
    from pyvmm.virtio.rng.device import EntropyDevice

    class Keywords(TypedDict, total=False):
        """The keywords that `pyvmm.VM` takes."""

        rng: Spec | bool | str | Table


_LIMITS = "--rng-limit"

OPTIONS = (
    Option(
        "rng",
        "--rng",
        device="rng",
        shape=FLAG,
        after="--net",
        help="Add a virtio-rng device: random numbers for the guest.",
    ),
    Option(
        "rng_limit",
        _LIMITS,
        metavar="[bps=N][,iops=N][,packed]",
        stands_for="rng",
        not_in_files='write rng = "bps=…"',
        after="--rng",
        help="Add one that gives no more than this: bytes, or requests, a second; bursts as for "
        "disks.",
    ),
)


class Spec(DeviceSpec):
    """An entropy device; `bps`, `iops` and their bursts are its limits (spec.rates)."""

    kind: ClassVar[str] = "rng"
    bps: int = 0
    iops: int = 0
    bps_burst: int = 0
    iops_burst: int = 0


def parse(text: str) -> Spec:
    """The device of ``--rng``, and of ``--rng-limit LIMITS``. Raises ConfigError."""
    fields: dict[str, Any] = {}
    for option in text.split(",") if text else ():
        key, _, value = option.partition("=")
        if key not in rates.KEYS:
            usage = f"use {rates.SYNTAX.replace('[,', '[', 1)}[,packed]"
            raise unknown_option(option, (*rates.KEYS, "packed"), usage=usage, flag=_LIMITS)
        fields[rates.KEYS[key]] = rates.parse_rate(key, value, _LIMITS)
    return Spec(**fields)


def check(spec: Spec) -> Spec:
    """Raises ConfigError for limits that make no sense."""
    rates.check(spec, _LIMITS)
    return spec


def open_device(spec: Spec, context: Context) -> EntropyDevice:
    """A device on the host's random number generator."""
    from pyvmm.virtio.rng.device import EntropyDevice

    device = EntropyDevice()
    device.limits = limiter(spec)
    return device
