"""A socket device on the real transport, a mock driver in front and Unix sockets behind."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pyvmm.host.named_listener import NamedListener
from pyvmm.memory import GuestMemory
from pyvmm.testing import InterruptLine, MmioDriver
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.testing.mock_driver import Arena
from pyvmm.testing.vsock_driver import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    Packet,
    VsockDriver,
)
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.vsock.device import VsockDevice

MIB = 1 << 20
CID = 3
GUEST_PORT, HOST_PORT = 1000, 52


@dataclass
class Rig:
    """A running device; `path` is its socket, `lines` and `events` what it logged and traced."""

    device: VsockDevice
    memory: GuestMemory
    driver: MmioDriver
    guest: VsockDriver
    path: Path
    lines: list[str] = field(default_factory=list)
    events: list[object] = field(default_factory=list)

    def listen(self, port: int = HOST_PORT) -> socket.socket:
        """A program of the host that waits for the guest at `port`."""
        listener = socket.socket(socket.AF_UNIX)
        listener.settimeout(SAFETY_TIMEOUT)
        listener.bind(f"{self.path}_{port}")
        listener.listen()
        return listener

    def client(self, command: bytes = b"") -> socket.socket:
        """A program of the host that connects, and sends `command`."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(SAFETY_TIMEOUT)
        client.connect(str(self.path))
        if command:
            client.sendall(command)
        return client

    def dial(self, port: int = HOST_PORT, **fields: int) -> socket.socket:
        """A stream from the guest's GUEST_PORT to `port`: the host's end of it."""
        with self.listen(port) as listener:
            self.guest.send(Packet(REQUEST, GUEST_PORT, port, **fields))
            assert self.guest.receive().op == RESPONSE
            connection, _ = listener.accept()
        Path(f"{self.path}_{port}").unlink()
        connection.settimeout(SAFETY_TIMEOUT)
        return connection

    def call(self, port: int = 80, **fields: int) -> tuple[socket.socket, Packet]:
        """A stream from a client of the host to the guest's `port`: its end, and our REQUEST."""
        client = self.client(f"CONNECT {port}\n".encode())
        request = self.guest.receive()
        assert (request.op, request.dst_port) == (REQUEST, port)
        self.guest.answer(request, RESPONSE, **fields)
        assert read_line(client) == f"OK {request.src_port}\n".encode()
        return client, request

    def fill(self) -> bytes:
        """Send on the stream of `dial`, whose host does not read, until there is no more credit:
        its socket and the device's buffer are full. What was sent."""
        sent = bytearray()
        while True:
            chunk = os.urandom(1 << 15)
            self.guest.send(guest_packet(RW, data=chunk))
            sent += chunk
            self.guest.send(guest_packet(CREDIT_REQUEST))
            answer = self.guest.receive()
            assert answer.op == CREDIT_UPDATE
            if answer.fwd_cnt + answer.buf_alloc < len(sent) + len(chunk):
                return bytes(sent)

    def assert_alive(self) -> None:
        """The device did not ask for a reset, and still opens streams."""
        assert not self.driver.needs_reset, self.lines
        probe = Packet(REQUEST, 0xABCD, 0xDCBA)
        self.guest.send(probe)
        while (answer := self.guest.receive()).dst_port != probe.src_port:
            pass
        assert answer.op == RST  # nobody listens there


def read_line(sock: socket.socket) -> bytes:
    """Bytes up to a newline, and none after it; what there is before the end of the stream."""
    line = b""
    try:
        while not line.endswith(b"\n") and (byte := sock.recv(1)):
            line += byte
    except ConnectionResetError:
        return line  # closed without reading all that we sent
    return line


def read_all(sock: socket.socket) -> bytes:
    """Bytes up to the end of the stream."""
    data = bytearray()
    while more := sock.recv(1 << 16):
        data += more
    return bytes(data)


def guest_packet(op: int, **fields: object) -> Packet:
    """Of the stream that `Rig.dial` opened."""
    return Packet(op, GUEST_PORT, HOST_PORT, **fields)  # type: ignore[arg-type]


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        assert more, f"the stream ended after {len(data)} bytes of {size}"
        data += more
    return data


@contextmanager
def running(
    folder: Path,
    *,
    features: int | None = None,
    queue_sizes: tuple[int, ...] | None = None,
    receive_buffers: int = 16,
    start: bool = True,
) -> Iterator[Rig]:
    """A device at a socket in `folder`, brought up by a driver with some receive buffers."""
    memory = GuestMemory([(0, 16 * MIB), (1 << 32, MIB)])
    lines: list[str] = []
    events: list[object] = []
    path = folder / "vsock"
    with NamedListener(str(path)) as listener:
        device = VsockDevice(CID, listener.socket, str(path), trace=events.append, log=lines.append)
        irq = InterruptLine()
        transport = MmioTransport(device, memory, irq, log=lines.append)
        driver = MmioDriver(transport, memory, irq=irq, arena=Arena(memory))
        rig = Rig(device, memory, driver, VsockDriver(driver, CID), path, lines, events)
        try:
            if start:
                driver.start(features=features, queue_sizes=queue_sizes)
                rig.guest.offer(receive_buffers)
            yield rig
        finally:
            device.reset()
            transport.close()
            memory.close()
