"""The register table: complete, consistent, and the same as the documentation's."""

from __future__ import annotations

from pathlib import Path

import mmio_harness
import pytest
from mmio_harness import VERSION_1, Bench, RecordingDevice

from pyvmm.errors import DriverError
from pyvmm.transport.__main__ import page
from pyvmm.transport.mmio import REGISTERS
from pyvmm.transport.registers import Register

pytestmark = pytest.mark.mmio_only

# virtio 1.3, 4.2.2, Table 4.1: offset, name, direction.
SPECIFIED = """
000 MagicValue R, 004 Version R, 008 DeviceID R, 00c VendorID R, 010 DeviceFeatures R,
014 DeviceFeaturesSel W, 020 DriverFeatures W, 024 DriverFeaturesSel W, 030 QueueSel W,
034 QueueSizeMax R, 038 QueueSize W, 044 QueueReady RW, 050 QueueNotify W, 060 InterruptStatus R,
064 InterruptACK W, 070 Status RW, 080 QueueDescLow W, 084 QueueDescHigh W, 090 QueueDriverLow W,
094 QueueDriverHigh W, 0a0 QueueDeviceLow W, 0a4 QueueDeviceHigh W, 0ac SHMSel W, 0b0 SHMLenLow R,
0b4 SHMLenHigh R, 0b8 SHMBaseLow R, 0bc SHMBaseHigh R, 0c0 QueueReset RW, 0fc ConfigGeneration R,
100 Config RW
"""


def test_the_table_is_the_specification_s() -> None:
    ours = [f"{row.offset:03x} {row.name} {row.access}" for row in REGISTERS]
    assert ours == [row.strip() for row in SPECIFIED.replace("\n", " ").split(",")]


@pytest.mark.parametrize("row", REGISTERS, ids=lambda row: row.name)
def test_every_row_has_its_handlers(row: Register) -> None:
    verbs = {"R": ["read"], "W": ["write"], "RW": ["read", "write"]}[row.access]
    transport = Bench(RecordingDevice()).transport
    for verb in verbs:
        name = f"{verb}_{row.handler}"
        owners = [owner for owner in (transport, transport.negotiation) if hasattr(owner, name)]
        assert len(owners) == 1, f"{name} is to be in one place"
        assert callable(getattr(owners[0], name))


def test_the_documentation_has_this_table() -> None:
    written = Path(__file__).parents[3] / "docs" / "registers.md"
    assert written.read_text() == page(), "run: python -m pyvmm.transport > docs/registers.md"


# --- the trace of a driver that starts, is interrupted, and meets an error ---------------------


def test_a_trace_reads_like_the_specification() -> None:
    device = RecordingDevice()
    bench = Bench(device, trace=True)
    bench.write(mmio_harness.DEVICE_FEATURES_SEL, 1)
    bench.read(mmio_harness.DEVICE_FEATURES)
    bench.go_live(VERSION_1 | mmio_harness.EVENT_IDX)
    bench.read(mmio_harness.MAGIC, 1)
    bench.read(mmio_harness.CONFIG + 2, 2)
    device.live.interrupt.signal_used(0)
    bench.read(mmio_harness.INTERRUPT_STATUS)
    bench.write(mmio_harness.INTERRUPT_ACK, 3)
    device.live.fail(DriverError("loop of descriptors", section="2.7.5.2"))
    bench.write(mmio_harness.STATUS, 0)
    lines = [str(event) for event in bench.events]
    assert all("\n" not in line for line in lines)
    expected = """
dev0: write DeviceFeaturesSel 0x1
dev0: read DeviceFeatures 0x1 (VIRTIO_F_VERSION_1)
dev0: write Status 0x0 (RESET)
dev0: reset
dev0: status RESET -> RESET
dev0: write Status 0x1 (ACKNOWLEDGE)
dev0: status RESET -> ACKNOWLEDGE
dev0: write Status 0x3 (ACKNOWLEDGE|DRIVER)
dev0: status ACKNOWLEDGE -> ACKNOWLEDGE|DRIVER
dev0: write DriverFeaturesSel 0x0
dev0: write DriverFeatures 0x20000000 (VIRTIO_F_EVENT_IDX)
dev0: write DriverFeaturesSel 0x1
dev0: write DriverFeatures 0x1 (VIRTIO_F_VERSION_1)
dev0: write Status 0xb (ACKNOWLEDGE|DRIVER|FEATURES_OK)
dev0: status ACKNOWLEDGE|DRIVER -> ACKNOWLEDGE|DRIVER|FEATURES_OK
dev0: write QueueSel 0x0
dev0: write QueueSize 0x10
dev0: write QueueDescLow 0x1000
dev0: write QueueDescHigh 0x0
dev0: write QueueDriverLow 0x3000
dev0: write QueueDriverHigh 0x0
dev0: write QueueDeviceLow 0x4000
dev0: write QueueDeviceHigh 0x0
dev0: write QueueReady 0x1
dev0: write Status 0xf (ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK)
dev0: status ACKNOWLEDGE|DRIVER|FEATURES_OK -> ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK
dev0: active, queue sizes [16, 0], features VIRTIO_F_EVENT_IDX VIRTIO_F_VERSION_1
dev0: 1-byte read at 0x0 ignored
dev0: read Config[0x2:2] 0x403
dev0: read InterruptStatus 0x1 (used buffer)
dev0: write InterruptACK 0x3 (used buffer, configuration change)
dev0: needs reset: loop of descriptors (virtio 1.3, 2.7.5.2)
dev0: write Status 0x0 (RESET)
dev0: reset
dev0: status ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK|DEVICE_NEEDS_RESET -> RESET
"""
    assert lines == expected.strip().splitlines()
