"""Numbers of the virtio core and of virtio-mmio against the system's own headers."""

from __future__ import annotations

from pathlib import Path

from c_claims import assert_in_c, needs_headers

from pyvmm.transport.mmio import REGISTERS
from pyvmm.virtio import constants, features

HEADERS = tuple(f"linux/virtio_{part}.h" for part in ("config", "ids", "mmio", "ring"))
pytestmark = needs_headers(HEADERS)

# Ours alone, or values that the headers write only in a comment.
NOT_IN_HEADERS = {"VIRTIO_MMIO_MAGIC", "VIRTIO_MMIO_VERSION_MODERN", "VIRTIO_MMIO_VENDOR_PYVMM"}
# Names of the specification for bits that the headers call VIRTIO_RING_F_….
RING_BITS = {"VIRTIO_F_INDIRECT_DESC", "VIRTIO_F_EVENT_IDX"}
# Linux 6.1's headers do not have these yet.
NEWER = {"VIRTIO_F_NOTIFICATION_DATA", "VIRTIO_F_NOTIF_CONFIG_DATA", "VIRTIO_F_ADMIN_VQ"}


def equal(numbers: dict[str, int]) -> list[str]:
    return [f"{name} == {value}" for name, value in numbers.items()]


def named(module: object, prefix: str) -> dict[str, int]:
    return {name: value for name, value in vars(module).items() if name.startswith(prefix)}


def test_every_constant_is_the_headers(tmp_path: Path) -> None:
    ours = named(constants, "VIRTIO_")
    claims = {name: value for name, value in ours.items() if name not in NOT_IN_HEADERS}
    assert len(claims) >= 14
    assert_in_c(tmp_path, HEADERS, equal(claims))


def test_every_feature_bit_is_the_headers(tmp_path: Path) -> None:
    ours = named(features, "VIRTIO_")
    claims = {name: value for name, value in ours.items() if name not in RING_BITS}
    assert len(claims) >= 12
    assert_in_c(tmp_path, HEADERS, equal(claims), NEWER)


def test_every_register_is_where_the_header_has_it(tmp_path: Path) -> None:
    claims = {f"VIRTIO_MMIO_{row.linux}": row.offset for row in REGISTERS if row.linux}
    missing = [row.name for row in REGISTERS if not row.linux]
    assert missing == ["QueueReset"]
    assert_in_c(tmp_path, HEADERS, equal(claims))


def test_names_of_feature_bits() -> None:
    bits = features.mask(5, 28, 29, 32, 44)
    assert features.describe(bits, {5: "VIRTIO_BLK_F_RO"}) == [
        "VIRTIO_BLK_F_RO",
        "VIRTIO_F_INDIRECT_DESC",
        "VIRTIO_F_EVENT_IDX",
        "VIRTIO_F_VERSION_1",
        "bit 44",
    ]
    assert features.describe(0) == []
    assert features.has(bits, 29) and not features.has(bits, 30)
