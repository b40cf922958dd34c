"""``--rng``: a virtio-rng device, random numbers for the guest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyvmm.errors import ConfigError
from pyvmm.machine.devices import Context
from pyvmm.machine.spec import DeviceSpec
from pyvmm.virtio.rng.device import EntropyDevice


@dataclass(frozen=True)
class Spec(DeviceSpec):
    """An entropy device; there is nothing to choose."""

    kind: ClassVar[str] = "rng"


def parse(text: str) -> Spec:
    """The device of ``--rng``. Raises ConfigError for any option."""
    if text:
        raise ConfigError(f"unknown option {text!r}", cure="use --rng alone", option="--rng")
    return Spec()


def open_device(spec: Spec, context: Context) -> EntropyDevice:
    """A device on the host's random number generator."""
    return EntropyDevice()
