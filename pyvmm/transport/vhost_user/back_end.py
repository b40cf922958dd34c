"""One front end's view of a device: its requests, mapped to the negotiation state all transports
share.

A vhost-user front end keeps the driver's registers to itself and sends what follows from them, ring
by ring and in no fixed order. So what it said is kept (`Vring`, `MemoryTable`), and whenever the
set of rings that can run changes, the device is quiesced and then brought up again by the same
steps a driver takes: reset, features, queues, DRIVER_OK. No rule of virtio is written here.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, NamedTuple

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host.log import Sink, to_stderr
from pyvmm.host.syscalls import EventFd
from pyvmm.transport.vhost_user.memory_table import MemoryTable, Slot
from pyvmm.transport.vhost_user.vring import Vring
from pyvmm.vhost_user import protocol
from pyvmm.vhost_user.channel import Message
from pyvmm.vhost_user.inflight import Inflight, Journal
from pyvmm.vhost_user.protocol import FrontEndError, Request
from pyvmm.virtio import features, status
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.lifecycle import Trace
from pyvmm.virtio.negotiation import Negotiation
from pyvmm.virtio.queue.build import restore_queue
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.queue.split import SplitQueue
from pyvmm.virtio.queue.state import QueueConfig, QueueState

_OWN_FEATURES = features.mask(protocol.VHOST_USER_F_PROTOCOL_FEATURES)


class Reply(NamedTuple):
    """The answer to a request; the file descriptors stay ours."""

    payload: bytes
    fds: tuple[int, ...] = ()


class VhostUserNegotiation(Negotiation):
    """A negotiation whose queues go on where `positions` says, by queue index, and with the
    requests in flight that `journals` has."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.positions: dict[int, QueueState] = {}
        self.journals: dict[int, tuple[Journal, list[int]]] = {}

    def _build_queue(self, index: int, config: QueueConfig, accepted: int) -> Queue:
        state = self.positions[index]
        queue = restore_queue(self.memory, state, accepted, index, self._kicks[index])
        if index in self.journals:
            assert isinstance(queue, SplitQueue)
            queue.keep_journal(*self.journals[index])
        return queue


class BackEnd:
    """A device as one vhost-user front end sees it. One thread handles all messages."""

    def __init__(
        self, device: VirtioDevice, *, log: Sink = to_stderr, trace: Trace | None = None
    ) -> None:
        """Raises HostError without file descriptors, ValueError for a device that offers what
        does not exist here."""
        self.table = MemoryTable()
        self.vrings = [Vring(index, size) for index, size in enumerate(device.queue_sizes)]
        kicks: list[EventFd] = [vring.kick for vring in self.vrings]
        self.negotiation = VhostUserNegotiation(
            device, self.table.memory, self, kicks, log=log, trace=trace
        )
        self._calls = [vring.call.signal for vring in self.vrings]
        self._accepted: int | None = None
        self._protocol_features = 0
        self._inflight: Inflight | None = None
        self._running: set[int] = set()
        self._methods: dict[int, Callable[..., bytes | Reply | None]] = {
            request.number: getattr(self, request.method) for request in protocol.BY_NUMBER.values()
        }

    def close(self) -> None:
        """Quiesce the device and give everything back."""
        with self.negotiation.lock:
            self.negotiation.reset()
        for vring in self.vrings:
            vring.close()
        self._track(None)
        self.table.memory.close()

    # --- messages -------------------------------------------------------------------------------

    def handle(self, message: Message) -> Reply | None:
        """Do what `message` asks for; the answer, or None where it has none.

        Raises FrontEndError if it was refused and the front end cannot be told, which is reason to
        end the connection.
        """
        request = protocol.BY_NUMBER.get(message.request)
        acknowledged = message.needs_reply and self._has(protocol.VHOST_USER_PROTOCOL_F_REPLY_ACK)
        try:
            if request is None:
                raise FrontEndError(f"unknown request {message.request}")
            reply = self._call(request, message)
        except PyvmmError as error:
            name = f"{request.name} refused: " if request is not None else ""
            # A front end that waits for another reply, or for none, cannot be told.
            if not acknowledged or (request is not None and request.replies):
                raise FrontEndError(f"{name}{error}") from None
            self.negotiation.warn(f"{name}{error}")
            return Reply(protocol.U64.pack(1))
        if reply is None and acknowledged:
            return Reply(protocol.U64.pack(0))
        return Reply(reply) if isinstance(reply, bytes) else reply

    def _call(self, request: Request, message: Message) -> bytes | Reply | None:
        if request.needs is not None and not self._has(request.needs):
            raise FrontEndError("the protocol feature it belongs to was not negotiated")
        if len(message.fds) not in request.fds:
            raise FrontEndError(f"{len(message.fds)} file descriptors came along")
        method = self._methods[request.number]
        with self.negotiation.lock:
            if request.layout is None:
                return method(message)
            if len(message.payload) != request.layout.size:
                raise FrontEndError(f"its payload has {len(message.payload)} bytes")
            fields = request.layout.unpack(message.payload)
            return method(*fields, *((message.fds,) if request.fds.stop > 1 else ()))

    @property
    def _packed(self) -> bool:
        return features.has(self._accepted or 0, features.VIRTIO_F_RING_PACKED)

    def _has(self, feature: int) -> bool:
        return features.has(self._protocol_features, feature)

    # --- session and features -------------------------------------------------------------------

    def get_features(self) -> bytes:
        return protocol.U64.pack(self.negotiation.offered | _OWN_FEATURES)

    def set_features(self, bits: int) -> None:
        if bits & ~(self.negotiation.offered | _OWN_FEATURES):
            unknown = features.describe(bits & ~(self.negotiation.offered | _OWN_FEATURES))
            raise FrontEndError(f"{' '.join(unknown)} was not offered")
        if bits == self._accepted:
            return
        if self._running:
            raise FrontEndError("features changed while a ring runs")
        self._accepted = bits
        if not bits & _OWN_FEATURES:
            for vring in self.vrings:
                vring.enabled = True

    def get_protocol_features(self) -> bytes:
        return protocol.U64.pack(protocol.PROTOCOL_FEATURES)

    def set_protocol_features(self, bits: int) -> None:
        if bits & ~protocol.PROTOCOL_FEATURES:
            raise FrontEndError(f"{bits & ~protocol.PROTOCOL_FEATURES:#x} was not offered")
        self._protocol_features = bits

    def set_owner(self) -> None:
        """The session began when the front end connected."""

    def reset_owner(self) -> None:
        for vring in self.vrings:
            vring.enabled = False
        self._apply()

    def reset_device(self) -> None:
        for vring in self.vrings:
            vring.reset()
        self._apply()
        self._track(None)
        self._accepted = None

    def get_queue_num(self) -> bytes:
        return protocol.U64.pack(len(self.vrings))

    # --- memory ---------------------------------------------------------------------------------

    def set_mem_table(self, message: Message) -> None:
        header, region = protocol.MEMORY_HEADER, protocol.MEMORY_REGION
        payload = message.payload
        if len(payload) < header.size:
            raise FrontEndError(f"its payload has {len(payload)} bytes")
        count, _ = header.unpack_from(payload)
        rows = payload[header.size :]
        # Front ends may send the whole array, used or not.
        if count > protocol.MAX_FDS or len(rows) < count * region.size:
            raise FrontEndError(f"{count} regions in {len(payload)} bytes")
        if len(message.fds) != count:
            raise FrontEndError(f"{count} regions with {len(message.fds)} file descriptors")
        slots = [Slot(*region.unpack_from(rows, i * region.size)) for i in range(count)]
        self.table.set(slots, message.fds)
        self._memory_changed()

    def add_mem_reg(self, _: int, *fields: Any) -> None:
        *numbers, fds = fields
        self.table.add(Slot(*numbers), fds[0])
        self._memory_changed()

    def rem_mem_reg(self, _: int, *fields: Any) -> None:
        *numbers, _ = fields  # a file descriptor that old front ends send is not looked at
        self.table.remove(Slot(*numbers))
        self._memory_changed()

    def get_max_mem_slots(self) -> bytes:
        return protocol.U64.pack(protocol.MAX_MEM_SLOTS)

    def _memory_changed(self) -> None:
        try:
            for index in self._running:
                # A ring's user addresses must still mean the same place in the guest.
                config = self.vrings[index].config(self.table)
                config.ready = True
                if config != self.negotiation.state.queues[index]:
                    raise FrontEndError(f"ring {index} moved while it runs")
            self.negotiation.memory_changed()
        except PyvmmError as error:
            self.negotiation.fail(error)
            raise
        self._apply()

    # --- rings ----------------------------------------------------------------------------------

    def _vring(self, index: int) -> Vring:
        if index >= len(self.vrings):
            raise FrontEndError(f"there is no ring {index}")
        return self.vrings[index]

    def set_vring_num(self, index: int, num: int) -> None:
        self._vring(index).set_size(num, packed=self._packed)
        self._apply()

    def set_vring_addr(
        self, index: int, flags: int, desc: int, used: int, avail: int, log: int
    ) -> None:
        if flags & protocol.VHOST_VRING_F_LOG:
            raise FrontEndError("logging was not offered")
        self._vring(index).set_addresses((desc, used, avail))
        self._apply()

    def set_vring_base(self, index: int, base: int) -> None:
        self._vring(index).set_base(base, packed=self._packed)

    def get_vring_base(self, index: int, _: int) -> bytes:
        vring = self._vring(index)
        vring.started = False
        self._apply()
        vring.kick.become(())
        return protocol.VRING_STATE.pack(index, vring.base)

    def set_vring_kick(self, value: int, fds: tuple[int, ...]) -> None:
        vring = self._vring_of_fd(value, fds)
        if not fds:
            raise FrontEndError("a ring without a kick would have to be polled for ever")
        if vring.started:
            vring.started = False
            self._apply()
        vring.kick.become(fds)
        vring.started = True
        self._apply()

    def set_vring_call(self, value: int, fds: tuple[int, ...]) -> None:
        vring = self._vring_of_fd(value, fds)
        vring.call.become(fds)

    def set_vring_err(self, value: int, fds: tuple[int, ...]) -> None:
        vring = self._vring_of_fd(value, fds)
        vring.error.become(fds)

    def _vring_of_fd(self, value: int, fds: tuple[int, ...]) -> Vring:
        if value & ~(protocol.VRING_INDEX_MASK | protocol.VRING_NOFD):
            raise FrontEndError(f"{value:#x} is not a ring")
        if bool(value & protocol.VRING_NOFD) == bool(fds):
            raise FrontEndError(f"{len(fds)} file descriptors came along, where it says otherwise")
        return self._vring(value & protocol.VRING_INDEX_MASK)

    def set_vring_enable(self, index: int, enable: int) -> None:
        if enable not in (0, 1):
            raise FrontEndError(f"{enable} is neither on nor off")
        self._vring(index).enabled = bool(enable)
        self._apply()

    # --- requests in flight -----------------------------------------------------------------------

    def get_inflight_fd(self, message: Message) -> Reply:
        self._check_inflight(message)
        _, _, num_queues, queue_size = protocol.INFLIGHT.unpack_from(message.payload)
        if num_queues > len(self.vrings):
            raise FrontEndError(f"{num_queues} rings, of which there are {len(self.vrings)}")
        inflight = Inflight.create(num_queues, queue_size)
        self._track(inflight)
        return Reply(inflight.describe().ljust(len(message.payload), b"\0"), (inflight.fd,))

    def set_inflight_fd(self, message: Message) -> None:
        self._check_inflight(message)
        self._track(Inflight.given(message.payload, message.fds[0]))

    def _check_inflight(self, message: Message) -> None:
        if len(message.payload) < protocol.INFLIGHT.size:
            raise FrontEndError(f"its payload has {len(message.payload)} bytes")
        if self._running:
            raise FrontEndError("requests in flight are to be kept elsewhere while a ring runs")

    def _track(self, inflight: Inflight | None) -> None:
        if self._inflight is not None:
            self._inflight.close()
        self._inflight = inflight

    # --- configuration space --------------------------------------------------------------------

    def get_config(self, message: Message) -> bytes:
        offset, size, flags = self._config_header(message)
        if flags is None:
            return b""  # "zero length of payload to indicate an error"
        value = self.negotiation.read_config(offset, size).to_bytes(size, "little")
        answer = protocol.CONFIG_HEADER.pack(offset, size, flags) + value
        return answer.ljust(len(message.payload), b"\0")  # as long as what asked for it

    def set_config(self, message: Message) -> None:
        offset, size, flags = self._config_header(message)
        if flags is None:
            raise FrontEndError("it does not describe a part of the configuration space")
        data = message.payload[protocol.CONFIG_HEADER.size :][:size]
        self.negotiation.write_config(offset, size, int.from_bytes(data, "little"))

    @staticmethod
    def _config_header(message: Message) -> tuple[int, int, int | None]:
        header = protocol.CONFIG_HEADER
        if len(message.payload) < header.size:
            return 0, 0, None
        offset, size, flags = header.unpack_from(message.payload)
        # SPDK sends all of its 256 bytes, used or not.
        whole = len(message.payload) >= header.size + size
        inside = size > 0 and offset + size <= protocol.MAX_CONFIG
        return offset, size, flags if whole and inside and flags in protocol.CONFIG_FLAGS else None

    # --- bringing the device up and down --------------------------------------------------------

    def _apply(self) -> None:
        """Have the device work on just the rings that can run. Raises PyvmmError."""
        wanted = {vring.index for vring in self.vrings if vring.runnable}
        if wanted == self._running:
            return
        failed = bool(self.negotiation.read_status() & status.NEEDS_RESET)
        if failed and wanted:
            return  # A device that failed touches no ring until all of them have been stopped.
        self._suspend()
        if wanted:
            self._activate(wanted)

    def _suspend(self) -> None:
        if not self._running:
            return
        states = self.negotiation.suspend()
        for index in self._running:
            state = states[index] if states else None  # none, if it failed before it had queues
            if state is not None:
                self.vrings[index].left(state)
        self._running = set()
        self.negotiation.reset()

    def _activate(self, wanted: set[int]) -> None:
        if self._accepted is None:
            raise FrontEndError("a ring is to run and no features were accepted")
        negotiation = self.negotiation
        negotiation.reset()
        self._climb(status.ACKNOWLEDGE, status.DRIVER)
        negotiation.state.driver_features = self._accepted & ~_OWN_FEATURES
        self._climb(status.FEATURES_OK)
        if not negotiation.read_status() & status.FEATURES_OK:
            raise FrontEndError("the device does not work with the features that were accepted")
        positions, journals = {}, {}
        for index in wanted:
            config = self.vrings[index].config(self.table)
            positions[index] = self.vrings[index].resume(config, self.table, packed=self._packed)
            if self._inflight is not None and not self._packed:
                journal = self._inflight.journal(index, config.size)
                journals[index] = journal, journal.resume(positions[index].next_used)
            config.ready = True
            negotiation.state.queues[index] = config
        negotiation.positions, negotiation.journals = positions, journals
        self._running = wanted
        self._climb(status.DRIVER_OK)

    def _climb(self, *bits: int) -> None:
        for bit in bits:
            self.negotiation.write_status(self.negotiation.read_status() | bit)

    # --- from the device: pyvmm.virtio.lifecycle.Notifier -----------------------------------------

    def used_buffer(self, *queue_indexes: int) -> None:
        """Any thread calls it."""
        for index in queue_indexes:
            self._calls[index]()

    def used_eventfd(self, index: int) -> EventFd | None:
        """The front end may change a queue's file at any time."""
        raise HostError(errno.EOPNOTSUPP, "an eventfd for interrupts over vhost-user")

    def config_changed(self) -> None:
        """Any thread calls it. There is no word for a changed configuration without BACKEND_REQ,
        but for a device that failed there are the rings' error eventfds."""
        if self.negotiation.read_status() & status.NEEDS_RESET:
            for vring in self.vrings:
                vring.error.signal()
