"""The short way of the usual requests: reads and writes with their data in one piece.

Nearly all that a driver sends is of that kind, so a whole batch of them goes through the ring, to
the backend and back in a few loops, without an object or a call for each. Whatever is not as usual
(another layout, another type, something wrong, a failure) is left in the ring for the general way
of `pyvmm.virtio.blk.request` and `BlockDevice`, where all refusals and messages are made.
"""

from __future__ import annotations

from collections.abc import Callable

from pyvmm.virtio.blk.request import HEADER, SECTOR
from pyvmm.virtio.blk.uapi import VIRTIO_BLK_S_OK, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT
from pyvmm.virtio.queue.chain import Usual
from pyvmm.virtio.queue.protocol import Queue

_STATUS_SIZE = 1
_unpack_header = HEADER.unpack
_PART_OF_SECTOR = SECTOR - 1

CarryOut = Callable[[int, int, int, list[memoryview]], bool]
Expect = Callable[[int, int], None]


def serve_usual(queue: Queue, most: int, carry_out: CarryOut, expect: Expect | None = None) -> bool:
    """Carry out and return the next requests of the usual kind, of about `most` bytes in all.

    `carry_out(type, sector, end, buffers)` reads or writes the sectors up to `end` and says whether
    it could; requests for sectors that follow one another go to it at once. `expect(sector, end)`
    is told of all reads beforehand, if there are several. Returns whether the next request, if
    there is one already, is for the general way.
    """
    chains, more = queue.peek_usual(HEADER.size, _STATUS_SIZE, most)
    written: list[int] = []
    start = 0
    try:
        runs = _runs(chains)
        if expect is not None:
            reads = [(run[1], run[2]) for run in runs if run[0] == VIRTIO_BLK_T_IN]
            for sector, end in reads if len(reads) > 1 else ():
                expect(sector, end)
        for type, sector, end, views in runs:
            if queue.halt or not carry_out(type, sector, end, views):
                break
            for _, _, status, size, is_write in chains[start : start + len(views)]:
                status[0] = VIRTIO_BLK_S_OK
                written.append(1 if is_write else size + 1)
            start += len(views)
    finally:
        queue.use_peeked(written)
    return more or start < len(chains)


def _runs(chains: list[Usual]) -> list[tuple[int, int, int, list[memoryview]]]:
    """Requests of one type for sectors that follow one another: type, first sector, the sector
    behind the last, and the buffers. Ends in front of a request that is not as usual."""
    runs: list[tuple[int, int, int, list[memoryview]]] = []
    unpack, wanted_write, wanted_read = _unpack_header, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN
    run_type, start, end = -1, 0, 0
    views: list[memoryview] = []
    for header, data, _, size, is_write in chains:
        type, _, sector = unpack(header)
        if type != (wanted_write if is_write else wanted_read) or size & _PART_OF_SECTOR:
            break
        if sector != end or type != run_type:
            if views:
                runs.append((run_type, start, end, views))
            run_type, start, views = type, sector, []
            end = sector
        views.append(data)
        end += size // SECTOR
    if views:
        runs.append((run_type, start, end, views))
    return runs
