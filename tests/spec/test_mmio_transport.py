"""Device requirements of virtio 1.3, chapter 4.2 Virtio Over MMIO.

One test per MUST, its section in the docstring; docs/spec-coverage.md lists them.
"""

from __future__ import annotations

import pytest
from mmio_harness import (
    CONFIG_GENERATION,
    INTERRUPT_ACK,
    LIVE,
    MAGIC,
    QUEUE_NOTIFY,
    QUEUE_READY,
    QUEUE_RESET,
    QUEUE_SEL,
    STATUS,
    VERSION,
    VERSION_1,
    Bench,
    Naps,
    RecordingDevice,
    SlowDevice,
)

pytestmark = pytest.mark.mmio_only

RING_RESET = 1 << 40


def test_magic_value(bench: Bench) -> None:
    """4.2.2.1 Device Requirements: MUST return 0x74726976 in MagicValue."""
    assert bench.read(MAGIC).to_bytes(4, "little") == b"virt"


def test_version(bench: Bench) -> None:
    """4.2.2.1 Device Requirements: MUST return value 0x2 in Version."""
    assert bench.read(VERSION) == 2


@pytest.mark.parametrize("bit", [1, 2])
def test_an_event_is_presented_from_its_moment_until_acknowledged(
    bench: Bench, device: RecordingDevice, bit: int
) -> None:
    """4.2.2.1 Device Requirements: MUST present each event in InterruptStatus from the moment it
    takes place until the driver acknowledges it."""
    bench.go_live()
    interrupt = device.live.interrupt
    if bit == 1:
        interrupt.signal_used(0)
    else:
        interrupt.signal_config_change()
    assert bench.interrupt_status == bit
    assert bench.interrupt_status == bit, "reading acknowledges nothing"
    bench.write(INTERRUPT_ACK, bit ^ 3)
    assert bench.interrupt_status == bit
    bench.write(INTERRUPT_ACK, bit)
    assert bench.interrupt_status == 0


def test_bits_without_an_event_are_zero(bench: Bench, device: RecordingDevice) -> None:
    """4.2.2.1 Device Requirements: bits of InterruptStatus which do not represent events which
    took place MUST be zero."""
    bench.go_live()
    assert bench.interrupt_status == 0
    bench.write(INTERRUPT_ACK, 0xFFFF_FFFF)
    assert bench.interrupt_status == 0
    device.live.interrupt.signal_used(1)
    assert bench.interrupt_status == 1


def test_reset_clears_interrupt_status(bench: Bench, device: RecordingDevice) -> None:
    """4.2.2.1 Device Requirements: upon reset MUST clear all bits in InterruptStatus."""
    bench.go_live()
    device.live.interrupt.signal_used(0)
    device.live.interrupt.signal_config_change()
    bench.write(STATUS, 0)
    assert bench.interrupt_status == 0


def test_reset_clears_queue_ready_of_all_queues(bench: Bench) -> None:
    """4.2.2.1 Device Requirements: upon reset MUST clear the ready bits of all queues."""
    bench.negotiate()
    for index in (0, 1):
        bench.enable_queue(index)
        assert bench.read(QUEUE_READY) == 1
    bench.write(STATUS, LIVE)
    bench.write(STATUS, 0)
    for index in (0, 1):
        bench.write(QUEUE_SEL, index)
        assert bench.read(QUEUE_READY) == 0


@pytest.mark.parametrize("signalled", [False, True])
def test_config_generation_changes_when_a_driver_may_see_halves(
    bench: Bench, device: RecordingDevice, signalled: bool
) -> None:
    """4.2.2.1 Device Requirements: MUST change the value in ConfigGeneration if there is any risk
    of a driver seeing an inconsistent configuration state."""
    bench.go_live()
    before = bench.read(CONFIG_GENERATION)
    device.config[0] ^= 0xFF
    if signalled:
        device.live.interrupt.signal_config_change()
    after = bench.read(CONFIG_GENERATION)
    assert after != before
    assert bench.read(CONFIG_GENERATION) == after


def test_virtqueue_contents_are_not_accessed_when_not_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """4.2.2.1 Device Requirements: MUST NOT access virtqueue contents when QueueReady is zero."""
    device = SlowDevice()
    device.release.set()
    naps = Naps(monkeypatch)
    bench = Bench(device)
    bench.go_live()
    naps.settle(0)
    bench.write(QUEUE_READY, 0)
    assert bench.read(QUEUE_READY) == 0
    bench.offer_buffer(0)
    before = bench.rings()
    bench.write(QUEUE_NOTIFY, 0)
    naps.settle(1)
    assert bench.rings() == before
    bench.transport.close()


def test_queue_reset_is_neither_offered_nor_obeyed(bench: Bench, device: RecordingDevice) -> None:
    """4.2.2.1 Device Requirements: what VIRTIO_F_RING_RESET requires of QueueReset binds a device
    that negotiated it; ours does not offer it, and presents 0."""
    assert not bench.offered() & RING_RESET
    bench.negotiate(VERSION_1 | RING_RESET)
    assert bench.status == 3
    bench.go_live()
    bench.write(QUEUE_RESET, 1)
    assert bench.read(QUEUE_RESET) == 0
    queue = device.live.queues[0]
    assert bench.read(QUEUE_READY) == 1
    assert queue is not None and queue.ready
