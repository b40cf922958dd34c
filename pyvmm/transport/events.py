"""Events of a transport for a trace: register accesses, by name and with decoded values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pyvmm.virtio import features, status
from pyvmm.virtio.lifecycle import CONFIG_CHANGED, USED_BUFFER, DeviceState


class RegisterAccess(NamedTuple):
    """A driver's read or write of a register; `meaning` is the value in words, if it has any."""

    device: str
    write: bool
    register: str
    value: int
    meaning: str

    def __str__(self) -> str:
        verb = "write" if self.write else "read"
        meaning = f" ({self.meaning})" if self.meaning else ""
        return f"{self.device}: {verb} {self.register} {self.value:#x}{meaning}"


class BadAccess(NamedTuple):
    """An access that no register answers to."""

    device: str
    write: bool
    offset: int
    size: int
    value: int

    def __str__(self) -> str:
        verb = f"write of {self.value:#x}" if self.write else "read"
        return f"{self.device}: {self.size}-byte {verb} at {self.offset:#x} ignored"


def decode(kind: str, value: int, state: DeviceState, feature_names: Mapping[int, str]) -> str:
    """The meaning of a register's `value`, decoded as `kind`, in the specification's names."""
    if kind == "status":
        return status.describe(value)
    if kind == "interrupt":
        names = {USED_BUFFER: "used buffer", CONFIG_CHANGED: "configuration change"}
        return ", ".join(name for bit, name in names.items() if value & bit)
    if kind == "device features":
        return _features(value, state.device_features_select, feature_names)
    if kind == "driver features":
        return _features(value, state.driver_features_select, feature_names)
    return ""


def _features(value: int, select: int, names: Mapping[int, str]) -> str:
    return " ".join(features.describe(value << 32 * select, names)) if select < 2 else ""
