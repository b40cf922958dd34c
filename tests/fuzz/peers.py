"""vhost-user under the fuzzer, from both sides: front ends that say anything to our back end, and
back ends that answer anything to our front end.

A case draws everything from one `random.Random`. It raises AssertionError, with the messages so
far, if

- anything but an error of ours is raised, or one of more than a line,
- a wait has no bound, or a thread is left,
- the device cannot be reset by its driver (our front end).
"""

from __future__ import annotations

import functools
import io
import os
import select
import signal
import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, suppress
from dataclasses import replace
from random import Random
from unittest import mock

import front_end_rig as rig
from front_end_rig import Fake, fake, front
from fuzz.shortage import Shortage
from vhost_user_rig import MIB, Echo

from pyvmm.errors import ConfigError, DriverError, PyvmmError
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing import vhost_user_driver as front_end
from pyvmm.testing.mmio_driver import QUEUE_RESET, QUEUE_SEL, Ring
from pyvmm.testing.vhost_user_driver import PACKED_START, USER_BASE
from pyvmm.transport.vhost_user.back_end import BackEnd
from pyvmm.transport.vhost_user.server import serve_each
from pyvmm.vhost_user import protocol
from pyvmm.vhost_user.channel import Message
from pyvmm.vhost_user.protocol import FrontEndError
from pyvmm.virtio import defects
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.vhost_user import device, link
from pyvmm.virtio.vhost_user.served import Served

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
_Said = tuple[int, int, bytes, list[str]]  # request, flags, payload, kinds of descriptors


@contextmanager
def told(said: list[str]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        error.add_note("\n".join(f"  {number}. {one}" for number, one in enumerate(said, 1)))
        raise


# --- a front end, and our back end ----------------------------------------------------------------


class _Lent:
    """What front ends hand over, by kind."""

    def __init__(self) -> None:
        self.memory = GuestMemory([(0, MIB)])
        self.eventfd = EventFd()
        self.files = {
            "memory": self.memory.fd,
            "eventfd": self.eventfd.fd,
            "blocking": os.eventfd(0, os.EFD_CLOEXEC),  # to read and to write would be to wait
            "full": os.eventfd(0, os.EFD_CLOEXEC),
            "pipe": os.pipe()[0],
            "file": os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
            "folder": os.open("/", os.O_RDONLY | os.O_CLOEXEC),
        }

    def fill(self) -> None:
        """What a case has taken out of the counter that is full."""
        fd = self.files["full"]
        poll = select.poll()
        poll.register(fd, select.POLLIN | select.POLLOUT)
        happened = dict(poll.poll(0)).get(fd, 0)
        if happened & select.POLLOUT:
            if happened & select.POLLIN:
                os.eventfd_read(fd)
            os.eventfd_write(fd, U64 - 1)


_lent = functools.cache(_Lent)


def _small(rng: Random) -> int:
    return rng.choice((0, 1, 2, 3, 4, 16, 64, 0x8000, 0xFFFF, PACKED_START, U32))


def _address(rng: Random) -> int:
    base = rng.choice((0, USER_BASE, USER_BASE, USER_BASE, U64))
    return (base + 4096 * rng.randrange(18) + rng.choice((0, 0, 0, 2, 4, 8, 1))) & U64


def _region(rng: Random) -> bytes:
    return struct.pack(
        "=4Q",
        rng.choice((0, 0, 4096, 2 * MIB, U64 - 4095)),
        rng.choice((MIB, MIB, 4096, 0, 100, 1 << 40, U64)),
        rng.choice((USER_BASE, USER_BASE, USER_BASE + MIB, 0, U64)),
        rng.choice((0, 0, 4096, 1, U64)),
    )


def _number(rng: Random) -> bytes:
    known = (0, 1, 2, 0x100, 0x101, 1 << 30, 1 << 32, 3 << 32 | 1 << 30, 0x9209, U64)
    return struct.pack("=Q", rng.choice((*known, rng.getrandbits(64))))


def _payload(rng: Random, request: protocol.Request) -> bytes:
    name, layout = request.name, request.layout
    if layout is protocol.U64:
        return _number(rng)
    if layout is protocol.VRING_STATE:
        return struct.pack("=II", rng.randrange(3), _small(rng))
    if layout is protocol.VRING_ADDR:
        places = (_address(rng) for _ in range(3))
        return struct.pack("=IIQQQQ", rng.randrange(3), rng.choice((0, 0, 0, 1)), *places, 0)
    if layout is protocol.SINGLE_REGION:
        return bytes(8) + _region(rng)
    if name == "SET_MEM_TABLE":
        count = rng.choice((0, 1, 1, 2, 9))
        return struct.pack("=II", count, 0) + b"".join(_region(rng) for _ in range(count))
    if name.endswith("_CONFIG"):
        head = struct.pack("=III", _small(rng), _small(rng), rng.randrange(3))
        return head + bytes(rng.choice((0, 1, 4, 20)))
    if name.endswith("_FD"):
        size, offset = rng.choice((0, 4096, MIB, U64)), rng.choice((0, 4096, 5, U64))
        sizes = rng.choice((16, 0, 64, 3, 0xFFFF))
        return struct.pack("=QQHH", size, offset, rng.randrange(3), sizes) + bytes(4)
    return b""


def _message(rng: Random) -> _Said:
    request = rng.choice(protocol.REQUESTS)
    payload = _payload(rng, request)
    usual = {"SET_MEM_TABLE": len(payload) // 32, "ADD_MEM_REG": 1, "SET_INFLIGHT_FD": 1}
    is_ring = "VRING" in request.name and request.layout is protocol.U64
    eventfd = rng.choice(("eventfd", "eventfd", "eventfd", "blocking", "full"))
    kinds = ["memory" if request.name in usual else eventfd]
    kinds *= usual.get(request.name, int(is_ring))
    if not rng.randrange(10):
        payload = payload[: rng.randint(0, len(payload))] + rng.randbytes(rng.randrange(9))
    if not rng.randrange(10):
        kinds = rng.choices(sorted(_lent().files), k=rng.randrange(4))
    return request.number, rng.choice((1, 9, 9)), payload, kinds


def _beginning(rng: Random, ring: Ring) -> Iterator[_Said]:
    """Messages that negotiate, and bring some rings up."""
    packed = ring == "packed"
    features = 1 << 32 | 1 << 30 | (1 << 34 if packed else 0)
    features |= rng.choice((0, 1 << 28, 1 << 29, 3 << 28))
    yield front_end.SET_PROTOCOL_FEATURES, 9, struct.pack("=Q", rng.choice((0x9209, 0, 8))), []
    yield front_end.SET_FEATURES, 9, struct.pack("=Q", features), []
    table = struct.pack("=II4Q", 1, 0, 0, MIB, USER_BASE, 0)
    yield front_end.SET_MEM_TABLE, 9, table, ["memory"]
    for index in range(rng.randrange(3)):
        places = [USER_BASE + (4 * index + page) * 4096 for page in (1, 2, 3)]
        base = PACKED_START if packed else 0
        yield front_end.SET_VRING_NUM, 9, struct.pack("=II", index, 16), []
        yield front_end.SET_VRING_BASE, 9, struct.pack("=II", index, base), []
        yield front_end.SET_VRING_ADDR, 9, struct.pack("=IIQQQQ", index, 0, *places, 0), []
        for number in (front_end.SET_VRING_CALL, front_end.SET_VRING_KICK):
            eventfd = rng.choice(("eventfd", "eventfd", "eventfd", "blocking", "full"))
            yield number, 9, struct.pack("=Q", index), [eventfd]
        yield front_end.SET_VRING_ENABLE, 9, struct.pack("=II", index, 1), []


def back_end_case(rng: Random, ring: Ring) -> int:
    """A front end says anything; how many messages it was."""
    lent, said = _lent(), list[str]()
    lent.fill()
    threads = threading.active_count()
    # Of a split ring: so many chains are available.
    lent.memory.write(2 * 4096 + 2, bytes([rng.randrange(20)]))
    back_end = BackEnd(Echo((16, 16), packed=ring == "packed"), log=lambda line: None)
    with told(said):
        try:
            several = [_message(rng) for _ in range(rng.randint(1, 24))]
            for number, flags, payload, kinds in [*_beginning(rng, ring), *several]:
                said.append(f"{number} {flags:#x} {payload.hex(' ', 8)} {kinds}")
                fds = [os.dup(lent.files[kind]) for kind in kinds]
                with Message(number, flags, payload, fds) as message:
                    try:
                        back_end.handle(message)
                    except FrontEndError as error:
                        assert "\n" not in str(error)
        finally:
            back_end.close()
            lent.memory.write(0, bytes(0x20000))
        assert threading.active_count() == threads
    return len(said)


def server_case(rng: Random, ring: Ring) -> int:
    """Front ends come to our server one after the other, each served by a process of its own, until
    it is asked to end; how many messages they said. From the main thread only."""
    lent, said = _lent(), list[str]()
    visits = [
        [*_beginning(rng, ring), *(_message(rng) for _ in range(rng.randrange(8)))]
        for _ in range(rng.randint(1, 3))
    ]
    broken, fails = rng.randrange(6), rng.random() < 0.2
    packed, opens = ring == "packed", list[bool]()

    def visit(path: str, messages: list[_Said]) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as front:
            front.settimeout(60)
            front.connect(path)
            for number, flags, payload, kinds in messages:
                said.append(f"{number} {flags:#x} {payload.hex(' ', 8)} {kinds}")
                head = struct.pack("=III", number, flags, len(payload) ^ (broken == 0))
                fds = [lent.files[kind] for kind in kinds][: protocol.MAX_FDS]
                socket.send_fds(front, [head + payload], fds)
            front.shutdown(socket.SHUT_WR)
            while front.recv(4096):
                pass

    @contextmanager
    def opened() -> Iterator[VirtioDevice]:
        opens.append(fails and len(opens) == 1)
        if opens[-1]:
            raise ConfigError("there is no device now")
        yield Echo((16, 16), packed=packed)

    def come(path: str) -> None:
        try:
            rig.until(lambda: rig.listens_at(rig.Path(path)))
            for messages in visits:
                with suppress(OSError):  # it has had enough
                    visit(path, messages)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with told(said), tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = f"{folder}/s"
        visitor = threading.Thread(target=come, args=(path,))
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # where it has ended by itself
        visitor.start()
        try:
            with redirect_stderr(io.StringIO()):
                serve_each(opened, path)
        finally:
            visitor.join(60)
            signal.signal(signal.SIGTERM, before)
        assert not visitor.is_alive()
    return len(said)


# --- a back end, and our front end ----------------------------------------------------------------

ECHO = Served(42, 2, features=0xFF, config_size=16)


def refuse(queue: Queue) -> None:
    for chain in queue:
        queue.add_used(chain, 0)


_ALL = rig.ALL | rig.P_BACKEND_REQ | rig.P_STATE
_PATIENCE = 0.05  # seconds for an answer, as some never come
_TOO_MUCH = 1 << 18  # bytes of a back end's state, of which half may be taken here
_STAGES = (
    *(rig.GET_FEATURES, rig.GET_PROTOCOL_FEATURES, rig.SET_OWNER, rig.GET_QUEUE_NUM),
    *(rig.SET_BACKEND_REQ_FD, rig.GET_CONFIG, rig.SET_FEATURES, rig.SET_STATUS, rig.GET_STATUS),
    *(rig.SET_MEM_TABLE, rig.GET_INFLIGHT_FD, rig.SET_INFLIGHT_FD, rig.SET_VRING_NUM),
    *(rig.SET_VRING_BASE, rig.SET_VRING_ADDR, rig.SET_VRING_ERR, rig.SET_VRING_CALL),
    *(rig.SET_VRING_KICK, rig.SET_VRING_ENABLE, rig.GET_VRING_BASE, rig.SET_CONFIG),
    *(rig.SET_DEVICE_STATE_FD, rig.CHECK_DEVICE_STATE, rig.RESET_DEVICE, rig.ADD_MEM_REG),
)


def _wrong(rng: Random) -> tuple[str, rig.Action]:
    """Something that a back end does in place of its answer, and what to call it."""
    kind = rng.randrange(8)
    data = rng.randbytes(rng.choice((0, 3, 8, 8, 8, 12, 24, 70, 1000)))
    flags = rng.choice((rig.VERSION | rig.REPLY,) * 4 + (rng.getrandbits(4),))
    count, other = rng.choice((0, 0, 0, 1, 2, 9)), rng.choice((0, 0, 0, 1, 7))
    size, silent = rng.choice((8, 0xFFFF_FFF0)), not rng.randrange(4)

    def act(back_end: Fake, number: int, payload: bytes, fds: list[int]) -> bool:
        assert back_end.connection is not None
        if kind == 0:
            back_end.die()
        elif kind == 1:
            back_end.usual(number, 8, payload, fds)
            back_end.answer(number, bytes(8))
        elif kind == 2:
            back_end.answer(number, struct.pack("=Q", 1))
        elif kind == 3:
            head = struct.pack("=III", number, rig.VERSION | rig.REPLY, size)
            back_end.connection.sendall(head + data[:4])
            back_end.die()
        elif kind != 4 or not silent:  # else it says nothing, for which we wait
            back_end.answer(number + other, data, [0] * count, flags)
        return False

    return f"way {kind}: {data[:24].hex(' ', 8)}, {flags:#x}, {count} files, {other}", act


def _nearly(rng: Random) -> tuple[str, rig.Action]:
    """A right answer, or an acknowledgement, but for one thing; not before the request was answered
    some times. What to call it."""
    after, kind = rng.choice((0, 0, 1, 2)), rng.randrange(5)
    place, value = rng.random(), rng.choice((0, 1, 2, 1 << 31, U32))
    count = rng.choice((1, 1, 2))

    def act(back_end: Fake, number: int, payload: bytes, fds: list[int]) -> bool:
        nonlocal after
        if after:
            after -= 1
            return True
        if number not in rig.REPLYING:
            back_end.answer(number, struct.pack("=Q", value))
            return False
        answer, files = back_end._reply(number, payload)
        data = bytearray(answer)
        at = int(place * len(data)) & ~3
        if kind == 0:
            data[at : at + 4] = struct.pack("=I", value)
        elif kind == 1:
            data[at // 8 * 8] ^= 1 << int(place * 64) % 8  # a feature less, or more
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            data.clear()
        else:
            files = [0] * count  # of another kind, or too many
        back_end.answer(number, bytes(data), files)
        return False

    return f"nearly, {kind}: {place:.3f}, {value:#x}, {count}, after {after}", act


def _transfer(rng: Random) -> tuple[str, rig.Action]:
    """What a back end does with the pipe for its state, and what to call it."""
    kind = rng.choice(("refused", "closed", "kept", "endless", "short"))

    def act(back_end: Fake, number: int, payload: bytes, fds: list[int]) -> bool:
        fd = fds[0]
        back_end.answer(number, struct.pack("=Q", 0x101 if kind == "refused" else rig.NO_FD))
        gives = struct.unpack("=II", payload)[0] == 0
        if kind in ("endless", "short") and gives:
            with suppress(BrokenPipeError):
                for _ in range(_TOO_MUCH >> 12 if kind == "endless" else 1):
                    os.write(fd, bytes(1 << 12))
        if kind != "kept":
            back_end._let_go(fd)
        return False

    return f"the state's pipe is {kind}", act


def _requests(rng: Random) -> bytes:
    """What it asks for itself (BACKEND_REQ)."""
    size = rng.choice((0, 0, 0, 1, 8, 0xFFFF_FFFF))
    head = struct.pack("=III", rng.choice((2, 2, 2, 1, 3, 99)), rng.choice((1, 9, 9, 5, 0)), size)
    return head + rng.randbytes(rng.choice((0, 0, 0, min(size, 20), 40)))


def _steps(rng: Random, one: rig.Front, back_end: Fake, said: list[str]) -> Iterator[str]:
    driver = one.driver.mmio

    def ask_for() -> None:
        if back_end.requests is not None:
            with suppress(OSError):  # we have hung up
                back_end.requests.sendall(_requests(rng))

    def offer() -> None:
        with suppress(RuntimeError, MemoryError):
            driver.submit(rng.randrange(2), [b"question"], [8])

    def write_config() -> None:
        one.driver.config(rng.randrange(20), rng.choice((1, 2, 4)))
        one.device.write_config(rng.randrange(16), rng.randbytes(rng.choice((1, 2, 4))))

    def begin() -> None:
        driver.reset()
        driver.start()

    def fall_short() -> None:
        with Shortage(Random(rng.random())).lasting():
            begin()

    def save() -> None:
        with suppress(ConfigError, DriverError):
            known = rig.saved_of(one.driver)
            state = one.device.take_state()
            assert known["device"] is not None and (not state or len(state) <= link.MOST_STATE)

    def look() -> None:
        one.device.look()
        one.driver.transport.negotiation.memory_changed()

    def load() -> None:
        one.device._state = rng.randbytes(rng.choice((0, 10, _TOO_MUCH)))
        with suppress(PyvmmError):
            one.device._load_state(Saved({}, "front"))

    def restore() -> None:
        rows = [
            {"offset": rng.randrange(20), "data": rng.randbytes(rng.randrange(3)).hex()}
            for _ in range(rng.randrange(3))
        ]
        known = back_end.config[: one.device._served.identity]
        config = rng.choice((known, known, b"another")).hex()
        with suppress(PyvmmError):
            one.device.restore(Saved({"config": config, "written": rows}, "front"))

    def change() -> None:
        back_end.config = rng.randbytes(64)
        if back_end.requests is not None:
            with suppress(OSError):
                back_end.requests.sendall(struct.pack("=III", 2, rng.choice((1, 9)), 0))

    def hang_up_requests() -> None:
        if back_end.requests is not None:
            with suppress(OSError):
                back_end.requests.shutdown(socket.SHUT_WR)

    def come_back_as_another() -> None:
        back_end.features &= ~(1 << rng.choice((2, 28, 30, 32)))
        back_end.protocol &= ~(1 << rng.choice((0, 3, 9, 12, 15, 16, 19)))
        back_end.die()

    def report() -> None:
        for fd in back_end.errors.values():
            os.eventfd_write(fd, 1)

    def lag() -> None:
        for index in list(back_end.bases):
            back_end.bases[index] += rng.choice((1, 2, 1 << 15))

    def pause() -> None:
        """The machine stands still meanwhile."""
        queues = one.driver.transport.negotiation.active_queues
        for queue in queues:
            queue.lock.acquire()
        back_end.die()
        for queue in queues:
            queue.lock.release()

    def renew() -> None:
        driver.write(QUEUE_SEL, rng.randrange(2))
        driver.write(QUEUE_RESET, 1)

    def lend() -> None:
        memory = one.driver.memory
        rows = [(r.guest_addr, r.size, r.host_addr, r.fd_offset) for r in memory.regions]
        with suppress(PyvmmError), one.device._talking:
            if one.device._link is not None:
                more = [(n << 30, 4096, n << 32, 0) for n in range(1, places)]
                one.device._link.lend(memory.fd, rows + more)

    places = rng.choice((2, 3, 10))
    ways: dict[str, Callable[[], object]] = {
        "it has other memory": lend,
        "the back end asks": ask_for,
        "it is saved": save,
        "it is given a state": load,
        "it is restored": restore,
        "the configuration changes": change,
        "the back end asks no more": hang_up_requests,
        "another one comes": come_back_as_another,
        "a ring is reported": report,
        "it lags": lag,
        "pause": pause,
        "a queue is reset": renew,
        "a request": offer,
        "the configuration": write_config,
        "begun anew": begin,
        "begun on a host that has too little": fall_short,
        "it dies": back_end.die,
        "it is looked at": look,
        "its counters": one.device.stats,
    }
    for _ in range(rng.randint(1, 6)):
        name = rng.choice(sorted(ways))
        if name in ("a request", "the configuration", "a queue is reset") and not driver.queues:
            continue
        said.append(name)
        ways[name]()
        yield name


def front_end_case(rng: Random, ring: Ring) -> int:
    """A back end answers anything; how many steps of a driver there were."""
    said: list[str] = []
    actions: dict[int, rig.Action] = {}
    for _ in range(rng.choice((0, 1, 1, 2))):
        number = rng.choice(_STAGES)
        what, actions[number] = rng.choice((_wrong, _nearly, _nearly))(rng)
        said.append(f"at request {number}, {what}")
    if rng.random() < 0.2:
        what, actions[rig.SET_DEVICE_STATE_FD] = _transfer(rng)
        said.append(what)
    features = rng.choice((1 << 32 | 1 << 30 | 3 << 28 | 1 << 34, 1 << 32 | 1 << 30) * 3)
    features = features if rng.randrange(5) else rng.getrandbits(64)
    knows = rng.choice((_ALL, _ALL, _ALL & ~rig.P_INFLIGHT, rig.P_REPLY_ACK, rng.getrandbits(20)))
    said.append(f"features {features:#x}, protocol features {knows:#x}")
    packed = ring == "packed" and bool(features >> 34 & 1) and rig.GET_FEATURES not in actions
    served = replace(
        ECHO,
        refuse=refuse if rng.randrange(2) else None,
        is_stateless=not rng.randrange(3),
        resumes=bool(rng.randrange(4)),
        needs_config=not rng.randrange(4),
        identity=rng.choice((0, 0, 8)),
    )
    threads, defects_found = threading.active_count(), list[str]()
    with told(said), ExitStack() as closing:
        closing.enter_context(mock.patch.object(defects, "_report", defects_found.append))
        folder = closing.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))
        path = rig.Path(folder) / "s"
        made = fake(path, features=features, protocol=knows, actions=actions)
        back_end = closing.enter_context(made)
        connection = None
        if rng.random() < 0.15:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(path))
        closing.enter_context(mock.patch.object(link, "MOST_STATE", _TOO_MUCH // 2))
        closing.enter_context(
            mock.patch.multiple(device, STARTING=_PATIENCE, _LONGEST_PAUSE=_PATIENCE)
        )
        try:
            with front(
                path,
                served,
                start=False,
                patience=_PATIENCE,
                reconnect=rng.choice((0.0, 0.02)),
                ring="packed" if packed else "split",
                connection=connection,
            ) as one:
                for _ in _steps(rng, one, back_end, said):
                    pass
                one.driver.mmio.reset()
                assert one.driver.mmio.status == 0
        except PyvmmError as error:
            assert "\n" not in str(error) and len(str(error)) < 200
        assert not defects_found, defects_found
    rig.until(lambda: threading.active_count() <= threads, lambda: str(threading.enumerate()))
    return len(said)
