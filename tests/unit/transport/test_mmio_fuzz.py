"""Any sequence of accesses: nothing is raised, and the device is live only by the legal path."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from mmio_harness import (
    ACKNOWLEDGE,
    AGREED,
    AVAIL,
    DESC,
    DESC_LOW,
    DEVICE_LOW,
    DRIVEN,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    DRIVER_LOW,
    LIVE,
    QUEUE_READY,
    QUEUE_RESET,
    QUEUE_SEL,
    QUEUE_SIZE,
    STATUS,
    USED,
    VERSION_1,
    Bench,
    RecordingDevice,
)
from unit.virtio.queue.test_queue_reset import Recorder

from pyvmm.transport.mmio import REGISTERS
from pyvmm.virtio.features import ring_features

OFFSETS = st.one_of(
    st.sampled_from([row.offset for row in REGISTERS]),
    st.integers(0, 0x1FF),
)
SIZES = st.sampled_from([4, 4, 4, 4, 1, 2, 8])
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 8, 11, 15, 16, 64, 128, 0x1000, 0x3000, 0xFFFF_FFFF]),
    st.integers(0, 2**64 - 1),
)
ANY = st.tuples(st.booleans(), OFFSETS, SIZES, VALUES)


def step(offset: int, value: int) -> st.SearchStrategy[tuple[bool, int, int, int]]:
    return st.just((True, offset, 4, value))


# Without the steps of a well-behaved driver mixed in, chance would never make a device live.
STEPS = st.one_of(
    ANY,
    *(step(STATUS, status) for status in (0, ACKNOWLEDGE, DRIVEN, AGREED, LIVE)),
    step(DRIVER_FEATURES_SEL, 1),
    step(DRIVER_FEATURES, VERSION_1 >> 32),
    step(QUEUE_SEL, 0),
    step(QUEUE_READY, 1),
)
PREFIX = [
    (True, STATUS, 4, ACKNOWLEDGE),
    (True, STATUS, 4, DRIVEN),
    (True, DRIVER_FEATURES_SEL, 4, 1),
    (True, DRIVER_FEATURES, 4, 1),
    (True, STATUS, 4, AGREED),
    (True, STATUS, 4, LIVE),
]
SEQUENCES = st.builds(
    lambda known, rest: PREFIX[:known] + rest,
    st.integers(0, len(PREFIX)),
    st.lists(STEPS, max_size=40),
)


@settings(max_examples=300, deadline=None)
@given(SEQUENCES)
def test_no_sequence_of_accesses_raises_or_activates_wrongly(
    accesses: list[tuple[bool, int, int, int]],
) -> None:
    device = RecordingDevice()
    bench = Bench(device)
    try:
        legal = 0  # the rung reached by writes that 3.1.1 allows, kept by the test alone
        for write, offset, size, value in accesses:
            value &= (1 << 8 * size) - 1
            before = bench.status
            if not write:
                assert 0 <= bench.read(offset, size) < 1 << 8 * size
                assert bench.status == before, "a read changed the status"
                continue
            bench.write(offset, value, size)
            if offset != STATUS or size != 4:
                assert bench.status == before, "the status changed by itself"
                continue
            legal = climb(legal, value, bench.status)
            assert bench.status == legal
            assert (device.activation is not None) == bool(bench.status & 4)
            if device.activation is not None:
                assert device.live.features & ~bench.negotiation.offered == 0
                assert device.live.features & VERSION_1
    finally:
        bench.transport.close()
        bench.memory.close()


def climb(current: int, written: int, now: int) -> int:
    """The status as it must be, but that features alone decide whether FEATURES_OK stays."""
    if written == 0:
        return 0
    if written & ~0xCF or current & ~(written & 0x8F):
        return current
    added = written & 0x8F & ~current
    if added in (0, 128):
        return current | added
    if current & 128:
        return current
    if (current, added) == (3, 8):
        return now if now in (3, 11) else current
    return current | added if (current, added) in {(0, 1), (0, 3), (1, 2), (11, 4)} else current


RING_PACKED, RING_RESET = 1 << 34, 1 << 40
QUEUE_STEPS = st.one_of(
    ANY,
    *(step(QUEUE_SEL, index) for index in (0, 1)),
    *(step(QUEUE_SIZE, size) for size in (8, 12)),
    *(step(QUEUE_READY, ready) for ready in (0, 1)),
    step(QUEUE_RESET, 1),
    step(DESC_LOW, DESC),
    step(DRIVER_LOW, AVAIL),
    step(DEVICE_LOW, USED),
)


@settings(max_examples=200, deadline=None)
@given(st.booleans(), st.booleans(), st.lists(QUEUE_STEPS, max_size=60))
def test_a_live_queue_is_always_one_that_was_checked(
    packed: bool, resettable: bool, accesses: list[tuple[bool, int, int, int]]
) -> None:
    device = Recorder()
    device.features = ring_features(packed=True)
    bench = Bench(device)
    try:
        features = VERSION_1 | RING_PACKED * packed | RING_RESET * resettable
        bench.negotiate(features)
        bench.enable_queue(0, 12 if packed else 8)
        bench.write(STATUS, LIVE)
        for write, offset, size, value in accesses:
            if offset == STATUS:
                continue
            if not write:
                bench.read(offset, size)
                continue
            bench.write(offset, value & (1 << 8 * size) - 1, size)
            assert bench.status == LIVE
            for config in bench.negotiation.state.queues:
                if config.ready:
                    config.validate(bench.memory, packed=packed)
        assert resettable or (device.queue_resets, device.started) == ([], [])
        assert len(device.started) <= len(device.queue_resets)
    finally:
        bench.transport.close()
        bench.memory.close()
