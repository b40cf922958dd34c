"""MSI-X: messages go out when nothing masks them, and wait, as one, while something does."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.errors import HostError
from pyvmm.host.log import RateLimited
from pyvmm.pci import registers as pci
from pyvmm.pci.bus import PciBus
from pyvmm.pci.function import Function
from pyvmm.pci.msix import MAX_VECTORS, Msix

VECTORS = 3
ENABLE, MASKALL = pci.PCI_MSIX_FLAGS_ENABLE, pci.PCI_MSIX_FLAGS_MASKALL
MESSAGE = (0xFEE0_0000, 0x41)


class Line:
    """A MessageLine that writes down what it sends; an address of 0 is nobody's."""

    def __init__(self) -> None:
        self.to: tuple[int, int] | None = None
        self.waiting = 0
        self.sent: list[tuple[int, int]] = []
        self.connections = 0

    def connect(self, address: int, data: int) -> None:
        if not address:
            raise HostError(22, "nobody is at that address")
        self.to = address, data
        self.connections += 1
        if self.waiting:
            self.waiting = 0
            self.sent.append(self.to)

    def disconnect(self) -> None:
        self.to = None

    @property
    def pending(self) -> bool:
        return bool(self.waiting)

    def signal(self) -> None:
        if self.to is None:
            self.waiting += 1
        else:
            self.sent.append(self.to)


class Bench:
    def __init__(self, vectors: int = VECTORS) -> None:
        self.said: list[str] = []
        self.lines = [Line() for _ in range(vectors)]
        self.msix = Msix(self.lines, RateLimited(lambda line: self.said.append(str(line))))
        self.function = Function(vendor_id=1, device_id=2, class_code=0)
        self.msix.add_to(self.function, 0, 0x1000, 0x2000)
        self.function.placement = self
        self.bus = PciBus(0, 0)
        self.bus.add(1, self.function)
        self.control(0)

    def bar_moved(self, bar: object, address: int | None) -> None:
        raise AssertionError("there is none")

    def bus_master_changed(self, on: bool) -> None:
        self.msix.bus_master_changed(on)

    def function_reset(self) -> None:
        self.msix.reset()

    def master(self, on: bool) -> None:
        self.bus.write(1, 0, pci.PCI_COMMAND, 2, pci.PCI_COMMAND_MASTER if on else 0)

    def control(self, flags: int) -> None:
        at = self.bus.read(1, 0, pci.PCI_CAPABILITY_LIST, 1)
        self.bus.write(1, 0, at + 2, 2, flags)

    def fill(self, vector: int = 0, message: tuple[int, int] = MESSAGE, control: int = 0) -> None:
        """As Linux does: masked while it is written."""
        at = 16 * vector
        self.msix.write_table(at + 12, 4, 1)
        for offset, value in (
            (0, message[0] & 0xFFFF_FFFF),
            (4, message[0] >> 32),
            (8, message[1]),
        ):
            self.msix.write_table(at + offset, 4, value)
        self.msix.write_table(at + 12, 4, control)

    def go(self) -> None:
        """Everything allows messages."""
        self.master(True)
        self.control(ENABLE)
        for vector in range(len(self.lines)):
            self.fill(vector)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_capability(bench: Bench) -> None:
    at = bench.bus.read(1, 0, pci.PCI_CAPABILITY_LIST, 1)
    assert bench.bus.read(1, 0, at, 1) == pci.PCI_CAP_ID_MSIX
    assert bench.bus.read(1, 0, at + 2, 2) == VECTORS - 1
    assert bench.bus.read(1, 0, at + 4, 4) == 0x1000
    assert bench.bus.read(1, 0, at + 8, 4) == 0x2000
    bench.bus.write(1, 0, at + 2, 2, 0xFFFF)
    assert bench.bus.read(1, 0, at + 2, 2) == ENABLE | MASKALL | VECTORS - 1


def test_messages_go_out(bench: Bench) -> None:
    bench.go()
    bench.lines[0].signal()
    bench.lines[2].signal()
    assert [line.sent for line in bench.lines] == [[MESSAGE], [], [MESSAGE]]


def test_a_vector_is_masked_at_first(bench: Bench) -> None:
    bench.master(True)
    bench.control(ENABLE)
    assert all(bench.msix.read_table(16 * vector + 12, 4) == 1 for vector in range(VECTORS))
    bench.lines[0].signal()
    assert (bench.lines[0].sent, bench.msix.read_pending(0, 8)) == ([], 1)


OPEN = {
    "bus master": lambda bench, on: bench.master(on),
    "enabled": lambda bench, on: bench.control(ENABLE if on else 0),
    "function mask": lambda bench, on: bench.control(ENABLE if on else ENABLE | MASKALL),
    "vector mask": lambda bench, on: bench.msix.write_table(16 + 12, 4, 0 if on else 1),
}


@pytest.mark.parametrize("gate", OPEN)
def test_row65_what_comes_while_one_gate_is_shut_goes_out_once_it_opens(
    bench: Bench, gate: str
) -> None:
    bench.go()
    OPEN[gate](bench, False)
    for _ in range(3):
        bench.lines[1].signal()
    assert bench.lines[1].sent == []
    assert bench.msix.read_pending(0, 4) == 0b10
    OPEN[gate](bench, True)
    assert bench.lines[1].sent == [MESSAGE]
    assert bench.msix.read_pending(0, 4) == 0
    bench.lines[1].signal()
    assert bench.lines[1].sent == [MESSAGE] * 2


def test_row65_every_gate_must_be_open() -> None:
    for shut in itertools.product([False, True], repeat=len(OPEN)):
        bench = Bench()
        bench.go()
        for (name, gate), one in zip(OPEN.items(), shut, strict=True):
            # Enable and function mask stand in one register.
            if one and not (name == "function mask" and shut[1]):
                gate(bench, False)
        bench.lines[1].signal()
        assert bool(bench.lines[1].sent) == (not any(shut)), shut


def test_a_line_is_connected_anew_only_for_another_message(bench: Bench) -> None:
    bench.go()
    before = bench.lines[0].connections
    bench.msix.write_table(8, 4, MESSAGE[1])
    bench.control(ENABLE)
    bench.master(True)
    assert bench.lines[0].connections == before
    bench.msix.write_table(8, 4, 0x42)
    bench.lines[0].signal()
    assert bench.lines[0].sent == [(MESSAGE[0], 0x42)]
    assert bench.lines[0].connections == before + 1
    assert bench.lines[1].connections == before


def test_eight_bytes_at_once(bench: Bench) -> None:
    bench.master(True)
    bench.control(ENABLE)
    bench.msix.write_table(16, 8, 0xFEE0_1000)
    bench.msix.write_table(24, 8, 0x55)
    bench.lines[1].signal()
    assert bench.lines[1].sent == [(0xFEE0_1000, 0x55)]
    assert bench.msix.read_table(16, 8) == 0xFEE0_1000
    assert bench.msix.read_table(24, 8) == 0x55
    for at, value in ((32, 0x2_1234_5678), (40, 0x1_8765_4321)):
        bench.msix.write_table(at, 8, value)
        assert bench.msix.read_table(at, 8) == value


@pytest.mark.parametrize(
    "shut",
    [
        lambda bench: bench.msix.bus_master_changed(False),
        lambda bench: bench.control(0),
        lambda bench: bench.msix.reset(),
        lambda bench: bench.msix.write_table(12, 4, 1),
    ],
    ids=["bus mastering", "control", "reset", "mask"],
)
def test_row65_a_gate_that_is_shut_while_a_line_is_being_connected_stays_shut(
    bench: Bench, shut: Callable[[Bench], None]
) -> None:
    bench.go()
    line = bench.lines[0]
    connects, goes_on = threading.Event(), threading.Event()
    connect = line.connect

    def slowly(address: int, data: int) -> None:
        connects.set()
        goes_on.wait(60)
        connect(address, data)

    line.connect = slowly  # type: ignore[method-assign]
    opens = threading.Thread(target=bench.msix.write_table, args=(8, 4, 0x77))
    shuts = threading.Thread(target=shut, args=(bench,))
    opens.start()
    assert connects.wait(60)
    shuts.start()
    shuts.join(0.2)  # it waits; without a lock it would be done, and too early
    goes_on.set()
    opens.join(60)
    shuts.join(60)
    line.signal()
    assert line.sent == []


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (0, 2), (2, 4), (4, 8), (12, 1), (13, 4), (8, 2)]
)
def test_row64_other_accesses_change_nothing(bench: Bench, offset: int, size: int) -> None:
    bench.go()
    before = [bench.msix.read_table(at, 4) for at in range(0, bench.msix.table_size, 4)]
    bench.msix.write_table(offset, size, (1 << 8 * size) - 1)
    assert [bench.msix.read_table(at, 4) for at in range(0, bench.msix.table_size, 4)] == before
    assert bench.msix.read_table(offset, size) == bench.msix.read_pending(offset, size) == 0
    assert "MSI-X table" in bench.said[0]


def test_reserved_bits_read_as_zeros(bench: Bench) -> None:
    for word in range(4):
        bench.msix.write_table(4 * word, 4, 0xFFFF_FFFF)
    words = [bench.msix.read_table(4 * word, 4) for word in range(4)]
    assert words == [0xFFFF_FFFC, 0xFFFF_FFFF, 0xFFFF_FFFF, 1]


@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 2), (2, 4), (4, 8)])
def test_row64_pending_bits_are_read_by_four_or_eight_bytes(
    bench: Bench, offset: int, size: int
) -> None:
    bench.lines[0].signal()
    assert bench.msix.read_pending(offset, size) == 0
    assert bench.msix.read_pending(0, 4) == bench.msix.read_pending(0, 8) == 1


def test_row63_before_bus_mastering_was_ever_on(bench: Bench) -> None:
    bench.control(ENABLE)
    bench.fill()
    bench.lines[0].signal()
    assert bench.lines[0].sent == []
    bench.master(True)
    assert bench.lines[0].sent == [MESSAGE]


def test_an_address_above_4_gib(bench: Bench) -> None:
    bench.go()
    bench.fill(2, (0x12_FEE0_0000, 7))
    bench.lines[2].signal()
    assert bench.lines[2].sent == [(0x12_FEE0_0000, 7)]
    assert bench.said == []


def test_a_function_of_one_vector() -> None:
    bench = Bench(1)
    bench.go()
    bench.lines[0].signal()
    assert bench.lines[0].sent == [MESSAGE]


def test_row66_what_was_refused_is_tried_again_and_the_old_message_is_gone(bench: Bench) -> None:
    bench.go()
    line = bench.lines[0]
    bench.msix.write_table(0, 4, 0)  # while nothing masks it
    line.signal()
    assert (line.sent, line.to) == ([], None)
    connect = line.connect
    line.connect = lambda address, data: connect(0, data)  # type: ignore[method-assign]
    bench.msix.write_table(0, 4, MESSAGE[0])
    line.connect = connect  # type: ignore[method-assign]
    bench.msix.write_table(0, 4, MESSAGE[0])
    assert line.sent == [MESSAGE]


def test_row66_a_message_to_nobody_is_said_once_and_waits(bench: Bench) -> None:
    bench.go()
    for _ in range(3):
        bench.fill(0, (0, 0x41))
    bench.lines[0].signal()
    assert bench.lines[0].sent == []
    assert any("vector 0 sends nothing" in line for line in bench.said)
    bench.fill(0)
    assert bench.lines[0].sent == [MESSAGE]


def test_pending_bits_of_many() -> None:
    bench = Bench(130)
    for vector in (0, 31, 32, 63, 64, 129):
        bench.lines[vector].signal()
    assert bench.msix.pending_size == 24
    assert bench.msix.read_pending(0, 8) == 1 << 63 | 1 << 32 | 1 << 31 | 1
    assert bench.msix.read_pending(4, 4) == 1 << 31 | 1
    assert [bench.msix.read_pending(at, 8) for at in (8, 16)] == [1, 2]
    assert bench.msix.read_pending(4, 8) == 0


def test_a_reset_masks_all_and_turns_it_off(bench: Bench) -> None:
    bench.go()
    bench.msix.reset()
    assert not bench.msix.enabled
    bench.lines[0].signal()
    assert bench.lines[0].sent == []
    bench.control(ENABLE)
    assert bench.msix.read_table(12, 4) == 1
    assert [bench.msix.read_table(at, 4) for at in (0, 4, 8)] == [0, 0, 0]
    bench.lines[0].signal()
    assert bench.lines[0].sent == []


@pytest.mark.parametrize("vectors", [0, MAX_VECTORS + 1])
def test_tables_that_cannot_be(vectors: int) -> None:
    with pytest.raises(ValueError, match="vectors"):
        Bench(vectors)


STEPS = st.lists(
    st.one_of(
        st.sampled_from([(name, on) for name in OPEN for on in (False, True)]),
        st.just(("signal", True)),
        st.integers(1, 9).map(lambda data: ("message", data)),
    )
)


@given(STEPS)
def test_row65_no_interrupt_is_lost_or_made_up(steps) -> None:
    """After each signal there is a message, unless it still waits; and none without a signal."""
    bench = Bench()
    bench.go()
    signals = 0
    owed = False
    for name, value in steps:
        before = len(bench.lines[1].sent)
        if name == "signal":
            bench.lines[1].signal()
            signals += 1
            owed = True
        elif name == "message":
            bench.fill(1, (MESSAGE[0], value), bench.msix.read_table(28, 4))
        else:
            OPEN[name](bench, value)
        sent = len(bench.lines[1].sent) - before
        assert sent <= owed
        owed = owed and not sent
        assert owed == bench.lines[1].pending
    for gate in OPEN.values():
        gate(bench, True)
    assert not bench.lines[1].pending and len(bench.lines[1].sent) <= signals
