"""What a back end knows of its device beyond the rings, as a file of a snapshot."""

from __future__ import annotations

from collections.abc import Iterable

from pyvmm.control.snapshot_store import read_file
from pyvmm.errors import ConfigError
from pyvmm.virtio.vhost_user.device import VhostUserDevice
from pyvmm.virtio.vhost_user.link import MOST_STATE

_PIECE = 1 << 20


def contents(device: VhostUserDevice) -> tuple[int, Iterable[tuple[int, memoryview]]]:
    """The size of what `device`, which has been saved, has got, and its pieces with their
    offsets."""
    state = memoryview(device.take_state())
    return len(state), ((at, state[at : at + _PIECE]) for at in range(0, len(state), _PIECE))


def read(path: str) -> bytes | None:
    """What is in the file at `path`, for a device that is restored; None for "". Raises
    ConfigError."""
    if not path:
        return None
    try:
        return read_file(path, MOST_STATE)
    except OSError as error:
        raise ConfigError(
            f"the saved state {path} cannot be read: {error.strerror}", cure="take a new snapshot"
        ) from None
