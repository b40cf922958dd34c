"""Lawful chains by name, for tests to be parametrised over; each for the rings it fits.

    @pytest.mark.parametrize("legal", legal_chains("packed"), ids=str)
    def test_echo(legal):
        chain = legal.offer(queue)  # a MockDriver
        driver.kick(0)
        …

Those that break a rule are in `pyvmm.testing.illegal`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pyvmm.testing.packed_driver import AVAIL, USED
from pyvmm.testing.ring import INDIRECT, NEXT, WRITE, Buffer, Chain, Element, MockDriver

BOTH = ("split", "packed")


@dataclass(frozen=True)
class LegalChain:
    """A chain that every device has to take; sizes of its parts in bytes.

    `indirect` tells those that need VIRTIO_F_INDIRECT_DESC. `arrange` puts the chain into the
    ring, the usual way unless given.
    """

    name: str
    readable: tuple[int, ...] = ()
    writable: tuple[int, ...] = ()
    indirect: bool = False
    scrambled: bool = False
    rings: tuple[str, ...] = BOTH
    arrange: Callable[[MockDriver, Sequence[Buffer], Sequence[Buffer]], Chain] | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def content(self) -> bytes:
        """The contents of the readable parts, joined."""
        return bytes(number * 7 % 251 for number in range(sum(self.readable)))

    def offer(self, queue: MockDriver) -> Chain:
        """Put the chain into the ring and publish it; the kick is the caller's."""
        readable = []
        start = 0
        for size in self.readable:
            buffer = Buffer(queue.arena.alloc(size, align=1), size)
            queue.memory.write(buffer.addr, self.content[start : start + size])
            readable.append(buffer)
            start += size
        writable = [Buffer(queue.arena.alloc(size, align=1), size) for size in self.writable]
        if self.arrange is None:
            chain = queue.add(readable, writable, indirect=self.indirect, scrambled=self.scrambled)
        else:
            chain = self.arrange(queue, readable, writable)
        queue.publish()
        return chain


def _elements(readable: Sequence[Buffer], writable: Sequence[Buffer]) -> list[Element]:
    return [Element(*part) for part in readable] + [Element(*part, WRITE) for part in writable]


def _write_flag_on_table(
    queue: MockDriver, readable: Sequence[Buffer], writable: Sequence[Buffer]
) -> Chain:
    # 2.7.5.3.2 and 2.8.7: the device ignores WRITE on a descriptor that refers to a table.
    elements = _elements(readable, writable)
    pointer = Element(queue.make_table(elements), 16 * len(elements), INDIRECT | WRITE)
    return queue.add_elements([pointer], readable, writable)


def _table_behind_direct(
    queue: MockDriver, readable: Sequence[Buffer], writable: Sequence[Buffer]
) -> Chain:
    # 2.7.5.3.2: direct descriptors may come before the one that refers to a table.
    first, *rest = _elements(readable, writable)
    pointer = Element(queue.make_table(rest), 16 * len(rest), INDIRECT)
    return queue.add_elements(
        [first._replace(flags=first.flags | NEXT), pointer], readable, writable
    )


def _reserved_flags(
    queue: MockDriver, readable: Sequence[Buffer], writable: Sequence[Buffer]
) -> Chain:
    reserved = 1 << 3 | 1 << 9
    elements = _elements(readable, writable)
    flagged = [
        element._replace(
            flags=element.flags | reserved | (NEXT if element is not elements[-1] else 0)
        )
        for element in elements
    ]
    return queue.add_elements(flagged, readable, writable)


def _next_in_packed_table(
    queue: MockDriver, readable: Sequence[Buffer], writable: Sequence[Buffer]
) -> Chain:
    # 2.8.7: in a table all flags but WRITE are ignored by the device, AVAIL and USED among them.
    elements = [
        element._replace(flags=element.flags | NEXT | AVAIL | USED)
        for element in _elements(readable, writable)
    ]
    pointer = Element(queue.make_table(elements), 16 * len(elements), INDIRECT)
    return queue.add_elements([pointer], readable, writable)


LEGAL = (
    LegalChain("one readable", (16,)),
    LegalChain("one writable", (), (16,)),
    LegalChain("one of each", (16,), (16,)),
    LegalChain("three of each", (1, 2, 3), (3, 2, 1)),
    LegalChain("single bytes", (1, 1, 1, 1), (1, 1, 1, 1)),
    LegalChain("a page and a byte", (4096, 1), (1, 4096)),
    LegalChain("scrambled", (5, 6, 7), (7, 6, 5), scrambled=True),
    LegalChain("table of one", (), (9,), indirect=True),
    LegalChain("table", (5, 6, 7), (7, 6, 5), indirect=True),
    LegalChain("scrambled table", (5, 6, 7), (7, 6, 5), indirect=True, scrambled=True),
    LegalChain("table behind WRITE", (5,), (7,), indirect=True, arrange=_write_flag_on_table),
    LegalChain(
        "direct, then table",
        (5, 6),
        (7,),
        indirect=True,
        rings=("split",),
        arrange=_table_behind_direct,
    ),
    LegalChain("reserved flags", (5, 6), (7,), arrange=_reserved_flags),
    LegalChain(
        "reserved flags in table",
        (5, 6),
        (7,),
        indirect=True,
        rings=("packed",),
        arrange=_next_in_packed_table,
    ),
)
"""Chains of up to eight descriptors that the specification allows."""


def legal_chains(ring: str, *, tables: bool = True) -> list[LegalChain]:
    """Those of LEGAL that fit a ``"split"`` or a ``"packed"`` ring; without `tables` only those
    that do not need VIRTIO_F_INDIRECT_DESC."""
    return [chain for chain in LEGAL if ring in chain.rings and (tables or not chain.indirect)]
