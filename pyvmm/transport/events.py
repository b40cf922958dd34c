"""What the transport tells a trace: register accesses, by name and with decoded values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pyvmm.transport.mmio_registers import CONFIG, Register
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


def register_name(row: Register, offset: int, size: int) -> str:
    """The register's name; for the configuration space with offset and size in bytes."""
    return f"Config[{offset - CONFIG:#x}:{size}]" if row.offset == CONFIG else row.name


def decode(row: Register, value: int, state: DeviceState, feature_names: Mapping[int, str]) -> str:
    """What `value` of register `row` means, in the specification's names."""
    if row.decode == "status":
        return status.describe(value)
    if row.decode == "interrupt":
        names = {USED_BUFFER: "used buffer", CONFIG_CHANGED: "configuration change"}
        return ", ".join(name for bit, name in names.items() if value & bit)
    if row.decode == "device features":
        return _features(value, state.device_features_select, feature_names)
    if row.decode == "driver features":
        return _features(value, state.driver_features_select, feature_names)
    return ""


def _features(value: int, select: int, names: Mapping[int, str]) -> str:
    return " ".join(features.describe(value << 32 * select, names)) if select < 2 else ""
