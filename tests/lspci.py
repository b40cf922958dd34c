"""lspci's reading of configuration spaces: our functions, or those that a guest has read."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

needs_lspci = pytest.mark.skipif(
    shutil.which("lspci") is None, reason="lspci is missing (guest-images/system-packages.txt)"
)

# What pciutils calls our devices; what is not here goes by its number in older lists of it.
NAMES = {
    "blk": r"SCSI storage controller: .*Virtio 1\.0 block device",
    "net": r"Ethernet controller: .*Virtio 1\.0 network device",
    "console": r"Communication controller: .*Virtio 1\.0 console",
    "rng": r".*Virtio 1\.0 RNG",
    "balloon": r".*Virtio 1\.0 memory balloon",
    "vsock": "Communication controller: ",
}


def lspci(spaces: Mapping[str, bytes], folder: Path) -> dict[str, str]:
    """`lspci -vv` of configuration spaces, by addresses such as 00:01.0, when it finds
    them in a file as `lspci -xxxx` would write it."""
    lines = []
    for address, space in spaces.items():
        lines.append(f"{address} a device")
        lines += (f"{at:03x}: {space[at : at + 16].hex(' ')}" for at in range(0, len(space), 16))
        lines.append("")
    dump = folder / "dump"
    dump.write_text("\n".join(lines))
    done = subprocess.run(
        ["lspci", "-F", str(dump), "-vv"], capture_output=True, text=True, check=True
    )
    return {text.partition(" ")[0]: text for text in done.stdout.split("\n\n") if text.strip()}
