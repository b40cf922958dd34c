"""Watchers of a VM: streams that nobody can make the VM wait for, a console for many, events."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from pyvmm.boot.diagnosis import Finding
from pyvmm.control import client
from pyvmm.control.events import KEPT as KEPT_EVENTS
from pyvmm.control.protocol import Upgrade
from pyvmm.control.streams import MAX_STREAMS, OUTPUT_LIMIT
from pyvmm.errors import ConfigError
from pyvmm.host import unix_sockets
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.monitor.watch import Watch
from pyvmm.platform.serial import FCR, FCR_ENABLE, IER, IER_RDI, LSR, LSR_DR, RBR, Serial
from pyvmm.platform.shared_console import KEPT, ConsoleTail, SharedInput

HANG = 60.0  # seconds; no measure of speed


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Guest:
    """A serial port with a driver that reads what is typed, and a watch over both."""

    def __init__(self) -> None:
        self.tail = ConsoleTail()
        self.serial = Serial(lambda level: None, lambda data: None)
        self.input = SharedInput(self.serial)
        self.watch = Watch(self.tail, self.input, "ttyS0")
        self.typed = bytearray()
        self.closing = ExitStack()

    def listen(self) -> None:
        self.serial.write(FCR, 1, FCR_ENABLE)
        self.serial.write(IER, 1, IER_RDI)

    def read(self) -> bytes:
        while self.serial.read(LSR, 1) & LSR_DR:
            self.typed.append(self.serial.read(RBR, 1))
        return bytes(self.typed)

    def dial(self, upgrade: Upgrade, received: bytes = b"") -> socket.socket:
        """The client's end of a connection that was upgraded."""
        ours, theirs = unix_sockets.pair()
        upgrade.hand_over(theirs, received)
        found = socket.socket(fileno=ours.detach())
        found.settimeout(HANG)
        self.closing.enter_context(found)
        return found


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.watch.close()
    made.closing.close()


def read_to_end(connection: socket.socket) -> bytes:
    return connection.makefile("rb").read()


# ---- the console


def test_a_watcher_sees_what_was_and_what_comes(guest: Guest) -> None:
    guest.tail.observe(b"booting\n")
    one = guest.dial(guest.watch.console())
    two = guest.dial(guest.watch.console(history=False))
    guest.tail.observe(b"login: ")
    guest.watch.close()
    assert read_to_end(one) == b"booting\nlogin: "
    assert read_to_end(two) == b"login: "


def test_the_history_is_bounded_and_begins_with_a_line(guest: Guest) -> None:
    for number in range(40_000):
        guest.tail.observe(b"line %d\n" % number)
    one = guest.dial(guest.watch.console())
    guest.watch.close()
    seen = read_to_end(one)
    assert KEPT - 20 < len(seen) <= KEPT
    assert seen.startswith(b"line ") and seen.endswith(b"line 39999\n")


def test_what_watchers_type_reaches_the_guest(guest: Guest) -> None:
    guest.listen()
    one, two = guest.dial(guest.watch.console()), guest.dial(guest.watch.console(), b"first")
    until(lambda: guest.read() == b"first")
    one.sendall(b"ls\r")
    until(lambda: guest.read().endswith(b"ls\r"))
    two.sendall(b"pwd\r")
    until(lambda: guest.read().endswith(b"pwd\r"))


def test_of_a_watcher_who_only_looks_nothing_is_typed(guest: Guest) -> None:
    guest.listen()
    looking, typing = (
        guest.dial(guest.watch.console(input=False)),
        guest.dial(guest.watch.console()),
    )
    looking.sendall(b"x" * 100_000)
    typing.sendall(b"only this")
    until(lambda: guest.read() == b"only this")


def test_nothing_typed_is_lost_while_the_guest_takes_nothing(guest: Guest) -> None:
    """More than the port and all buffers hold, from several, and the terminal's own keys."""
    texts = [bytes([65 + n]) * 30_000 for n in range(3)]
    terminal = guest.input.join()
    room = []
    terminal.watch_room(lambda: room.append(True))
    watchers = [guest.dial(guest.watch.console()) for _ in texts]
    for watcher, text in zip(watchers, texts, strict=True):
        watcher.setblocking(False)
        sent = watcher.send(text)
        texts[watchers.index(watcher)] = text[:sent]
    assert terminal.enqueue_input(b"!") == 0
    guest.listen()
    rest = b"!"
    deadline = time.monotonic() + HANG
    while len(guest.read()) < sum(map(len, texts)) + 1:
        assert time.monotonic() < deadline, f"{len(guest.typed)} bytes came"
        if room and rest:
            room.clear()
            rest = rest[terminal.enqueue_input(rest) :]
        time.sleep(0)
    for text in texts:
        assert guest.typed.count(text[:1]) == len(text)
    assert guest.typed.count(b"!") == 1


def test_s7_one_who_does_not_read_misses_some_and_nobody_waits(guest: Guest) -> None:
    deaf, other = guest.dial(guest.watch.console()), guest.dial(guest.watch.console())
    received = bytearray()
    for _ in range(64):
        guest.tail.observe(b"x" * 16_384)
        while len(received) < 16_384:
            received += other.recv(65536)
        del received[:16_384]
    assert deaf.recv(1) == b"x"
    seen = bytearray()
    # There is room again once some was read; then comes how much was left out.
    while b"left out]" not in seen:
        seen += deaf.recv(65536)
        guest.tail.observe(b"y")
    before, _, after = bytes(seen).partition(b"\r\n[pyvmm: ")
    left_out = int(after.split()[0])
    assert left_out >= 64 * 16_384 - OUTPUT_LIMIT - (1 << 20)
    assert 1 + len(before) + left_out >= 64 * 16_384


def test_who_leaves_is_forgotten_and_others_find_room(guest: Guest) -> None:
    for _ in range(MAX_STREAMS):
        guest.dial(guest.watch.console())
    with pytest.raises(ConfigError, match=f"{MAX_STREAMS} look at this VM already"):
        guest.watch.console()
    guest.closing.close()

    def room() -> bool:
        try:
            guest.watch.console()
        except ConfigError:
            return False
        return True

    until(room)
    until(lambda: not guest.input.shares)
    guest.tail.observe(b"to nobody")
    one = guest.dial(guest.watch.console(history=False))
    guest.tail.observe(b"to one")
    assert one.recv(100) == b"to one"


def test_a_reader_who_has_ended_his_input_still_sees(guest: Guest) -> None:
    guest.listen()
    one = guest.dial(guest.watch.console())
    one.sendall(b"last words")
    one.shutdown(socket.SHUT_WR)
    until(lambda: guest.read() == b"last words")
    guest.tail.observe(b"answer")
    assert one.recv(100) == b"answer"


def test_it_ends_though_somebody_does_not_read(guest: Guest) -> None:
    guest.dial(guest.watch.console())
    for _ in range(100):
        guest.tail.observe(b"x" * 16_384)
    guest.watch._streams.close(patience=0.05)


# ---- events


def lines(connection: socket.socket) -> list[dict[str, object]]:
    return [json.loads(line) for line in connection.makefile("rb")]


def test_events_come_in_order_from_the_first_on(guest: Guest) -> None:
    guest.watch.events.emit("started")
    one = guest.dial(guest.watch.events.listen())
    two = guest.dial(guest.watch.events.listen(history=False))
    guest.watch.tell_finding(Finding("panic", "the guest's kernel panicked: VFS", ""))
    guest.watch.tell_finding(Finding("no-init", "no init", "name one"))
    guest.watch.end(Outcome(Ending.PANIC, "the guest's kernel panicked"))
    guest.watch.close()
    seen = lines(one)
    assert [event["event"] for event in seen] == ["started", "panic", "diagnosis", "ended"]
    assert [event["number"] for event in seen] == [1, 2, 3, 4]
    assert seen[2]["finding"] == "no-init" and seen[2]["cure"] == "name one"
    assert seen[3]["ending"] == "panic" and seen[3]["exit_code"] == 11
    assert lines(two) == seen[1:]


def test_what_is_kept_is_bounded(guest: Guest) -> None:
    for _ in range(3 * KEPT_EVENTS):
        guest.watch.events.emit("paused")
    one = guest.dial(guest.watch.events.listen())
    guest.watch.close()
    assert len(lines(one)) == KEPT_EVENTS


def test_a_listener_who_is_too_slow_hears_how_many_he_missed(guest: Guest) -> None:
    one = guest.dial(guest.watch.events.listen())
    for _ in range(20_000):
        guest.watch.events.emit("paused", filler="x" * 100)
    stream = one.makefile("rb")
    numbers: list[int] = []
    lost = 0
    while not lost:
        event = json.loads(stream.readline())
        if event["event"] == "lost":
            lost = event["count"]
        else:
            numbers.append(event["number"])
            guest.watch.events.emit("resumed")
    after = json.loads(stream.readline())
    assert numbers == list(range(1, len(numbers) + 1))
    assert after["number"] == numbers[-1] + lost + 1


def test_the_client_reads_events_until_the_end(guest: Guest) -> None:
    ours, theirs = unix_sockets.pair()
    guest.watch.events.listen().hand_over(theirs, b"")
    guest.watch.events.emit("started")
    guest.watch.end(Outcome(Ending.POWEROFF))
    guest.watch.close()
    assert [event["event"] for event in client.read_events(ours)] == ["started", "ended"]
