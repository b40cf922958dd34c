"""Device requirements of virtio 1.3, chapter 2.1 to 2.5 and 6.2, over the virtio-mmio transport.

One test per MUST, its section in the docstring; docs/spec-coverage.md lists them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from mmio_harness import (
    AGREED,
    CONFIG,
    DEVICE_BIT,
    DRIVEN,
    LIVE,
    NEEDS_RESET,
    QUEUE_NOTIFY,
    SHM_LEN_HIGH,
    SHM_LEN_LOW,
    SHM_SEL,
    STATUS,
    VERSION_1,
    Bench,
    RecordingDevice,
    SlowDevice,
    wait_for,
    workers,
)

from pyvmm.errors import DriverError
from pyvmm.testing.mmio_driver import InterruptLine, MmioDriver
from pyvmm.transport.mmio import MmioTransport


@pytest.fixture
def serving() -> Iterator[Bench]:
    """A device whose worker serves every request at once."""
    device = SlowDevice()
    device.release.set()
    bench = Bench(device)
    yield bench
    bench.transport.close()
    bench.memory.close()


# --- 2.1 Device Status Field -------------------------------------------------------------------


def test_status_starts_out_as_0(bench: Bench) -> None:
    """2.1 Device Status Field: the field starts out as 0."""
    assert bench.status == 0


def test_no_buffer_is_consumed_before_driver_ok(serving: Bench) -> None:
    """2.1.2 Device Requirements: MUST NOT consume buffers before DRIVER_OK."""
    serving.negotiate()
    serving.enable_queue()
    serving.offer_buffer(0)
    before = serving.rings()
    serving.transport.kicks[0].signal()
    assert workers(serving.device) == [], "nobody is there to consume anything"
    assert serving.rings() == before
    serving.write(STATUS, LIVE)  # and what was made available until then is not forgotten
    wait_for(lambda: serving.used_index() == 1)


def test_no_used_buffer_notification_before_driver_ok(serving: Bench) -> None:
    """2.1.2 Device Requirements: MUST NOT send any used buffer notifications before DRIVER_OK."""
    status_at_edge: list[int] = []
    serving.at_edge = lambda: status_at_edge.append(serving.status)
    serving.negotiate()
    serving.enable_queue()
    serving.offer_buffer(0)
    serving.write(QUEUE_NOTIFY, 0)
    assert workers(serving.device) == [], "nobody is there to interrupt"
    assert status_at_edge == []
    serving.write(STATUS, LIVE)
    wait_for(lambda: bool(status_at_edge))
    assert status_at_edge == [LIVE]


def test_an_error_sets_needs_reset(serving: Bench) -> None:
    """2.1.2 Device Requirements: SHOULD set DEVICE_NEEDS_RESET in an error state."""
    line = InterruptLine()
    transport = MmioTransport(serving.device, serving.memory, line, log=serving.lines.append)
    driver = MmioDriver(transport, serving.memory, irq=line)
    (queue,) = driver.start()
    queue.avail_idx = queue.avail_idx + queue.size + 1 & 0xFFFF
    driver.kick()
    driver.wait_needs_reset()
    assert driver.status == LIVE | NEEDS_RESET
    transport.close()


def test_needs_reset_is_notified_if_driver_ok(bench: Bench, device: RecordingDevice) -> None:
    """2.1.2 Device Requirements: if DRIVER_OK is set, MUST send a device configuration change
    notification after it sets DEVICE_NEEDS_RESET."""
    seen: list[tuple[int, int]] = []
    bench.at_edge = lambda: seen.append((bench.status, bench.interrupt_status))
    bench.go_live()
    device.live.fail(DriverError("any rule", section="2.7"))
    assert seen == [(LIVE | NEEDS_RESET, 2)]


# --- 2.2 Feature Bits --------------------------------------------------------------------------


def test_no_feature_is_offered_without_the_one_it_requires(bench: Bench) -> None:
    """2.2.2 Device Requirements: MUST NOT offer a feature which requires another feature which was
    not offered. All that a ring or device feature of 1.3 requires is VERSION_1."""
    assert bench.offered() & VERSION_1


def test_an_invalid_subset_keeps_features_ok_clear(bench: Bench) -> None:
    """2.2.2 Device Requirements: MUST fail to set FEATURES_OK for a subset it does not accept."""
    bench.negotiate(VERSION_1 | 1)
    assert bench.status == DRIVEN
    bench.negotiate(DEVICE_BIT)
    assert bench.status == DRIVEN


def test_every_valid_subset_is_accepted(bench: Bench, device: RecordingDevice) -> None:
    """2.2.2 Device Requirements: SHOULD accept any valid subset of features."""
    bits = [1 << bit for bit in range(64) if device.features >> bit & 1]
    for chosen in range(1 << len(bits)):
        subset = sum(bit for place, bit in enumerate(bits) if chosen >> place & 1)
        bench.negotiate(VERSION_1 | subset)
        assert bench.status == AGREED, hex(subset)


@pytest.mark.parametrize("bit", [24, 27, 30, 31, 33, 36, 37, 38, 39, *range(41, 50)])
def test_reserved_and_unsupported_features_are_never_offered(bit: int) -> None:
    """2.2.2 Device Requirements: MUST NOT offer feature bits it would not support, reserved ones
    and those not supported by the transport among them."""
    device = RecordingDevice()
    device.features |= 1 << bit
    with pytest.raises(ValueError, match="does not implement"):
        Bench(device)


def test_the_same_features_can_be_negotiated_again(bench: Bench, device: RecordingDevice) -> None:
    """2.2.2 Device Requirements: SHOULD NOT fail re-negotiation of the same set of features."""
    for _ in range(3):
        bench.go_live(bench.offered())
        assert bench.status == LIVE
        assert device.live.features == bench.offered()


# --- 2.4 Device Reset --------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, DRIVEN, DRIVEN | 128, AGREED, LIVE])
def test_reset_reinitializes_the_status_to_0(bench: Bench, status: int) -> None:
    """2.4.1 Device Requirements: MUST reinitialize device status to 0 after receiving a reset."""
    for rung in (1, DRIVEN, AGREED, LIVE):
        if rung <= status & 15:
            if rung == AGREED:
                bench.accept(VERSION_1)
            bench.write(STATUS, rung)
    bench.write(STATUS, status)
    assert bench.status == status
    bench.write(STATUS, 0)
    assert bench.status == 0


def test_nothing_happens_between_reset_and_initialization(serving: Bench) -> None:
    """2.4.1 Device Requirements: MUST NOT send notifications or interact with the queues after
    indicating completion of the reset, until the driver re-initializes the device."""
    serving.go_live()
    serving.write(STATUS, 0)
    assert serving.status == 0
    edges = serving.edges
    serving.offer_buffer(0)
    before = serving.rings()
    serving.write(QUEUE_NOTIFY, 0)
    serving.transport.kicks[0].signal()
    assert workers(serving.device) == []
    assert serving.rings() == before
    assert (serving.edges, serving.interrupt_status) == (edges, 0)


# --- 2.5 Device Configuration Space ------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, DRIVEN])
def test_configuration_can_be_read_before_features_ok(bench: Bench, status: int) -> None:
    """2.5.2 Device Requirements: MUST allow reading of any device-specific configuration field
    before FEATURES_OK, those conditional on offered feature bits included."""
    bench.write(STATUS, status)
    assert bytes(bench.read(CONFIG + offset, 1) for offset in range(16)) == bytes(range(1, 17))


# --- 6 Reserved Feature Bits -------------------------------------------------------------------


def test_version_1_is_offered(bench: Bench) -> None:
    """6.2 Device Requirements: Reserved Feature Bits: MUST offer VIRTIO_F_VERSION_1."""
    assert bench.offered() >> 32 & 1


# --- 2.10 Shared Memory Regions ----------------------------------------------------------------


@pytest.mark.mmio_only
def test_there_are_no_shared_memory_regions(bench: Bench) -> None:
    """2.10.2 Device Requirements: a region MUST NOT expose what controls the device, nor be used to
    stream data. Whichever the driver asks for, its length is -1: it does not exist (4.2.2)."""
    for region in range(256):
        bench.write(SHM_SEL, region)
        assert bench.read(SHM_LEN_LOW) == bench.read(SHM_LEN_HIGH) == 0xFFFF_FFFF
