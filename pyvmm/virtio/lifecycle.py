"""A device's life on any transport: activated, interrupting, failing, reset.

Locks, in the order in which they are taken:

1. `lock`, the device lock. Whoever acts for the driver (a vCPU thread in a register write) holds
   it, so writes of several vCPUs happen one after the other. It is held while the device activates
   and resets, the latter waiting for the device's workers to end.
2. a queue's `lock`, held by its worker for a batch, and by a driver that stops the queue.
3. `_events`, a leaf: held for a few instructions and never while calling anything. It guards what
   workers and drivers both change: the status bits, the interrupt status, the configuration
   generation, whether the current activation is alive.

A worker never takes `lock`: `fail` and the interrupt use `_events` only. So a reset may wait for
workers that are just failing or signalling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, Protocol

from pyvmm.errors import DriverError, GuestMemoryError, PyvmmError
from pyvmm.host.log import RateLimited, Sink, to_stderr
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.virtio import constants, events, status
from pyvmm.virtio.defects import as_device_failure
from pyvmm.virtio.device import Activation, VirtioDevice
from pyvmm.virtio.features import VIRTIO_F_RING_PACKED, describe, has
from pyvmm.virtio.queue.build import build_queue
from pyvmm.virtio.queue.protocol import Queue, QueueStats
from pyvmm.virtio.queue.state import QueueConfig, QueueState

# Bits of the interrupt status; virtio-pci's are the same (4.1.4.5 ISR status capability).
USED_BUFFER = constants.VIRTIO_MMIO_INT_VRING
CONFIG_CHANGED = constants.VIRTIO_MMIO_INT_CONFIG

Trace = Callable[[object], None]


class Notifier(Protocol):
    """A transport's way to interrupt the driver. Any thread calls it, with no lock held but maybe a
    queue's; the interrupt status is set by then."""

    def used_buffer(self, *queue_indexes: int) -> None:
        """The device used a buffer of each of these queues."""

    def used_eventfd(self, index: int) -> EventFd | None:
        """The eventfd that interrupts the driver for queue `index` when another signals it; the
        driver is then told of used buffers whenever it asks. None if it wants no interrupt for this
        queue now. Raises HostError if the transport has no such thing."""

    def config_changed(self) -> None:
        """The configuration changed, or the device needs a reset."""


class DeviceState:
    """The negotiated state as plain data; all zero after a reset but for the generation."""

    def __init__(
        self,
        queues: list[QueueConfig],
        *,
        status: int = 0,
        device_features_select: int = 0,
        driver_features_select: int = 0,
        driver_features: int = 0,
        queue_select: int = 0,
        shm_select: int = 0,
        interrupt_status: int = 0,
        generation: int = 0,
    ) -> None:
        self.queues = queues
        self.status = status
        self.device_features_select = device_features_select
        self.driver_features_select = driver_features_select
        self.driver_features = driver_features
        self.queue_select = queue_select
        self.shm_select = shm_select
        self.interrupt_status = interrupt_status
        self.used_elsewhere = 0  # bits that are always set, because nobody tells us when
        self.generation = generation

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DeviceState) and vars(self) == vars(other)


# What is saved of DeviceState and of each QueueConfig; numbers with their bits.
_NUMBERS = {
    "status": 8,
    "device_features_select": 32,
    "driver_features_select": 32,
    "driver_features": 64,
    "queue_select": 32,
    "shm_select": 32,
    "interrupt_status": 2,
    "generation": 32,
}
_ADDRESSES = ("desc_addr", "avail_addr", "used_addr")


class _ActivationInterrupt:
    """The `Interrupt` of one activation: silent once that activation has ended."""

    __slots__ = (
        *("_events", "_lifecycle", "_notifier", "_state", "_stats", "_used_buffer"),
        "live",
    )

    def __init__(self, lifecycle: Lifecycle, events_lock: Lock, notifier: Notifier) -> None:
        self._lifecycle = lifecycle
        self._state = lifecycle.state
        self._stats = lifecycle.queue_stats
        self._events = events_lock
        self._notifier = notifier
        self._used_buffer = notifier.used_buffer
        self.live = True

    def signal_used(self, *queue_indexes: int) -> None:
        with self._events:
            if not self.live:
                return
            self._state.interrupt_status |= USED_BUFFER
            for index in queue_indexes:
                self._stats[index].interrupts += 1
        self._used_buffer(*queue_indexes)

    def eventfd(self, index: int) -> EventFd | None:
        found = self._notifier.used_eventfd(index)
        self._state.used_elsewhere = USED_BUFFER
        return found

    def signal_config_change(self) -> None:
        self._lifecycle.config_changed(self)


class Lifecycle:
    """The life of a device between two resets.

    Methods that act for the driver (`activate`, `stop_queue`, `interrupt_moved`, `set_bus_master`,
    `reset_queue`, `start_queue` and `reset`) want `lock` held; `fail`, `acknowledge`,
    `config_changed` and the interrupt are called by any thread without it.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        notifier: Notifier,
        kicks: Sequence[EventFd],
        *,
        log: Sink = to_stderr,
        trace: Trace | None = None,
    ) -> None:
        """`kicks` has one eventfd per queue of the device."""
        self.device = device
        self.memory = memory
        self.lock = Lock()
        self.state = _fresh_state(device)
        self.queue_stats = [QueueStats() for _ in device.queue_sizes]
        self.config_interrupts = 0
        self.failures = 0  # how often it needed a reset
        self.activations = 0  # how often a driver has set DRIVER_OK
        # Guests can cause both kinds of line at will. They are bounded apart, so that a flood of
        # the one cannot hide the other.
        self.warn = RateLimited(log, prefix=f"{device.name}: ", device=device.name)
        self._report = RateLimited(
            log, prefix=f"{device.name}: ", device=device.name, error="needs_reset", burst=3
        )
        self._notifier = notifier
        self._kicks = kicks
        self._trace = trace
        self._events = Lock()
        self._interrupt: _ActivationInterrupt | None = None
        self._queues: tuple[Queue | None, ...] = ()
        self._bus_master = True
        self._waiting: list[Queue] = []  # for bus mastering

    @property
    def active_queues(self) -> list[Queue]:
        """The queues that were enabled at the last activation."""
        return [queue for queue in self._queues if queue is not None]

    # --- what workers and drivers both change -------------------------------------------------

    def add_status(self, bits: int) -> None:
        """Set `bits` in the status field; a bit that the device sets meanwhile stays."""
        with self._events:
            before = self.state.status
            self.state.status = before | bits
        if self._trace is not None:
            self._trace(events.StatusChanged(self.device.name, before, before | bits))

    def acknowledge(self, handled: int) -> int:
        """The driver has handled the events in `handled`; those that remain (2.3)."""
        with self._events:
            self.state.interrupt_status = remaining = self.state.interrupt_status & ~handled
        return remaining

    def config_changed(self, source: _ActivationInterrupt | None = None) -> None:
        """The device's configuration has changed: raise the generation, and tell a live driver,
        but not on behalf of a `source` whose activation has ended."""
        with self._events:
            self._raise_generation()
            live = self.state.status & status.DRIVER_OK and (source is None or source.live)
            if live:
                self.state.interrupt_status |= CONFIG_CHANGED
                self.config_interrupts += 1
        if live:
            self._notifier.config_changed()

    def remind(self) -> None:
        """There may be used buffers that the driver was not told of: the interrupt status says
        so."""
        with self._events:
            self.state.interrupt_status |= USED_BUFFER

    def _raise_generation(self) -> None:
        self.state.generation = self.state.generation + 1 & 0xFFFF_FFFF

    # --- activate, stop, fail, reset ----------------------------------------------------------

    def activate(self, going_on: Sequence[QueueState | None] | None = None) -> None:
        """Hand the device what was negotiated: the driver has just set DRIVER_OK, or did so before
        it was saved, and the queues are `going_on` from these states.

        DRIVER_OK is set before, because a worker may use a buffer before `device.activate` has
        returned, and no used buffer notification may precede DRIVER_OK (2.1.2 Device Requirements).
        """
        interrupt = self._interrupt = _ActivationInterrupt(self, self._events, self._notifier)
        self.activations += 1
        accepted = self.state.driver_features
        try:
            queues = self._queues = self._build_queues(accepted, going_on)
            self.device.activate(
                Activation(
                    self.memory,
                    accepted,
                    queues,
                    interrupt,
                    lambda error: self._fail(error, interrupt),
                )
            )
        except Exception as error:
            self._fail(as_device_failure(self.device.name, error), interrupt)
            return
        if self._trace is not None:
            sizes = tuple(queue.size if queue is not None else 0 for queue in queues)
            names = tuple(describe(accepted, self.device.feature_names))
            self._trace(events.Activated(self.device.name, names, sizes))

    def _build_queues(
        self, accepted: int, going_on: Sequence[QueueState | None] | None
    ) -> tuple[Queue | None, ...]:
        states = going_on or [None] * len(self.state.queues)
        return tuple(
            self._new_queue(index, config, accepted, states[index]) if config.ready else None
            for index, config in enumerate(self.state.queues)
        )

    def _new_queue(
        self, index: int, config: QueueConfig, accepted: int, state: QueueState | None = None
    ) -> Queue:
        queue = self._build_queue(index, config, accepted)
        if state is not None:
            queue.served_to(state.next_avail)
        queue.lock = self.device.queue_lock()  # before anybody else can see the queue
        if not self._bus_master:
            queue.ready = False
            self._waiting.append(queue)
        return queue

    def _build_queue(self, index: int, config: QueueConfig, accepted: int) -> Queue:
        queue = build_queue(self.memory, config, accepted, index, self._kicks[index])
        queue.stats = self.queue_stats[index]
        return queue

    def stop_queue(self, index: int) -> None:
        """Touch the ring of queue `index` no more, until it or the device is reset and set up
        again."""
        self.state.queues[index].ready = False
        queue = self._queues[index] if self._queues else None
        if queue is not None:
            # A driver that refills the ring for ever must not keep us from the lock.
            queue.end_serving()
            # Once the lock is ours, the batch in progress has ended, and no other will begin.
            with queue.lock:
                queue.ready = False

    def interrupt_moved(self, index: int) -> None:
        """The eventfd that interrupts the driver for queue `index` is another now: whoever serves
        the queue in our place learns of it."""
        queue = self._queues[index] if self._queues else None
        if queue is not None and self.state.used_elsewhere:
            queue.claim()  # a driver may refill the ring for ever
            queue.lock.release()
            queue.kick.signal()  # for a worker that ended its batch early because of us

    def set_bus_master(self, on: bool) -> None:
        """True if the device may access memory at all, as a PCI driver says by its function's
        command register. Without it requests wait in the rings; when this returns none is being
        served."""
        self._bus_master = on
        if on:
            waiting, self._waiting = self._waiting, []
            for queue in waiting:
                if queue in self._queues and self.state.queues[queue.index].ready:
                    with queue.lock:
                        queue.ready = True
                        # Looked at afterwards: a worker that fails sets the status first.
                        if self.state.status & status.NEEDS_RESET:
                            queue.ready = False
                    queue.kick.signal()
            return
        for queue in self.active_queues:
            queue.claim()  # a driver may refill the ring for ever
            if queue.ready:
                queue.ready = False
                self._waiting.append(queue)
            queue.lock.release()

    def reset_queue(self, index: int) -> None:
        """2.6.1.1 Virtqueue Reset: quiesce queue `index` alone, then forget all about it.

        From the stop on no request of it is begun; when this returns none is in flight, and its
        registers read as after a reset of the device.
        """
        config = self.state.queues[index]
        config.resetting = True
        self.stop_queue(index)
        try:
            self.device.reset_queue(index)
        except Exception as error:
            # It may still be at work, so the driver must not see the reset as done.
            self.fail(as_device_failure(self.device.name, error))
            return
        self._replace_queue(index, None)
        self._kicks[index].drain()
        self.state.queues[index] = QueueConfig(config.max_size, was_reset=True)
        if self._trace is not None:
            self._trace(events.QueueReset(self.device.name, index))

    def start_queue(self, index: int) -> None:
        """2.6.1.2 Virtqueue Re-enable: serve queue `index` as the driver has set it up anew."""
        config = self.state.queues[index]
        config.was_reset = False
        try:
            queue = self._new_queue(index, config, self.state.driver_features)
            self._replace_queue(index, queue)
            self.device.start_queue(queue)
        except Exception as error:
            self.fail(as_device_failure(self.device.name, error))
            return
        if self._trace is not None:
            self._trace(events.QueueStarted(self.device.name, index, queue.size))

    def _replace_queue(self, index: int, queue: Queue | None) -> None:
        if self._queues:
            before = self._queues[index]
            self._queues = (*self._queues[:index], queue, *self._queues[index + 1 :])
            # A driver may reset a queue as often as it likes while all wait for bus mastering.
            self._waiting = [one for one in self._waiting if one is not before]

    def suspend(self) -> tuple[QueueState | None, ...]:
        """Quiesce the device: what it has begun is completed and the driver notified.

        The state of each queue that it had, for a queue that goes on there later. Nothing else is
        cleared: `reset` must follow. Raises PyvmmError if the device cannot be stopped.
        """
        queues = self._queues
        try:
            self.device.reset()
        except Exception as error:
            raise as_device_failure(self.device.name, error) from None
        return tuple(queue.state() if queue is not None else None for queue in queues)

    # --- saved and restored ------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """The negotiated state, and the position of each queue. Nobody acts for the driver, and the
        locks of the queues are held. Raises DriverError for a queue that cannot be saved."""
        state = self.state
        with self._events:
            numbers = {name: getattr(state, name) for name in _NUMBERS}
        live = state.status & status.DRIVER_OK and not state.status & status.NEEDS_RESET
        return {
            **numbers,
            "queues": [
                {
                    **{name: getattr(config, name) for name in _ADDRESSES},
                    "max_size": config.max_size,
                    "size": config.size,
                    "ready": config.ready,
                    "was_reset": config.was_reset,
                    "place": self._place_of(index) if live and config.ready else None,
                }
                for index, config in enumerate(state.queues)
            ],
        }

    def _place_of(self, index: int) -> int | None:
        queue = self._queues[index] if self._queues else None
        return None if queue is None else queue.rewound().next_avail

    def restore(self, saved: Saved, of_device: Saved) -> None:
        """Restore what `save` gave, and `of_device` what the device's own gave, to one that is new.
        The device is activated if it was. Raises ConfigError for state that cannot be."""
        numbers = {name: saved.bits(name, bits) for name, bits in _NUMBERS.items()}
        if numbers["status"] not in status.TRANSITIONS:
            raise saved.wrong(f"the device status is {numbers['status']:#x}")
        queues = list(saved.tables("queues", len(self.state.queues)))
        if len(queues) != len(self.state.queues):
            raise saved.wrong(f"there are {len(queues)} queues, not {len(self.state.queues)}")
        configs = [
            self._restored_config(one, config)
            for one, config in zip(queues, self.state.queues, strict=True)
        ]
        with self._events:
            self.state = DeviceState(configs, **numbers)
        if numbers["status"] & status.FEATURES_OK:
            self.device.accept_features(numbers["driver_features"])
        self.device.restore(of_device)
        live = numbers["status"] & status.DRIVER_OK and not numbers["status"] & status.NEEDS_RESET
        if not live:
            return
        accepted = numbers["driver_features"]
        states = [
            self._restored_queue(one, config, accepted)
            for one, config in zip(queues, configs, strict=True)
        ]
        self.activate(states)
        if self.state.status & status.NEEDS_RESET:
            raise saved.wrong("the device does not go on from there")

    @staticmethod
    def _restored_config(saved: Saved, config: QueueConfig) -> QueueConfig:
        if saved.bits("max_size", 16) != config.max_size:
            raise saved.wrong(f"its largest size is not {config.max_size}")
        desc, avail, used = (saved.bits(name, 64) for name in _ADDRESSES)
        return QueueConfig(
            config.max_size,
            saved.integer("size", config.max_size),
            desc,
            avail,
            used,
            ready=saved.flag("ready"),
            was_reset=saved.flag("was_reset"),
        )

    def _restored_queue(
        self, saved: Saved, config: QueueConfig, accepted: int
    ) -> QueueState | None:
        if not config.ready:
            return None
        place = saved.bits("place", 16)
        state = QueueState(
            config.max_size,
            config.size,
            config.desc_addr,
            config.avail_addr,
            config.used_addr,
            next_avail=place,
            next_used=place,
            packed=has(accepted, VIRTIO_F_RING_PACKED),
        )
        try:
            state.validate(self.memory)
        except DriverError as error:
            raise saved.wrong(str(error)) from None
        return state

    def memory_changed(self) -> None:
        """The memory has other regions now: each queue finds its rings anew.

        Raises GuestMemoryError if a ring is no longer in RAM, and the device has failed then.
        """
        for queue in self._queues:
            if queue is None:
                continue
            queue.claim()  # a driver may refill the ring for ever
            try:
                if queue.ready:
                    queue.remap()
            except GuestMemoryError as error:
                self.fail(error)
                raise
            finally:
                queue.lock.release()
            queue.kick.signal()  # for a worker that ended its batch early because of us

    def fail(self, error: PyvmmError) -> None:
        """Set DEVICE_NEEDS_RESET because of `error`, and touch no ring until the driver resets.

        Any thread may call it, holding any lock but `_events`.
        """
        self._fail(error, None)

    def _fail(self, error: PyvmmError, interrupt: _ActivationInterrupt | None) -> None:
        with self._events:
            before = self.state.status
            ended = interrupt is not None and not interrupt.live
            if ended or before & status.NEEDS_RESET:
                return
            self.state.status = before | status.NEEDS_RESET
            self.failures += 1
            queues = self._queues  # a driver may reset the device and go on before we are done
        for queue in queues:
            if queue is not None:
                # Without the queue's lock: the caller may hold it. A worker looks at `ready`
                # before it takes another chain.
                queue.ready = False
        self._report(f"needs a reset: {error}")
        if self._trace is not None:
            self._trace(events.NeedsReset(self.device.name, str(error)))
        self.config_changed()

    def reset(self) -> None:
        """2.4 Device Reset: quiesce the device, then clear everything; the status becomes 0 last.

        From the first line on nothing that the device still does reaches the driver.
        """
        with self._events:
            if self._interrupt is not None:
                self._interrupt.live = False
        try:
            self.device.reset()
        except Exception as error:
            # The device may still be at work, so the driver must not read a status of 0.
            self._fail(as_device_failure(self.device.name, error), None)
            return
        for queue in self._queues:
            if queue is not None:
                queue.ready = False
        self._queues = ()
        self._waiting = []
        for kick in self._kicks:
            kick.drain()
        self._clear()

    def _clear(self) -> None:
        cleared = _fresh_state(self.device)
        with self._events:
            before = self.state.status
            cleared.generation = self.state.generation
            # One store replaces all: whoever reads without a lock sees the old or the new.
            self.state = cleared
        if self._trace is not None:
            self._trace(events.DeviceReset(self.device.name))
            self._trace(events.StatusChanged(self.device.name, before, 0))


def _fresh_state(device: VirtioDevice) -> DeviceState:
    return DeviceState([QueueConfig(max_size) for max_size in device.queue_sizes])
