"""Sets of pages, and which of several files that lie over one another has a page."""

from __future__ import annotations

import os
import random

from pyvmm.memory import GuestMemory, pages

PAGE = 4096


def test_a_bitmap_and_a_set_are_the_same() -> None:
    rng = random.Random(1)
    for count in (1, 7, 8, 9, 64, 1000):
        which = bytes(rng.choice(b"01") for _ in range(count))
        bitmap = pages.to_bitmap(which)
        assert len(bitmap) == -(-count // 8)
        assert [bitmap[n // 8] >> n % 8 & 1 for n in range(count)] == [one & 1 for one in which]
        assert pages.from_bitmap(bitmap, count) == which
        assert pages.from_bitmap(bitmap + bytes(9), count) == which
    assert pages.both(b"0101", b"0011") == b"0111"


def test_extents_are_those_of_the_highest_layer() -> None:
    rng = random.Random(2)
    for case in range(200):
        count = rng.choice((1, 2, 50, 300))
        some = rng.choice((b"0", b"01", b"00001", b"1"))
        over = [bytes(rng.choice(some) for _ in range(count)) for _ in range(case % 4)]
        wanted = [
            max([number for number, which in enumerate(over, 1) if which[page] & 1], default=0)
            for page in range(count)
        ]
        found = list(pages.extents(count, over))
        assert [layer for _, length, layer in found for _ in range(length)] == wanted
        assert [first for first, _, _ in found] == [
            page for page in range(count) if not page or wanted[page] != wanted[page - 1]
        ]
        for which in over:
            told = bytearray(b"0" * count)
            for first, length in pages.runs(which):
                told[first : first + length] = b"1" * length
            assert told == which


def test_memory_knows_what_this_process_has_mapped() -> None:
    memory = GuestMemory([(0, 64 * PAGE), (1 << 32, 64 * PAGE)])
    memory.write(3 * PAGE, b"a")
    memory.write((1 << 32) + 5 * PAGE, b"b")
    found = memory.mapped()
    assert len(found) == 128 and {3, 69} <= {n for n, one in enumerate(found) if one & 1}
    memory.let_go()
    assert b"1" not in memory.mapped()
    assert memory.read(3 * PAGE, 1) == b"a", "something was lost"
    assert memory.mapped()[3:4] == b"1"
    memory.watch_discards()
    memory.discard(3 * PAGE, 2 * PAGE)
    assert [n for n, one in enumerate(memory.discarded()) if one & 1] == [3, 4]
    assert b"1" not in memory.discarded()
    memory.close()


def test_what_others_have_written_to_is_among_it_once_memory_was_lent() -> None:
    memory = GuestMemory([(0, 64 * PAGE)])
    memory.write(3 * PAGE, b"ours")
    memory.let_go()
    os.pwrite(memory.fd, b"theirs", 9 * PAGE)  # by no mapping of this process
    assert b"1" not in memory.mapped()
    memory.lent = True
    found = memory.mapped()
    assert found[3:4] == found[9:10] == b"1"
    assert len(found) == 64
    memory.close()


def test_one_layer_costs_nothing_for_each_page() -> None:
    assert list(pages.extents(1 << 50, [])) == [(0, 1 << 50, 0)]
    assert list(pages.extents(0, [])) == []
