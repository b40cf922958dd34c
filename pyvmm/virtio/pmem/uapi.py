"""Numbers and structures of the pmem device, named as in <linux/virtio_pmem.h>.

A test compares them with the header. Structures are little endian.
"""

from __future__ import annotations

from struct import Struct

VIRTIO_ID_PMEM = 27  # virtio 1.3, 5 Device Types; linux/virtio_ids.h

# Feature bits (5.19.3 Feature bits), as bit numbers
VIRTIO_PMEM_F_SHMEM_REGION = 0
FEATURE_NAMES = {VIRTIO_PMEM_F_SHMEM_REGION: "VIRTIO_PMEM_F_SHMEM_REGION"}

VIRTIO_PMEM_SHMEM_REGION_ID = 0  # of the shared memory region that the memory is

CONFIG = Struct("<QQ")  # struct virtio_pmem_config: start, size

REQ = Struct("<L")  # struct virtio_pmem_req: type
VIRTIO_PMEM_REQ_TYPE_FLUSH = 0
RESP = Struct("<l")  # struct virtio_pmem_resp: ret
OK, FAILED = 0, -1  # 5.19.7.2 Device Requirements: Device Operation: Virtqueue return
