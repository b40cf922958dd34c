"""The quick way of usual requests and the general way, side by side: whatever a driver puts into
its ring, guest memory and the disk end up the same, byte by byte, and so does what is reported.

A device with a trace has the general way only, one request at a time. One whose storage is slow
looks at its requests before it is their turn.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from queue_rig import HOLE_END, LAYOUTS, RAM, Rig

from pyvmm.errors import DriverError, HostError
from pyvmm.testing.blk_driver import FLUSH, GET_ID, IN, OUT, UNTOUCHED, header
from pyvmm.testing.ring import INDIRECT, NEXT, WRITE, Element
from pyvmm.virtio.blk.backend import Backend, scatter
from pyvmm.virtio.blk.device import BlockDevice
from pyvmm.virtio.features import mask

SECTORS = 40
DISCARD, WRITE_ZEROES = 11, 13
WAYS = ("general", "general, slow", "quick", "quick, slow")
DATA, SMALL = 0x4_0000, 0x2_0000  # where data and where headers and status bytes lie


class Disk(Backend):
    """In memory; sectors that are `broken` can be neither read nor written. If it is `slow`, each
    read is one that had to wait."""

    size_sectors = SECTORS
    can_discard = True

    def __init__(self, broken: frozenset[int], *, read_only: bool, slow: bool) -> None:
        self.slow = slow
        self.data = bytearray(b"".join(bytes([n + 1]) * 512 for n in range(SECTORS)))
        self.broken = broken
        self.read_only = read_only

    def _check(self, size: int, offset: int) -> None:
        assert offset >= 0 and offset + size <= len(self.data) and not (offset | size) % 512
        if any(offset < (sector + 1) * 512 and sector * 512 < offset + size
               for sector in self.broken):  # fmt: skip
            raise HostError(errno.EIO, "broken sector")

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        assert sum(map(len, views)) == size
        self.misses += self.slow
        self._check(size, offset)
        scatter(self.data[offset : offset + size], views)

    def expect(self, size: int, offset: int) -> None:
        assert self.slow and offset + size <= len(self.data)

    def writev(self, views: list[memoryview], size: int, offset: int) -> None:
        assert sum(map(len, views)) == size
        self._check(size, offset)
        self.data[offset : offset + size] = b"".join(views)

    def discard(self, offset: int, size: int) -> None:
        self._check(size, offset)
        self.data[offset : offset + size] = b"\xdd" * size


@dataclass(frozen=True)
class Ask:
    """One request: what it asks for and how it lies in the ring."""

    type: int = IN
    sector: int = 0
    pieces: tuple[int, ...] = (512,)
    readable: bool = False  # the data; usually that of a write
    place: int = 0  # of the data, in units of 512 bytes; its own range for each request if 0
    outside: bool = False
    header_cut: int = 0
    joined: bool = False  # the status byte lies in the data's last descriptor
    status_size: int = 1
    order: str = "hds"  # header, data, status
    odd: int = 0  # flags that mean nothing
    indirect: bool = False
    table_flags: int = 0


def elements_of(ask: Ask, number: int, memory) -> list[Element]:
    small = SMALL + 256 * number
    memory.write(small, header(ask.type, ask.sector))
    memory.write(small + 64, bytes([UNTOUCHED]) * 8)
    cut = ask.header_cut
    lengths = (cut, 16 - cut) if cut else (16,)
    head = [Element(small + n * cut, length) for n, length in enumerate(lengths)]
    place = ask.place * 512 or DATA + 0x2000 * number
    if ask.outside:
        place = (RAM - 256, HOLE_END + 0xFF00)[number % 2]
    data = []
    for size in ask.pieces:
        data.append(Element(place, size, 0 if ask.readable else WRITE))
        if ask.readable and not ask.outside:
            memory.write(place, bytes((number + n) % 251 for n in range(size)))
        place += size
    status = [Element(small + 64, ask.status_size, WRITE)]
    if ask.joined and data and not ask.readable and not ask.outside:
        addr, length, flags = data.pop()
        data.append(Element(addr, length + 1, flags))
        status = []
    parts = {"h": head, "d": data, "s": status}
    found = [part for letter in ask.order for part in parts[letter]] or head
    last = len(found) - 1
    return [
        Element(addr, length, flags | ask.odd | (NEXT if place < last else 0))
        for place, (addr, length, flags) in enumerate(found)
    ]


class World:
    """A device that has one of the ways, a ring and a disk."""

    def __init__(self, way, layout, size, start, event_idx, broken, read_only, stops, features):
        self.rig = Rig(size, layout=layout, event_idx=event_idx, start=start)
        self.disk = Disk(broken, read_only=read_only, slow="slow" in way)
        self.lines: list[str] = []
        self.told: list[str] = []
        self.device = BlockDevice(
            self.disk,
            name="vda",
            log=self.lines.append,
            stop=self.told.append if stops else None,
            trace=None if "quick" in way else lambda event: None,
        )
        self.device.accept_features(features)
        self.found: list[object] = []

    def offer(self, asks, scratches, first):
        driver = self.rig.driver
        for number, ask in enumerate(asks, first):
            elements = elements_of(ask, number, self.rig.memory)
            if ask.indirect:
                table = driver.make_table(elements)
                flags = INDIRECT | ask.table_flags
                elements = [Element(table, 16 * len(elements), flags)]
            if driver.room < len(elements):
                break
            driver.add_elements(elements)
        for offset, value in scratches:
            place = driver.desc_addr + offset % (16 * driver.size)
            self.rig.memory.write(place, bytes([value]))
        driver.publish()

    def serve(self):
        """As a worker does it: until nothing more is found, or the ring turns out to be broken."""
        queue = self.rig.queue
        try:
            while True:
                queue.disable_notification()
                self.device.serve(queue)
                self.found.append(queue.publish_used())
                if queue.halt or not queue.enable_notification():
                    return True
        except DriverError as error:
            self.found += [queue.publish_used(), str(error)]
            return False

    def outcome(self):
        # Of calls that fail the quick way makes more; what is reported is the same.
        notified = any(found is True for found in self.found)
        errors = [found for found in self.found if isinstance(found, str)]
        stats = self.device.stats()
        return {
            "memory": self.rig.snapshot(),
            "disk": bytes(self.disk.data),
            "lines": self.lines,
            "told": self.told,
            "errors": errors,
            "notified": notified,
            "queue": self.rig.queue._next_avail,
            "used": self.rig.queue._next_used,
            "stats": stats,
        }

    def close(self):
        self.rig.close()


near = st.integers(0, 7)
sectors = near | st.sampled_from([SECTORS - 2, SECTORS - 1, SECTORS, 2**63, 2**64 - 1])
usual = st.builds(
    lambda write, sector, size, indirect: Ask(
        OUT if write else IN, sector, (size,), write, indirect=indirect
    ),
    st.booleans(), sectors, st.sampled_from([512, 1024, 4096]), st.booleans(),
)  # fmt: skip
ways_to_differ = {
    "type": st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 77]),
    "pieces": st.lists(st.sampled_from([0, 1, 16, 20, 511, 512, 513]), max_size=3).map(tuple),
    "readable": st.booleans(),
    "outside": st.just(True),
    "header_cut": st.sampled_from([1, 8]),
    "joined": st.just(True),
    "status_size": st.sampled_from([0, 2, 513]),
    "order": st.sampled_from(["hsd", "dhs", "hd", "h", "ds", "shd"]),
    "odd": st.sampled_from([8, 0x40, 0x4000]),
    "table_flags": st.sampled_from([WRITE, NEXT, WRITE | 8]),
}


@st.composite
def almost_usual(draw):
    """A usual request but for one thing or two."""
    names = st.lists(st.sampled_from(sorted(ways_to_differ)), min_size=1, max_size=2)
    return replace(draw(usual), **{name: draw(ways_to_differ[name]) for name in draw(names)})


rounds = st.lists(
    st.lists(usual | usual | usual | almost_usual(), min_size=3, max_size=10),
    min_size=1,
    max_size=3,
)
# A byte of the descriptors that the driver spoils before it shows them: any, or of their flags and
# their `next`, with values that might pass.
spoilt = st.builds(
    lambda index, field, value: (16 * index + field, value),
    st.integers(0, 15), st.sampled_from([8, 9, 12, 14]), st.integers(0, 16),
)  # fmt: skip
scratch = st.tuples(st.integers(0, 16 * 40), st.integers(0, 255)) | spoilt
starts = {
    "split": st.sampled_from([None, 65533, 65535, 7]),
    "packed": st.sampled_from([None, 1 << 15 | 30, 30, 0]),
}
features = st.sampled_from([mask(9, 13, 14), mask(9), 0])  # FLUSH, DISCARD, WRITE_ZEROES


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nobody_can_tell_the_ways_apart(layout):
    @settings(max_examples=300)
    @given(
        rounds=rounds,
        scratches=st.lists(scratch, max_size=1),
        start=starts[layout],
        event_idx=st.booleans(),
        broken=st.frozensets(near, max_size=1),
        read_only=st.booleans(),
        stops=st.booleans(),
        features=features,
    )
    @example([[Ask(), Ask(sector=1), Ask(FLUSH, pieces=()), Ask(OUT, readable=True)]],
             [], None, False, frozenset({1}), False, True, mask(9))  # fmt: skip
    def check(rounds, scratches, start, event_idx, broken, read_only, stops, features):
        size = 32 if layout == "split" else 31
        outcomes = []
        for way in WAYS:
            world = World(way, layout, size, start, event_idx, broken, read_only, stops, features)
            number = 0
            for asks in rounds:
                last = asks is rounds[-1]
                world.offer(asks, scratches if last else (), number)
                number += len(asks)
                if not world.serve() or last or world.told:
                    break
                world.rig.all_used()
            outcomes.append(world.outcome())
            world.close()
        for what, value in outcomes[0].items():
            assert [outcome[what] for outcome in outcomes] == [value] * len(WAYS), what

    check()
