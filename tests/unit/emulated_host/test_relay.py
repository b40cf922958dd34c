"""The relay of Unix sockets: two real ends over a socket pair, and ends that break its rules."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import random
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.control import streams as control_streams
from pyvmm.control.doors import MAX_CLIENTS
from pyvmm.emulated_host.ports import Port
from pyvmm.emulated_host.qmp import Qmp
from pyvmm.emulated_host.sockets import allows, connect_now, outside_end
from pyvmm.emulated_host.spec import EmulatedHostSpec, HostImage, HostListener, Plugs
from pyvmm.errors import HostError
from pyvmm.host import unix_sockets
from pyvmm.host.syscalls import allow_descriptors
from pyvmm.relay import frames, multiplexer
from pyvmm.relay.channel import Channel
from pyvmm.relay.frames import CLOSE, CREDIT, DATA, EOF, OPEN, SLOTS, WINDOW, Decoder, encode
from pyvmm.relay.multiplexer import INSIDE, OUTSIDE, Listener, Multiplexer
from pyvmm.virtio.vsock.switch import MAX_STREAMS

HANG = 60.0  # seconds; no measure of speed


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.0005)


class Ends:
    """Both ends of a relay. What either reaches are paths in `folder`; `path` leads to `inner`."""

    def __init__(
        self, folder: Path, hold: bool = False, take: Callable[[bytes], Any] | None = None
    ) -> None:
        self.folder = folder
        self.broken: list[str] = []
        self.streams = unix_sockets.pair()
        self.path, self.inner = str(folder / "in.sock"), str(folder / "inner.sock")
        self.listener = unix_sockets.listen(self.path)
        self.outside = Multiplexer(
            self.streams[0].fileno(),
            OUTSIDE,
            reach=unix_sockets.connect,
            listeners=[Listener(self.listener, self.inner, owner_only=True, take=take)],
            on_broken=self.broken.append,
        )
        self.inside = Multiplexer(
            self.streams[1].fileno(),
            INSIDE,
            reach=unix_sockets.connect,
            on_broken=self.broken.append,
            hold=hold,
        )
        self.outside.start()
        self.inside.start()

    def call(self) -> socket.socket:
        """A client of the listener outside."""
        client = socket.socket(socket.AF_UNIX)
        client.connect(self.path)
        client.settimeout(HANG)
        return client

    def close(self) -> None:
        self.outside.stop()
        self.inside.stop()
        for end in (*self.streams, self.listener):
            end.close()


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    made = Ends(tmp_path)
    yield made
    made.close()
    assert made.broken == []


def serve(path: str, handle: Callable[[socket.socket], None]) -> None:
    """Listen at `path`; a thread for each connection."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)

    def run(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(HANG)
            handle(connection)

    def loop() -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=run, args=(connection,), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def blocking(found: unix_sockets.Socket) -> socket.socket:
    made = socket.socket(fileno=found.detach())
    made.settimeout(HANG)
    return made


def send_in_background(connection: socket.socket, data: bytes) -> threading.Thread:
    def send() -> None:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("way", ["in", "out"])
def test_megabytes_go_both_ways_unchanged(ends: Ends, way: str) -> None:
    serve(ends.inner, echo)
    client = ends.call() if way == "in" else blocking(ends.inside.connect(ends.inner))
    data = random.Random(1).randbytes(20 * WINDOW + 77)
    send_in_background(client, data)
    with client:
        assert hashlib.sha256(read_all(client)).digest() == hashlib.sha256(data).digest()


def test_each_direction_ends_apart(ends: Ends) -> None:
    def answer_after_the_end(connection: socket.socket) -> None:
        question = read_all(connection)
        connection.sendall(b"you said " + question)

    serve(ends.inner, answer_after_the_end)
    with ends.call() as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"you said hello"


def test_what_was_written_before_a_close_arrives(ends: Ends) -> None:
    """Even where the one who closed has left unread what it was sent."""

    def say_and_leave(connection: socket.socket) -> None:
        connection.recv(1)
        connection.sendall(b"too much for me")

    serve(ends.inner, say_and_leave)
    with ends.call() as client:
        client.sendall(bytes(1000))
        assert read_all(client) == b"too much for me"


def test_a_child_may_have_what_is_closed(ends: Ends) -> None:
    """As one has that was forked and has not become its program yet: epoll tells of it still."""
    serve(ends.inner, echo)
    held: list[int] = []
    for _ in range(3):
        with ends.call() as client:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            sockets = [channel.socket for channel in ends.outside._channels.values()]
            held += [os.dup(one.fileno()) for one in sockets if one is not None]
        wait_for(lambda: not ends.outside._channels)
    with ends.call() as client:
        client.sendall(b"y")
        assert client.recv(1) == b"y"
    assert len(held) == 3
    wait_for(lambda: not ends.outside._channels)
    wait_for(lambda: not ends.outside._epoll.poll(0))  # or it would be at work for ever
    for fd in held:
        os.close(fd)


def test_a_client_that_leaves_is_seen_to_have_left(ends: Ends) -> None:
    """At the other end too, where nobody writes to it and so would notice."""
    left = threading.Event()

    def wait_for_the_hang_up(connection: socket.socket) -> None:
        poll = select.poll()
        poll.register(connection, 0)
        if poll.poll(HANG * 1000):
            left.set()

    serve(ends.inner, wait_for_the_hang_up)
    client = ends.call()
    client.sendall(b"x")
    client.shutdown(socket.SHUT_WR)
    assert not left.wait(0.1)  # half of it is open still
    client.close()
    assert left.wait(HANG)


def test_nobody_there(ends: Ends) -> None:
    with ends.call() as client:
        assert read_all(client) == b""
    with pytest.raises(HostError) as refused:
        ends.inside.connect(ends.inner)
    assert refused.value.errno == errno.ECONNREFUSED


def test_a_socket_that_nobody_reads_holds_up_no_other(ends: Ends) -> None:
    serve(ends.inner, echo)
    with ends.call() as stuck, ends.call() as other:
        stuck.setblocking(False)
        sent = 0
        quiet = 0
        while quiet < 5:  # until all is full on the way there and back
            try:
                sent += stuck.send(bytes(1 << 16))
                quiet = 0
            except BlockingIOError:
                quiet += 1
                time.sleep(0.02)
        # In all: the sockets' own buffers and four windows. Far less than one could send.
        assert sent < 64 * WINDOW
        other.sendall(b"ping")
        assert other.recv(10) == b"ping"


@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(multiplexer, "SLOTS", 8)
    return 8


def test_more_clients_than_slots_wait_for_their_turn_and_that_is_said(
    few_slots: int, ends: Ends, capfd: pytest.CaptureFixture[str]
) -> None:
    serve(ends.inner, echo)
    clients = [ends.call() for _ in range(few_slots)]
    for client in clients:
        client.sendall(b"a")
        assert client.recv(1) == b"a"
    late = ends.call()
    late.sendall(b"late")
    said = ""

    def is_told() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "8 connections across the emulated KVM host at once; others wait" in said

    wait_for(is_told)
    late.settimeout(0.2)
    with pytest.raises(TimeoutError):
        late.recv(4)
    clients.pop().close()
    late.settimeout(HANG)
    assert late.recv(4) == b"late"
    for client in (late, *clients):
        client.close()


def test_a_thread_that_finds_no_slot_is_told_at_once(few_slots: int, ends: Ends) -> None:
    """It may be a device's, whose other streams must not wait for it."""
    serve(ends.inner, echo)
    clients = [blocking(ends.inside.connect(ends.inner)) for _ in range(few_slots)]
    began = time.monotonic()
    with pytest.raises(HostError) as refused:
        ends.inside.connect(ends.inner)
    assert refused.value.errno == errno.ECONNREFUSED
    assert time.monotonic() - began < multiplexer._ANSWER_SECONDS
    clients.pop().close()
    wait_for(lambda: ends.inside._free_slot() is not None)
    ends.inside.connect(ends.inner).close()
    for client in clients:
        client.close()


def test_all_that_the_devices_take_at_once_goes_across(ends: Ends) -> None:
    many = MAX_STREAMS + MAX_CLIENTS + control_streams.MAX_STREAMS
    assert many < SLOTS
    allow_descriptors(6 * many)  # both ends of the relay, clients and servers are this process
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 5 * many:
        pytest.skip("this process may not open so many files (ulimit -Hn)")
    serve(ends.inner, echo)
    clients = [ends.call() for _ in range(many)]
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    for number, client in enumerate(clients):
        assert client.recv(10) == b"%d" % number
        client.close()


def test_slots_are_used_again(few_slots: int, ends: Ends) -> None:
    serve(ends.inner, echo)
    for number in range(3 * few_slots):
        with ends.call() as client:
            client.sendall(b"%d" % number)
            assert client.recv(10) == b"%d" % number


def test_early_connections_wait_until_they_are_admitted(tmp_path: Path) -> None:
    ends = Ends(tmp_path, hold=True)
    with ends.call() as client:
        client.sendall(b"early")
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        serve(ends.inner, echo)
        ends.inside.admit()
        client.settimeout(HANG)
        assert client.recv(10) == b"early"
    ends.close()
    assert ends.broken == []


def test_the_other_machine_ends(tmp_path: Path) -> None:
    """Connections end, later ones are refused, and nobody calls that a broken protocol."""
    ends = Ends(tmp_path)
    serve(ends.inner, echo)
    client = ends.call()
    client.sendall(b"a")
    assert client.recv(1) == b"a"
    ends.inside.stop()
    ends.streams[1].close()
    assert read_all(client) == b""
    with pytest.raises(HostError):
        ends.outside.connect(ends.inner)
    ends.close()
    assert ends.broken == []


class Hostile:
    """The end under test, and a test that speaks for the other one."""

    def __init__(self, folder: Path) -> None:
        self.broken: list[str] = []
        self.path = str(folder / "server.sock")
        serve(self.path, echo)
        self.stream, theirs = socket.socketpair()
        self._theirs = theirs
        theirs.setblocking(False)
        self.stream.settimeout(HANG)
        self.relay = Multiplexer(
            theirs.fileno(), INSIDE, reach=unix_sockets.connect, on_broken=self.broken.append
        )
        self.relay.start()
        self._decoder = Decoder()
        self._frames: list[frames.Frame] = []

    def say(self, *what: bytes) -> None:
        self.stream.sendall(b"".join(what))

    def hear(self) -> frames.Frame:
        while not self._frames:
            self._frames += self._decoder.feed(self.stream.recv(1 << 16))
        return self._frames.pop(0)

    def open(self, slot: int = 0) -> None:
        self.say(encode(OPEN, slot, data=self.path.encode()))
        assert self.hear() == (CREDIT, slot, WINDOW, b"")

    def close(self) -> None:
        self.relay.stop()
        self._theirs.close()
        self.stream.close()


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Hostile]:
    made = Hostile(tmp_path)
    yield made
    made.close()


def fill(slot: int, size: int) -> list[bytes]:
    piece = encode(DATA, slot, data=bytes(frames.MAX_DATA))
    return [piece] * (size // frames.MAX_DATA)


BROKEN = {
    "unknown-type": [b"\x09" + bytes(7)],
    "type-0": [bytes(8)],
    "reserved-byte": [b"\x04\x01" + bytes(6)],
    "slot-past-the-last": [encode(OPEN, 2 * SLOTS, data=b"x")],
    "their-slot": [encode(OPEN, SLOTS, data=b"x")],
    "open-twice": [encode(OPEN, 0, data=b"x"), encode(OPEN, 0, data=b"x")],
    "open-an-open-one": [encode(OPEN, 1, data=b"x")],
    "name-of-4-gigabytes": [b"\x01\0\0\0\xff\xff\xff\xff"],
    "name-empty": [encode(OPEN, 0)],
    "data-empty": [encode(DATA, 1)],
    "data-of-4-gigabytes": [b"\x03\0\x01\0\xff\xff\xff\xff"],
    "data-without-credit": fill(1, WINDOW) + fill(1, WINDOW),
    "data-after-the-end": [encode(EOF, 1), encode(DATA, 1, data=b"x")],
    "data-in-a-closed-slot": [encode(DATA, 5, data=b"x")],
    "two-ends": [encode(EOF, 1), encode(EOF, 1)],
    "frames-after-close": [encode(CLOSE, 1), encode(EOF, 1)],
    "credit-over-the-window": [encode(CREDIT, 1, 1)],
    "credit-of-4-gigabytes": [encode(CREDIT, 1, 0xFFFF_FFFF)],
    "credit-0": [encode(CREDIT, 1, 0)],
}


@pytest.mark.parametrize("case", BROKEN)
def test_s9_whoever_breaks_the_rules_is_cut_off(hostile: Hostile, case: str) -> None:
    hostile.open(1)
    if case == "data-without-credit":
        # Whatever it sends, it gets no credit unless the echo is taken: so this has an end.
        hostile.stream.setblocking(False)
        rest = b""
        deadline = time.monotonic() + HANG
        while not hostile.broken:
            assert time.monotonic() < deadline, "it takes whatever comes"
            rest = rest or b"".join(BROKEN[case])
            with suppress(OSError):
                rest = rest[hostile.stream.send(rest) :]
    else:
        hostile.say(*BROKEN[case])
    wait_for(lambda: hostile.broken)
    assert len(hostile.broken) == 1
    with pytest.raises(HostError):
        hostile.relay.connect("anything")


def test_s9_an_end_that_takes_no_answers_is_cut_off(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiplexer, "_TOO_MUCH", 32 << 10)
    hostile.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    opens = b"".join(encode(OPEN, slot, data=b"/nowhere") for slot in range(SLOTS))
    closes = b"".join(encode(CLOSE, slot) for slot in range(SLOTS))
    relay = hostile.relay
    for _ in range(10_000):
        hostile.say(opens)
        wait_for(lambda: hostile.broken or (not relay._held and len(relay._channels) == SLOTS))
        if hostile.broken:
            break
        hostile.say(closes)
        wait_for(lambda: hostile.broken or not relay._channels)
    assert hostile.broken == ["answers that nobody takes"]


def test_refused_and_closed_slots_are_free_again(hostile: Hostile) -> None:
    for _ in range(3):
        hostile.say(encode(OPEN, 0, data=b"/nowhere"))
        assert hostile.hear() == (CLOSE, 0, 0, b"")
        hostile.say(encode(CLOSE, 0))
    hostile.open(0)
    hostile.say(encode(DATA, 0, data=b"hello"), encode(EOF, 0))
    assert hostile.hear() == (DATA, 0, 5, b"hello")


@given(
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=40).map(lambda data: (DATA, 3, len(data), data)),
            st.sampled_from([(EOF, 2, 0, b""), (CREDIT, 9, 77, b""), (CLOSE, 255, 0, b"")]),
        )
    ),
    st.integers(1, 20),
)
def test_frames_survive_being_cut_anywhere(
    sent: list[tuple[int, int, int, bytes]], cut: int
) -> None:
    stream = b"".join(encode(type, slot, value, data) for type, slot, value, data in sent)
    decoder = Decoder()
    got = [
        frame for at in range(0, len(stream), cut) for frame in decoder.feed(stream[at : at + cut])
    ]
    assert got == sent


def test_a_listener_that_accepts_nobody_refuses_at_once(tmp_path: Path) -> None:
    path = str(tmp_path / "full")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(path)
        listener.listen(0)
        waiting.connect(path)
        with pytest.raises(HostError) as refused:
            connect_now(path)
        assert refused.value.errno == errno.ECONNREFUSED
        listener.accept()[0].close()
        connect_now(path).close()


def test_which_paths_may_be_reached() -> None:
    assert allows("/run/a.sock", "/run/a.sock")
    assert not allows("/run/a.sock", "/run/a.sock_1")
    assert allows("/run/v_*", "/run/v_1024")
    for wrong in ("/run/v_", "/run/v_1/../x", "/run/v_x", "/run/v_1\0", "/run/w_1", "/run/v_²"):
        assert not allows("/run/v_*", wrong), wrong


def test_sockets_of_long_paths(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    path = str(folder / "socket")
    listener = unix_sockets.listen(path)
    assert os.stat(path).st_mode & 0o777 == 0o600
    connection = unix_sockets.connect(path)
    accepted = unix_sockets.accept(listener)
    assert accepted is not None and unix_sockets.is_ours(accepted)
    assert unix_sockets.peer(connection).pid == os.getpid()
    with pytest.raises(HostError) as taken:
        unix_sockets.listen(path)
    assert taken.value.errno == errno.EADDRINUSE
    for end in (listener, connection, accepted):
        end.close()
    with pytest.raises(HostError) as refused:
        unix_sockets.connect(path)
    assert refused.value.errno == errno.ECONNREFUSED


# ---- connections that this end takes for itself


Given = Callable[[unix_sockets.Socket, bytes], None]


def test_what_a_connection_says_first_decides_whose_it_is(tmp_path: Path) -> None:
    taken: list[tuple[unix_sockets.Socket, bytes]] = []

    def take(said: bytes) -> Given | None:
        return (lambda *given: taken.append(given)) if said.startswith(b"ours") else None

    ends = Ends(tmp_path, take=take)
    try:
        serve(ends.inner, echo)
        silent = ends.call()  # which holds up no other
        with ends.call() as theirs:
            theirs.sendall(b"theirs\n")
            assert theirs.recv(7) == b"theirs\n"
        ours = ends.call()
        ours.sendall(b"ours\nand")
        wait_for(lambda: taken)
        mine, said = blocking(taken[0][0]), taken[0][1]
        mine.sendall(b"done")
        assert ours.recv(4) == b"done"
        mine.setblocking(False)
        assert said == b"ours\nand"
        ends.outside.take_back(unix_sockets.adopt(mine.detach()), ends.inner, b"and")
        ours.sendall(b" then theirs\n")
        assert ours.makefile("rb").readline() == b"and then theirs\n"
        assert len(taken) == 1
        for one in (silent, ours):
            one.close()
        wait_for(lambda: not ends.outside._undecided)
    finally:
        ends.close()


def test_a_connection_may_come_back_before_the_relay_has_looked_again(tmp_path: Path) -> None:
    def take(said: bytes) -> Given | None:
        return answer if said.startswith(b"ours") else None

    def answer(connection: unix_sockets.Socket, said: bytes) -> None:
        # In the relay's own thread: so it is back before the next look in any case.
        line, _, rest = said.partition(b"\n")
        assert line == b"ours"
        connection.send(b"no")
        ends.outside.take_back(connection, ends.inner, rest)

    ends = Ends(tmp_path, take=take)
    try:
        serve(ends.inner, echo)
        with ends.call() as client:
            for _ in range(3):
                client.sendall(b"ours\n")
                assert client.recv(2) == b"no"
            client.sendall(b"ours\nours\ntheirs\n")  # at once, so that it waits for nothing more
            assert client.makefile("rb").readline() == b"nonotheirs\n"
        assert ends.broken == []
    finally:
        ends.close()


def test_a_first_line_in_pieces_is_one_line(tmp_path: Path) -> None:
    """Also in more pieces than a socket keeps, while nobody reads them."""
    said: list[bytes] = []

    def take(line: bytes) -> Given | None:
        said.append(line)
        return None

    ends = Ends(tmp_path, take=take)
    try:
        serve(ends.inner, echo)
        line = b"x" * 2000 + b"\n"
        with ends.call() as client:
            for place in range(len(line)):
                client.sendall(line[place : place + 1])
            assert client.makefile("rb").readline() == line
        assert said == [line]
        with ends.call() as client:  # no line at all: the other end is to say so
            client.sendall(bytes(1 << 16) + b"!")
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == bytes(1 << 16) + b"!"
        with ends.call() as client:
            client.sendall(b"half")
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"half"
        assert said[1:] == [bytes(1 << 16) + b"!", b"half"]
    finally:
        ends.close()


def test_what_was_said_first_does_not_wait_for_ever_behind_others() -> None:
    """The stream takes at once all that was enough, so that nothing else wakes the relay."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.set_blocking(writer, False)
    ours, theirs = unix_sockets.pair()
    relay = Multiplexer(writer, OUTSIDE, reach=unix_sockets.connect)
    relay._channels[0] = Channel(0, ours, relay._out, credit=WINDOW, said=b"first\n")
    for piece in fill(1, 2 * multiplexer._ENOUGH):
        relay._out += piece
    relay._wake.signal()
    relay._step()
    assert relay._out or not relay._channels[0].said
    relay._step()
    assert not relay._channels[0].said and not relay._out
    relay.stop()
    for end in (ours, theirs):
        end.close()
    os.close(reader)
    os.close(writer)


def test_what_was_given_away_and_closed_is_forgotten(tmp_path: Path) -> None:
    ends = Ends(tmp_path, take=lambda said: lambda connection, said: connection.close())
    try:
        for _ in range(20):
            with ends.call() as client:
                client.sendall(b"mine\n")
                with suppress(ConnectionResetError):
                    assert client.recv(1) == b""
        assert len(ends.outside._given) <= 1
    finally:
        ends.close()


def test_who_comes_by_one_door_takes_no_place_from_those_at_another(tmp_path: Path) -> None:
    """Whatever becomes of a connection: it is inside, has said nothing, or was given away."""
    given: list[unix_sockets.Socket] = []

    def take(said: bytes) -> Given | None:
        return (lambda mine, said: given.append(mine)) if said == b"mine\n" else None

    streams = unix_sockets.pair()
    inner = str(tmp_path / "inner")
    paths = [str(tmp_path / name) for name in ("owner", "watch", "exec")]
    listeners = [unix_sockets.listen(path) for path in paths]
    serve(inner, echo)
    most = 3
    outside = Multiplexer(
        streams[0].fileno(),
        OUTSIDE,
        reach=unix_sockets.connect,
        listeners=[
            Listener(listeners[0], inner),
            Listener(listeners[1], inner, most=most),
            Listener(listeners[2], inner, most=most, take=take),
        ],
    )
    inside = Multiplexer(streams[1].fileno(), INSIDE, reach=unix_sockets.connect)
    outside.start()
    inside.start()

    def calls(door: int, say: bytes) -> list[socket.socket]:
        found = [socket.socket(socket.AF_UNIX) for _ in range(most + 2)]
        for one in found:
            one.settimeout(HANG)
            one.connect(paths[door])
            one.sendall(say)
        return found

    def served(client: socket.socket) -> bool:
        client.sendall(b"?\n")
        return client.makefile("rb").readline() == b"?\n"

    try:
        for door, say in ((1, b""), (2, b""), (2, b"mine\n"), (2, b"theirs\n")):
            before = len(given)
            clients = calls(door, say)
            if say == b"mine\n":
                wait_for(lambda before=before: len(given) == before + most)
            # Nobody waits behind them: neither the owner nor a thread of this machine.
            with socket.socket(socket.AF_UNIX) as owner:
                owner.settimeout(HANG)
                owner.connect(paths[0])
                assert served(owner)
            outside.connect(inner).close()
            for_them = outside._listeners[listeners[door].fileno()]
            at_door = list(outside._by_slot.values()).count(for_them)
            silent = sum(one.listener is for_them for one in list(outside._undecided))
            away = sum(one.fileno() >= 0 for one in given)
            assert at_door + silent + away <= most
            # As those who are in leave, all others have their turn.
            for number, one in enumerate(clients):
                if say == b"mine\n":
                    wait_for(lambda before=before, n=number: len(given) > before + n)
                    given[before + number].close()
                elif say:
                    assert one.makefile("rb").readline() == say
                else:
                    assert served(one)
                one.close()
    finally:
        outside.stop()
        inside.stop()
        for end in (*streams, *listeners):
            end.close()


def test_a_connection_goes_back_to_the_door_that_it_came_by(tmp_path: Path) -> None:
    """And not to the first one, whose places are its owner's."""
    streams = socket.socketpair()
    for stream in streams:
        stream.setblocking(False)
    paths = [str(tmp_path / name) for name in ("owner", "exec")]
    listeners = [unix_sockets.listen(path) for path in paths]

    def take(said: bytes, plugs: Plugs) -> Given | None:
        if not said.startswith(b"mine"):
            return None
        return lambda mine, said: plugs.take_back(mine, said.removeprefix(b"mine\n"))

    def name(what: bytes) -> Callable[[socket.socket], None]:
        return lambda connection: connection.recv(100) and connection.sendall(what)

    inner = [str(tmp_path / name) for name in ("inner", "inner-0")]
    serve(inner[0], name(b"owner\n"))
    serve(inner[1], name(b"exec\n"))
    sockets_in = tuple(
        HostListener(there, here, take=take) for there, here in zip(inner, listeners, strict=True)
    )
    spec = EmulatedHostSpec(HostImage("", "", "", ()), sockets_in=sockets_in)
    outside = outside_end(spec, [Port(0, "relay", *streams)], Qmp(streams[0]))
    assert outside is not None
    inside = Multiplexer(streams[1].fileno(), INSIDE, reach=unix_sockets.connect)
    outside.start()
    inside.start()
    try:
        for path, who in zip(paths, (b"owner\n", b"exec\n"), strict=True):
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(HANG)
                client.connect(path)
                client.sendall(b"mine\nwho?\n")
                assert client.makefile("rb").readline() == who
    finally:
        outside.stop()
        inside.stop()
        for end in (*streams, *listeners):
            end.close()
