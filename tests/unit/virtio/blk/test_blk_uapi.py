"""The block device's numbers and structure against the system's own <linux/virtio_blk.h>."""

from __future__ import annotations

from pathlib import Path

from c_claims import assert_in_c, needs_headers

from pyvmm.host import files
from pyvmm.virtio.blk import config, uapi

HEADERS = ("linux/virtio_blk.h", "linux/virtio_ids.h")
pytestmark = needs_headers(HEADERS)


def test_every_number_is_the_headers(tmp_path: Path) -> None:
    names = [name for name in vars(uapi) if name.startswith("VIRTIO_")]
    assert len(names) >= 15
    assert_in_c(tmp_path, HEADERS, [f"{name} == {getattr(uapi, name)}" for name in names])


def test_every_feature_has_its_name() -> None:
    expected = {bit: name for name, bit in vars(uapi).items() if name.startswith("VIRTIO_BLK_F_")}
    assert expected == uapi.FEATURE_NAMES


def test_every_field_of_the_configuration_lies_where_the_header_has_it(tmp_path: Path) -> None:
    claims = []
    for name, (offset, size) in config.layout().items():
        member = f"geometry.{name}" if name in ("cylinders", "heads", "sectors") else name
        claims.append(f"__builtin_offsetof(struct virtio_blk_config, {member}) == {offset}")
        claims.append(f"sizeof(((struct virtio_blk_config *)0)->{member}) == {size}")
    total = len(config.BlockConfig(capacity=1, seg_max=1).encode())
    claims.append(f"sizeof(struct virtio_blk_config) == {total}")
    assert_in_c(tmp_path, HEADERS, claims)


def test_the_request_header_is_16_bytes_in_this_order(tmp_path: Path) -> None:
    header = "struct virtio_blk_outhdr"
    claims = [f"sizeof({header}) == 16"]
    for member, offset in (("type", 0), ("ioprio", 4), ("sector", 8)):
        claims.append(f"__builtin_offsetof({header}, {member}) == {offset}")
    assert_in_c(tmp_path, HEADERS, claims)


def test_iov_max_is_the_kernels(tmp_path: Path) -> None:
    assert_in_c(tmp_path, ("linux/uio.h",), [f"UIO_MAXIOV == {files.IOV_MAX}"])


def test_the_encoded_configuration_reads_back_field_by_field() -> None:
    encoded = config.BlockConfig(capacity=0x123456789, seg_max=254, num_queues=4).encode()
    expected = {
        "capacity": 0x123456789,
        "seg_max": 254,
        "blk_size": 512,
        "physical_block_exp": 3,
        "min_io_size": 8,
        "num_queues": 4,
    }
    for name, (offset, size) in config.layout().items():
        assert int.from_bytes(encoded[offset : offset + size], "little") == expected.get(name, 0)
