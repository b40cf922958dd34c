"""The vCPU loop on a kvm_run page that a fake KVM_RUN fills: what real guests reach too rarely."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyvmm.bus import Action, Bus
from pyvmm.errors import HostError
from pyvmm.kvm import loop, uapi
from pyvmm.kvm import vcpu as vcpu_module
from pyvmm.kvm.uapi import ffi
from pyvmm.kvm.vcpu import EXIT_INTR, Vcpu

Step = Callable[[Any, memoryview], None]


class Device:
    def __init__(self, answer: int = 0, action: Action | None = None) -> None:
        self.answer, self.action = answer, action
        self.seen: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return self.answer

    def write(self, offset: int, size: int, value: int) -> Action | None:
        self.seen.append((offset, size, value))
        return self.action


class Scripted:
    """A vCPU whose KVM_RUN plays `steps`, each filling the page, then says EINTR for good."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            vcpu_module.syscalls, "map_shared", lambda fd, size: mmap.mmap(-1, size)
        )
        self.vcpu = Vcpu(0, -1, 3 * 4096)
        self.page = self.vcpu.run_page
        self.run: Any = ffi.cast("struct kvm_run *", ffi.from_buffer(self.page))
        self.steps: Iterator[Step] = iter(())
        monkeypatch.setattr(loop.fcntl, "ioctl", self._ioctl)

    def _ioctl(self, fd: int, request: int) -> int:
        assert request == uapi.KVM_RUN
        for step in self.steps:
            step(self.run, self.page)
            return 0
        raise InterruptedError(errno.EINTR, "interrupted")

    def play(self, *steps: Step, pio: Bus | None = None, mmio: Bus | None = None) -> Action | None:
        self.steps = iter(steps)
        return loop.run_until_exit(self.vcpu, pio or Bus("port"), mmio or Bus("MMIO"))


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    return Scripted(monkeypatch)


def out(port: int, value: bytes, size: int = 1) -> Step:
    def step(run: Any, page: memoryview) -> None:
        run.exit_reason = uapi.KVM_EXIT_IO
        run.io.direction, run.io.size, run.io.port = uapi.KVM_EXIT_IO_OUT, size, port
        run.io.count, run.io.data_offset = len(value) // size, 4096
        page[4096 : 4096 + len(value)] = value

    return step


def mmio(address: int, size: int, value: int | None = None) -> Step:
    def step(run: Any, page: memoryview) -> None:
        run.exit_reason = uapi.KVM_EXIT_MMIO
        run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = address, size, value is not None
        run.mmio.data = list((value or 0).to_bytes(8, "little"))

    return step


def fail(number: int) -> Step:
    def step(run: Any, page: memoryview) -> None:
        raise OSError(number, "as scripted")

    return step


def bus(start: int, size: int, device: Device) -> Bus:
    made = Bus("test")
    made.register(start, size, device)
    return made


def test_eintr_ends_the_loop_with_a_reason_of_its_own(scripted: Scripted) -> None:
    assert scripted.play(out(1, b"x")) is None
    assert scripted.vcpu.exit_reason == EXIT_INTR


def test_eagain_means_enter_again(scripted: Scripted) -> None:
    device = Device()
    scripted.play(fail(errno.EAGAIN), out(1, b"x"), pio=bus(1, 1, device))
    assert device.seen == [(0, 1, ord("x"))]


def test_a_memory_fault_is_an_exit_although_kvm_says_efault(scripted: Scripted) -> None:
    def fault(run: Any, page: memoryview) -> None:
        run.exit_reason = uapi.KVM_EXIT_MEMORY_FAULT
        raise OSError(errno.EFAULT, "bad address")

    assert scripted.play(fault) is None
    assert scripted.vcpu.exit_reason == uapi.KVM_EXIT_MEMORY_FAULT


def test_other_errors_say_which_vcpu(scripted: Scripted) -> None:
    with pytest.raises(HostError, match="KVM_RUN of vCPU 0"):
        scripted.play(fail(errno.ENOMEM))
    with pytest.raises(HostError, match="KVM_RUN of vCPU 0"):
        scripted.play(fail(errno.EFAULT))


def test_an_exit_that_is_no_access_is_the_callers(scripted: Scripted) -> None:
    def halt(run: Any, page: memoryview) -> None:
        run.exit_reason = uapi.KVM_EXIT_HLT

    assert scripted.play(halt) is None
    assert scripted.vcpu.exit_reason == uapi.KVM_EXIT_HLT


def test_only_the_bytes_of_the_access_reach_the_handler(scripted: Scripted) -> None:
    ports, registers = Device(), Device()
    for _ in range(2):  # the first access and the ones after it take different ways
        scripted.play(
            out(1, b"\x34\x12\xff\xff", 2),
            out(1, b"\x34\x12", 2),
            mmio(0x1000, 2, 0xFFFF_1234),
            mmio(0x1000, 2, 0xFFFF_1234),
            pio=bus(0, 8, ports),
            mmio=bus(0x1000, 8, registers),
        )
    assert set(registers.seen) == {(0, 2, 0x1234)}
    assert set(ports.seen) == {(1, 2, 0x1234), (1, 2, 0xFFFF)}


def test_an_answer_too_large_is_cut_to_the_access(scripted: Scripted) -> None:
    device = Device(answer=-1)
    steps = [mmio(0x1000, 2)] * 2
    scripted.play(*steps, mmio=bus(0x1000, 8, device))
    assert int.from_bytes(bytes(scripted.run.mmio.data), "little") == 0xFFFF


def test_the_first_action_of_a_string_instruction_counts(scripted: Scripted) -> None:
    device = Device(action=Action.RESET)
    assert scripted.play(out(1, b"abc"), pio=bus(1, 1, device)) is Action.RESET
    assert [value for _, _, value in device.seen] == list(b"abc")


@pytest.mark.parametrize("size", [3, 5, 6, 7])
def test_odd_sizes_arrive_in_natural_pieces(scripted: Scripted, size: int) -> None:
    device = Device()
    value = int.from_bytes(bytes(range(1, size + 1)), "little")
    scripted.play(mmio(0x1000, size, value), mmio=bus(0x1000, 16, device))
    assert {piece for _, piece, _ in device.seen} <= {1, 2, 4, 8}
    assert all(offset % piece == 0 for offset, piece, _ in device.seen)
    got = b"".join(part.to_bytes(piece, "little") for _, piece, part in device.seen)
    assert got == bytes(range(1, size + 1))


def test_stale_padding_in_the_shared_page_changes_nothing(scripted: Scripted) -> None:
    device = Device()

    def stale(run: Any, page: memoryview) -> None:
        mmio(0x1000, 4, 0x1234_5678)(run, page)
        page[53:56] = b"\xff\xff\xff"  # what another member of the union may have left

    scripted.play(stale, stale, mmio=bus(0x1000, 8, device))
    assert device.seen == [(0, 4, 0x1234_5678)] * 2


def test_a_guest_cannot_make_the_loops_memory_grow(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_MAX_KEPT", 4)
    device = Device()
    addresses = [0x1000 + place for place in range(100)] * 2
    kept: list[int] = []
    real = loop._first_mmio_access

    def spying(page: Any, views: Any, space: Any, registers: dict[int, dict[int, Any]]) -> Any:
        result = real(page, views, space, registers)
        kept.append(sum(map(len, registers.values())))
        return result

    monkeypatch.setattr(loop, "_first_mmio_access", spying)
    steps = [mmio(address, 1, 7) for address in addresses]
    scripted.play(*steps, mmio=bus(0x1000, 0x1000, device))
    assert len(device.seen) == 200
    assert max(kept) <= 4


def test_what_a_handler_raises_comes_out(scripted: Scripted) -> None:
    class Broken(Device):
        def write(self, offset: int, size: int, value: int) -> Action | None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        scripted.play(out(1, b"x"), pio=bus(1, 1, Broken()))

    # KeyError too: it must not be mistaken for an access never seen before.
    class Missing(Device):
        def write(self, offset: int, size: int, value: int) -> Action | None:
            raise KeyError(offset)

    device = Missing()
    with pytest.raises(KeyError):
        scripted.play(out(1, b"x"), out(1, b"x"), pio=bus(1, 1, device))


class Watched(Bus):
    """Counts how often a handler is looked for."""

    def __init__(self, device: Device) -> None:
        super().__init__("test")
        self.register(0x10, 0x40, device)
        self.looks = 0

    def find(self, address: int) -> Any:
        self.looks += 1
        return super().find(address)

    def _within(self, address: int, size: int) -> Any:
        self.looks += 1
        return super()._within(address, size)


def into(port: int, size: int, count: int = 1) -> Step:
    def step(run: Any, page: memoryview) -> None:
        run.exit_reason = uapi.KVM_EXIT_IO
        run.io.direction, run.io.size, run.io.port = uapi.KVM_EXIT_IO_IN, size, port
        run.io.count, run.io.data_offset = count, 4096
        page[4096:4120] = bytes(24)

    return step


VALUE = 0x8877_6655_4433_2211


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_port_is_looked_up_once_and_served_alike_ever_after(
    scripted: Scripted, size: int
) -> None:
    device, got = Device(answer=VALUE), []
    watched, cut = Watched(device), VALUE & (1 << 8 * size) - 1
    turn = [out(0x18, cut.to_bytes(size, "little"), size), into(0x20, size)]

    def look(run: Any, page: memoryview) -> None:
        got.append(bytes(page[4096:4104]))
        out(0x18, cut.to_bytes(size, "little"), size)(run, page)

    scripted.play(*turn, pio=watched)
    looks = watched.looks
    watched.looks = 0
    device.seen.clear()
    scripted.play(*turn, look, *turn, look, *turn, look, pio=watched)
    assert watched.looks == looks
    assert device.seen == [(8, size, cut), (0x10, size), (8, size, cut)] * 3
    assert got == [cut.to_bytes(8, "little")] * 3


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_register_is_looked_up_once_and_served_alike_ever_after(
    scripted: Scripted, size: int
) -> None:
    device, got = Device(answer=VALUE), []
    watched, cut = Watched(device), VALUE & (1 << 8 * size) - 1
    turn = [mmio(0x50 - size, size, cut), mmio(0x18, size, cut), mmio(0x20, size)]

    def look(run: Any, page: memoryview) -> None:
        got.append(int.from_bytes(bytes(run.mmio.data), "little"))
        mmio(0x18, size, cut)(run, page)

    scripted.play(*turn, mmio=watched)
    looks = watched.looks
    watched.looks = 0
    device.seen.clear()
    scripted.play(*turn, look, *turn, look, *turn, look, mmio=watched)
    assert watched.looks == looks
    assert (
        device.seen == [(0x40 - size, size, cut), (8, size, cut), (0x10, size), (8, size, cut)] * 3
    )
    assert got == [cut] * 3


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_string_instruction_is_served_whole_each_time(scripted: Scripted, size: int) -> None:
    device, got = Device(answer=VALUE), []
    data = bytes(range(1, 3 * size + 1))

    def look(run: Any, page: memoryview) -> None:
        got.append(bytes(page[4096:4120]))
        out(0x18, data, size)(run, page)

    steps = [out(0x18, data, size), into(0x18, size, 3), look] * 2
    scripted.play(*steps, pio=bus(0x10, 0x20, device))
    written = [int.from_bytes(data[at : at + size], "little") for at in range(0, 3 * size, size)]
    writes, reads = [(8, size, value) for value in written], [(8, size)] * 3
    assert device.seen == (writes + reads + writes) * 2
    assert (
        got == [((VALUE & (1 << 8 * size) - 1).to_bytes(size, "little") * 3).ljust(24, b"\0")] * 2
    )


@pytest.mark.parametrize("first", [True, False], ids=["at first", "later"])
@pytest.mark.parametrize("kind", ["port", "register"])
def test_what_a_handler_asks_for_ends_the_loop(scripted: Scripted, kind: str, first: bool) -> None:
    device = Device(action=Action.RESET if first else None)

    def asks(run: Any, page: memoryview) -> None:
        device.action = Action.RESET
        access(run, page)

    access = out(0x18, b"x") if kind == "port" else mmio(0x18, 1, ord("x"))
    space = bus(0x10, 0x20, device)
    steps = [access, access, asks, access]
    assert scripted.play(*steps, pio=space, mmio=space) is Action.RESET
    assert device.seen == [(8, 1, ord("x"))] * (1 if first else 3)


def test_a_guest_that_uses_all_ports_does_not_make_it_grow(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_MAX_KEPT", 4)
    kept: list[int] = []
    real = loop._first_port_access

    def spying(page: Any, views: Any, space: Any, ports: dict[int, Any]) -> Any:
        result = real(page, views, space, ports)
        kept.append(len(ports))
        return result

    monkeypatch.setattr(loop, "_first_port_access", spying)
    device = Device()
    scripted.play(*[out(port, b"x") for port in range(9)], pio=bus(0, 0x100, device))
    assert kept == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    assert [offset for offset, _, _ in device.seen] == list(range(9))


def test_an_access_over_the_end_of_a_range_is_never_its_handlers(scripted: Scripted) -> None:
    device, got = Device(), []

    def look(run: Any, page: memoryview) -> None:
        got.append(int.from_bytes(bytes(run.mmio.data), "little"))

    space = Bus("test")
    space.register(0x10, 4, device)
    space.register(0x14, 4, device)
    over = [mmio(0x12, 4), look, mmio(0x12, 4, 7), mmio(0x16, 4), look, mmio(0x16, 4, 7)]
    scripted.play(*over * 2, out(0x13, b"xy", 2), out(0x13, b"xy", 2), pio=space, mmio=space)
    assert device.seen == []
    assert got == [0xFFFF_FFFF] * 4


@pytest.mark.parametrize(
    "asked", [[], [None, None], [Action.RESET], [None, Action.RESET, Action.POWEROFF, None]]
)
def test_what_is_half_done_is_completed_and_the_first_wish_told(
    scripted: Scripted, asked: list[Action | None]
) -> None:
    device = Device()

    def step(action: Action | None) -> Step:
        def access(run: Any, page: memoryview) -> None:
            assert scripted.vcpu.immediate_exit
            device.action = action
            out(1, b"x")(run, page)

        return access

    scripted.steps = iter([step(action) for action in asked])
    wish = loop.finish_pending(scripted.vcpu, bus(1, 1, device), Bus("MMIO"))
    assert wish is next((action for action in asked if action is not None), None)
    assert len(device.seen) == len(asked)
    assert scripted.vcpu.immediate_exit, "the caller lets the guest go on"


@pytest.mark.parametrize("start", [0x1000, 0x1001, 0x1002, 0x1005])
@pytest.mark.parametrize("size", [3, 5, 6, 7])
def test_odd_sizes_are_read_in_order(scripted: Scripted, size: int, start: int) -> None:
    content, got = bytes(range(2, 34, 2)), []

    class Memory(Device):
        def read(self, offset: int, size: int) -> int:
            return int.from_bytes(content[offset : offset + size], "little") | 0xFF << 8 * size

    def look(run: Any, page: memoryview) -> None:
        got.append(bytes(run.mmio.data))
        run.exit_reason = uapi.KVM_EXIT_HLT

    scripted.play(mmio(start, size), look, mmio=bus(0x1000, 16, Memory()))
    at = start - 0x1000
    assert got[0] == content[at : at + size].ljust(8, b"\0")
