"""``--rng``: a virtio-rng device, random numbers for the guest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pyvmm.errors import ConfigError
from pyvmm.kinds.registry import Context
from pyvmm.spec import rates
from pyvmm.spec.vm import DeviceSpec
from pyvmm.virtio.rng.device import EntropyDevice

OPTION = "--rng-limit"


@dataclass(frozen=True)
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
            cure = f"use {rates.SYNTAX.replace('[,', '[')}"
            raise ConfigError(f"unknown option {option!r}", cure=cure, option=OPTION)
        fields[rates.KEYS[key]] = rates.parse_rate(key, value, OPTION)
    return Spec(**fields)


def check(spec: Spec) -> Spec:
    """Raises ConfigError for limits that make no sense."""
    rates.check(spec, OPTION)
    return spec


def open_device(spec: Spec, context: Context) -> EntropyDevice:
    """A device on the host's random number generator."""
    device = EntropyDevice()
    device.limits = rates.limiter(spec)
    return device
