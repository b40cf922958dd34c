"""One fuzz case: a device, a driver that errs at random, and what must hold whatever it does.

`run_case` draws everything from one `random.Random`, so a case is repeated by its seed, hypothesis
can shrink it, and a coverage-guided fuzzer can steer it. It raises AssertionError, with the steps
so far, if

- anything but DriverError is raised, in a register access or in a worker,
- a worker takes more chains in a pass than its queue has entries, or never sleeps,
- a byte of memory changes that is neither in the device area nor in a buffer for the device,
- a completion is lost or doubled,
- after a reset the device does not serve a good request,
- a descriptor or a thread is left at the end.

For a while the host may have too little (fuzz/shortage.py): the device may need a reset then, and
no more than that.
"""

from __future__ import annotations

import ctypes
import functools
import json
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from random import Random
from typing import Any, cast
from unittest import mock

from fuzz.inline import Workers
from fuzz.request import Request
from fuzz.room import check_closed, check_ended, open_files
from fuzz.shortage import Shortage
from fuzz.targets import TARGETS, Target

from pyvmm.bus import Handler
from pyvmm.errors import ConfigError, DriverError, PyvmmError
from pyvmm.host.log import RateLimited
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.memory.guest_memory import Region
from pyvmm.pci.bus import PciBus
from pyvmm.testing import (
    Arena,
    Element,
    MmioDriver,
    MockDriver,
    illegal_chains,
    legal_chains,
)
from pyvmm.testing.attached import SLOT, WINDOW, on_a_bus
from pyvmm.testing.mmio_driver import (
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    DRIVER_OK,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_RING_PACKED,
    F_RING_RESET,
    NEEDS_RESET,
    QUEUE_DESC,
    QUEUE_DEVICE,
    QUEUE_READY,
    QUEUE_RESET,
    QUEUE_SEL,
    QUEUE_SIZE,
    STATUS,
    Ring,
)
from pyvmm.testing.pci_driver import (
    CAP_EXPRESS,
    COMMAND,
    ISR_CFG,
    PCI_CFG,
    MockLine,
    PciDriver,
)
from pyvmm.testing.ring import INDIRECT, WRITE
from pyvmm.transport.base import Transport
from pyvmm.transport.mmio import MmioTransport
from pyvmm.transport.pci import PciTransport, vectors_for
from pyvmm.virtio import defects
from pyvmm.virtio.device import VirtioDevice

RAM = ((0, 0xF_0000), (0x40_0000, 0x1_0000))  # 1 MiB with a hole in it
RINGS_AT = 0x1000
LARGEST_TABLE = 1 << 16  # as much of an indirect table as the oracle looks at
REGISTERS = [*range(0, 0x100, 4), 0x100, 0x104, 0x108, 0x118, 0x120, 0x1FC]
VALUES = (0, 1, 2, 3, 4, 8, 11, 15, 16, 64, 128, 256, 0x1000, 0xF_0000, 0x40_0000, 0xFFFF_FFFF)


# A register that selects, and one that means what was selected.
_SELECTED = (
    (DRIVER_FEATURES_SEL, DRIVER_FEATURES), (QUEUE_SEL, QUEUE_SIZE), (QUEUE_SEL, QUEUE_READY),
    (QUEUE_SEL, QUEUE_RESET), (QUEUE_SEL, QUEUE_DESC), (QUEUE_SEL, QUEUE_DEVICE + 4),
)  # fmt: skip
# 4.1.4.3 Common configuration structure layout: offsets and widths.
_COMMON = (
    *((at, 4) for at in (0x00, 0x04, 0x08, 0x0C, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x34)),
    *((at, 2) for at in (0x10, 0x12, 0x16, 0x18, 0x1A, 0x1C, 0x1E, 0x38, 0x3A)),
    *((at, 1) for at in (0x14, 0x15)),
)


class Pump:
    """The driver's doorbell: a write to QueueNotify, and then the worker's turn."""

    def __init__(self, case: Case, index: int) -> None:
        self.case = case
        self.index = index

    def signal(self) -> None:
        self.case.driver.notify(self.index)
        self.case.pump()


class Case:
    """A device on its transport, with a driver in front that is about to misbehave."""

    def __init__(self, rng: Random, target: Target, ring: Ring, closing: ExitStack) -> None:
        self.rng = rng
        self.target = target
        self.ring: Ring = "split" if target.offloads else ring
        self.steps: list[str] = []
        self.workers = Workers(may_fail=target.may_fail, in_threads=rng.random() < 0.15)
        self.shortage = Shortage(Random(rng.getrandbits(32)))
        self.defects: list[str] = []
        self.memory, self.before = _blank_memory()
        self.closing = closing
        self.discarded: list[tuple[int, int]] = []  # pages that a balloon gave back
        self._watch_discards()
        closing.enter_context(self.workers.instead_of_threads())
        closing.enter_context(
            mock.patch.object(defects, "_report", RateLimited(self.defects.append, burst=100))
        )
        self.kind = rng.getrandbits(32)  # of those that the target has
        self.device = device = self._make_device()
        pumps = [Pump(self, index) for index in range(len(device.queue_sizes))]
        self.interrupts = 0
        self.over = rng.choice(("mmio", "mmio", "pci"))
        self.trace = _look_at if rng.random() < 0.1 else None
        self.bus: PciBus | None = None
        self.transport: Transport
        self.driver: MmioDriver
        if self.over == "pci":
            self._attach_pci(pumps)
        else:
            self._attach_mmio(pumps)
        closing.callback(self.transport.close)
        self.clean = True  # whether the driver has broken no rule since the last reset
        self.must_fail = False
        self.good_steps = 0
        self.oracle: list[tuple[int, int]] = []
        self.structures: list[tuple[int, int]] = []

    def _make_device(self) -> VirtioDevice:
        device = self.closing.enter_context(self.target.make(Random(self.kind)))
        # What the rings are like is not a device's business, so each is tried with all of them.
        if self.ring == "packed":
            device.features |= F_RING_PACKED
        if len(self.target.prompt) == len(device.queue_sizes):
            device.features |= F_IN_ORDER
        return device

    def _attach_mmio(self, pumps: Sequence[Pump]) -> None:
        mmio = MmioTransport(
            self.device,
            self.memory,
            self._interrupt,
            irq_eventfd=_interrupts() if self.target.offloads else None,
            log=lambda line: None,
            trace=self.trace,
        )
        if hasattr(self, "driver"):
            self.driver.registers = mmio.registers
        else:
            self.driver = MmioDriver(mmio.registers, self.memory, kicks=pumps, ring=self.ring)
        self.transport = mmio
        self.places: list[tuple[Handler, Sequence[int]]] = [
            (mmio.registers, [*REGISTERS * 60, *range(0x200)])
        ]

    def _attach_pci(self, pumps: Sequence[Pump]) -> None:
        lines = [
            MockLine(self._interrupt)  # type: ignore[arg-type]
            for _ in range(vectors_for(self.device))
        ]
        for line in lines:
            self.closing.callback(line.close)
        transport = PciTransport(
            self.device, self.memory, lines, log=lambda line: None, trace=self.trace
        )
        bus, driver = on_a_bus(transport, self.memory, kicks=pumps, ring=self.ring)
        self.transport, self.bus = transport, bus
        if hasattr(self, "driver"):  # which finds it where the one before it was
            driver = cast("PciDriver", self.driver)
            driver._config, driver.registers = bus.ecam, bus.window
        else:
            driver.find()
            driver.place(WINDOW)
            self.driver = driver
        registers = [
            one.offset + at
            for one in driver.structures.values()
            for at in range(min(one.length, 64))
        ]
        table = range(driver.msix.offset, driver.msix.offset + driver.msix.length, 4)
        configuration = [SLOT << 15 | at for at in range(256)]
        self.places = [
            (bus.window, registers),
            (bus.window, table),
            (bus.ecam, configuration),
            (bus.ports, range(8)),
        ]

    def _watch_discards(self) -> None:
        def watched(addr: int, size: int) -> None:
            self.discarded.append((addr, size))
            GuestMemory.discard(self.memory, addr, size)

        self.memory.discard = watched  # type: ignore[method-assign]
        self.closing.callback(vars(self.memory).pop, "discard")

    def _interrupt(self) -> None:
        self.interrupts += 1

    # --- steps -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Bring the device up, with some of its features and queues of some size."""
        rng = self.rng
        self._begin_anew()
        self.target.settle(self.device)
        self.driver.reset()
        self.workers.scarce = self.shortage.lasts
        self.workers.logs.clear()
        features = self.driver._usual_features()
        if rng.random() < 0.3:
            features |= self.driver.offered_features() & F_IN_ORDER
        for feature in (F_EVENT_IDX, F_INDIRECT_DESC):
            if rng.random() < 0.25:
                features &= ~feature
        sizes = [
            min(largest, rng.choice((1, 2, 4, 4, 8, 8, 16)))
            for largest in self.transport.device.queue_sizes
        ]
        self.note(f"start with features {features:#x}, queues of {sizes}")
        self.driver.start(features=features, queue_sizes=sizes)
        self.clean = True
        self.good_steps = rng.choice((0, 0, 2, 12))  # enough to go around a ring, sometimes
        self.oracle = []
        if rng.random() < 0.5:
            for request in self.target.begin(rng):
                self.ask(request)

    def _begin_anew(self) -> None:
        """The driver's earlier deeds, to memory or to its BAR, are of no account."""
        self.driver.arena = Arena(self.memory, RINGS_AT)
        if isinstance(self.driver, PciDriver):
            self.driver.place(WINDOW)

    @property
    def status(self) -> int:
        """The device status field, whether or not the driver can reach it."""
        return self.transport.negotiation.state.status

    @property
    def queue(self) -> MockDriver:
        return self.rng.choice(self.driver.queues)

    def note(self, step: str) -> None:
        self.steps.append(step)

    def step(self) -> None:
        """One more thing that the driver does: lawful ones, until its good time is over."""
        self.good_steps -= 1
        good = (self.lawful, self.lawful, self.lawful, self.legal, self.legal, self.renew)
        bad = (
            self.illegal, self.mutant, self.mutant, self.mutant, self.random_chain,
            self.random_chain, self.poke, self.poke, self.register, self.speak, self.start,
        )  # fmt: skip
        if self.rng.random() < 0.05:
            self.move()
        elif self.rng.random() < 0.04:
            self.fall_short()
        elif self.rng.random() < 0.03:
            self.look()
        else:
            self.rng.choice(good if self.good_steps >= 0 else good + bad)()

    @contextmanager
    def room(self) -> Iterator[None]:
        """A driver that has no descriptor or no memory left does nothing."""
        try:
            yield
        except (RuntimeError, MemoryError):
            self.note("(no room)")

    def lawful(self) -> None:
        for _ in range(self.rng.choice((1, 1, 2, 4))):
            self.ask(self.target.request(self.rng))

    def ask(self, request: Request) -> None:
        """Make a lawful request available."""
        self.note(f"lawful {request}")
        if request.queue >= len(self.driver.queues):
            return
        queue = self.driver.queues[request.queue]
        indirect = self.tables and self.rng.random() < 0.4
        with self.room():
            queue.add(
                request.readable,
                request.writable,
                indirect=indirect and len(request.readable + request.writable) <= queue.size,
                scrambled=self.rng.random() < 0.3,
            )
        queue.publish()

    @property
    def tables(self) -> bool:
        return bool(self.driver.features & F_INDIRECT_DESC)

    def legal(self) -> None:
        legal = self.rng.choice(legal_chains(self.ring, tables=self.tables))
        queue = self.queue
        self.note(f"legal: {legal}")
        with self.room():
            if queue.size >= len(legal.readable + legal.writable):
                legal.offer(queue)

    def renew(self) -> None:
        """Reset one queue, and set it up anew (2.6.1)."""
        index = self.rng.randrange(len(self.driver.queues))
        live = self.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK
        if not self.driver.features & F_RING_RESET or not live or not self.clean:
            return  # of a device that was reset behind the driver's back nothing can be expected
        size = self.rng.choice((1, 2, 4, 8))
        self.note(f"queue {index} is reset, and now of {size}")
        with self.room():
            self.target.settle(self.device)
            size = min(size, self.transport.device.queue_sizes[index])
            try:
                self.driver.reset_queue(index, size)
            except AssertionError:  # a thread of its own has found a fault meanwhile
                assert self.target.may_fail or self.workers.scarce
                assert self.status & NEEDS_RESET

    def move(self) -> None:
        """The device is saved, and goes on as another one; or the state is damaged on the way."""
        queues = self.transport.negotiation.active_queues
        for queue in reversed(queues):
            assert queue.claim(20)
        try:
            both = self.bus and self.bus.save(), self.transport.save()
            state = json.loads(json.dumps(both))
            self._keep_memory()
        except (ConfigError, DriverError):
            self.note("(it cannot be saved)")
            return
        finally:
            for queue in queues:
                queue.lock.release()
        damaged = self.rng.random() < 0.5
        if damaged:
            self.note(f"moved, with {self.damage(state)}")
            self.clean = False
        else:
            self.note("moved")
        logs = self.workers.logs.copy()
        self._exchange()
        try:
            if self.bus is not None:
                self.bus.restore(Saved(state[0], "the bus"))
            self.transport.restore(Saved(state[1], "the device"))
        except ConfigError as refused:
            assert damaged or not self.clean, refused
            self._exchange()
            self.start()
            return
        for index, log in self.workers.logs.items():
            config = self.transport.negotiation.state.queues[index]
            if logs.get(index) is not log and config.ready:
                # The earlier device has returned so many; the driver may not have looked yet.
                if index in logs:
                    log.written = logs[index].written
                if self.ring == "split":
                    used = int.from_bytes(self.memory.read(config.used_addr + 2, 2), "little")
                    log.pops = log.returns = used

    def fall_short(self) -> None:
        """The host has too little while the driver begins anew or goes on."""
        way = self.rng.choice((self.start, self.start, self.start, self.lawful, self.renew))
        self.note(f"the host has too little: {way.__name__}")
        if way == self.lawful:
            self.target.stir(self.device, self.rng)
        self.workers.scarce, clean = True, self.clean
        with self.shortage.lasting():
            way()
            self.pump()
        # The device may have failed, and what it does now is to be lawful all the same.
        self.clean = clean and not self.status & NEEDS_RESET and way != self.start

    def look(self) -> None:
        """What the host asks, and does beside the driver: nobody else sees anything of it."""
        self.note("the host looks")
        self.device.stats()
        transport, negotiation = self.transport, self.transport.negotiation
        assert len(list(transport.doorbells)) >= len(self.device.queue_sizes)
        for index in range(len(self.device.queue_sizes)):
            with suppress(PyvmmError):  # no eventfd there
                transport.used_eventfd(index)
        negotiation.memory_changed()
        negotiation.remind()
        if isinstance(transport, PciTransport) and self.rng.random() < 0.3:
            self.note("the function is reset")
            self.clean = False
            transport.function_reset()

    def _exchange(self) -> None:
        """Another device of the kind in place of this one, in front of the same driver."""
        self.transport.close()
        for region, kept in zip(self.memory.regions, self.before, strict=True):
            region.view[:] = kept.view  # what the first one did as it ended has not happened
        self.workers.logs.clear()
        self.device = self._make_device()
        if self.over == "pci":
            self._attach_pci(())
        else:
            self._attach_mmio(())
        self.closing.callback(self.transport.close)

    def damage(self, state: Any) -> str:
        """Change one value of `state`, wherever it is; what was done."""
        path: list[Any] = []
        while isinstance(state, dict | list) and state:
            place = self.rng.choice(list(state if isinstance(state, dict) else range(len(state))))
            path.append(place)
            if self.rng.random() < 0.1 or not isinstance(state[place], dict | list):
                break
            state = state[place]
        if not path or not state:
            return "nothing changed"
        old = state[place]
        others: list[Any] = [None, True, -1, 1 << 64, "", [], {}, self.number(8), self.number(2)]
        if type(old) is int:
            others += [old ^ 1 << self.rng.randrange(16), old + 1] * 5
        state[place] = self.rng.choice(others)
        return f"{old!r:.40} at {path} now {state[place]!r:.40}"

    def illegal(self) -> None:
        illegal = self.rng.choice(illegal_chains(self.ring))
        index = self.rng.randrange(len(self.driver.queues))
        queue = self.driver.queues[index]
        self.note(f"illegal: {illegal} in queue {index}")
        with self.room():
            if queue.size >= 4:
                illegal.offer(queue)
                # Of a driver that erred before nobody knows what the ring looks like.
                refused = illegal.outcome == "refused" and index in self.target.prompt
                self.must_fail = self.clean and refused
        self.clean = False

    def mutant(self) -> None:
        """A lawful request with one field of one descriptor changed before it is visible."""
        rng = self.rng
        request = self.target.request(rng)
        if request.queue >= len(self.driver.queues):
            return
        queue = self.driver.queues[request.queue]
        self.clean = False
        with self.room():
            chain = queue.add(request.readable, request.writable, indirect=rng.random() < 0.3)
            place = queue.desc_addr + 16 * rng.choice(chain.descriptors)
            field, size = rng.choice(((0, 8), (8, 4), (12, 2), (14, 2)))
            value = self.number(size)
            self.note(f"mutant {request}: {size} bytes at {place + field:#x} become {value:#x}")
            self.memory.write(place + field, value.to_bytes(size, "little"))
        queue.publish()

    def random_chain(self) -> None:
        rng, queue = self.rng, self.queue
        self.clean = False
        elements = [
            Element(self.number(8), self.number(4), rng.choice((0, 1, 2, 3, 4, 5, 6, 7)))
            for _ in range(rng.randint(1, queue.size))
        ]
        with self.room():
            if rng.random() < 0.3:
                table = queue.make_table(elements)
                elements = [Element(table, 16 * len(elements), INDIRECT)]
            self.note(f"random {elements}")
            queue.add_elements(elements)
        queue.publish()

    def poke(self) -> None:
        """Change a field of a ring that the device may be looking at."""
        rng, queue = self.rng, self.queue
        self.clean = False
        area, length = rng.choice(
            (
                (queue.desc_addr, 16 * queue.size),
                (queue.driver_addr, 4 if self.ring == "packed" else 6 + 2 * queue.size),
            )
        )
        size = rng.choice((2, 2, 2, 4))
        place = area + 2 * rng.randrange((length - size) // 2 + 1)
        value = self.number(size)
        self.note(f"poke {size} bytes at {place:#x}: {value:#x}")
        self.memory.write(place, value.to_bytes(size, "little"))

    def register(self) -> None:
        rng = self.rng
        self.clean = False
        for _ in range(rng.choice((1, 2, 4, 16))):
            place, offsets = rng.choice(self.places)
            offset = rng.choice(offsets)
            size = rng.choice((4, 4, 4, 4, 1, 2, 8))
            where = f"{size} bytes of {type(place).__name__} at {offset:#x}"
            if rng.random() < 0.3:
                self.note(f"read {where}")
                assert 0 <= place.read(offset, size) < 1 << 8 * size
            else:
                value = rng.choice(VALUES) if rng.random() < 0.8 else rng.getrandbits(32)
                self.note(f"write {where}: {value:#x}")
                place.write(offset, size, value)

    def speak(self) -> None:
        """Registers in an order that means something, with values that need not."""
        rng, driver = self.rng, self.driver
        self.clean = False
        self.note("registers in turn")
        for _ in range(rng.randint(1, 4)):
            if isinstance(driver, PciDriver) and rng.random() < 0.7:
                self._speak_pci(driver)
                continue
            first, second = rng.choice(_SELECTED)
            driver.write(first, rng.choice((0, 1, 2, 3, 0xFFFF)))
            driver.write(second, rng.choice((*VALUES, 5, 0x8000)) & 0xFFFF)
            if rng.random() < 0.2:
                driver.write(STATUS, rng.choice((1, 3, 11, 15, 0x80, 0x90, 0xFF, self.status)))

    def _speak_pci(self, driver: PciDriver) -> None:
        rng = self.rng
        value = rng.choice(VALUES)
        way = rng.randrange(10)
        if way == 8:
            assert driver.registers.read(driver.access(ISR_CFG, 0), 1) in (*range(4), 0xFF)
        elif way == 9:
            self._overstep(driver)
        elif way < 3:
            offset, width = rng.choice(_COMMON)
            assert 0 <= driver.field((offset, width)) < 1 << 8 * width
            if way:
                driver.set_field((offset, width), value % (1 << 8 * width))
        elif way < 5:  # 4.1.4.9 PCI configuration access capability
            at, where = driver.structures[PCI_CFG].at, rng.choice((*_COMMON, (0x1000, 4)))
            driver.write_config(at + 4, 1, rng.choice((0, 0, 0, 1, 5)))
            driver.write_config(at + 8, 4, rng.choice((where[0], value)))
            driver.write_config(at + 12, 4, rng.choice((where[1], where[1], 3, 8)))
            if way == 3:
                driver.read_config(at + 16, 4)
            else:
                driver.write_config(at + 16, rng.choice((1, 2, 4)), value & 0xFF)
        elif way == 5:
            [express] = [at for kind, at in driver.capabilities() if kind == CAP_EXPRESS]
            driver.write_config(express + 8, 2, rng.choice((0x8000, 0, 0xFFFF)))
        elif way == 6:
            driver.write_config(COMMAND, 2, rng.choice((0, 2, 4, 6, 0x406)))
        else:
            driver.place(WINDOW + rng.choice((0, 0x10_0000, 0x0FF0_0000, 0x1000_0000)))

    def _overstep(self, driver: PciDriver) -> None:
        """Accesses to what is only read, or where nothing is."""
        table = driver.msix.offset
        place = self.rng.choice((table, table + driver.msix.length, 0x3FF0, 0x7FF8, 0xFFF0))
        size = self.rng.choice((1, 2, 4, 8))
        driver.registers.write(place, size, self.rng.getrandbits(8 * size))
        assert 0 <= driver.registers.read(place, size) < 1 << 8 * size

    def number(self, size: int) -> int:
        """A number of `size` bytes, likely one that is nearly right."""
        rng = self.rng
        ends = [edge for start, length in RAM for edge in (start, start + length)]
        kind = rng.randrange(6)
        if kind == 0:
            value = rng.getrandbits(8 * size)
        elif kind == 1:
            value = rng.choice(ends) + rng.choice((-4096, -16, -1, 0, 1, 16))
        elif kind == 2:
            value = rng.choice((0, 1, 2, 3, 4, 7, 8, 16, 17, 0x80, 0x8000, 0xFFFF, 0x8080))
        elif kind == 3:
            value = rng.choice((-1, -16, 1 << 31, 1 << 32, 1 << 63))
        elif kind == 4:
            value = self.driver.arena.next + rng.randrange(-256, 4096)
        else:
            value = rng.randrange(64)
        return value % (1 << 8 * size)

    def _keep_memory(self) -> None:
        for region, kept in zip(self.memory.regions, self.before, strict=True):
            kept.view[:] = region.view

    # --- what must hold --------------------------------------------------------------------------

    def pump(self) -> None:
        """The workers' turn, at which nobody looks."""
        if self.ring == "packed":  # what a device returns lies over the descriptors that it took
            self._collect_writable()
        self.workers.pump()

    def turn(self) -> None:
        """The device's turn; then everything is looked at."""
        self.target.stir(self.device, self.rng)
        self._keep_memory()
        independent = self._collect_writable()
        self.discarded.clear()
        self.workers.pump()
        self.oracle += self.discarded
        independent = independent and self._is_sound()
        self._check_memory(independent)
        assert self.target.may_fail or not self.defects, self.defects
        if self.must_fail:
            assert self.status & NEEDS_RESET, "a broken ring was accepted"
            self.must_fail = False
        if independent and self.ring == "split" and not self.target.may_fail:
            self._count_completions()
        if self.clean and not self.target.may_fail:
            self._check_completions()

    def _check_memory(self, independent: bool) -> None:
        pairs = [
            pair
            for pair in zip(self.memory.regions, self.before, strict=True)
            if not _is_equal(*pair, 0, pair[0].size)
        ]
        if not pairs:
            return
        allowed = [
            (addr, length) for log in self.workers.logs.values() for addr, length in log.writable
        ]
        areas = self._device_areas()
        _assert_within(pairs, [*allowed, *areas, *self.discarded], "as the device has it")
        if independent:
            _assert_within(pairs, [*self.oracle, *areas], "as the driver wrote it")

    def _device_areas(self) -> list[tuple[int, int]]:
        """The parts of the rings that the device writes (2.7, 2.8)."""
        areas = []
        for config in self.transport.negotiation.state.queues:
            if config.ready and self.ring == "split":
                areas.append((config.used_addr, 6 + 8 * config.size))
            elif config.ready:
                areas += [(config.desc_addr, 16 * config.size), (config.used_addr, 4)]
        return areas

    def _collect_writable(self) -> bool:
        """Add to the oracle every range that a descriptor with WRITE describes, wherever it is;
        whether the oracle is sound."""
        self.structures = [*self._device_areas()]
        for config in self.transport.negotiation.state.queues:
            if config.ready:
                self.structures.append((config.desc_addr, 16 * config.size))
                self.structures.append((config.avail_addr, 6 + 2 * config.size))
                self._walk(config.desc_addr, 16 * config.size, self.oracle, self.structures, 1)
        return self._is_sound()

    def _is_sound(self) -> bool:
        """True if the device, writing where it may, leaves rings and tables as the oracle saw
        them: no buffer lies over one."""
        return not any(
            addr < start + length and start < addr + size
            for addr, size in self.oracle
            for start, length in self.structures
        )

    def _walk(
        self,
        addr: int,
        length: int,
        ranges: list[tuple[int, int]],
        structures: list[tuple[int, int]],
        depth: int,
    ) -> None:
        if not self.memory.contains(addr, length):
            return
        flags_at = 12 if self.ring == "split" else 14
        table = self.memory.read(addr, min(length, LARGEST_TABLE) & ~15)
        for at in range(0, len(table), 16):
            where, size = struct.unpack_from("<QL", table, at)
            flags = struct.unpack_from("<H", table, at + flags_at)[0]
            if flags & INDIRECT and depth:
                structures.append((where, size))
                self._walk(where, size, ranges, structures, depth - 1)
            elif flags & WRITE:
                ranges.append((where, size))

    def _count_completions(self) -> None:
        """The used index, as the driver sees it, has moved once for each chain returned."""
        if self.workers.scarce and self.status & NEEDS_RESET:
            return  # a queue that was set up anew has no worker
        for index, config in enumerate(self.transport.negotiation.state.queues):
            log = self.workers.logs.get(index)
            if log is not None and config.ready:
                used = int.from_bytes(self.memory.read(config.used_addr + 2, 2), "little")
                assert used == log.returns % 0x10000, f"queue {index}: {used}, not {log.returns}"
                assert log.returns + len(log.in_flight) == log.pops

    def _check_completions(self) -> None:
        """While the driver was lawful: each chain comes back once, and none is forgotten."""
        status = self.status
        assert not status & NEEDS_RESET, "a lawful driver got DEVICE_NEEDS_RESET"
        for index, queue in enumerate(self.driver.queues):
            published = queue.outstanding
            log = self.workers.logs.get(index)
            while (used := queue.pop_used()) is not None:
                assert used.head in published, f"{used} came back, of {sorted(published)}"
                published -= {used.head}
                if log is not None:
                    assert used.written == log.written[used.head], f"the driver sees {used}"
            held = frozenset(log.in_flight) if log is not None else frozenset()
            if index in self.target.prompt:
                assert not published, f"chains {sorted(published)} never came back"
                assert not held, f"the device keeps {sorted(held)}"

    def finish(self) -> None:
        """A reset, and a good request."""
        self.note("the end: reset, and a good request")
        self._begin_anew()
        self.target.settle(self.device)
        self.driver.start()
        self.target.check(self.device, self.driver)
        assert self.target.may_fail or not self.defects, self.defects


# --- memory, and what it was like ----------------------------------------------------------------

# To map memory anew costs more than a case. What is compared are a megabyte and another, so that is
# left to the C library.
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def _look_at(event: object) -> None:
    assert "\n" not in str(event)


@functools.cache
def _interrupts() -> EventFd:
    """For those of a device whose rings are in others' hands; nobody hears them."""
    return EventFd()


@functools.cache
def _memory() -> tuple[GuestMemory, tuple[Region, ...]]:
    return GuestMemory(RAM), GuestMemory(RAM).regions


def _blank_memory() -> tuple[GuestMemory, tuple[Region, ...]]:
    """Zeroed RAM, and as much again for its earlier contents; those of the case before, if there
    was one."""
    memory, before = _memory()
    for region in memory.regions:
        region.view[:] = _ZEROES[: region.size]
    return memory, before


_ZEROES = bytes(max(size for _, size in RAM))
Pair = tuple[Region, Region]


def _is_equal(now: Region, before: Region, start: int, length: int) -> bool:
    return not _memcmp(now.host_addr + start, before.host_addr + start, length)


def _assert_within(pairs: Sequence[Pair], ranges: Sequence[tuple[int, int]], who: str) -> None:
    """Nothing but these ranges has changed. One may lie partly in RAM: its last byte, say, may be
    a status byte."""
    inside = sorted((addr, addr + length) for addr, length in ranges)
    for now, before in pairs:
        at, last = now.guest_addr, now.guest_addr + now.size
        for start, end in [*inside, (last, last)]:
            if at < start:
                gap = min(start, last)
                if not _is_equal(now, before, at - now.guest_addr, gap - at):
                    place = next(
                        place
                        for place in range(at, gap)
                        if now.view[place - now.guest_addr] != before.view[place - now.guest_addr]
                    )
                    raise AssertionError(
                        f"byte {place:#x} changed, which is not to be written, {who}"
                    )
            at = max(at, end)
            if at >= last:
                break


def run_case(rng: Random, name: str, ring: Ring, *, most_steps: int = 12) -> int:
    """Run one case against target `name`; how many steps it had."""
    _memory(), _interrupts()  # which stay
    files, threads = open_files(), threading.active_count()
    steps = _run_case(rng, name, ring, most_steps)
    check_closed(files)
    check_ended(threads)
    return steps


def _run_case(rng: Random, name: str, ring: Ring, most_steps: int) -> int:
    with ExitStack() as closing:
        case = Case(rng, TARGETS[name], ring, closing)
        try:
            case.start()
            for _ in range(rng.randint(1, most_steps) * rng.choice((1, 1, 1, 1, 1, 1, 1, 4))):
                case.step()
                case.turn()
            case.finish()
        except BaseException as error:
            steps = "\n".join(f"  {number}. {step}" for number, step in enumerate(case.steps, 1))
            error.add_note(f"{name} over a {ring} ring:\n{steps}")
            raise
        return len(case.steps)
