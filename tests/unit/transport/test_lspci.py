"""lspci's reading of every kind of device on PCI: names, BARs, capabilities, MSI-X."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from every_device import KINDS
from lspci import NAMES, lspci, needs_lspci

from pyvmm.testing import attached
from pyvmm.transport.pci import PciTransport


@needs_lspci
@pytest.mark.parametrize("kind", KINDS)
def test_lspci_reads_every_device(kind: str, tmp_path: Path) -> None:
    with KINDS[kind].make() as device, attached(device, over="pci") as driver:
        assert isinstance(driver.transport, PciTransport)
        text = lspci({"00:01.0": bytes(driver.transport.function.space)}, tmp_path)["00:01.0"]
    first = text.partition("\n")[0]
    name = {**NAMES, "pmem": "Memory controller: "}.get(kind, ".*Red Hat")
    assert re.match(rf"00:01\.0 {name}.*\(rev 01\)$", first), first
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
