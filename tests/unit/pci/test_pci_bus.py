"""Configuration space, its two ways, and BARs that a driver sizes, moves and turns off."""

from __future__ import annotations

import itertools
import json
import threading
from pathlib import Path

import pytest
from c_claims import assert_in_c, needs_headers
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.bus import Bus
from pyvmm.errors import ConfigError
from pyvmm.host.saved import Saved
from pyvmm.pci import registers as pci
from pyvmm.pci.bus import DEVICES, ECAM_SIZE, PciBus
from pyvmm.pci.function import Bar, Capability, Function

BASE, SIZE = 0x40_0000_0000, 1 << 30  # of the window
BAR_SIZE = 0x4000
SLOT = 3
ONES = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8)}
WIDTHS = (1, 2, 4)


class Registers:
    """Says what reached it."""

    def __init__(self) -> None:
        self.written: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return 0x5A

    def write(self, offset: int, size: int, value: int) -> None:
        self.written.append((offset, size, value))


class Told:
    def __init__(self) -> None:
        self.places: list[int | None] = []
        self.master: list[bool] = []

    def bar_moved(self, bar: Bar, address: int | None) -> None:
        self.places.append(address)

    def bus_master_changed(self, on: bool) -> None:
        self.master.append(on)

    def function_reset(self) -> None:
        raise AssertionError("nobody has asked for it")


def function(*bars: Bar) -> Function:
    made = Function(
        vendor_id=0x1AF4,
        device_id=0x1042,
        class_code=0x018000,
        revision=1,
        subsystem_vendor_id=0x1AF4,
        subsystem_id=0x1100,
        bars=bars,
    )
    made.placement = Told()
    return made


class Bench:
    """A bus with one function, seen through its handlers as a machine would."""

    def __init__(self) -> None:
        self.bus = PciBus(BASE, SIZE)
        self.registers = Registers()
        self.bar = Bar(0, BAR_SIZE, self.registers)
        self.function = function(self.bar)
        self.bus.add(SLOT, self.function)
        assert isinstance(self.function.placement, Told)
        self.told = self.function.placement

    def read(self, offset: int, size: int, device: int = SLOT, number: int = 0) -> int:
        return self.bus.ecam.read(device << 15 | number << 12 | offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self.bus.ecam.write(SLOT << 15 | offset, size, value)

    def by_ports(self, offset: int) -> None:
        self.bus.ports.write(0, 4, 1 << 31 | SLOT << 11 | offset & 0xFC)

    def place(self, address: int) -> None:
        self.write(pci.PCI_BASE_ADDRESS_0, 4, address & 0xFFFF_FFFF)
        self.write(pci.PCI_BASE_ADDRESS_0 + 4, 4, address >> 32)
        self.write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)

    def answers_at(self, address: int) -> bool:
        return self.bus.window.read(address - BASE, 4) == 0x5A


@pytest.fixture
def bench() -> Bench:
    return Bench()


@needs_headers(["linux/pci_regs.h"])
def test_every_number_is_the_headers(tmp_path: Path) -> None:
    names = {name for name in vars(pci) if name.startswith("PCI_")}
    assert len(names) > 30
    claims = [f"{name} == {getattr(pci, name)}" for name in sorted(names)]
    assert_in_c(tmp_path, ["linux/pci_regs.h"], claims)


def test_the_header(bench: Bench) -> None:
    assert bench.read(pci.PCI_VENDOR_ID, 4) == 0x1042_1AF4
    assert bench.read(pci.PCI_CLASS_REVISION, 4) == 0x01800001
    assert bench.read(pci.PCI_HEADER_TYPE, 1) == 0
    assert bench.read(pci.PCI_SUBSYSTEM_VENDOR_ID, 4) == 0x1100_1AF4
    assert bench.read(pci.PCI_INTERRUPT_PIN, 1) == 0  # there is no INTx


# --- rows 59 and 60 -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", WIDTHS)
def test_row59_both_ways_show_the_same_at_every_offset(bench: Bench, size: int) -> None:
    for offset in range(0, pci.PCI_CFG_SPACE_SIZE - 4):
        expected = int.from_bytes(bench.function.space[offset : offset + size], "little")
        assert bench.read(offset, size) == expected
        if offset % 4 + size <= 4:
            bench.by_ports(offset)
            assert bench.bus.ports.read(4 + offset % 4, size) == expected


@pytest.mark.parametrize("size", WIDTHS)
def test_row59_both_ways_write_the_same(size: int) -> None:
    for offset in range(0, pci.PCI_STD_HEADER_SIZEOF - 4):
        if offset % 4 + size > 4:
            continue
        one, other = Bench(), Bench()
        one.write(offset, size, ONES[size])
        other.by_ports(offset)
        other.bus.ports.write(4 + offset % 4, size, ONES[size])
        assert one.function.space == other.function.space


@pytest.mark.parametrize("size", [*WIDTHS, 8])
def test_row59_who_is_not_there_is_all_ones(bench: Bench, size: int) -> None:
    for device, number in itertools.product(range(DEVICES), range(8)):
        if (device, number) != (SLOT, 0):
            assert bench.read(0, size, device, number) == ONES[size]
            bench.bus.ecam.write(device << 15 | number << 12 | pci.PCI_COMMAND, size, ONES[size])
    assert bench.function.command == 0
    bench.bus.ports.write(0, 4, 1 << 31 | 1 << 16 | SLOT << 11)  # bus 1
    assert bench.bus.ports.read(4, 4) == ONES[4]


def test_row59_wide_unaligned_and_straddling_accesses(bench: Bench) -> None:
    assert bench.read(0, 8) == 0x1042_1AF4
    assert bench.read(1, 4) == 0x0010_421A
    assert bench.read(2, 8) == int.from_bytes(bench.function.space[2:10], "little")
    last = pci.PCI_CFG_SPACE_EXP_SIZE - 1
    for size in (2, 4, 8):
        assert bench.read(last, size) == ONES[size]
    assert bench.read(last, 1) == 0
    before = bytes(bench.function.space)
    bench.write(last, 8, ONES[8])
    bench.write(0x800, 8, ONES[8])
    assert bench.function.space == before


@pytest.mark.parametrize("size", [*WIDTHS, 8])
def test_row59_a_write_at_any_offset_is_one_of_its_bytes(size: int) -> None:
    at_most = pci.PCI_STD_HEADER_SIZEOF + 4
    for offset in (*range(at_most), *range(pci.PCI_CFG_SPACE_EXP_SIZE - 8, ECAM_SIZE // DEVICES)):
        one, other = Bench(), Bench()
        one.write(offset, size, ONES[size])
        if offset + size <= pci.PCI_CFG_SPACE_EXP_SIZE:  # or it straddles, and does nothing
            for byte in range(offset, offset + size):
                other.write(byte, 1, 0xFF)
        assert one.function.space == other.function.space
        if offset >= pci.PCI_CFG_SPACE_EXP_SIZE:
            break


@pytest.mark.parametrize(
    ("port", "size"), [(port, size) for port in range(-3, 11) for size in (1, 2, 4)]
)
def test_row59_ports_at_every_offset_and_what_straddles_them(
    bench: Bench, port: int, size: int
) -> None:
    """On the machine's bus of ports, where CONFIG_DATA ends with nobody behind it."""
    first = 0xCF8
    ports = Bus("I/O port")
    ports.register(first, bench.bus.ports.SIZE, bench.bus.ports)
    ports.write(first, 4, 1 << 31 | SLOT << 11 | 0xFC)  # the last that the ports reach
    before = bytes(bench.function.space)
    bench.function.space[0xFC:0x104] = bytes(range(1, 9))
    inside = port >= 4 and port + size <= 8
    expected = int.from_bytes(bytes(range(1, 9))[port - 4 : port - 4 + size], "little")
    if (port, size) == (0, 4):
        expected = 1 << 31 | SLOT << 11 | 0xFC
    elif not inside:
        expected = ONES[size]
    assert ports.read(first + port, size) == expected
    bench.function.space[:] = before
    ports.write(first + port, size, ONES[size])
    assert bench.function.space == before


def test_row59_the_end_of_the_ecam(bench: Bench) -> None:
    assert bench.bus.ecam.read(ECAM_SIZE - 4, 4) == ONES[4]
    bench.bus.ecam.write(ECAM_SIZE - 4, 4, 0)


def test_row59_the_address_port(bench: Bench) -> None:
    ports = bench.bus.ports
    assert ports.SIZE == 8
    assert (ports.read(0, 4), ports.read(4, 4)) == (0, ONES[4])  # nothing is addressed yet
    ports.write(0, 4, SLOT << 11)  # not enabled
    assert (ports.read(0, 4), ports.read(4, 4)) == (SLOT << 11, ONES[4])
    ports.write(0, 4, 0xFFFF_FFFF)
    assert ports.read(0, 4) == 0x80FF_FFFC
    bench.by_ports(0)
    for offset, size in ((0, 1), (1, 1), (0, 2), (2, 2), (3, 1)):
        ports.write(offset, size, 0)
        assert ports.read(offset, size) == ONES[size]
    assert ports.read(4, 4) == 0x1042_1AF4
    bench.by_ports(pci.PCI_COMMAND + 4)
    ports.write(0, 2, pci.PCI_COMMAND_MEMORY)
    assert bench.function.command == 0


def test_row60_only_what_may_be_written_changes(bench: Bench) -> None:
    before = bytes(bench.function.space)
    for offset in range(0, pci.PCI_CFG_SPACE_EXP_SIZE, 4):
        bench.write(offset, 4, ONES[4])
    changed = {at for at, byte in enumerate(bench.function.space) if byte != before[at]}
    command = {pci.PCI_COMMAND, pci.PCI_COMMAND + 1}
    bar = set(range(pci.PCI_BASE_ADDRESS_0 + 1, pci.PCI_BASE_ADDRESS_0 + 8))
    assert len(bench.function.space) == pci.PCI_CFG_SPACE_EXP_SIZE
    assert changed == command | bar | {pci.PCI_CACHE_LINE_SIZE, pci.PCI_INTERRUPT_LINE}
    assert bench.function.command == 0x406
    for offset in range(0, pci.PCI_CFG_SPACE_EXP_SIZE, 4):
        bench.write(offset, 4, 0)
    kept = bytearray(before)
    assert bench.function.space == kept


# --- rows 61 and 62 -------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [[(0, 4), (4, 4)], [(4, 4), (0, 4)], [(0, 8)]])
@pytest.mark.parametrize("decoding", [False, True])
def test_row61_sizing(bench: Bench, steps: list[tuple[int, int]], decoding: bool) -> None:
    bench.place(BASE + 0x10_0000)
    if not decoding:
        bench.write(pci.PCI_COMMAND, 2, 0)
    kept = [bench.read(pci.PCI_BASE_ADDRESS_0 + at, size) for at, size in steps]
    for at, size in steps:
        bench.write(pci.PCI_BASE_ADDRESS_0 + at, size, ONES[size])
    value = bench.read(pci.PCI_BASE_ADDRESS_0, 8)
    assert value & 0xF == 4  # of 64 bits, not prefetchable
    assert (~value & (1 << 64) - 1 | 0xF) + 1 == BAR_SIZE
    for (at, size), old in zip(steps, kept, strict=True):
        bench.write(pci.PCI_BASE_ADDRESS_0 + at, size, old)
    assert bench.answers_at(BASE + 0x10_0000) == decoding
    assert bench.function.address_of(bench.bar) == BASE + 0x10_0000


def test_row61_sizing_byte_by_byte(bench: Bench) -> None:
    for at in range(8):
        bench.write(pci.PCI_BASE_ADDRESS_0 + at, 1, 0xFF)
    assert bench.read(pci.PCI_BASE_ADDRESS_0, 8) == (1 << 64) - BAR_SIZE | 4


@pytest.mark.parametrize(
    "address",
    [
        0,
        0x10_0000,  # RAM
        BASE - BAR_SIZE,
        BASE + SIZE,
        BASE + SIZE - BAR_SIZE // 2 & ~(BAR_SIZE - 1),
        1 << 52,
        (1 << 64) - BAR_SIZE,
    ],
)
def test_row62_a_bar_outside_the_window_answers_nowhere(bench: Bench, address: int) -> None:
    bench.place(BASE)
    assert bench.answers_at(BASE)
    bench.place(address)
    inside = address >= BASE and address + BAR_SIZE <= BASE + SIZE
    assert bench.told.places[0] == BASE
    assert not bench.answers_at(BASE)
    assert bench.bus.window.where(bench.bar) == (address if inside else None)
    bench.place(BASE + BAR_SIZE)
    assert bench.answers_at(BASE + BAR_SIZE)


def test_row62_over_another_bar_the_first_stays(bench: Bench) -> None:
    bench.place(BASE)
    other = Registers()
    bar = Bar(2, 2 * BAR_SIZE, other)
    second = function(bar)
    bench.bus.add(4, second)
    for at, value in ((0x18, BASE), (0x1C, BASE >> 32), (pci.PCI_COMMAND, 2)):
        bench.bus.ecam.write(4 << 15 | at, 4, value & 0xFFFF_FFFF)
    assert bench.answers_at(BASE)
    bench.bus.window.write(0, 4, 1)
    assert (len(bench.registers.written), len(other.written)) == (1, 0)
    assert bench.bus.window.where(bar) is None
    bench.place(BASE + 8 * BAR_SIZE)
    bench.bus.ecam.write(4 << 15 | 0x18, 4, 0)  # set again, now that there is room
    assert bench.bus.window.where(bar) == BASE


def test_row62_decoding_off(bench: Bench) -> None:
    bench.place(BASE)
    bench.write(pci.PCI_COMMAND, 2, 0)
    assert not bench.answers_at(BASE)
    assert bench.bus.window.read(0, 8) == ONES[8]
    bench.bus.window.write(0, 4, 1)
    assert bench.registers.written == []
    bench.write(pci.PCI_COMMAND, 1, pci.PCI_COMMAND_MEMORY)
    assert bench.answers_at(BASE)
    steps = [place for place in bench.told.places if place in (BASE, None)]
    assert steps[-3:] == [BASE, None, BASE]


def test_row62_an_access_over_the_end_of_a_bar(bench: Bench) -> None:
    bench.place(BASE)
    assert bench.bus.window.read(BAR_SIZE - 2, 4) == ONES[4]
    bench.bus.window.write(BAR_SIZE - 2, 4, 0)
    assert bench.bus.window.read(BAR_SIZE, 4) == ONES[4]
    assert bench.registers.written == []


@given(st.lists(st.tuples(st.integers(0, 0x40), st.sampled_from([1, 2, 4, 8]), st.integers(0))))
def test_row62_whatever_is_written_a_bar_answers_where_it_says_or_nowhere(steps) -> None:
    bench = Bench()
    for offset, size, value in steps:
        bench.write(offset, size, value & ONES[size])
        where = bench.bus.window.where(bench.bar)
        assert where in (None, bench.function.address_of(bench.bar))
        assert where is None or bench.function.decodes_memory
        assert bench.told.places[-1:] in ([], [where])


# --- the rest -------------------------------------------------------------------------------------


def test_row63_bus_mastering_is_told_once_for_each_change(bench: Bench) -> None:
    for value in (0, 4, 6, 4, 2, 0, 4):
        bench.write(pci.PCI_COMMAND, 2, value)
    assert bench.told.master == [True, False, True]


def test_capabilities_are_a_list(bench: Bench) -> None:
    function = bench.function
    assert not function.space[pci.PCI_STATUS] & pci.PCI_STATUS_CAP_LIST
    places = [
        function.add_capability(Capability(pci.PCI_CAP_ID_VNDR, bytes(14), b"\0\0\xf0")),
        function.add_capability(Capability(pci.PCI_CAP_ID_MSIX, bytes(10))),
    ]
    assert function.space[pci.PCI_STATUS] & pci.PCI_STATUS_CAP_LIST
    at, found = bench.read(pci.PCI_CAPABILITY_LIST, 1), []
    while at:
        assert at % 4 == 0
        found.append((bench.read(at, 1), at))
        at = bench.read(at + 1, 1)
    assert found == [(pci.PCI_CAP_ID_VNDR, places[0]), (pci.PCI_CAP_ID_MSIX, places[1])]
    bench.write(places[0] + 4, 2, 0xFFFF)
    assert bench.read(places[0] + 4, 2) == 0xF0
    bench.write(places[0] + 4, 2, 0)
    before = bytes(function.space)
    for at in range(pci.PCI_STD_HEADER_SIZEOF, pci.PCI_CFG_SPACE_EXP_SIZE, 4):
        bench.write(at, 4, ONES[4])
    changed = [at for at, byte in enumerate(function.space) if byte != before[at]]
    assert (changed, len(function.space)) == ([places[0] + 4], len(before))


class Watch:
    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    def before_read(self, offset: int, size: int) -> None:
        self.seen.append(("read", offset, size))

    def after_write(self, offset: int, size: int) -> None:
        self.seen.append(("write", offset, size))


@pytest.mark.parametrize("size", [*WIDTHS, 8])
def test_a_watcher_hears_of_accesses_to_its_capability_and_of_no_others(
    bench: Bench, size: int
) -> None:
    length = 7  # of which the last byte is not aligned
    watch = Watch()
    at = bench.function.add_capability(Capability(pci.PCI_CAP_ID_VNDR, bytes(length - 2)), watch)
    for offset in range(at - 10, at + length + 4):
        watch.seen.clear()
        bench.read(offset, size)
        bench.write(offset, size, 0)
        inside = offset < at + length and offset + size > at
        expected = [("read", offset - at, size), ("write", offset - at, size)] if inside else []
        assert watch.seen == expected


def test_a_capability_may_fill_all_there_is(bench: Bench) -> None:
    room = pci.PCI_CFG_SPACE_SIZE - pci.PCI_STD_HEADER_SIZEOF
    body = bytes(range(room - 2))
    at = bench.function.add_capability(Capability(pci.PCI_CAP_ID_VNDR, body))
    assert bytes(bench.read(at + 2 + n, 1) for n in range(len(body))) == body


def test_too_many_capabilities(bench: Bench) -> None:
    with pytest.raises(ValueError, match="no room"):
        while True:
            bench.function.add_capability(Capability(pci.PCI_CAP_ID_VNDR, bytes(30)))
    assert bench.read(pci.PCI_CFG_SPACE_SIZE, 4) == 0


def test_a_function_that_is_removed_answers_no_more(bench: Bench) -> None:
    bench.place(BASE)
    bench.write(pci.PCI_COMMAND, 2, 6)
    bench.bus.remove(SLOT, bench.bus.functions[SLOT])
    assert bench.read(0, 4) == ONES[4]
    assert not bench.answers_at(BASE)
    assert (bench.told.places[-1], bench.told.master) == (None, [True, False])
    bench.bus.add(SLOT, function())


def test_where_a_function_was_pulled_away_zeros_are_read(bench: Bench) -> None:
    """So that a driver that waits for its reset's end does not wait for ever."""
    window = bench.bus.window
    bench.place(BASE)
    bench.write(pci.PCI_COMMAND, 2, 6)
    bench.bus.remove(SLOT, bench.bus.functions[SLOT], pulled=True)
    assert bench.read(0, 4) == ONES[4]
    assert [window.read(at, 1) for at in (0, BAR_SIZE - 1, BAR_SIZE)] == [0, 0, ONES[1]]
    assert window.read(BAR_SIZE - 2, 4) == ONES[4], "which straddles its end"
    assert window.write(0, 4, 7) is None and window.read(0, 4) == 0
    bar = Bar(0, BAR_SIZE, Registers())
    other = function(bar)
    other.place(bar, BASE)
    other.write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
    bench.bus.add(SLOT, other)
    assert bench.answers_at(BASE)
    bench.bus.remove(SLOT, other)
    assert window.read(0, 4) == ONES[4], "a function that was given up leaves nothing"


def test_only_the_last_places_that_functions_were_pulled_from_are_remembered(bench: Bench) -> None:
    window = bench.bus.window
    bench.bus.remove(SLOT, bench.bus.functions[SLOT])
    for place in range(40):
        bar = Bar(0, BAR_SIZE, Registers())
        one = function(bar)
        one.place(bar, BASE + place * BAR_SIZE)
        one.write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
        bench.bus.add(SLOT, one)
        bench.bus.remove(SLOT, one, pulled=True)
    zeros = [window.read(place * BAR_SIZE, 4) == 0 for place in range(40)]
    assert zeros == [False] * 8 + [True] * 32


def test_where_functions_were_pulled_away_is_saved(bench: Bench) -> None:
    bench.bus.add_window(4 * BASE, 4 * BAR_SIZE)
    bars = Bar(0, BAR_SIZE, Registers()), Bar(2, 2 * BAR_SIZE, Registers())
    one = function(*bars)
    for bar, address in zip(bars, (BASE + BAR_SIZE, 4 * BASE + 2 * BAR_SIZE), strict=True):
        one.place(bar, address)
    one.write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
    bench.bus.add(9, one)
    bench.bus.remove(9, one, pulled=True)
    state = json.loads(json.dumps(bench.bus.save()))
    again = Bench()
    high = again.bus.add_window(4 * BASE, 4 * BAR_SIZE)
    again.bus.restore(Saved(state, "the bus"))
    for window, zeros in ((again.bus.window, [1]), (high, [2, 3])):
        found = [at for at in range(4) if not window.read(at * BAR_SIZE, 4)]
        assert found == zeros
    assert again.bus.save() == state
    for bad in ({"start": BASE - 4096, "size": 8192}, {"start": BASE, "size": 0}, {"start": BASE}):
        with pytest.raises(ConfigError, match="cannot be"):
            Bench().bus.restore(Saved(state | {"pulled": [bad]}, "the bus"))


def test_a_function_that_decodes_already_answers_once_it_is_plugged_in(bench: Bench) -> None:
    """As one that comes back with all that a driver had set."""
    bar = Bar(2, BAR_SIZE, Registers())
    made = function(bar)
    made.place(bar, BASE)
    made.write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY | pci.PCI_COMMAND_MASTER)
    bench.bus.add(0, made)
    assert bench.answers_at(BASE)
    assert isinstance(made.placement, Told)
    assert (made.placement.places, made.placement.master) == ([BASE], [True])


def test_bars_may_lie_side_by_side(bench: Bench) -> None:
    bench.place(BASE + BAR_SIZE)
    for device, address in ((4, BASE), (5, BASE + 2 * BAR_SIZE)):
        bar = Bar(0, BAR_SIZE, Registers())
        made = function(bar)
        made.place(bar, address)
        made.write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
        bench.bus.add(device, made)
        assert bench.bus.window.where(bar) == address


def test_row63_what_comes_last_is_told_last(bench: Bench) -> None:
    """One vCPU turns bus mastering on while another turns it off."""
    told, going = bench.told, threading.Event()
    goes_on = threading.Event()

    class Slow(Told):
        def bus_master_changed(self, on: bool) -> None:
            if on:
                going.set()
                goes_on.wait(60)
            told.bus_master_changed(on)

    bench.function.placement = Slow()
    on = threading.Thread(target=bench.write, args=(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MASTER))
    off = threading.Thread(target=bench.write, args=(pci.PCI_COMMAND, 2, 0))
    on.start()
    assert going.wait(60)
    off.start()
    off.join(0.2)  # it waits; without a lock it would be done, and too early
    goes_on.set()
    on.join(60)
    off.join(60)
    assert told.master == [True, False]


def test_a_place_is_taken_once(bench: Bench) -> None:
    for device in (SLOT, DEVICES, -1):
        with pytest.raises(ValueError, match="no place"):
            bench.bus.add(device, function())


@pytest.mark.parametrize("bar", [(1, 4096), (6, 4096), (0, 2048), (0, 5000)])
def test_bars_that_cannot_be(bar: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no such BAR"):
        function(Bar(*bar, Registers()))


def test_the_smallest_bar(bench: Bench) -> None:
    bench.bus.add(4, function(Bar(4, 4096, Registers())))
    bench.bus.ecam.write(4 << 15 | pci.PCI_BASE_ADDRESS_0 + 16, 8, ONES[8])
    assert bench.read(pci.PCI_BASE_ADDRESS_0 + 16, 8, 4) == (1 << 64) - 4096 | 4


def test_a_function_without_a_subsystem(bench: Bench) -> None:
    bench.bus.add(4, Function(vendor_id=1, device_id=2, class_code=0))
    assert bench.read(pci.PCI_SUBSYSTEM_VENDOR_ID, 4, 4) == 0
    assert bench.read(pci.PCI_CLASS_REVISION, 4, 4) == 0


def test_firmware_places_a_bar(bench: Bench) -> None:
    after = bytes(bench.function.space[pci.PCI_BASE_ADDRESS_0 + 8 :])
    bench.function.place(bench.bar, BASE + BAR_SIZE)
    assert bench.read(pci.PCI_BASE_ADDRESS_0, 8) == BASE + BAR_SIZE | 4
    assert bench.function.space[pci.PCI_BASE_ADDRESS_0 + 8 :] == after
    bench.write(pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
    assert bench.answers_at(BASE + BAR_SIZE)


@pytest.mark.parametrize("leaves", ["moves", "decodes no more", "is taken out"])
def test_row62_a_bar_over_another_answers_once_that_has_left(bench: Bench, leaves: str) -> None:
    """As when a driver exchanges the addresses of two functions."""
    first = Bar(0, BAR_SIZE, Registers())
    other = function(first)
    bench.bus.add(SLOT + 1, other)
    at = (SLOT + 1) << 15
    bench.bus.ecam.write(at | pci.PCI_BASE_ADDRESS_0 + 4, 4, BASE >> 32)
    bench.bus.ecam.write(at | pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
    bench.place(BASE)
    assert bench.told.places[-1:] in ([], [None])
    if leaves == "moves":
        bench.bus.ecam.write(at | pci.PCI_BASE_ADDRESS_0, 4, BAR_SIZE)
    elif leaves == "decodes no more":
        bench.bus.ecam.write(at | pci.PCI_COMMAND, 2, 0)
    else:
        bench.bus.remove(SLOT + 1, bench.bus.functions[SLOT + 1])
    assert bench.told.places[-1] == BASE
    bench.bus.window.write(0, 4, 7)
    assert bench.registers.written == [(0, 4, 7)]


def test_a_prefetchable_bar_in_either_window(bench: Bench) -> None:
    other = bench.bus.add_window(BASE + 4 * SIZE, SIZE)
    content = Registers()
    bar = Bar(2, BAR_SIZE, content, prefetchable=True)
    made = function(bar)
    bench.bus.add(SLOT + 1, made)
    at = (SLOT + 1) << 15
    assert bench.bus.ecam.read(at | 0x18, 4) == 0xC
    bench.bus.ecam.write(at | pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
    assert isinstance(made.placement, Told)
    for address in (BASE + 4 * SIZE, BASE, BASE + 5 * SIZE - BAR_SIZE, BASE + 5 * SIZE, BASE):
        bench.bus.ecam.write(at | 0x18, 8, address)
        inside = address != BASE + 5 * SIZE
        assert bench.bus.where(bar) == made.placement.places[-1] == (address if inside else None)
        low, high = bench.bus.window.where(bar), other.where(bar)
        assert (low, high).count(None) == (1 if inside else 2)
        content.written.clear()
        for window, first in ((bench.bus.window, BASE), (other, BASE + 4 * SIZE)):
            window.write(address - first, 4, 1)
        assert content.written == ([(0, 4, 1)] if inside else [])
    bench.bus.remove(SLOT + 1, made)
    assert bench.bus.where(bar) is None


def test_a_function_with_several_bars(bench: Bench) -> None:
    bars = [Bar(number, BAR_SIZE << number, Registers()) for number in (0, 2, 4)]
    made = function(*bars)
    places = [BASE + (number << 20) for number in (1, 2, 3)]
    for bar, address in zip(bars, places, strict=True):
        made.place(bar, address)
    assert [made.address_of(bar) for bar in bars] == places
    bench.bus.add(SLOT + 1, made)
    bench.bus.ecam.write((SLOT + 1) << 15 | pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MEMORY)
    assert [bench.bus.window.where(bar) for bar in bars] == places
    for at in range(pci.PCI_BASE_ADDRESS_0, pci.PCI_BASE_ADDRESS_0 + 24, 4):
        bench.bus.ecam.write((SLOT + 1) << 15 | at, 4, ONES[4])
    for bar in bars:
        at = pci.PCI_BASE_ADDRESS_0 + 4 * bar.number
        assert bench.read(at, 8, SLOT + 1) == (1 << 64) - bar.size | 4
