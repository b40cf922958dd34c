"""Random rings: whatever a driver writes into the shared memory, the walk ends, the only error is
DriverError, and no byte changes outside the buffers that were made writable and the used ring."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from queue_rig import HOLE_END, RAM, Rig

from pyvmm.errors import DriverError
from pyvmm.testing import Desc
from pyvmm.virtio.queue import split as split_queue

SIZE = 8
TABLES = 0x2000  # where indirect tables may lie

# Mostly plausible values with hostile ones among them, or a fuzzer would meet nothing but the
# first check.
addresses = st.one_of(
    st.integers(0x4000, 0x4100),
    st.sampled_from([0, TABLES, TABLES + 16, RAM - 4, RAM, HOLE_END - 4, HOLE_END, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)
lengths = st.one_of(
    st.integers(0, 64), st.sampled_from([16, 32, 48, 128, 2**32 - 1]), st.integers(0, 2**32 - 1)
)
flags = st.one_of(st.integers(0, 3), st.integers(0, 7), st.integers(0, 0xFFFF))
nexts = st.one_of(st.integers(0, SIZE), st.integers(0, 0xFFFF))
descs = st.builds(Desc, addresses, lengths, flags, nexts)
heads = st.one_of(st.integers(0, SIZE - 1), st.integers(0, 0xFFFF))


def allowed(rig, chain, changed: set[int]) -> set[int]:
    for addr, length in chain.writable:
        if rig.memory.contains(addr, length) and length < 4096:
            changed.update(range(addr, addr + length))
    return changed


def differences(before: bytes, after: bytes) -> set[int]:
    found = set()
    for start in range(0, len(before), 4096):
        if before[start : start + 4096] != after[start : start + 4096]:
            found |= {
                start + i
                for i in range(min(4096, len(before) - start))
                if before[start + i] != after[start + i]
            }
    # The second region follows the first one in a snapshot.
    return {place if place < RAM else place - RAM + HOLE_END for place in found}


class CountingUnpack:
    def __init__(self, unpack):
        self.unpack = unpack
        self.count = 0

    def __call__(self, table, offset):
        self.count += 1
        return self.unpack(table, offset)


@settings(max_examples=200, deadline=None)
@given(
    table=st.lists(descs, min_size=SIZE, max_size=SIZE),
    indirect=st.lists(descs, max_size=SIZE),
    ring=st.lists(heads, min_size=1, max_size=SIZE),
    idx=st.one_of(st.none(), st.integers(0, 0xFFFF)),
    event_idx=st.booleans(),
    used_event=st.integers(0, 0xFFFF),
)
def test_random_rings(table, indirect, ring, idx, event_idx, used_event):
    rig = Rig(size=SIZE, event_idx=event_idx)
    try:
        for index, desc in enumerate(table):
            rig.driver.write_desc(index, desc)
        rig.driver.write_table(TABLES, indirect)
        for head in ring:
            rig.driver.offer(head)
        rig.driver.publish()
        if idx is not None:
            rig.driver.avail_idx = idx
        rig.driver.used_event = used_event
        used_ring = range(rig.driver.used_addr, rig.driver.used_addr + 6 + 8 * SIZE)
        before, changed = rig.snapshot(), set(used_ring)
        run_device(rig, changed)
        assert differences(before, rig.snapshot()) <= changed
    finally:
        rig.close()


def run_device(rig: Rig, changed: set[int]) -> None:
    counter = CountingUnpack(split_queue._unpack_desc)
    split_queue._unpack_desc = counter
    try:
        rig.queue.disable_notification()
        for taken, chain in enumerate(rig.queue, 1):
            # A pointer to an indirect table is one descriptor more than the chain has.
            assert counter.count <= taken * (SIZE + 1)
            allowed(rig, chain, changed)
            rig.queue.add_used(chain, fill(chain))
        rig.queue.publish_used()
        rig.queue.enable_notification()
    except DriverError as error:
        assert error.section
    finally:
        split_queue._unpack_desc = counter.unpack


def fill(chain) -> int:
    """A device that reads all, writes all, and gives up on a buffer that is not there."""
    reader, writer = chain.reader(), chain.writer()
    try:
        reader.read(min(reader.available, 4096))
        for _, length in chain.writable:
            if length >= 4096:
                break
            writer.write(b"\xa5" * length)
    except DriverError:
        pass
    return writer.written if writer.written < 2**32 else 0
