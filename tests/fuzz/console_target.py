"""virtio-console under the fuzzer: a terminal that is slow at times, and a named port."""

from __future__ import annotations

import socket
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import Random

from fuzz.request import Request, pieces

from pyvmm.host.named_listener import NamedListener
from pyvmm.testing import MmioDriver
from pyvmm.virtio.console.device import ConsoleDevice
from pyvmm.virtio.console.ends import SocketEnd, TerminalEnd
from pyvmm.virtio.device import VirtioDevice

RX0, TX0, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)  # 5.3.2 Virtqueues


class Console(ConsoleDevice):
    """A console that knows who sits at it."""

    end: TerminalEnd
    program: socket.socket
    path: str
    room = 1 << 16

    def show(self, data: bytes) -> bool:
        self.room -= len(data)
        return self.room >= 0


@contextmanager
def make(rng: Random) -> Iterator[VirtioDevice]:
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        NamedListener(f"{folder}/port") as listener,
        socket.socket(socket.AF_UNIX) as program,
    ):
        end = TerminalEnd()
        port = SocketEnd(listener.socket, "port")
        named = [] if rng.random() < 0.2 else [("port", port)]
        console = Console(terminal=end, named=named, log=lambda line: None)
        end.attach(console.show)
        program.connect(f"{folder}/port")
        program.setblocking(False)
        console.end, console.program, console.path = end, program, f"{folder}/port"
        try:
            yield console
        finally:
            console.program.close()


def begin(rng: Random) -> list[Request]:
    """A driver with both ports, which are open."""
    messages = ((0, 0, 1), (0, 3, 1), (1, 3, 1), (0, 6, 1), (1, 6, 1))
    buffers = [Request(queue, [], [64]) for queue in (*[CONTROL_RX] * 6, RX0, RX1, RX1)]
    return [
        *buffers,
        *(Request(CONTROL_TX, [struct.pack("<LHH", *message)], []) for message in messages),
    ]


def request(rng: Random) -> Request:
    kind = rng.randrange(6)
    if kind < 2:
        queue = rng.choice((RX0, CONTROL_RX, CONTROL_RX, RX1))
        return Request(
            queue, [], [len(part) for part in pieces(rng, bytes(rng.choice((0, 1, 300))))]
        )
    if kind < 4:
        return Request(
            rng.choice((TX0, TX1)), pieces(rng, rng.randbytes(rng.choice((0, 1, 5000)))), []
        )
    # 5.3.6.2: DEVICE_READY, PORT_READY and PORT_OPEN are the driver's, the others are not
    event = rng.choice((0, 0, 3, 3, 6, 6, rng.randrange(10)))
    port, value = rng.choice((0, 1, 1, 2, 0xFFFF_FFFF)), rng.choice((0, 1, 1, 0xFFFF))
    return Request(CONTROL_TX, pieces(rng, struct.pack("<LHH", port, event, value)), [])


def stir(device: VirtioDevice, rng: Random) -> None:
    """Somebody types, reads, resizes the window; the program at the port does likewise."""
    assert isinstance(device, Console)
    device.room = rng.choice((0, 100, 1 << 16))
    kind = rng.randrange(5)
    if not rng.randrange(6):  # the program leaves, and another one comes
        device.program.close()
        device.program = socket.socket(socket.AF_UNIX)
        device.program.setblocking(False)
        with suppress(OSError):
            device.program.connect(device.path)
    with suppress(OSError):
        if kind == 0:
            device.end.enqueue_input(rng.randbytes(rng.choice((1, 5000))))
        elif kind == 1:
            device.program.send(rng.randbytes(rng.choice((1, 300, 1 << 16))))
        elif kind == 2:
            device.program.recv(1 << 16)
        elif kind == 3 and rng.random() < 0.3:
            device.program.shutdown(rng.choice((socket.SHUT_RD, socket.SHUT_WR)))
        elif kind == 3:
            device.set_size(rng.randrange(1 << 17), 25)
    device.end.wake()


def check(device: VirtioDevice, driver: MmioDriver) -> None:
    assert isinstance(device, Console)
    device.room = 1 << 16
    driver.request(TX0, [b"alive"], [])
    assert device.room == (1 << 16) - 5
    if len(device.ports) == 1:
        return
    driver.submit(CONTROL_RX, [], [64])
    driver.request(CONTROL_TX, [struct.pack("<LHH", 0, 0, 1)], [])  # DEVICE_READY
    driver.wait_used(CONTROL_RX)  # PORT_ADD
