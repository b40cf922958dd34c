"""The stream that a snapshot is, from a machine's monitor to whoever stores it.

    a line of JSON      {"state": bytes, "files": {name: size, …}}, or {"error": message}
    the state           JSON text
    pieces              struct PIECE: number of the file, offset, length; then so many bytes
    the last piece      has the number END, and is JSON: {"paused_ms": …} or {"error": message}

With `stop` the client answers with a byte when all is on its storage, and the run ends then; if it
hangs up without, the machine goes on.
"""

from __future__ import annotations

import struct

from pyvmm.errors import ConfigError
from pyvmm.spec.vm import MAX_DEVICES, VmSpec

PIECE = struct.Struct("<IQI")
END = 0xFFFF_FFFF
LARGEST_PIECE = 1 << 20
DONE = b"!"


def check(spec: VmSpec) -> None:
    """Raise ConfigError for a VM with disks that have no file that outlives it, or with more
    devices, as some have come later, than a VM can begin with."""
    if len(spec.parts) > MAX_DEVICES:
        raise ConfigError(
            f"a VM with {len(spec.parts)} devices cannot be in a snapshot",
            cure=f"remove some: {MAX_DEVICES} are the most",
        )
    for disk in spec.disks:
        if disk.storage in ("ram", "python"):
            raise ConfigError(
                f"the disk {disk.id} cannot be in a snapshot: {disk.path} is not a file",
                cure="use a VM without it for that",
            )
