"""Random packed rings: whatever a driver writes into the shared memory, the walk ends, the only
error is DriverError, and no byte changes outside the buffers that were made writable and the
queue."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from queue_rig import HOLE_END, RAM, PackedRig
from test_split_queue_fuzz import CountingUnpack, allowed, differences, fill

from pyvmm.errors import DriverError
from pyvmm.testing import PackedDesc
from pyvmm.virtio.queue import packed as packed_queue

SIZE = 8
TABLES = 0x2000  # where indirect tables may lie
WRAP = 1 << 15

addresses = st.one_of(
    st.integers(0x4000, 0x4100),
    st.sampled_from([0, TABLES, TABLES + 16, RAM - 4, RAM, HOLE_END - 4, HOLE_END, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)
lengths = st.one_of(
    st.integers(0, 64), st.sampled_from([16, 32, 48, 128, 2**32 - 1]), st.integers(0, 2**32 - 1)
)
# AVAIL and USED are toggled by the mock driver where they are in here: mostly they are right.
flags = st.one_of(st.integers(0, 3), st.integers(0, 7), st.integers(0, 0xFFFF))
ids = st.one_of(st.integers(0, SIZE - 1), st.integers(0, 0xFFFF))
descs = st.builds(PackedDesc, addresses, lengths, flags, ids)


@settings(max_examples=250, deadline=None)
@given(
    start=st.sampled_from([WRAP, 0, WRAP | 5, 7]),
    ring=st.lists(descs, max_size=2 * SIZE),
    table=st.lists(descs, max_size=SIZE),
    raw=st.lists(st.tuples(st.integers(0, SIZE - 1), descs), max_size=3),
    event_idx=st.booleans(),
    event=st.integers(0, 0xFFFF_FFFF),
    in_order=st.booleans(),
)
def test_random_rings(start, ring, table, raw, event_idx, event, in_order):
    rig = PackedRig(SIZE, event_idx=event_idx, start=start, in_order=in_order)
    try:
        rig.driver.write_table(TABLES, table)
        for desc in ring:
            rig.driver.add_raw([desc])
        rig.driver.publish()
        for index, desc in raw:
            rig.driver.write_desc(index, desc)
        rig.memory.write(rig.driver.driver_addr, event.to_bytes(4, "little"))
        own = range(rig.driver.desc_addr, rig.driver.desc_addr + 16 * SIZE)
        device = range(rig.driver.device_addr, rig.driver.device_addr + 4)
        before, changed = rig.snapshot(), {*own, *device}
        run_device(rig, changed)
        assert differences(before, rig.snapshot()) <= changed
    finally:
        rig.close()


def run_device(rig: PackedRig, changed: set[int]) -> None:
    counter = CountingUnpack(packed_queue._unpack_desc)
    packed_queue._unpack_desc = counter
    try:
        rig.queue.disable_notification()
        for _ in range(3):
            taken = 0
            for chain in rig.queue:
                taken += chain.slots
                assert counter.count <= taken, "no descriptor is read that is not part of a chain"
                assert taken <= SIZE
                allowed(rig, chain, changed)
                rig.queue.add_used(chain, fill(chain))
            counter.count = 0
            rig.queue.publish_used()
            rig.queue.enable_notification()
    except DriverError as error:
        assert error.section
    finally:
        packed_queue._unpack_desc = counter.unpack
