"""Back ends for our vhost-user front end: a scripted one that may do anything, and processes."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import create_memfd
from pyvmm.kinds import registry
from pyvmm.kinds.interface import Context
from pyvmm.testing.attached import AttachedDriver, Over, attached
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT, Ring
from pyvmm.transport.mmio import MmioTransport
from pyvmm.transport.vhost_user import serve_connection
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.vhost_user.device import VhostUserDevice
from pyvmm.virtio.vhost_user.served import Served

GET_FEATURES, SET_FEATURES, SET_OWNER, SET_MEM_TABLE = 1, 2, 3, 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR = 12, 13, 14
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES, GET_QUEUE_NUM = 15, 16, 17
SET_VRING_ENABLE, SET_BACKEND_REQ_FD, GET_CONFIG, SET_CONFIG = 18, 21, 24, 25
GET_INFLIGHT_FD, SET_INFLIGHT_FD, RESET_DEVICE = 31, 32, 34
ADD_MEM_REG, REM_MEM_REG, SET_STATUS, GET_STATUS = 37, 38, 39, 40
SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE = 42, 43
REPLYING = (
    *(GET_FEATURES, GET_VRING_BASE, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_CONFIG),
    *(GET_INFLIGHT_FD, GET_STATUS, SET_DEVICE_STATE_FD, CHECK_DEVICE_STATE),
)
VERSION, REPLY, NEED_REPLY = 1, 4, 8
F_VERSION_1, F_INDIRECT, F_EVENT_IDX, F_PROTOCOL = 1 << 32, 1 << 28, 1 << 29, 1 << 30
P_MQ, P_REPLY_ACK, P_BACKEND_REQ, P_CONFIG = 1 << 0, 1 << 3, 1 << 5, 1 << 9
P_INFLIGHT, P_RESET, P_SLOTS, P_STATUS, P_STATE = 1 << 12, 1 << 13, 1 << 15, 1 << 16, 1 << 19
NO_FD = 1 << 8  # in the answer to SET_DEVICE_STATE_FD
ALL = P_MQ | P_REPLY_ACK | P_CONFIG | P_INFLIGHT | P_SLOTS | P_STATUS
ACCEPTS = 0x10000  # __SO_ACCEPTCON among the flags of /proc/net/unix
PATIENCE = 0.5  # seconds that a test's front end waits for a back end which says nothing

Fds = list[int]
Action = Callable[["Fake", int, bytes, Fds], bool]
"""What a fake does at a request (number, payload, descriptors): whether it goes on as usual."""


class Fake:
    """A back end that does all that is asked, and serves no ring. `asked` are the requests that it
    had; `actions` are what it does at a request in place of an answer or before it."""

    def __init__(
        self,
        path: Path,
        *,
        features: int = F_VERSION_1 | F_INDIRECT | F_EVENT_IDX | F_PROTOCOL,
        protocol: int = ALL,
        config: bytes = bytes(64),
        actions: dict[int, Action] | None = None,
    ) -> None:
        self.path, self.features, self.protocol, self.config = path, features, protocol, config
        self.actions = actions or {}
        self.asked: list[tuple[int, bytes]] = []
        self.kept: list[int] = []  # descriptors that came along
        self.requests: socket.socket | None = None  # for its own, with BACKEND_REQ
        self.connection: socket.socket | None = None
        self.bases: dict[int, int] = {}
        self.errors: dict[int, int] = {}  # the eventfds that say that a ring cannot be served
        self.acknowledges = False
        self.status = 0
        self.state = b"what it knows"  # of its device, which it gives or has been given
        self._loads: int | None = None  # the pipe from which it gets that
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connection = connection
            self.acknowledges = False
            # The latter two where this process has no descriptor for what came or is to be given.
            with suppress(OSError, HostError, LookupError):
                self._serve(connection)
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        while True:
            head, fds, _, _ = socket.recv_fds(connection, 12, 8)
            if not head:
                return
            number, flags, size = struct.unpack("=III", head)
            payload = connection.recv(size, socket.MSG_WAITALL) if size else b""
            self.kept += fds
            self.asked.append((number, payload))
            action = self.actions.get(number)
            if action is not None and not action(self, number, payload, fds):
                continue
            self.usual(number, flags, payload, fds)

    def usual(self, number: int, flags: int, payload: bytes, fds: Fds) -> None:
        """The answer of a decent back end."""
        if number == SET_PROTOCOL_FEATURES:
            self.acknowledges = bool(struct.unpack("=Q", payload)[0] & P_REPLY_ACK)
        elif number == SET_BACKEND_REQ_FD:
            self.requests = socket.socket(fileno=os.dup(fds[0]))
        elif number == SET_VRING_BASE:
            index, base = struct.unpack("=II", payload)
            self.bases[index] = base
        elif number == SET_VRING_ERR and fds:
            self.errors[struct.unpack("=Q", payload)[0]] = fds[0]
        elif number == SET_STATUS:
            [self.status] = struct.unpack("=Q", payload)
        elif number == SET_DEVICE_STATE_FD:
            self._transfer(*struct.unpack("=II", payload), fds[0])
        elif number == CHECK_DEVICE_STATE and self._loads is not None:
            self.state = b"".join(iter(lambda fd=self._loads: os.read(fd, 1 << 16), b""))
            self._let_go(self._loads)
            self._loads = None
        if number in REPLYING:
            self.answer(number, *self._reply(number, payload))
        elif flags & NEED_REPLY and self.acknowledges:
            self.answer(number, bytes(8))

    def _transfer(self, direction: int, phase: int, fd: int) -> None:
        assert phase == 0
        if direction:
            self._loads = fd
        else:
            os.write(fd, self.state)
            self._let_go(fd)

    def _let_go(self, fd: int) -> None:
        self.kept.remove(fd)
        os.close(fd)

    def _reply(self, number: int, payload: bytes) -> tuple[bytes, Sequence[int]]:
        values = {
            SET_DEVICE_STATE_FD: NO_FD,
            CHECK_DEVICE_STATE: 0,
            GET_FEATURES: self.features,
            GET_PROTOCOL_FEATURES: self.protocol,
            GET_QUEUE_NUM: 64,
            GET_STATUS: self.status,
        }
        if number in values:
            return struct.pack("=Q", values[number]), ()
        if number == GET_VRING_BASE:
            [index, _] = struct.unpack("=II", payload)
            return struct.pack("=II", index, self.bases.get(index, 0)), ()
        if number == GET_CONFIG:
            [_, size, _] = struct.unpack("=III", payload[:12])
            return payload[:12] + self.config[:size].ljust(size, b"\0"), ()
        fd = create_memfd("notes", 1 << 16)
        self.kept.append(fd)
        return struct.pack("=QQ", 1 << 16, 0) + payload[16:], (fd,)

    def answer(
        self, number: int, payload: bytes, fds: Sequence[int] = (), flags: int = VERSION | REPLY
    ) -> None:
        """Send an answer, whatever is in it."""
        assert self.connection is not None
        message = struct.pack("=III", number, flags, len(payload)) + payload
        socket.send_fds(self.connection, [message], list(fds))

    def numbers(self) -> list[int]:
        """The requests that it had."""
        return [number for number, _ in self.asked]

    def die(self) -> None:
        """As if it were killed."""
        if self.connection is not None:
            with suppress(OSError):  # it has gone already
                self.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Die for good; a second time changes nothing."""
        if self._listener.fileno() < 0:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.die()
        self._thread.join(SAFETY_TIMEOUT)
        assert not self._thread.is_alive()
        if self.requests is not None:
            self.requests.close()
        for fd in self.kept:
            os.close(fd)
        self.path.unlink(missing_ok=True)


@contextmanager
def fake(path: Path, **options: Any) -> Iterator[Fake]:
    """A fake at `path`."""
    made = Fake(path, **options)
    try:
        yield made
    finally:
        made.close()


class Front(NamedTuple):
    """A front end with a driver in front; `lines` is what it logged."""

    device: VhostUserDevice
    driver: AttachedDriver
    lines: list[str]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds."""
        until(condition, lambda: f"{self.lines} {self.driver.log}")

    def wait_no_longer_than(self, seconds: float) -> None:
        """From now on for an answer. What comes before takes its time on a busy machine."""
        link = self.device._link
        assert link is not None
        self.device._patience = seconds
        link.expect(seconds)


def until(condition: Callable[[], bool], what: Callable[[], str] = str) -> None:
    """Wait until `condition` holds."""
    give_up_at = time.monotonic() + SAFETY_TIMEOUT
    while not condition():
        assert time.monotonic() < give_up_at, what()
        time.sleep(0.002)


def listens_at(path: Path) -> bool:
    """True if somebody listens there: a socket's file is there before that (bind, then listen)."""
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        if words[7:] == [str(path)] and int(words[3], 16) & ACCEPTS:
            return True
    return False


@contextmanager
def front(
    path: Path,
    served: Served,
    *,
    over: Over = "mmio",
    start: bool = True,
    reconnect: float = SAFETY_TIMEOUT,
    patience: float = SAFETY_TIMEOUT,
    queue_size: int = 16,
    ring: Ring = "split",
    connection: socket.socket | None = None,
) -> Iterator[Front]:
    """The front end of the back end at `path`, which `connection` leads to if there is one."""
    lines: list[str] = []
    device = VhostUserDevice(
        str(path),
        served,
        name="front",
        queue_size=queue_size,
        reconnect=reconnect,
        patience=patience,
        log=lines.append,
        connection=connection,
    )
    if ring == "packed":
        assert device.knows_packed
        device.features |= 1 << 34
    try:
        with attached(device, irqfd=True, over=over, start=start, ring=ring) as driver:
            yield Front(device, driver, lines)
    finally:
        device.close()


@contextmanager
def opened(text: str, *, over: Over = "mmio", packed: bool = False) -> Iterator[AttachedDriver]:
    """The device of ``--vhost-user TEXT``, with a driver in front."""
    [spec] = registry.check("vhost_user", [registry.parse("vhost_user", text)], None)  # type: ignore[arg-type]
    with ExitStack() as closing:
        device = registry.open_device(spec, Context("vm", None, closing))
        ring = "packed" if spec.packed else "split"
        with attached(device, irqfd=True, over=over, ring=ring) as driver:  # type: ignore[arg-type]
            yield driver


def saved_of(driver: AttachedDriver) -> dict[str, Any]:
    """The state of the driver's device, whose queues are at rest meanwhile."""
    queues = driver.transport.negotiation.active_queues
    with ExitStack() as held:
        for queue in reversed(queues):
            held.enter_context(queue.lock)
        state: dict[str, Any] = json.loads(json.dumps(driver.transport.save()))
    return state


@contextmanager
def restored(driver: AttachedDriver, device: VirtioDevice, state: object) -> Iterator[None]:
    """The driver, whose device has gone, has `device` in its place from now on, which goes on from
    `state`."""
    assert driver._irqfd is not None
    transport = MmioTransport(
        device,
        driver.memory,
        driver.irq,
        irq_eventfd=driver._irqfd.eventfd,
        log=driver.log.append,
    )
    driver.transport, driver.mmio.registers = transport, transport.registers
    try:
        transport.restore(Saved(state, device.name))
        yield
    finally:
        transport.close()


@contextmanager
def process(*words: str, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A back end in a process: ``pyvmm WORDS``, which listens at `path`."""
    back_end = subprocess.Popen(
        [sys.executable, "-m", "pyvmm", *words, "--socket", str(path)],
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: listens_at(path) or back_end.poll() is not None)
        assert back_end.poll() is None, words
        yield back_end
    finally:
        back_end.kill()
        back_end.wait()
        path.unlink(missing_ok=True)


@contextmanager
def in_thread(make: Callable[[], VirtioDevice], path: Path) -> Iterator[list[socket.socket]]:
    """Our back end in threads of this process, a device for each front end; their connections."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(4)
    connections: list[socket.socket] = []

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            with connection, suppress(PyvmmError):
                serve_connection(make(), connection, log=lambda _: None)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield connections
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join(60)
        path.unlink()
