"""The pmem device's numbers and structures against the system's own headers."""

from __future__ import annotations

from pathlib import Path

from c_claims import assert_in_c, needs_headers

from pyvmm.virtio.pmem import uapi

HEADERS = ("linux/virtio_pmem.h", "linux/virtio_ids.h")
# Linux 6.8; headers may be older.
SINCE_SHARED_MEMORY = ("VIRTIO_PMEM_F_SHMEM_REGION", "VIRTIO_PMEM_SHMEM_REGION_ID")
pytestmark = needs_headers(HEADERS)


def test_every_number_is_the_headers(tmp_path: Path) -> None:
    names = [name for name in vars(uapi) if name.startswith("VIRTIO_")]
    assert len(names) == 4
    claims = [f"{name} == {getattr(uapi, name)}" for name in names]
    assert_in_c(tmp_path, HEADERS, claims, optional=SINCE_SHARED_MEMORY)


def test_structures_lie_as_the_kernels(tmp_path: Path) -> None:
    config = "struct virtio_pmem_config"
    claims = [
        f"sizeof({config}) == {uapi.CONFIG.size}",
        f"__builtin_offsetof({config}, start) == 0",
        f"__builtin_offsetof({config}, size) == 8",
        f"sizeof(struct virtio_pmem_req) == {uapi.REQ.size}",
        f"sizeof(struct virtio_pmem_resp) == {uapi.RESP.size}",
    ]
    assert_in_c(tmp_path, HEADERS, claims)
