"""The virtio console device: its ports' queues, the control queues, and one thread for them all.

Virtio 1.3, 5.3 Console Device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any

from pyvmm.errors import DriverError, how_many
from pyvmm.host.log import RateLimited, Sink
from pyvmm.host.poller import Poller
from pyvmm.host.saved import Saved
from pyvmm.virtio.console.ends import End, TerminalEnd
from pyvmm.virtio.console.port import Port
from pyvmm.virtio.console.uapi import (
    CONFIG,
    CONTROL,
    CONTROL_RECEIVE,
    CONTROL_TRANSMIT,
    EMERG_WR_OFFSET,
    FEATURE_NAMES,
    VIRTIO_CONSOLE_DEVICE_READY,
    VIRTIO_CONSOLE_F_EMERG_WRITE,
    VIRTIO_CONSOLE_F_MULTIPORT,
    VIRTIO_CONSOLE_F_SIZE,
    receive_queue,
)
from pyvmm.virtio.constants import VIRTIO_ID_CONSOLE
from pyvmm.virtio.device import Activation, VirtioDevice
from pyvmm.virtio.features import RING_FEATURES, has, mask
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.worker import DeviceWorker

MAX_NAMED_PORTS = 15
_DATA_QUEUE = 128
_CONTROL_QUEUE = 32
# Linux reads the size when it is told that the configuration has changed, and at no other time; and
# drops it until its console is set up (drivers/char/virtio_console.c, set_console_size). When that
# is, only its output shows: after some of it the driver is told again, at these intervals at most.
_REMINDERS = 600
_QUICK_REMINDERS = 100
_SOON, _LATER = 0.1, 1.0  # seconds, for these and for the rest


class ConsoleDevice(VirtioDevice):
    """A console with a terminal as port 0, or named ports from 1 on, or both.

    With named ports MULTIPORT is offered. A driver that does not take it has port 0 only.
    """

    device_type = VIRTIO_ID_CONSOLE
    feature_names = FEATURE_NAMES
    config_always_writable = True

    def __init__(
        self,
        *,
        terminal: TerminalEnd | None = None,
        named: Sequence[tuple[str, End]] = (),
        name: str = "console",
        log: Sink | None = None,
    ) -> None:
        """`named` are (name, end); `log` gets a line for what the guest did wrong, and is limited
        in rate unless given. Raises ValueError for too many ports."""
        if len(named) > MAX_NAMED_PORTS:
            raise ValueError(f"{len(named)} ports, at most {MAX_NAMED_PORTS}")
        self.name = name
        self.terminal = terminal
        self._size = (0, 0)
        self.warn = RateLimited(prefix=f"{name}: ", device=name) if log is None else log
        self.ports = [Port(0, terminal, is_console=True)] if terminal is not None else []
        self.ports += [Port(id, end, name=name) for id, (name, end) in enumerate(named, start=1)]
        self._multiport = bool(named)
        self.queue_sizes = (_DATA_QUEUE, _DATA_QUEUE)
        if named:
            self.queue_sizes += (_CONTROL_QUEUE,) * 2 + (_DATA_QUEUE,) * (2 * len(named))
        self.features = RING_FEATURES | mask(
            *((VIRTIO_CONSOLE_F_MULTIPORT,) if named else ()),
            *((VIRTIO_CONSOLE_F_SIZE, VIRTIO_CONSOLE_F_EMERG_WRITE) if terminal else ()),
        )
        self._max_nr_ports = len(named) + 1 if named else 0
        self._active: _Active | None = None
        self._restored: list[Saved] = []  # of the ports, for the next activation

    def set_size(self, columns: int, rows: int) -> None:
        """The terminal has this size now; the driver is told. Any thread may call it, and a signal
        handler too."""
        self._size = (min(columns, 0xFFFF), min(rows, 0xFFFF))
        active = self._active
        if active is not None:
            active.worker.wake()

    @property
    def size(self) -> tuple[int, int]:
        """(columns, rows) of the terminal, zeros if unknown."""
        return self._size

    def stats(self) -> Mapping[str, object]:
        """Bytes through all ports."""
        return {
            "bytes_to_guest": sum(port.bytes_to_guest for port in self.ports),
            "bytes_from_guest": sum(port.bytes_from_guest for port in self.ports),
        }

    def read_config(self, offset: int, length: int) -> bytes:
        """struct virtio_console_config, zero past its end (5.3.4, 2.5)."""
        encoded = CONFIG.pack(*self._size, self._max_nr_ports, 0)
        return encoded[offset : offset + length].ljust(length, b"\0")

    def write_config(self, offset: int, data: bytes) -> None:
        """A write to `emerg_wr` shows its lowest byte, whatever the device's state (5.3.5.1)."""
        place = EMERG_WR_OFFSET - offset
        if self.terminal is not None and 0 <= place < len(data):
            self.terminal.write_at_once(data[place : place + 1])

    def save(self) -> dict[str, Any]:
        """See VirtioDevice: what each port's driver knows. What programs have sent, and the guest
        has not taken, stays with this one."""
        return {"size": list(self._size), "ports": [port.save() for port in self.ports]}

    def restore(self, saved: Saved) -> None:
        """See VirtioDevice. A program that was connected to a port is not any more."""
        columns, rows = [*saved.integers("size", 2, 0xFFFF), 0, 0][:2]
        if self._size == (0, 0):
            self._size = columns, rows
        self._restored = list(saved.tables("ports", len(self.ports)))
        if len(self._restored) != len(self.ports):
            raise saved.wrong(f"there are {how_many(len(self._restored), 'port')}")

    def take_restored(self) -> list[Saved]:
        """The state that the ports are to go on from, once."""
        restored, self._restored = self._restored, []
        return restored

    def activate(self, activation: Activation) -> None:
        """Start the thread. Raises HostError."""
        active = _Active(self, activation)
        if self.terminal is not None:
            self.terminal.set_wake(active.worker.wake)
        self._active = active
        try:
            active.worker.start()
        except BaseException:
            self._active = None
            raise

    def reset(self) -> None:
        """Stop the thread; programs connected to named ports are disconnected."""
        self._restored = []  # the driver that it is about is not there any more
        active, self._active = self._active, None
        if active is not None:
            if self.terminal is not None:
                self.terminal.set_wake(lambda: None)
            active.worker.request_stop()
            active.worker.join()

    def reset_queue(self, index: int) -> None:
        """See VirtioDevice. What a port's end has not taken of a buffer is lost."""
        active = self._active
        if active is not None:
            active.worker.drop_queue(index, lambda: active.forget(index))

    def start_queue(self, queue: Queue) -> None:
        """See VirtioDevice."""
        assert self._active is not None, "only a live device starts queues"
        self._active.worker.take_queue(queue)


class _Active:
    """All that lives from DRIVER_OK to the reset."""

    def __init__(self, device: ConsoleDevice, activation: Activation) -> None:
        """Raises HostError."""
        self._device = device
        self._interrupt = activation.interrupt
        self._multiport = has(activation.features, VIRTIO_CONSOLE_F_MULTIPORT)
        ports = device.ports if self._multiport else [p for p in device.ports if p.id == 0]
        self._ports = {port.id: port for port in ports}
        self._size = device.size
        self._message_waits = False
        tells_size = not self._multiport and has(activation.features, VIRTIO_CONSOLE_F_SIZE)
        self._reminders = _Reminders(monotonic) if tells_size else None
        poller = Poller()
        try:
            for port in ports:
                port.begin(multiport=self._multiport)
                port.size = self._size if self._size != (0, 0) else None
                port.end.begin(poller)
            for port, saved in zip(device.ports, device.take_restored(), strict=False):
                if port in ports:
                    port.restore(saved)
            self.worker = DeviceWorker(device.name, activation, poller, self.work, self._end)
        except BaseException:
            for port in ports:
                port.end.finish()
            poller.close()
            raise
        self._queues = self.worker.queues

    def forget(self, index: int) -> None:
        """Queue `index` is reset: nothing that was taken from it goes back."""
        for port in self._ports.values():
            if index == receive_queue(port.id) + 1:
                port.forget_output()

    def _end(self) -> None:
        for port in self._ports.values():
            self.worker.batch(self._queue(receive_queue(port.id) + 1), port.drop_output)
            port.end.finish()

    def work(self) -> float | None:
        """Everything that can be done now; in how many seconds to come again."""
        worker = self.worker
        again = True
        while again and worker.may_go_on:
            again = False
            self._notice_size()
            if self._multiport:
                worker.batch(self._queue(CONTROL_TRANSMIT), self._take_messages)
            for port in self._ports.values():
                again |= self._serve(port)
            if self._multiport:
                self._message_waits = True  # also where the driver has no such queue
                worker.batch(self._queue(CONTROL_RECEIVE), self._give_messages)
                again |= worker.ask_for_kicks(self._queue(CONTROL_TRANSMIT))
                if self._message_waits:
                    again |= worker.ask_for_kicks(self._queue(CONTROL_RECEIVE))
            again |= any(self._has_more(port) for port in self._ports.values())
        return self._remind_of_size()

    def _serve(self, port: Port) -> bool:
        """Carry what can be carried; whether the driver has made more available meanwhile."""
        worker = self.worker
        receive = self._queue(receive_queue(port.id))
        transmit = self._queue(receive_queue(port.id) + 1)
        worker.batch(transmit, port.take_output)
        port.end.attend(port.guest_is_open, port.is_leaving)
        worker.batch(receive, port.give_input)
        # A client that has gone makes place for the next one.
        port.end.attend(port.guest_is_open, port.is_leaving)
        again = False if port.is_blocked else worker.ask_for_kicks(transmit)
        if port.starved:
            again |= worker.ask_for_kicks(receive)
        return again

    def _has_more(self, port: Port) -> bool:
        receive = self._queue(receive_queue(port.id))
        can_give = receive is not None and receive.ready and not port.starved
        return port.has_more_output or (can_give and port.wants_to_give)

    def _queue(self, index: int) -> Queue | None:
        return self._queues.get(index)

    def _notice_size(self) -> None:
        size = self._device.size
        if size == self._size:
            return
        self._size = size
        for port in self._ports.values():
            if port.is_console:
                port.size = size
                port.resized()
        self._interrupt.signal_config_change()

    def _remind_of_size(self) -> float | None:
        if self._reminders is None or self._size == (0, 0):
            return None
        due, seconds = self._reminders.after(self._ports[0].bytes_from_guest)
        if due:
            self._interrupt.signal_config_change()
        return seconds

    # --- control messages: 5.3.6.2 Multiport Device Operation ------------------------------------

    def _take_messages(self, queue: Queue) -> None:
        for chain in queue:
            try:
                id, event, value = chain.reader().unpack(CONTROL)
                self._hear(id, event, value)
            except DriverError as error:
                self._device.warn(f"a control message is ignored: {error}")
            queue.add_used(chain, 0)

    def _hear(self, id: int, event: int, value: int) -> None:
        if event == VIRTIO_CONSOLE_DEVICE_READY:
            if value == 1:
                for port in self._ports.values():
                    port.add()
            return
        if id not in self._ports:
            raise DriverError(f"no port {id}", section="5.3.6.2 Multiport Device Operation")
        self._ports[id].hear(event, value)

    def _give_messages(self, queue: Queue) -> None:
        self._message_waits = False
        for port in self._ports.values():
            while port.owes_message:
                chain = queue.pop()
                if chain is None:
                    self._message_waits = True
                    return
                message = port.next_message()
                try:
                    chain.writer().write(message)
                except DriverError as error:
                    self._device.warn(f"a control buffer is not used: {error}")
                    queue.add_used(chain, 0)
                    continue
                queue.add_used(chain, len(message))
                port.told()


class _Reminders:
    """The times to tell the driver the size again: some time after each output, within limits."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen = 0
        self._given = 0
        self._at: float | None = None

    def after(self, output: int) -> tuple[bool, float | None]:
        """Two answers: is it time now, and the seconds until the next question. `output` counts the
        bytes that the guest has written."""
        now = self._clock()
        if output != self._seen and self._at is None and self._given < _REMINDERS:
            self._at = now + (_SOON if self._given < _QUICK_REMINDERS else _LATER)
        self._seen = output
        if self._at is None:
            return False, None
        if now < self._at:
            return False, self._at - now
        self._at = None
        self._given += 1
        return True, None
