"""A console device on the real transport, a mock driver in front, a terminal and sockets behind."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pyvmm.host.named_listener import NamedListener
from pyvmm.memory import GuestMemory
from pyvmm.testing import Chain, InterruptLine, MmioDriver
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.console.device import ConsoleDevice
from pyvmm.virtio.console.ends import SocketEnd, TerminalEnd

MIB = 1 << 20
RX0, TX0, CONTROL_RX, CONTROL_TX = range(4)
READY, ADD, REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, OPEN, NAME = range(8)
CONTROL = struct.Struct("<LHH")
BUFFER = 256


def rx(port: int) -> int:
    return 2 * port + 2 if port else RX0


@dataclass
class Rig:
    """A running device; `screen` is what the terminal shows, as long as there is `room`."""

    device: ConsoleDevice
    terminal: TerminalEnd | None
    memory: GuestMemory
    driver: MmioDriver
    irq: InterruptLine
    folder: Path
    lines: list[str] = field(default_factory=list)
    screen: bytearray = field(default_factory=bytearray)
    room: int = 1 << 30
    _out: dict[int, list[Chain]] = field(default_factory=dict)

    def show(self, data: bytes) -> bool:
        if len(data) > self.room:
            return False
        self.room -= len(data)
        self.screen += data
        return True

    def offer(self, queue: int, count: int = 1, size: int = BUFFER) -> None:
        """Give the device buffers to fill."""
        for _ in range(count):
            self._out.setdefault(queue, []).append(self.driver.submit(queue, [], [size]))

    def take(self, queue: int) -> bytes:
        """The content of the next buffer that the device has filled; a new one is given to it."""
        chain = self._out[queue].pop(0)
        used = self.driver.wait_used(queue, chain)
        data = self.driver.queues[queue].contents(chain)[: used.written]
        self.offer(queue)
        return data

    def write(self, port: int, data: bytes) -> None:
        """Output of the guest to `port`, and wait until it is taken."""
        assert self.driver.request(rx(port) + 1, [data]) == (0, b"")

    def tell(self, id: int, event: int, value: int = 0) -> None:
        """A control message of the driver's."""
        self.tell_raw(CONTROL.pack(id, event, value))

    def tell_raw(self, message: bytes) -> None:
        assert self.driver.request(CONTROL_TX, [message])[0] == 0

    def hear(self) -> tuple[int, int, int, bytes]:
        """The device's next control message: id, event, value, and what follows."""
        data = self.take(CONTROL_RX)
        return (*CONTROL.unpack_from(data), data[CONTROL.size :])

    def set_up(self, *ports: int) -> None:
        """All that a driver says and hears until it has opened `ports`."""
        self.tell(0, READY, 1)
        for id in ports:
            assert self.hear() == (id, ADD, 0, b"")
        for id in ports:
            self.tell(id, PORT_READY, 1)
            assert self.hear()[:3] == (id, NAME, 0)
            self.offer(rx(id), 4)
            self.tell(id, OPEN, 1)

    def connect(self, name: str) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(SAFETY_TIMEOUT)
        client.connect(str(self.folder / name))
        return client


@contextmanager
def running(
    folder: Path,
    *names: str,
    terminal: bool = False,
    features: int | None = None,
    start: bool = True,
) -> Iterator[Rig]:
    """A device with ports called `names`, whose sockets are in `folder`, and maybe a terminal."""
    memory = GuestMemory([(0, 8 * MIB), (1 << 32, MIB)])
    lines: list[str] = []
    with ExitStack() as closing:
        ends = []
        for name in names:
            listener = closing.enter_context(NamedListener(str(folder / name)))
            ends.append((name, SocketEnd(listener.socket, name)))
        end = TerminalEnd() if terminal else None
        device = ConsoleDevice(terminal=end, named=ends, log=lines.append)
        irq = InterruptLine()
        transport = MmioTransport(device, memory, irq, log=lines.append)
        driver = MmioDriver(transport, memory, irq=irq)
        rig = Rig(device, end, memory, driver, irq, folder, lines)
        if end is not None:
            end.attach(rig.show)
        try:
            if start:
                driver.start(features=features)
                if names and (features is None or features & 2):
                    rig.offer(CONTROL_RX, 8)
            yield rig
        finally:
            device.reset()
            transport.close()
            memory.close()
