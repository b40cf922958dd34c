"""What lspci says of every kind of device on PCI: names, BARs, capabilities, MSI-X."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from every_device import KINDS

from pyvmm.pci.function import Function
from pyvmm.testing import attached
from pyvmm.transport.pci import PciTransport

# What pciutils calls them; what is not here goes by its number in older lists of it.
NAMES = {
    "blk": r"SCSI storage controller: .*Virtio 1\.0 block device",
    "net": r"Ethernet controller: .*Virtio 1\.0 network device",
    "console": r"Communication controller: .*Virtio 1\.0 console",
    "rng": r".*Virtio 1\.0 RNG",
    "balloon": r".*Virtio 1\.0 memory balloon",
    "vsock": "Communication controller: ",
}


def lspci(function: Function, folder: Path) -> str:
    """What it makes of the function's configuration space, as `lspci -xxxx` would write that."""
    rows = (
        f"{at:03x}: {function.space[at : at + 16].hex(' ')}"
        for at in range(0, len(function.space), 16)
    )
    dump = folder / "dump"
    dump.write_text("\n".join(("00:01.0 a device", *rows, "")))
    done = subprocess.run(
        ["lspci", "-F", str(dump), "-vv"], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.skipif(
    shutil.which("lspci") is None, reason="lspci is missing (guest-images/system-packages.txt)"
)
@pytest.mark.parametrize("kind", KINDS)
def test_lspci_reads_every_device(kind: str, tmp_path: Path) -> None:
    with KINDS[kind].make() as device, attached(device, over="pci") as driver:
        assert isinstance(driver.transport, PciTransport)
        text = lspci(driver.transport.function, tmp_path)
    first = text.partition("\n")[0]
    assert re.match(rf"00:01\.0 {NAMES.get(kind, '.*Red Hat')}.*\(rev 01\)$", first), first
    assert "Subsystem: Red Hat" in text
    assert "Mem+ BusMaster+" in text
    assert "Region 0: Memory at c0000000 (64-bit, non-prefetchable)" in text
    assert ("(64-bit, prefetchable)" in text) == bool(device.shared_memory)
    assert "MSI-X: Enable+" in text and f"Count={len(device.queue_sizes) + 1} Masked-" in text
    assert "Express (v2) Root Complex Integrated Endpoint" in text and "FLReset+" in text
    structures = re.findall(r"VirtIO: (\S+)\n\s+BAR=(\d) offset=\w+ size=(\w+)", text)
    known = [(name, bar) for name, bar, _ in structures if name != "<unknown>"]
    assert known == [(name, "0") for name in ("CommonCfg", "Notify", "ISR", "DeviceCfg")]
    # It has no names for PCI_CFG, which says nothing at first, and for shared memory.
    regions = [("2", f"{one.size:08x}") for one in device.shared_memory.values()]
    others = [(bar, size) for name, bar, size in structures if name == "<unknown>"]
    assert others == [("0", "00000000"), *regions]
    assert "Interrupt: pin" not in text
