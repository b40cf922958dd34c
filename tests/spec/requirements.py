"""The device requirements of virtio 1.3, chapters 2, 4.2 and 5.2: one entry for each MUST.

`test_coverage.py` compares this with docs/spec-coverage.md, so that no requirement is left out
there silently. That none is left out here is for `compare_with_spec.py`, which needs the
specification's source and counts what that says.
"""

from __future__ import annotations

from typing import NamedTuple


class Section(NamedTuple):
    """A section "Device Requirements: `title`", in the specification's source in `file`.

    `musts` are the rows of docs/spec-coverage.md that hold each MUST, in their order; several rows
    are joined by " + ". `unoffered` are those that bind a device with some feature only, and the
    row that shows that no device here has it.
    """

    number: str
    title: str
    file: str
    musts: tuple[str, ...] = ()
    unoffered: tuple[tuple[int, str, str], ...] = ()  # how many, feature, row

    @property
    def count(self) -> int:
        """The words MUST and SHALL in it."""
        return len(self.musts) + sum(count for count, _, _ in self.unoffered)


_CONTENT = "content.tex"
_SPLIT = "split-ring.tex"
_PACKED = "packed-ring.tex"
_BLK = "device-types/blk/description.tex"
_NEVER_OFFERED = "reserved and unsupported features are not offered"
_NO_ZONES = "(SHOULD) ZONED is not offered by a disk without zones"

SECTIONS = (
    Section(
        "2.1.2",
        "Device Status Field",
        _CONTENT,
        (
            "no buffer is consumed before DRIVER_OK + no used buffer notification before DRIVER_OK",
            "after DRIVER_OK, DEVICE_NEEDS_RESET is followed by a configuration change "
            "notification",
        ),
    ),
    Section(
        "2.2.2",
        "Feature Bits",
        _CONTENT,
        (
            "no feature is offered without those it requires",
            "FEATURES_OK stays clear for features that are not accepted",
            _NEVER_OFFERED,
        ),
    ),
    Section(
        "2.4.1",
        "Device Reset",
        _CONTENT,
        (
            "a reset sets the status to 0",
            "from then until initialization no notification, no queue access",
        ),
    ),
    Section(
        "2.5.2",
        "Device Configuration Space",
        _CONTENT,
        ("all fields can be read before FEATURES_OK",),
    ),
    Section(
        "2.6.1.1.1",
        "Virtqueue Reset",
        _CONTENT,
        (
            "after it no request of the queue is executed + after it no notification for the queue",
            "all state of the queue is reset, positions included",
        ),
    ),
    Section(
        "2.6.1.2.1",
        "Virtqueue Re-enable",
        _CONTENT,
        ("what the driver changed in between is observed",),
    ),
    Section(
        "2.7.4.1",
        "Message Framing",
        _SPLIT,
        ("no assumption about how a request is cut into descriptors",),
    ),
    Section(
        "2.7.5.1",
        "The Virtqueue Descriptor Table",
        _SPLIT,
        ("no write to a device-readable buffer", "no write to a descriptor table entry"),
    ),
    Section(
        "2.7.5.3.2",
        "Indirect Descriptors",
        _SPLIT,
        (
            "the write flag is ignored on a descriptor that refers to a table",
            "direct descriptors may come before the one that refers to a table",
        ),
    ),
    Section(
        "2.7.7.2",
        "Used Buffer Notification Suppression",
        _SPLIT,
        (
            "without EVENT_IDX used_event is ignored; (SHOULD) flags 1 gets no notification",
            "without EVENT_IDX flags 0 gets a notification",
            "with EVENT_IDX the lower bit of flags is ignored; "
            "(SHOULD) no notification at another index",
            "with EVENT_IDX a notification when the index was used_event",
        ),
    ),
    Section(
        "2.7.8.2",
        "The Virtqueue Used Ring",
        _SPLIT,
        (
            "len is set before the used index",
            "at least len bytes are written before the used index",
        ),
    ),
    Section(
        "2.7.10.2",
        "Available Buffer Notification Suppression",
        _SPLIT,
        (
            "without EVENT_IDX flags is 0 or 1",
            "with EVENT_IDX flags is 0",
            "notifications without a reason are harmless",
        ),
    ),
    Section(
        "2.8.12",
        "Virtqueues",
        _PACKED,
        (
            "descriptors are processed in ring order",
            "used descriptors are written in the order of completion",
        ),
    ),
    Section(
        "2.8.15",
        "The Virtqueue Descriptor Table",
        _PACKED,
        (
            "no write to a device-readable buffer",
            "no descriptor is used unless its AVAIL bit changed",
            "no descriptor changes after its USED bit",
        ),
    ),
    Section(
        "2.8.18",
        "Scatter-Gather Support",
        _PACKED,
        ("descriptors of a list are used in their order",),
    ),
    Section(
        "2.10.2",
        "Shared Memory Regions",
        "shared-mem.tex",
        ("no region exposes what controls the device, nor streams data: pmem has one",),
    ),
    Section(
        "2.12.1.6",
        "Group administration commands",
        "admin.tex",
        unoffered=((26, "VIRTIO_F_ADMIN_VQ", _NEVER_OFFERED),),
    ),
    Section(
        "4.2.2.1",
        "MMIO Device Register Layout",
        "transport-mmio.tex",
        (
            "MagicValue is 0x74726976",
            "Version is 2",
            "an event shows in InterruptStatus until it is acknowledged",
            "other bits of InterruptStatus are 0",
            "a reset clears InterruptStatus + a reset clears QueueReady of all queues",
            "ConfigGeneration changes when a driver might see halves",
            "no virtqueue access while QueueReady is 0",
            "QueueReset is 0 on reset",
            "QueueReset is 0 after the queue was enabled",
            "1 resets the queue, and is read as long as that goes on",
            "1 resets the queue, and is read as long as that goes on",
            "after that QueueReset and QueueReady are 0",
        ),
    ),
    Section(
        "5.2.5.2",
        "Device Initialization",
        _BLK,
        (
            "CONFIG_WCE is not offered without FLUSH",
            "`writeback` is 0 if FLUSH was not negotiated",
            "`unused0` and `unused1` are 0",
        ),
        # A legacy device, one with the zone model HM, and eight fields of zoned devices.
        ((10, "VIRTIO_BLK_F_ZONED", _NO_ZONES),),
    ),
    Section(
        "5.2.6.2",
        "Device Operation",
        _BLK,
        (
            "a write to a read-only disk is IOERR and writes nothing",
            "a write to a read-only disk is IOERR and writes nothing",
            "discard, secure erase and write zeroes with an unknown flag are UNSUPP",
            "discard with `unmap` is UNSUPP",
            "after write zeroes, with `unmap` or without, reads return zeroes",
            "case 1: without FLUSH negotiated a write is committed before it completes + "
            "case 2: with CONFIG_WCE and `writeback` 0 a write is committed before it completes + "
            "case 3: completed writes are committed before a flush completes",
            "LIFETIME is not offered without its metrics",
            "zone requests are UNSUPP where ZONED is not negotiated",
        ),
        (
            (1, "VIRTIO_BLK_F_LIFETIME", "LIFETIME is not offered without its metrics"),
            (22, "VIRTIO_BLK_F_ZONED", _NO_ZONES),
        ),
    ),
    Section(
        "6.2",
        "Reserved Feature Bits",
        _CONTENT,
        (
            "VIRTIO_F_VERSION_1 is offered",
            "with VIRTIO_F_IN_ORDER buffers are used in the order in which they became available",
            "VIRTIO_F_SR_IOV is not offered by a device that is not on PCI",
        ),
    ),
)
