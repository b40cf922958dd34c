"""Numbers and structures of the balloon device, named as in <linux/virtio_balloon.h>.

A test compares them with the header. Structures are little endian.
"""

from __future__ import annotations

from struct import Struct

VIRTIO_BALLOON_PFN_SHIFT = 12  # a page of the balloon is 4096 bytes, whatever the guest's are

# Feature bits (5.5.3 Feature bits), as bit numbers
VIRTIO_BALLOON_F_MUST_TELL_HOST = 0
VIRTIO_BALLOON_F_STATS_VQ = 1
VIRTIO_BALLOON_F_DEFLATE_ON_OOM = 2
VIRTIO_BALLOON_F_FREE_PAGE_HINT = 3
VIRTIO_BALLOON_F_PAGE_POISON = 4
VIRTIO_BALLOON_F_REPORTING = 5
FEATURE_NAMES = {
    VIRTIO_BALLOON_F_MUST_TELL_HOST: "VIRTIO_BALLOON_F_MUST_TELL_HOST",
    VIRTIO_BALLOON_F_STATS_VQ: "VIRTIO_BALLOON_F_STATS_VQ",
    VIRTIO_BALLOON_F_DEFLATE_ON_OOM: "VIRTIO_BALLOON_F_DEFLATE_ON_OOM",
    VIRTIO_BALLOON_F_FREE_PAGE_HINT: "VIRTIO_BALLOON_F_FREE_PAGE_HINT",
    VIRTIO_BALLOON_F_PAGE_POISON: "VIRTIO_BALLOON_F_PAGE_POISON",
    VIRTIO_BALLOON_F_REPORTING: "VIRTIO_BALLOON_F_REPORTING",
}

INFLATE, DEFLATE, STATS, FREE_PAGE, REPORTING = range(5)  # 5.5.2 Virtqueues

# struct virtio_balloon_config: num_pages, actual, free_page_hint_cmd_id, poison_val
CONFIG = Struct("<IIII")
ACTUAL_OFFSET = 4
POISON_VAL_OFFSET = 12
VIRTIO_BALLOON_CMD_ID_STOP = 0

# Statistics (5.5.6.1 Memory Statistics): struct virtio_balloon_stat is tag, value
STAT = Struct("<HQ")
VIRTIO_BALLOON_S_SWAP_IN = 0
VIRTIO_BALLOON_S_SWAP_OUT = 1
VIRTIO_BALLOON_S_MAJFLT = 2
VIRTIO_BALLOON_S_MINFLT = 3
VIRTIO_BALLOON_S_MEMFREE = 4
VIRTIO_BALLOON_S_MEMTOT = 5
VIRTIO_BALLOON_S_AVAIL = 6
VIRTIO_BALLOON_S_CACHES = 7
VIRTIO_BALLOON_S_HTLB_PGALLOC = 8
VIRTIO_BALLOON_S_HTLB_PGFAIL = 9
STAT_NAMES = {
    VIRTIO_BALLOON_S_SWAP_IN: "swap_in",
    VIRTIO_BALLOON_S_SWAP_OUT: "swap_out",
    VIRTIO_BALLOON_S_MAJFLT: "major_faults",
    VIRTIO_BALLOON_S_MINFLT: "minor_faults",
    VIRTIO_BALLOON_S_MEMFREE: "free",
    VIRTIO_BALLOON_S_MEMTOT: "total",
    VIRTIO_BALLOON_S_AVAIL: "available",
    VIRTIO_BALLOON_S_CACHES: "caches",
    VIRTIO_BALLOON_S_HTLB_PGALLOC: "huge_page_allocations",
    VIRTIO_BALLOON_S_HTLB_PGFAIL: "huge_page_failures",
}
