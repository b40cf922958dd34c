"""Rows 1 to 11 of what a hostile or broken driver must get (docs/robustness.md), over virtio-mmio.

Everywhere: no exception, no activation that was not asked for legally, a warning that says why.
"""

from __future__ import annotations

import re

import pytest
from mmio_harness import (
    ACKNOWLEDGE,
    AGREED,
    CONFIG,
    DESC_LOW,
    DEVICE_BIT,
    DEVICE_FEATURES,
    DEVICE_FEATURES_SEL,
    DRIVEN,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    DRIVER_OK,
    FEATURES_OK,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    LIVE,
    MAGIC,
    QUEUE_NOTIFY,
    QUEUE_SEL,
    QUEUE_SIZE_MAX,
    STATUS,
    VERSION,
    VERSION_1,
    Bench,
    RecordingDevice,
    SlowDevice,
    workers,
)

# --- 1 and 2: the wrong width, the wrong register, the wrong direction ----------------------------


@pytest.mark.mmio_only
@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("offset", [MAGIC, VERSION, STATUS, QUEUE_SIZE_MAX, 0xF8])
def test_row01_narrow_and_wide_reads_of_registers_give_0(
    bench: Bench, offset: int, size: int
) -> None:
    bench.negotiate()
    assert bench.read(offset, size) == 0


@pytest.mark.mmio_only
@pytest.mark.parametrize("offset", [0x01, 0x02, 0x03, 0x72, 0xFE])
def test_row01_unaligned_reads_give_0(bench: Bench, offset: int) -> None:
    assert bench.read(offset, 4) == 0


@pytest.mark.mmio_only
@pytest.mark.parametrize(("offset", "size"), [(STATUS, 1), (STATUS, 2), (STATUS, 8), (0x71, 4)])
def test_row01_writes_that_are_not_4_aligned_bytes_are_ignored(
    bench: Bench, device: RecordingDevice, offset: int, size: int
) -> None:
    bench.negotiate()
    resets = device.resets
    bench.write(offset, LIVE, size)
    bench.write(offset, 0, size)
    assert bench.status == AGREED
    assert (device.activations, device.resets) == (0, resets)
    assert "Status takes aligned accesses of 4 bytes" in bench.lines[-1]


@pytest.mark.mmio_only
@pytest.mark.parametrize("offset", [MAGIC, VERSION, QUEUE_SIZE_MAX, INTERRUPT_STATUS])
def test_row02_writes_to_read_only_registers_are_ignored(bench: Bench, offset: int) -> None:
    before = bench.read(offset)
    bench.write(offset, 0xFFFF_FFFF)
    assert bench.read(offset) == before
    assert "is read-only" in bench.lines[-1]


@pytest.mark.mmio_only
@pytest.mark.parametrize(
    "offset",
    [DEVICE_FEATURES_SEL, DRIVER_FEATURES, QUEUE_SEL, QUEUE_NOTIFY, INTERRUPT_ACK, DESC_LOW],
)
def test_row02_reads_of_write_only_registers_give_0(bench: Bench, offset: int) -> None:
    bench.go_live()
    assert bench.read(offset) == 0
    assert "is write-only" in bench.lines[-1]


@pytest.mark.mmio_only
@pytest.mark.parametrize("offset", [0x18, 0x28, 0x2C, 0x3C, 0x40, 0x54, 0xA8, 0xC4, 0xF8])
def test_row02_undefined_and_legacy_registers_do_not_exist(bench: Bench, offset: int) -> None:
    bench.write(offset, 0xFFFF_FFFF)
    assert bench.read(offset) == 0
    assert "there is no register" in bench.lines[-1]


# --- 3, 4 and 5: the configuration space ----------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "size", "value"),
    [
        (0, 4, 0x04030201),
        (0, 8, 0x0807060504030201),
        (1, 2, 0x0302),
        (15, 1, 16),
        (14, 4, 0x100F),  # straddles the end
        (12, 8, 0x100F0E0D),
        (16, 4, 0),  # past the end
        (0xFC, 4, 0),
    ],
)
def test_row03_configuration_is_zero_filled_past_its_end(
    bench: Bench, offset: int, size: int, value: int
) -> None:
    assert bench.read(CONFIG + offset, size) == value


@pytest.mark.parametrize("size", [3, 5, 6, 7])
def test_row03_widths_that_do_not_exist(bench: Bench, device: RecordingDevice, size: int) -> None:
    """KVM makes such pieces of an access that crosses a page."""
    bench.negotiate()
    assert bench.read(CONFIG, size) == 0
    bench.write(CONFIG, 1, size)
    assert device.config_writes == []
    assert [f"{size}-byte" in line for line in bench.lines] == [True, True]


def test_row03_a_device_that_answers_with_too_much_is_cut(
    bench: Bench, device: RecordingDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "read_config", lambda offset, length: b"\xff" * 100)
    assert bench.read(CONFIG, 2) == 0xFFFF


@pytest.mark.parametrize("status", [0, ACKNOWLEDGE, DRIVEN])
def test_row04_configuration_is_served_before_features_ok(bench: Bench, status: int) -> None:
    bench.write(STATUS, status)
    assert bench.read(CONFIG, 4) == 0x04030201


def test_row05_configuration_writes_do_nothing_unless_the_device_takes_them(
    device: RecordingDevice,
) -> None:
    class ReadOnly(RecordingDevice):
        write_config = RecordingDevice.__mro__[1].write_config  # the base class's: ignores all

    read_only = ReadOnly()
    bench = Bench(read_only)
    bench.go_live()
    for size in (1, 2, 4, 8):
        bench.write(CONFIG, 0, size)
    assert bench.read(CONFIG, 8) == 0x0807060504030201


def test_row05_configuration_writes_wait_for_features_ok(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.write(STATUS, DRIVEN)
    bench.write(CONFIG + 2, 7, 2)
    assert device.config_writes == []
    bench.negotiate()
    bench.write(CONFIG + 2, 7, 2)
    assert device.config_writes == [(2, b"\x07\0")]


# --- 6 to 9: features -----------------------------------------------------------------------------


@pytest.mark.parametrize("select", [2, 3, 32, 64, 0x8000_0000, 0xFFFF_FFFF])
def test_row06_feature_words_from_2_on_read_0_and_do_not_alias(bench: Bench, select: int) -> None:
    bench.write(STATUS, DRIVEN)
    bench.accept(VERSION_1)
    bench.write(DEVICE_FEATURES_SEL, select)
    assert bench.read(DEVICE_FEATURES) == 0
    bench.write(DRIVER_FEATURES_SEL, select)
    bench.write(DRIVER_FEATURES, 0xFFFF_FFFF)
    bench.write(STATUS, AGREED)
    assert bench.status == AGREED, "the bits of a word that is not there were taken for others"


@pytest.mark.parametrize("extra", [1, 1 << 28, 1 << 34, 1 << 63])
def test_row07_a_feature_that_was_not_offered_keeps_features_ok_clear(
    bench: Bench, device: RecordingDevice, extra: int
) -> None:
    bench.negotiate(VERSION_1 | extra)
    assert bench.status == DRIVEN
    assert "which is not offered" in bench.lines[-1]
    bench.write(STATUS, LIVE)
    assert device.activations == 0


def test_row08_refusing_version_1_keeps_features_ok_clear(bench: Bench) -> None:
    bench.negotiate(DEVICE_BIT)
    assert bench.status == DRIVEN
    assert "refuses VIRTIO_F_VERSION_1" in bench.lines[-1]


def test_row09_features_written_after_features_ok_are_ignored(
    bench: Bench, device: RecordingDevice
) -> None:
    bench.negotiate(VERSION_1)
    bench.accept(VERSION_1 | DEVICE_BIT)
    bench.enable_queue()
    bench.write(STATUS, LIVE)
    assert device.live.features == VERSION_1
    assert "ignored: only after DRIVER, before FEATURES_OK" in bench.lines[-1]
    assert re.search(r"DriverFeatures |driver_feature ", bench.lines[-1])


# --- 10 and 11: status and kicks ------------------------------------------------------------------


@pytest.mark.parametrize("cleared", [ACKNOWLEDGE, DRIVEN, DRIVEN | DRIVER_OK, FEATURES_OK])
def test_row10_a_cleared_status_bit_is_ignored(
    bench: Bench, device: RecordingDevice, cleared: int
) -> None:
    bench.go_live()
    resets = device.resets
    bench.write(STATUS, cleared)
    assert bench.status == LIVE
    assert device.resets == resets


@pytest.mark.parametrize("leap", [DRIVER_OK, DRIVEN | DRIVER_OK, LIVE, LIVE | 0x10])
def test_row10_driver_ok_without_features_ok_does_not_activate(
    bench: Bench, device: RecordingDevice, leap: int
) -> None:
    bench.write(STATUS, DRIVEN)
    bench.write(STATUS, leap)
    assert bench.status == DRIVEN
    assert device.activations == 0


def test_row11_a_kick_before_driver_ok_consumes_nothing(slow: tuple[Bench, SlowDevice]) -> None:
    bench, device = slow
    bench.negotiate()
    bench.enable_queue()
    bench.offer_buffer(0)
    before = bench.rings()
    bench.write(QUEUE_NOTIFY, 0)
    bench.transport.kicks[0].signal()  # as an ioeventfd would
    assert workers(device) == [], "nobody is there to consume anything"
    assert bench.rings() == before
    assert bench.edges == 0
