"""Chains that no driver may put into a ring, by name, for tests to be parametrised over.

    @pytest.mark.parametrize("illegal", illegal_chains("split"), ids=str)
    def test_hostile(illegal):
        illegal.offer(queue)  # a MockDriver
        driver.kick(0)
        if illegal.outcome == "refused":
            driver.wait_needs_reset()

"Refused" is what a device must not accept: DEVICE_NEEDS_RESET. "Contained" leaves it the choice
(to answer with an error, say, or to wait) as long as the monitor lives and memory that is not the
device's to write stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pyvmm.testing.chains import BOTH
from pyvmm.testing.mock_driver import Desc, MockSplitDriver
from pyvmm.testing.packed_driver import AVAIL, USED, MockPackedDriver, PackedDesc
from pyvmm.testing.ring import INDIRECT, NEXT, WRITE, Element, MockDriver

Outcome = Literal["refused", "contained"]
_END = 1 << 64


@dataclass(frozen=True)
class IllegalChain:
    """Something that no driver may put into a ring; `section` is the rule (virtio 1.3), `outcome`
    what the device has to make of it. `indirect` tells those that need VIRTIO_F_INDIRECT_DESC.

    A ring of at least four descriptors is needed, at rest, and one that `offer` may spoil.
    """

    name: str
    section: str
    build: Callable[[MockDriver], None]
    outcome: Outcome = "refused"
    rings: tuple[str, ...] = BOTH
    indirect: bool = False

    def __str__(self) -> str:
        return self.name

    def offer(self, queue: MockDriver) -> None:
        """Put it into the ring and publish it; the kick is the caller's."""
        self.build(queue)


def illegal_chains(
    ring: str, outcome: Outcome | None = None, *, tables: bool = True
) -> list[IllegalChain]:
    """Those of ILLEGAL that fit a ``"split"`` or a ``"packed"`` ring, all or one outcome only;
    without `tables` only those that do not need VIRTIO_F_INDIRECT_DESC."""
    return [
        chain
        for chain in ILLEGAL
        if ring in chain.rings
        and outcome in (None, chain.outcome)
        and (tables or not chain.indirect)
    ]


def _elements_of(
    *elements: Callable[[MockDriver], Element],
) -> Callable[[MockDriver], None]:
    def build(queue: MockDriver) -> None:
        queue.add_elements([make(queue) for make in elements])
        queue.publish()

    return build


def _buffer(length: int, flags: int = 0) -> Callable[[MockDriver], Element]:
    return lambda queue: Element(queue.arena.alloc(max(length, 1)), length, flags)


def _at(where: Callable[[MockDriver], int], length: int, flags: int) -> Callable[..., Element]:
    return lambda queue: Element(where(queue), length, flags)


def _table(
    *elements: Callable[[MockDriver], Element], size: int | None = None, flags: int = INDIRECT
) -> Callable[[MockDriver], Element]:
    def make(queue: MockDriver) -> Element:
        table = queue.make_table([element(queue) for element in elements])
        return Element(table, 16 * len(elements) if size is None else size, flags)

    return make


def _ram_end(queue: MockDriver) -> int:
    return queue.memory.regions[0].end


def _before_ram_end(queue: MockDriver) -> int:
    return _ram_end(queue) - 16


def _wrapping(queue: MockDriver) -> int:
    return _END - 16


def _too_long_table(queue: MockDriver) -> None:
    pointer = _table(*[_buffer(1)] * (queue.size + 1))
    _elements_of(pointer)(queue)


def _split(build: Callable[[MockSplitDriver], None]) -> Callable[[MockDriver], None]:
    def checked(queue: MockDriver) -> None:
        if not isinstance(queue, MockSplitDriver):
            raise TypeError("this chain is for a split ring")
        build(queue)

    return checked


def _packed(build: Callable[[MockPackedDriver], None]) -> Callable[[MockDriver], None]:
    def checked(queue: MockDriver) -> None:
        if not isinstance(queue, MockPackedDriver):
            raise TypeError("this chain is for a packed ring")
        build(queue)

    return checked


def _split_descs(*flags_and_next: tuple[int, int]) -> Callable[[MockDriver], None]:
    """Descriptors from index 0 on with these flags and these next fields."""

    def build(queue: MockSplitDriver) -> None:
        addr = queue.arena.alloc(16)
        queue.add_raw([Desc(addr, 16, flags, next) for flags, next in flags_and_next])
        queue.publish()

    return _split(build)


def _loop_in_table(queue: MockSplitDriver) -> None:
    table = queue.arena.alloc(32)
    queue.write_table(table, [Desc(table, 1, NEXT, 1), Desc(table, 1, NEXT, 0)])
    queue.add_raw([Desc(table, 32, INDIRECT)])
    queue.publish()


def _next_past_table(queue: MockSplitDriver) -> None:
    # 2 would be good in the descriptor table itself, but this table has two entries.
    table = queue.arena.alloc(48)
    queue.write_table(table, [Desc(table, 1, NEXT, 2), Desc(table, 1), Desc(table, 1)])
    queue.add_raw([Desc(table, 32, INDIRECT)])
    queue.publish()


def _jump(step: int) -> Callable[[MockDriver], None]:
    def build(queue: MockSplitDriver) -> None:
        distance = step if step < 0 else queue.size + step
        queue.avail_idx = (queue.avail_idx + distance) % 0x10000

    return _split(build)


def _head_out_of_range(queue: MockSplitDriver) -> None:
    queue.offer(queue.size)
    queue.publish()


def _head_twice(queue: MockSplitDriver) -> None:
    addr = queue.arena.alloc(4)
    queue.add_raw([Desc(addr, 4, WRITE)])
    queue.offer(0)
    queue.publish()


def _all_chained(queue: MockPackedDriver) -> None:
    addr = queue.arena.alloc(16)
    queue.add_raw([PackedDesc(addr, 16, NEXT)] * queue.size)
    queue.publish()


def _id_past_the_end(queue: MockPackedDriver) -> None:
    queue.add_raw([PackedDesc(queue.arena.alloc(16), 16, WRITE, queue.size)])
    queue.publish()


def _packed_descs(*flags_and_id: tuple[int, int]) -> Callable[[MockDriver], None]:
    def build(queue: MockPackedDriver) -> None:
        addr = queue.arena.alloc(16)
        for flags, id in flags_and_id:
            queue.add_raw([PackedDesc(addr, 16, flags, id)])
        queue.publish()

    return _packed(build)


_FRAMING = "2.7.4.2 Driver Requirements: Message Framing; 2.8.17 Driver Requirements: "
_FRAMING += "Scatter-Gather Support"
_INDIRECT = "2.7.5.3.1 and 2.8.19 Driver Requirements: Indirect Descriptors"
_TABLE = "2.7.5.2 Driver Requirements: The Virtqueue Descriptor Table"
_BUFFERS = "2.7.5 The Virtqueue Descriptor Table; 2.8.4 Element Address and Length"
_AVAIL = "2.7.6.1 Driver Requirements: The Virtqueue Available Ring"
_SUPPLY = "2.7.13 and 2.8.21 Supplying Buffers to The Device"
_LIST = "2.8.17 Driver Requirements: Scatter-Gather Support"
_SPLIT, _PACKED = ("split",), ("packed",)

ILLEGAL = (
    IllegalChain(
        "readable after writable", _FRAMING, _elements_of(_buffer(4, WRITE | NEXT), _buffer(4))
    ),
    # Tables
    IllegalChain(
        "table and NEXT",
        _INDIRECT,
        _elements_of(_table(_buffer(4), flags=INDIRECT | NEXT), _buffer(4)),
        indirect=True,
    ),
    IllegalChain(
        "table in table",
        _INDIRECT,
        _elements_of(_table(_table(_buffer(4)))),
        rings=_SPLIT,
        indirect=True,
    ),
    IllegalChain(
        "table in packed table",  # a device is to ignore the flag (2.8.7)
        _INDIRECT,
        _elements_of(_table(_table(_buffer(4)))),
        "contained",
        rings=_PACKED,
        indirect=True,
    ),
    IllegalChain(
        "table of 0 bytes", _INDIRECT, _elements_of(_table(_buffer(4), size=0)), indirect=True
    ),
    IllegalChain(
        "table of 17 bytes",
        _INDIRECT,
        _elements_of(_table(_buffer(4), _buffer(4), size=17)),
        indirect=True,
    ),
    IllegalChain("table longer than the queue", _INDIRECT, _too_long_table, indirect=True),
    IllegalChain(
        "table outside RAM", _INDIRECT, _elements_of(_at(_ram_end, 16, INDIRECT)), indirect=True
    ),
    IllegalChain(
        "table over the end of RAM",
        _INDIRECT,
        _elements_of(_at(_before_ram_end, 32, INDIRECT)),
        indirect=True,
    ),
    IllegalChain(
        "table that wraps 2^64",
        _INDIRECT,
        _elements_of(_at(_wrapping, 32, INDIRECT)),
        indirect=True,
    ),
    IllegalChain("loop in a table", _INDIRECT, _split(_loop_in_table), rings=_SPLIT, indirect=True),
    IllegalChain(
        "next past its table", _INDIRECT, _split(_next_past_table), rings=_SPLIT, indirect=True
    ),
    # Walks
    IllegalChain("loop of one", _TABLE, _split_descs((NEXT, 0)), rings=_SPLIT),
    IllegalChain("loop of two", _TABLE, _split_descs((NEXT, 1), (NEXT, 0)), rings=_SPLIT),
    IllegalChain("next out of range", _TABLE, _split_descs((NEXT, 0xFFFF)), rings=_SPLIT),
    IllegalChain("head out of range", _TABLE, _split(_head_out_of_range), rings=_SPLIT),
    IllegalChain("same head twice", _SUPPLY, _split(_head_twice), rings=_SPLIT),
    IllegalChain("available index jumps", _AVAIL, _jump(1), rings=_SPLIT),
    IllegalChain("available index goes back", _AVAIL, _jump(-1), rings=_SPLIT),
    IllegalChain("chain of the whole ring", _LIST, _packed(_all_chained), rings=_PACKED),
    IllegalChain(
        "list without an end", _LIST, _packed_descs((NEXT, 0)), "contained", rings=_PACKED
    ),
    IllegalChain(
        "second of a list not available",
        _LIST,
        _packed_descs((NEXT, 0), (AVAIL | USED, 0)),
        "contained",
        rings=_PACKED,
    ),
    IllegalChain(
        "id out of range", _SUPPLY, _packed_descs((WRITE, 0xFFFF)), "contained", rings=_PACKED
    ),
    IllegalChain(
        "id just out of range", _SUPPLY, _packed(_id_past_the_end), "contained", rings=_PACKED
    ),
    IllegalChain(
        "same id twice",
        _SUPPLY,
        _packed_descs((WRITE, 1), (WRITE, 1)),
        "contained",
        rings=_PACKED,
    ),
    # Buffers
    IllegalChain(
        "more than 2^32 bytes",
        _TABLE,
        _elements_of(_at(_ram_end, 0xFFFF_FFFF, WRITE | NEXT), _at(_ram_end, 0xFFFF_FFFF, WRITE)),
        rings=_SPLIT,
    ),
    IllegalChain(
        "more than 2^32 bytes in a packed ring",  # which has no rule against it
        _BUFFERS,
        _elements_of(_at(_ram_end, 0xFFFF_FFFF, WRITE | NEXT), _at(_ram_end, 0xFFFF_FFFF, WRITE)),
        "contained",
        rings=_PACKED,
    ),
    *(
        IllegalChain(
            f"{kind} buffer {place}",
            _BUFFERS,
            _elements_of(_at(where, 32, flags)),
            "contained",
        )
        for kind, flags in (("readable", 0), ("writable", WRITE))
        for place, where in (
            ("outside RAM", _ram_end),
            ("over the end of RAM", _before_ram_end),
            ("that wraps 2^64", _wrapping),
        )
    ),
    IllegalChain("empty readable buffer", _BUFFERS, _elements_of(_buffer(0)), "contained"),
    IllegalChain("empty writable buffer", _BUFFERS, _elements_of(_buffer(0, WRITE)), "contained"),
)
"""Chains that a device has to survive, one broken rule in each."""
