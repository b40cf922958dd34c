"""Queues by themselves: rings that a driver fills at random, a device that makes any calls, and a
model, written from the specification, that says what has to come out.

Without a device, a transport and threads there are thousands of cases a second. A case draws
everything from one `random.Random`. It raises AssertionError, with the steps so far, if

- a chain is another one than the ring says, or is taken, or refused, where the model does not,
- anything but DriverError is raised (ValueError for a device's own mistakes),
- a byte of memory is not as the model has it after the device's turn,
- a queue that goes on from its saved state, or from the notes of one that was killed, has other
  chains in flight.

As long as the driver moves its indices by the rules, all this is compared exactly, whatever stands
in descriptors. Afterwards a queue may do anything that harms nobody else.
"""

from __future__ import annotations

import functools
import itertools
import json
import struct
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any, NamedTuple

import _cffi_backend

from pyvmm.errors import DriverError
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing.mmio_driver import (
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_RING_PACKED,
    Ring,
)
from pyvmm.vhost_user.inflight import Journal, region_size
from pyvmm.virtio.queue.build import restore_queue
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.state import QueueState

NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
FIRST, SECOND = (0, 0x2000), (0x4000, 0x1000)  # RAM, with a hole in it
TABLE, DRIVER, DEVICE = 0, 0x200, 0x300
TABLES, BUFFERS = 0x400, 0x1000
MOST = 16  # entries
LONGEST = (1 << 32) - 1  # bytes written, as the ring can say it
LARGEST_TOUCHED = 1 << 16  # bytes of a chain that are read or written
_ffi = _cffi_backend.FFI()
_DESC = struct.Struct("<QLHH")
_HALF = struct.Struct("<H")
_QUEUE = 0  # its number


class Refused(Exception):
    """The model has found a rule that is broken."""


class Chain(NamedTuple):
    """A chain as the model has it; `position` is where it was taken."""

    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]
    slots: int
    position: int

    @property
    def room(self) -> int:
        return sum(length for _, length in self.writable)


@functools.cache
def _memory() -> GuestMemory:
    return GuestMemory((FIRST, SECOND))


@functools.cache
def _kick() -> EventFd:
    return EventFd()


_BLANK = bytes(BUFFERS) + bytes(range(256)) * ((FIRST[1] - BUFFERS) // 256)
_BLANK_TOO = bytes(reversed(range(256))) * (SECOND[1] // 256)


class Case:
    """A queue, its model, and the driver's side of both."""

    def __init__(self, rng: Random, ring: Ring) -> None:
        self.rng = rng
        self.steps: list[str] = []
        self.packed = ring == "packed"
        self.memory = _memory()
        self.ram = self.memory.regions[0].view
        self.far = self.memory.regions[1].view
        self.ram[:], self.far[:] = _BLANK, _BLANK_TOO
        sizes = (1, 2, 4, 4, 8, 8, 16, *((3, 5, 7, 12) if self.packed else ()))
        self.size = rng.choice(sizes)
        chance = rng.getrandbits(8)
        self.indirect, self.event_idx = bool(chance & 7), bool(chance & 8)
        self.in_order = not chance & 0x70
        self.features = (
            (F_INDIRECT_DESC if self.indirect else 0)
            | (F_EVENT_IDX if self.event_idx else 0)
            | (F_IN_ORDER if self.in_order else 0)
            | (F_RING_PACKED if self.packed else 0)
        )
        # Of a packed ring, places in two rounds: in the first the wrap counter is 1.
        self.span = 2 * self.size if self.packed else 1 << 16
        near = rng.choice((0, 0, self.size - 1, self.span - 1, self.span - self.size))
        self.next = self.published = self.returned_to = near % self.span
        self.driver_next = self.next
        if not self.packed:
            self._put_half(DRIVER + 2, self.next)
        self.held: dict[int, Chain] = {}
        self.chains: dict[int, DescriptorChain] = {}
        self.buffers: list[int] = []  # heads of those in flight that are plain buffers
        self.unpublished: list[tuple[Chain, int]] = []
        self.free = list(range(self.size))  # descriptors, or buffer ids
        self.driver_has: dict[int, list[int]] = {}  # by head, what comes back with it
        self.exact = True
        self.overwritten = False  # chains that the device holds, so it cannot step back to them
        # Of so many chains or descriptors one is wrong in a way that no index shows.
        self.errs = rng.choice((10, 50, 1000))
        self.told: set[tuple[int, int]] | None = set()
        self.journal: Journal | None = None
        self.notes = memoryview(bytearray(region_size(MOST)))
        self.resubmitted: dict[int, int] = {}
        self.queue = self._restored(self._state())
        if not self.packed and not chance & 0x80 and not self.in_order:
            self._keep_journal()
        self._keep()

    def note(self, step: str) -> None:
        self.steps.append(step)

    # --- memory ----------------------------------------------------------------------------------

    def _put_half(self, at: int, value: int) -> None:
        _HALF.pack_into(self.ram, at, value & 0xFFFF)

    def _half(self, at: int) -> int:
        value: int = _HALF.unpack_from(self.ram, at)[0]
        return value

    def _keep(self) -> None:
        """What memory is like before the device's turn; the model goes on from there."""
        self.expected, self.expected_far = bytearray(self.ram), bytes(self.far)

    def _is_ram(self, addr: int, length: int) -> bool:
        return any(at <= addr and addr + length <= at + size for at, size in (FIRST, SECOND))

    # --- the model: taking chains ----------------------------------------------------------------

    def walk(self) -> Chain | None:
        """The next chain, if it is there; `self.next` stays. Raises Refused."""
        chain = self._walk_packed() if self.packed else self._walk_split()
        if chain is None:
            return None
        if sum(length for _, length in (*chain.readable, *chain.writable)) > 1 << 32:
            raise Refused("too long")
        return chain

    def _check_head(self, head: int) -> int:
        if head >= self.size or head in self.held:
            raise Refused(f"head {head}")
        if any(chain.head == head for chain, _ in self.unpublished):
            raise Refused(f"head {head} again")
        return head

    def _table(self, addr: int, length: int, flags: int) -> bytes:
        if not self.indirect or flags & NEXT or not length or length % 16:
            raise Refused("a table")
        if not self._is_ram(addr, length):
            raise Refused("a table outside RAM")
        return bytes(self.memory.view(addr, length))

    def _walk_split(self) -> Chain | None:
        if self._half(DRIVER + 2) == self.next:
            return None
        entry = self._half(DRIVER + 4 + 2 * (self.next % self.size))
        head = self._check_head(self.resubmitted.get(self.next, entry))
        table: Any = self.ram[: 16 * self.size]
        entries, index, nested, parts = self.size, head, False, _Parts()
        while True:
            addr, length, flags, following = _DESC.unpack_from(table, 16 * index)
            if flags & INDIRECT:
                if nested:
                    raise Refused("nested")
                table, nested, index = self._table(addr, length, flags), True, 0
                entries = length // 16
                continue
            parts.add(addr, length, flags)
            if not flags & NEXT:
                return Chain(head, parts.readable, parts.writable, 1, self.next)
            if parts.count == self.size or following >= entries:
                raise Refused("a list that goes on")
            index = following

    def _is_available(self, position: int) -> bool:
        flags = self._half(TABLE + 16 * (position % self.size) + 14)
        wrap = position < self.size
        return bool(flags & AVAIL) == wrap != bool(flags & USED)

    @property
    def _room(self) -> int:
        """Entries of a packed ring that the device does not hold."""
        return self.size - (self.next - self.published) % self.span

    def _walk_packed(self) -> Chain | None:
        if not self._is_available(self.next):
            return None
        room, parts, position = self._room, _Parts(), self.next
        addr, length, head, flags = _DESC.unpack_from(self.ram, 16 * (position % self.size))
        if flags & INDIRECT and room:
            table = self._table(addr, length, flags)
            if length > 16 * self.size:
                raise Refused("a table of more than the ring has")
            for addr, length, _, flags in _DESC.iter_unpack(table):
                parts.add(addr, length, flags)
            self._check_head(head)
            return Chain(head, parts.readable, parts.writable, 1, self.next)
        while True:
            if parts.count == room or not self._is_available(position):
                raise Refused("a list that goes on")
            addr, length, head, flags = _DESC.unpack_from(self.ram, 16 * (position % self.size))
            if flags & INDIRECT:
                raise Refused("a table in a list")
            parts.add(addr, length, flags)
            if not flags & NEXT:
                break
            position = (position + 1) % self.span
        self._check_head(head)
        return Chain(head, parts.readable, parts.writable, parts.count, self.next)

    def available(self) -> bool:
        return self._is_available(self.next) if self.packed else self._half(DRIVER + 2) != self.next

    def first_unavailable(self) -> int:
        if not self.packed:
            return self._half(DRIVER + 2)
        position = self.next
        for _ in range(self._room):
            if not self._is_available(position):
                break
            position = (position + 1) % self.span
        return position

    def take(self, chain: Chain) -> None:
        self.held[chain.head] = chain
        self.next = (chain.position + chain.slots) % self.span

    # --- the model: returning them ---------------------------------------------------------------

    def give_back(self, head: int, written: int) -> None:
        self.unpublished.append((self.held.pop(head), written))
        self.chains.pop(head, None)
        if not self.packed and not self.in_order:  # where the driver does not look yet
            self._show(self.published + len(self.unpublished) - 1, head, written)

    def publish(self) -> bool:
        """What `publish_used` does; whether the driver wants to be notified."""
        returned, self.unpublished = self.unpublished, []
        if not returned:
            return False
        place, first, old = self.published, self.published, self.published
        for number, (chain, written) in enumerate(returned):
            last = number == len(returned) - 1
            if not self.in_order:
                if self.packed:
                    self._show(place, chain.head, written)
            elif last or (min(written, LONGEST) if self.packed else written) != chain.room:
                self._show(first, chain.head, written)
                first = (place + chain.slots) % self.span
            place = (place + chain.slots) % self.span
            self._free(chain.head)
        self.published = place
        self.told = set()
        count = (place - old) % self.span
        if not self.packed:
            self._expect_half(DEVICE + 2, place)
            if self.event_idx:
                event = self._half(DRIVER + 4 + 2 * self.size)
                return (place - event - 1) % self.span < count
            return not self._half(DRIVER) & 1
        at, kind = self._half(DRIVER), self._half(DRIVER + 2) & 3
        if kind == 2 and self.event_idx:
            event = at % (1 << 15) + (0 if at >> 15 else self.size)
            return (event - old) % self.span < count
        return kind != 1

    def _show(self, place: int, head: int, written: int) -> None:
        written = min(written, LONGEST)
        if not self.packed:
            at = DEVICE + 4 + 8 * (place % self.size)
            struct.pack_into("<LL", self.expected, at, head, written)
            return
        flags = (AVAIL | USED if place < self.size else 0) | (WRITE if written else 0)
        at = TABLE + 16 * (place % self.size) + 8
        struct.pack_into("<LHH", self.expected, at, written, head, flags)

    def _expect_half(self, at: int, value: int) -> None:
        _HALF.pack_into(self.expected, at, value)

    def _free(self, head: int) -> None:
        self.free += self.driver_has.pop(head, ())

    # --- the driver ------------------------------------------------------------------------------

    def supply(self) -> None:
        """Some chains, most of them lawful."""
        rng = self.rng
        for _ in range(rng.choice((1, 1, 2, 3, 5, 8))):
            form = rng.choice(("usual", "usual", "buffer", "buffer", "list", "list", "garbage"))
            elements = self._elements(form)
            table = self.indirect and form != "buffer" and rng.random() < 0.4
            (self._supply_packed if self.packed else self._supply_split)(elements, table)
        if not self.packed:
            self._put_half(DRIVER + 2, self.driver_next)
        if rng.random() < 0.5:
            self._wish()

    def _wish(self) -> None:
        """When the driver wants to be notified."""
        value = self.rng.choice((0, 1, self.published, self.next, self.rng.getrandbits(16)))
        at = DRIVER + self.rng.choice((0, 2 if self.packed else 4 + 2 * self.size))
        if self.packed and at == DRIVER + 2:
            value = self.rng.choice((0, 1, 2, 2, 3))
        elif self.packed:
            value = value % self.span
            value = value | 1 << 15 if value < self.size else value - self.size
        self._put_half(at, value)

    def _elements(self, form: str) -> list[tuple[int, int, int]]:
        """Address, length and flags of each, without NEXT."""
        rng = self.rng
        data = BUFFERS + 64 * rng.randrange(40)
        if form == "buffer":
            return [(data, rng.choice((0, 1, 64, 1526, 4096, 65535)), WRITE)]
        if form == "usual":
            sizes = (1, 512, 512, 1024, 4096, 4096, 512, 0, 1 << 30, (1 << 32) - 1)
            size, flags = rng.choice(sizes), rng.choice((0, WRITE))
            return [(data, 16, 0), (SECOND[0], size, flags), (BUFFERS - 64, 1, WRITE)]
        count = rng.randint(1, 4)
        if form == "list":
            readable = rng.randint(0, count)
            sizes = (0, 1, 16, 100, 4096, 1 << 31, (1 << 32) - 1)
            return [
                (data + 64 * place, rng.choice(sizes), 0 if place < readable else WRITE)
                for place in range(count)
            ]
        return [(self._number(64), self._number(32), rng.getrandbits(4)) for _ in range(count)]

    def _number(self, bits: int) -> int:
        rng = self.rng
        value = rng.choice(
            (0, 1, 16, 48, TABLES, BUFFERS, 0x2000, 0x1FF0, 0x4000, 0x5000, -1, -16, 1 << 31)
        )
        value = value if rng.random() < 0.8 else rng.getrandbits(bits)
        return value % (1 << bits)

    def _write_table(self, elements: list[tuple[int, int, int]]) -> tuple[int, int]:
        """Address and length of a table with `elements`."""
        at = TABLES + 16 * self.rng.randrange(0x80)
        for place, (addr, length, flags) in enumerate(elements):
            last = place == len(elements) - 1
            third, fourth = (flags if last else flags | NEXT), place + 1
            if self.packed:
                third, fourth = fourth, flags
            _DESC.pack_into(self.ram, at + 16 * place, addr, length, third, fourth)
        return at, 16 * len(elements)

    def _errs(self) -> bool:
        return not self.rng.randrange(self.errs)

    def _supply_split(self, elements: list[tuple[int, int, int]], table: bool) -> None:
        rng = self.rng
        if (self.driver_next - self.published) % self.span >= self.size:
            return
        if self.driver_has and self._errs():
            head = rng.choice(list(self.driver_has))
        else:
            if table:
                elements = [(*self._write_table(elements), INDIRECT)]
            if len(elements) > len(self.free):
                return
            head = self._write_split(elements)
        head = rng.randrange(2 * self.size) if self._errs() else head
        self._put_half(DRIVER + 4 + 2 * (self.driver_next % self.size), head)
        self.driver_next = (self.driver_next + 1) % self.span
        self.note(f"chain {head}: {elements}")

    def _write_split(self, elements: list[tuple[int, int, int]]) -> int:
        """Put a chain into the descriptor table; its head."""
        rng, count = self.rng, len(elements)
        own = sorted(self.free)[:count] if rng.random() < 0.8 else self.free[-count:]
        self.free = [one for one in self.free if one not in own]
        for place, (addr, length, flags) in enumerate(elements):
            following = own[place + 1] if place + 1 < count else rng.choice((0, 0xFFFF))
            flags |= NEXT if place + 1 < count else 0
            if self._errs():
                following = rng.randrange(2 * self.size)
            _DESC.pack_into(self.ram, TABLE + 16 * own[place], addr, length, flags, following)
        self.driver_has[own[0]] = own
        return own[0]

    def _supply_packed(self, elements: list[tuple[int, int, int]], table: bool) -> None:
        rng = self.rng
        if table:
            elements = [(*self._write_table(elements), INDIRECT)]
        taken = self.next if self._errs() else self.published  # else over what the device holds
        if len(elements) > self.size - (self.driver_next - taken) % self.span:
            return
        self.overwritten |= (
            len(elements) > self.size - (self.driver_next - self.published) % self.span
        )
        if self.driver_has and self._errs():
            head = rng.choice(list(self.driver_has))
        elif self.free:
            head = self.free.pop(rng.randrange(len(self.free)))
            self.driver_has[head] = [head]
        else:
            return
        first = self.driver_next
        for place in reversed(range(len(elements))):
            addr, length, flags = elements[place]
            position = (first + place) % self.span
            flags |= NEXT if place + 1 < len(elements) else 0
            flags |= AVAIL if position < self.size else USED
            if self._errs():
                flags = rng.getrandbits(16)
            number = rng.randrange(2 * self.size) if self._errs() else head
            _DESC.pack_into(
                self.ram, TABLE + 16 * (position % self.size), addr, length, number, flags
            )
        self.driver_next = (first + len(elements)) % self.span
        self.note(f"chain {head}: {elements}")

    def poke(self) -> None:
        """Something in the driver's part of the ring changes that has been made available."""
        rng = self.rng
        if self.packed:
            at = TABLE + 2 * rng.randrange(8 * self.size)
        else:
            at = rng.choice((DRIVER + 2, DRIVER + 2, DRIVER + 4 + 2 * rng.randrange(self.size)))
        value = rng.choice((0, 1, self._half(at) + 1, self._half(at) - 1, rng.getrandbits(16)))
        self.note(f"poke {value:#x} at {at:#x}")
        self._put_half(at, value)
        self.exact = False

    # --- the device ------------------------------------------------------------------------------

    def _state(self) -> QueueState:
        place = self.encoded(self.next)
        return QueueState(MOST, self.size, TABLE, DRIVER, DEVICE, place, place, packed=self.packed)

    def encoded(self, position: int) -> int:
        """A position as a saved state has it."""
        if not self.packed:
            return position
        return position | 1 << 15 if position < self.size else position - self.size

    def _restored(self, state: QueueState) -> Any:
        return restore_queue(self.memory, state, self.features, _QUEUE, _kick())

    def _keep_journal(self) -> None:
        self.journal = Journal(self.notes, MOST)
        in_flight = self.journal.resume(self.published)
        self.queue.keep_journal(self.journal, in_flight)

    def pop(self) -> None:
        chain: DescriptorChain | None
        for _ in range(self.rng.choice((1, 1, 2, 4, 16))):
            try:
                expected = self.walk() if self.exact else None
            except Refused as why:
                self.note(f"pop: {why}")
                self._is_refused()
                raise _Ended from None
            chain = self.queue.pop()
            self.note(f"pop: {chain}")
            if self.exact:
                self._is_same(chain, expected)
            elif chain is not None:
                assert chain.head < self.size and chain.head not in self.chains
                expected = Chain(
                    chain.head, chain.readable, chain.writable, chain.slots, chain.position
                )
            if chain is None:
                return
            assert expected is not None
            self.take(expected)
            self.chains[chain.head] = chain

    def _is_refused(self) -> None:
        for _ in range(2):  # nothing is consumed
            try:
                chain = self.queue.pop()
            except DriverError as error:
                assert error.section and "\n" not in str(error)
            else:
                raise AssertionError(f"{chain} was taken")

    def _is_same(self, chain: DescriptorChain | None, expected: Chain | None) -> None:
        if chain is None or expected is None:
            assert chain is expected, f"{chain}, where there is {expected}"
            return
        found = (chain.head, chain.readable, chain.writable, chain.slots, chain.position)
        assert Chain(*found) == self._without_empty(expected), f"{found}, not {expected}"
        assert chain.writable_size == expected.room
        assert chain.readable_size == sum(length for _, length in expected.readable)

    def _without_empty(self, chain: Chain) -> Chain:
        return chain._replace(
            readable=[part for part in chain.readable if part[1]],
            writable=[part for part in chain.writable if part[1]],
        )

    def add_used(self) -> None:
        rng = self.rng
        if not self.chains:
            return
        for _ in range(rng.choice((1, 2, 8))):
            if not self.chains:
                return
            heads = list(self.chains)
            chain = self.chains[heads[0] if self.in_order else rng.choice(heads)]
            room = chain.writable_size
            written = rng.choice((0, room, room, rng.randint(0, room)))
            self.note(f"return {chain.head}, {written}")
            self.queue.add_used(chain, written)
            self.give_back(chain.head, written)
            self._is_wrong(self.queue.add_used, chain, 0)

    def out_of_turn(self) -> None:
        """A device that returns what it does not have, or too early."""
        heads = list(self.chains)
        if self.in_order and len(heads) > 1:
            self._is_wrong(self.queue.add_used, self.chains[heads[-1]], 0)
        if len(heads) > 1:
            self._is_wrong(self.queue.step_back, self.chains[heads[0]])
        if idle := [head for head in range(self.size) if head not in self.held]:
            self._is_wrong(self.queue.add_used_buffers, idle[:1], 0)
            self._is_wrong(self.queue.chain_in_flight, idle[-1])
        self._is_wrong(self.queue.chain_in_flight, self.size)

    def _is_wrong(
        self, call: Callable[..., object], *arguments: Any, error: type[Exception] = ValueError
    ) -> None:
        try:
            call(*arguments)
        except error:
            return
        raise AssertionError(f"{call} with {arguments} was accepted")

    def touch(self) -> None:
        """A device reads and writes in pieces of its own, whatever those of the driver are."""
        if self.chains:
            chain = self.chains[self.rng.choice(list(self.chains))]
            if chain.readable_size <= LARGEST_TOUCHED:
                self._read(chain)
            if chain.writable_size <= LARGEST_TOUCHED and not _overlap(chain.writable):
                self._write(chain)

    def _read(self, chain: DescriptorChain) -> None:
        reader = chain.reader()
        first = self.rng.randint(0, reader.available)
        if not all(self._is_ram(*part) for part in chain.readable):
            with suppress(DriverError):
                reader.read(first)
            return
        data = b"".join(bytes(self.memory.view(*part)) for part in chain.readable)
        assert reader.read(first) == data[:first]
        left = self.rng.randint(0, reader.available)
        reader.skip(reader.available - left)
        if left >= _DESC.size:
            fields = _DESC.unpack(data[len(data) - left :][: _DESC.size])
            assert reader.unpack(_DESC) == fields
            left -= _DESC.size
        assert reader.read(left) == data[len(data) - left :]
        self._is_wrong(reader.read, 1, error=DriverError)

    def _write(self, chain: DescriptorChain) -> None:
        """Where nothing else lies; a part outside RAM lets nothing be written."""
        rng, writer = self.rng, chain.writer()
        if not all(addr >= BUFFERS for addr, _ in chain.writable):
            return
        try:
            before = b"".join(map(bytes, chain.writable_views()))
        except DriverError:
            self._is_wrong(writer.write, bytes(writer.available), error=DriverError)
            return
        lasts = [_place_of(writer.take_last_byte()) for _ in range(min(2, len(before)))]
        skipped = rng.randint(0, writer.available)
        data = rng.randbytes(rng.randint(0, writer.available - skipped))
        writer.skip(skipped)
        writer.write(data)
        assert writer.written == skipped + len(data)
        after = b"".join(map(bytes, chain.writable_views()))
        assert after == before[:skipped] + data + before[skipped + len(data) :]
        ends = [at for addr, length in chain.writable for at in (addr, addr + length - 1)]
        assert all(length == 1 for _, length in lasts) and {*lasts[:1]} <= {(at, 1) for at in ends}
        self.expected[BUFFERS:], self.expected_far = self.ram[BUFFERS:], bytes(self.far)

    def step_back(self) -> None:
        youngest = next(reversed(self.chains), None)
        if youngest is None or self.buffers or self.overwritten or not self.exact:
            return
        chain = self.chains[youngest]
        ends_here = (chain.position + chain.slots) % self.span == self.next
        if chain.position < 0 or not ends_here:
            self._is_wrong(self.queue.step_back, chain)
            return
        self.note(f"step back, {youngest}")
        self.queue.step_back(chain)
        del self.chains[youngest]
        self.next = self.held.pop(youngest).position

    def buffers_at_once(self) -> None:
        views: list[memoryview] = []
        rng = self.rng
        wanted, most, least = (
            rng.choice((1, 5000, 1 << 20)),
            rng.randint(1, 17),
            rng.choice((1, 64)),
        )
        heads = self.queue.pop_buffers(views, wanted, most, least)
        self.note(f"pop_buffers({wanted}, {most}, {least}): {heads}")
        assert len(heads) == len(views) <= most
        assert not heads or not (self.packed or self.in_order or self.journal is not None)
        for head, view in zip(heads, views, strict=True):
            if self.exact:
                chain = self.walk()
                assert chain is not None and chain.head == head and not chain.readable
                assert chain.writable == [_place_of(view)] and view.nbytes >= least
                self.take(chain)
            else:
                assert head < self.size and head not in self.held
                place = _place_of(view)
                self.take(Chain(head, [], [place], 1, self.next))
        self.buffers += heads
        if self.buffers and rng.random() < 0.7:
            self.return_buffers()

    def return_buffers(self) -> None:
        if not self.buffers:
            return
        count = self.rng.randint(1, len(self.buffers))
        heads, self.buffers = self.buffers[:count], self.buffers[count:]
        last = self.rng.randint(0, self.held[heads[-1]].room)
        self.note(f"return buffers {heads}, {last}")
        self.queue.add_used_buffers(heads, last)
        for head in heads:
            self.give_back(head, last if head == heads[-1] else self.held[head].room)

    def usual(self) -> None:
        rng = self.rng
        most = rng.choice((1, 2000, 1 << 20, 1 << 31))
        chains, more = self.queue.peek_usual(16, 1, most)
        self.note(f"peek_usual({most}): {len(chains)}, {more}")
        count = rng.choice((len(chains), rng.randint(0, len(chains))))
        written = [
            rng.randint(0, 1 + (0 if reads else size)) for _, _, _, size, reads in chains[:count]
        ]
        if not self.exact:
            self.queue.use_peeked(written)
            for _ in written:  # nobody knows any more which
                self.unpublished.append((Chain(-1, [], [], 0, 0), 0))
            return
        kept, taken = self.next, []
        for first, data, last, size, reads in chains:
            chain = self.walk()
            assert chain is not None, "a chain that is not there"
            a, b, c = map(_place_of, (first, data, last))
            assert b[1] == size
            assert (chain.readable, chain.writable) == (([a, b], [c]) if reads else ([a], [b, c]))
            taken.append(chain)
            self.take(chain)
        if not chains and self.packed and not self.in_order and self.size >= 3:
            assert not self._is_usual(), "a usual chain was left to others"
        enough = sum(size for *_, size, _ in chains) >= most
        assert more or enough or not self.available(), "a chain was overlooked"
        self.queue.use_peeked(written)
        for chain, length in zip(taken, written, strict=False):
            self.give_back(chain.head, length)
        for chain in taken[count:]:
            del self.held[chain.head]
        self.next = taken[count].position if count < len(taken) else self.next
        assert taken or self.next == kept

    def _is_usual(self) -> bool:
        """True if a list of three descriptors comes next that is of the usual form."""
        try:
            chain = self.walk()
        except Refused:
            return False
        if chain is None or chain.slots != 3:
            return False
        parts = [*chain.readable, *chain.writable]
        at = [(chain.position + place) % self.size for place in range(3)]
        flags = [self._half(TABLE + 16 * place + 14) & 0x7F7F for place in at]
        return (
            [length for _, length in parts[::2]] == [16, 1]
            and flags in ([NEXT, NEXT, WRITE], [NEXT, NEXT | WRITE, WRITE])
            and 0 < parts[1][1] < 1 << 30
            and all(self._is_ram(*part) for part in parts)
        )

    def publish_used(self) -> None:
        if not self.exact:
            self.queue.publish_used()
            self.unpublished = []
            return
        wanted = self.queue.publish_used()
        self.note(f"publish: {wanted}")
        assert wanted == self.publish()

    def ask(self) -> None:
        """Kicks are wanted, or not."""
        if self.rng.random() < 0.4:
            self.note("no kicks")
            self.queue.disable_notification()
            if self.packed:
                self._expect_half(DEVICE, 0)
                self._expect_half(DEVICE + 2, 1)
            elif not self.event_idx:
                self._expect_half(DEVICE, 1)
            return
        more = self.queue.enable_notification()
        self.note(f"kicks: {more}")
        if not self.exact:
            return
        end = self.first_unavailable()
        if self.packed:
            self._expect_half(DEVICE, self.encoded(end) if self.event_idx else 0)
            self._expect_half(DEVICE + 2, 2 if self.event_idx else 0)
        else:
            self._expect_half(DEVICE, 0)
            if self.event_idx:
                self._expect_half(DEVICE + 4 + 8 * self.size, end)
        if self.told is not None:
            known = (end, self.next) in self.told
            assert more == (end != self.next and not known) or (known and more)
            self.told = {(end, self.next)}

    def look(self) -> None:
        """What a device asks without taking anything."""
        drained = self.queue.is_drained()
        self.queue.poll(0, 0)
        if self.exact:
            assert drained == (self.first_unavailable() == self.next and not self.held)
            self.told = None

    def go_on(self) -> None:
        """The queue is saved, and another one goes on; or is refused, where the state is wrong."""
        if self.unpublished or self.journal is not None:
            return
        plain = json.loads(json.dumps(self.queue.state().to_plain()))
        for head in self.buffers:  # which are chains like others from now on
            self.chains[head] = self.queue.chain_in_flight(head)
        self.chains = {head: self.chains[head] for head in self.held}
        self.buffers = []
        if self.rng.random() < 0.4:
            self._damage(plain)
            try:
                state = QueueState.from_plain(plain)
                again = self._restored(state)
            except DriverError as error:
                assert "\n" not in str(error)
                return
            assert again.state() == state
            heads = [chain.head for chain in state.in_flight]
            assert len(set(heads)) == len(heads)
            for chain in state.in_flight:
                assert len(chain.readable) + len(chain.writable) <= state.size
            return
        self.note("saved and restored")
        state = QueueState.from_plain(plain)
        if self.exact:
            heads = sorted(self.held, key=lambda head: self._taken_before(self.held[head]))
            assert [chain.head for chain in state.in_flight] == heads
        elif self.rng.random() < 0.5:
            return
        try:
            self.queue = self._restored(state)
        except DriverError:
            assert not self.exact
            raise _Ended from None
        assert self.queue.state() == state
        for head, chain in self.held.items():
            found = self.queue.chain_in_flight(head)
            assert (found.readable, found.writable) == (
                [part for part in chain.readable if part[1]],
                [part for part in chain.writable if part[1]],
            )
            self.chains[head] = found
        self.chains = {chain.head: self.chains[chain.head] for chain in state.in_flight}
        self.told = None

    def _taken_before(self, chain: Chain) -> int:
        return (chain.position - self.next) % self.span if chain.position >= 0 else chain.position

    def _damage(self, plain: Any) -> None:
        rng = self.rng
        target = plain
        if plain["in_flight"] and rng.random() < 0.6:
            target = rng.choice(plain["in_flight"])
        name = rng.choice(sorted(target))
        old = target[name]
        others: list[Any] = [None, True, -1, 1 << 64, "", [], {}, [[]], [[1, 2, 3]], [[-1, 2]]]
        others += [old + 1, old ^ 1 << rng.randrange(17)] * 4 if type(old) is int else []
        if type(old) is list:
            others += [old * 2, old * 20, old[1:]] * 4
        if name == "head":
            others += range(8)
        target[name] = rng.choice(others)
        if rng.random() < 0.1:
            del target[name]

    def rewind(self) -> None:
        """What a front end is told, or a snapshot that takes chains anew has."""
        if self.unpublished or self.journal is not None:
            return
        try:
            state = self.queue.rewound()
        except DriverError:
            return
        base = state.vring_base()
        again = QueueState.from_vring_base(state.config(), base, packed=self.packed)
        assert again.vring_base() == base and again.next_avail == state.next_avail
        if self.exact:
            assert state.next_avail == state.next_used == self.encoded(self.published)

    def remap(self) -> None:
        self.queue.remap()

    def another_serves(self) -> None:
        if self.held or self.unpublished or self.journal is not None:
            return
        if self.exact and not self.packed:
            # As vhost does: all that is available is used.
            place = self.rng.choice((self.next, self._half(DRIVER + 2)))
            for head in list(self.driver_has):
                self._free(head)
            self.queue.served_to(place)
            self._put_half(DEVICE + 2, place)
            self.expected[DEVICE + 2 : DEVICE + 4] = self.ram[DEVICE + 2 : DEVICE + 4]
            if place == self.next:
                self.driver_has.clear()
                raise _Ended
            self.next = self.published = place
            self.told = None

    def killed(self) -> None:
        """The process is, and another one goes on by its notes: between two calls, or when the
        driver can see what was returned and the notes do not say so yet."""
        if self.journal is None or not self.exact:
            return
        if self.unpublished and self.rng.random() < 0.7:

            def die(*_: object) -> None:
                raise _Killed

            self.journal.published = die  # type: ignore[method-assign]
            with suppress(_Killed):
                self.queue.publish_used()
            self.publish()
        place = self.published
        taken = {*self.held, *(chain.head for chain, _ in self.unpublished)}
        taken |= set(self.resubmitted.values())
        self.next, self.unpublished = place, []
        self.queue = self._restored(self._state())
        self.journal = Journal(self.notes, MOST)
        in_flight = self.journal.resume(place)
        self.note(f"killed, with {in_flight} in flight")
        assert set(in_flight) <= taken
        # Chains that were taken and returned without a note are in the ring, as if untouched.
        for chain in self.held.values():
            assert chain.head in in_flight or (chain.position - place) % self.span < self.size
        self.held, self.chains, self.told = {}, {}, None
        self.queue.keep_journal(self.journal, in_flight)
        self.resubmitted = {(place + n) % self.span: head for n, head in enumerate(in_flight)}

    # --- a case ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Memory is as the model has it."""
        own = self.expected
        if not self.exact:
            for start, length in self._device_area():
                own[start : start + length] = self.ram[start : start + length]
        if own != self.ram:
            now = bytes(self.ram)
            place = next(at for at in range(len(now)) if now[at] != own[at])
            raise AssertionError(
                f"{now[place : place + 8].hex()} at {place:#x}, not {own[place : place + 8].hex()}"
            )
        assert self.expected_far == self.far, "memory far from the ring has changed"

    def _device_area(self) -> tuple[tuple[int, int], ...]:
        if self.packed:
            return (TABLE, 16 * self.size), (DEVICE, 4)
        return ((DEVICE, 6 + 8 * self.size),)

    def run(self) -> None:
        rng = self.rng
        device = (
            *(self.pop, self.pop, self.pop, self.add_used, self.add_used, self.publish_used),
            *(self.publish_used, self.usual, self.usual, self.buffers_at_once, self.ask, self.ask),
            *(self.step_back, self.return_buffers, self.look, self.go_on, self.rewind, self.remap),
            *(self.touch, self.touch, self.out_of_turn, self.another_serves, self.killed),
        )
        for _ in range(rng.randint(1, 6)):
            self.supply()
            if not rng.randrange(16):
                self.poke()
            self._keep()
            for _ in range(rng.randint(1, 5)):
                rng.choice(device)()
            if rng.random() < 0.5:
                self.publish_used()
            self.check()


class _Parts:
    """The parts of a chain as it is walked."""

    def __init__(self) -> None:
        self.readable: list[tuple[int, int]] = []
        self.writable: list[tuple[int, int]] = []
        self.count = 0
        self.writing = False

    def add(self, addr: int, length: int, flags: int) -> None:
        self.count += 1
        if flags & WRITE:
            self.writing = True
            if length:
                self.writable.append((addr, length))
        elif self.writing:
            raise Refused("readable behind writable")
        elif length:
            self.readable.append((addr, length))


class _Ended(Exception):
    """The queue is used no more."""


class _Killed(Exception):
    """Its process is no more."""


def _overlap(parts: list[tuple[int, int]]) -> bool:
    ends = sorted((addr, addr + length) for addr, length in parts)
    return any(one[1] > other[0] for one, other in itertools.pairwise(ends))


def _place_of(view: memoryview) -> tuple[int, int]:
    """Guest-physical address and length of what `view` shows."""
    addr = int(_ffi.cast("uintptr_t", _ffi.from_buffer(view)))
    for region in _memory().regions:
        if 0 <= addr - region.host_addr < region.size:
            return region.guest_addr + addr - region.host_addr, view.nbytes
    raise AssertionError("a view of something else than RAM")


def queue_case(rng: Random, ring: Ring) -> int:
    """One queue; how many steps its driver and its device took."""
    case = Case(rng, ring)
    try:
        case.run()
        case.check()
    except BaseException as error:
        if isinstance(error, _Ended) or (isinstance(error, DriverError) and not case.exact):
            case.check()
            return len(case.steps)
        steps = "\n".join(f"  {number}. {step}" for number, step in enumerate(case.steps, 1))
        error.add_note(f"{ring}, {case.size} entries, features {case.features:#x}\n{steps}")
        raise
    return len(case.steps)
