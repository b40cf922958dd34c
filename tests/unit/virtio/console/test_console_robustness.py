"""A hostile guest's messages and buffers on a console device: rows of docs/robustness.md."""

from __future__ import annotations

import random
import select
from collections.abc import Iterator
from pathlib import Path

import pytest
from console_rig import (
    ADD,
    CONTROL,
    CONTROL_RX,
    CONTROL_TX,
    NAME,
    OPEN,
    PORT_READY,
    READY,
    REMOVE,
    RX0,
    TX0,
    Rig,
    running,
    rx,
)

from pyvmm.testing import Buffer

BAD = {
    "outside": Buffer(0x8000_0000, 64),
    "straddles the hole": Buffer((8 << 20) - 4, 64),
    "wraps 2^64": Buffer(2**64 - 32, 64),
}


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with running(tmp_path, "agent", terminal=True) as made:
        yield made
        assert not made.driver.needs_reset, made.lines
        made.write(0, b"alive")
        assert made.screen.endswith(b"alive")


@pytest.mark.parametrize("id", [2, 3, 2**31, 2**32 - 1])
@pytest.mark.parametrize("event", [PORT_READY, OPEN])
def test_c1_a_port_that_is_not_there(rig: Rig, id: int, event: int) -> None:
    rig.tell(0, READY, 1)
    rig.tell(id, event, 1)
    assert any("no port" in line for line in rig.lines)


@pytest.mark.parametrize("event", [PORT_READY, OPEN])
def test_c2_a_port_that_was_not_added_yet(rig: Rig, event: int) -> None:
    rig.tell(1, event, 1)
    assert not rig.driver.queues[CONTROL_RX].has_used()
    rig.tell(0, READY, 0)  # the driver has failed: it gets no ports
    assert not rig.driver.queues[CONTROL_RX].has_used()


@pytest.mark.parametrize("event", [ADD, REMOVE, 4, 5, NAME, 8, 0xFFFF])
def test_c3_messages_that_are_the_devices_or_nobodys(rig: Rig, event: int) -> None:
    rig.tell(0, READY, 1)
    rig.tell(1, event, 1)
    assert any("ignored" in line for line in rig.lines)


def test_c4_the_same_message_again_and_again(rig: Rig) -> None:
    """Ports are added once, and what is owed does not pile up."""
    for _ in range(100):
        rig.tell(0xFFFF_FFFF, READY, 1)
        rig.tell(1, PORT_READY, 1)
    messages = [rig.hear()[:2] for _ in range(3)]
    assert messages[:2] == [(0, ADD), (1, ADD)]
    assert messages[2:].count((1, NAME)) == 1
    rig.tell(1, PORT_READY, 1)
    assert (1, ADD) not in [rig.hear()[:2] for _ in range(1)]


@pytest.mark.parametrize("size", [0, 1, CONTROL.size - 1])
def test_c5_a_message_that_is_too_short(rig: Rig, size: int) -> None:
    rig.driver.request(CONTROL_TX, [bytes(size) or Buffer(0, 0)])
    rig.driver.request(CONTROL_TX, [CONTROL.pack(0, READY, 1) + b"and more", b"is ignored"])
    assert rig.hear()[:2] == (0, ADD)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_c5_a_message_outside_ram(rig: Rig, bad: Buffer) -> None:
    rig.driver.request(CONTROL_TX, [bad])
    rig.tell(0, READY, 1)
    assert rig.hear()[:2] == (0, ADD)


@pytest.mark.parametrize(
    "bad", [*([one] for one in BAD.values()), [7], [Buffer(0, 0)]], ids=[*BAD, "short", "empty"]
)
def test_c6_a_control_buffer_that_is_no_good(tmp_path: Path, bad: list[int | Buffer]) -> None:
    with running(tmp_path, "agent", start=False) as rig:
        rig.driver.start()
        chain = rig.driver.submit(CONTROL_RX, [], bad)
        rig.offer(CONTROL_RX, 2)
        rig.tell(0, READY, 1)
        assert rig.driver.wait_used(CONTROL_RX, chain).written == 0
        assert rig.hear() == (1, ADD, 0, b"")


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_c7_data_outside_ram(rig: Rig, bad: Buffer) -> None:
    assert rig.driver.request(TX0, [b"x", bad])[0] == 0
    assert rig.screen == b""
    chain = rig.driver.submit(RX0, [], [bad])
    rig.offer(RX0)
    assert rig.terminal is not None
    rig.tell(0, READY, 1)
    rig.tell(0, PORT_READY, 1)
    rig.tell(0, OPEN, 1)
    rig.terminal.enqueue_input(b"key")
    assert rig.driver.wait_used(RX0, chain).written == 0
    assert rig.take(RX0) == b"key"


def test_c8_one_byte_of_memory_sent_four_billion_times(tmp_path: Path) -> None:
    """A chain may be 2^32 bytes long; others have their turn, and a reset ends it."""
    with running(tmp_path, "agent", "other") as rig:
        rig.set_up(1, 2)
        with rig.connect("other") as other:
            rig.hear()
            rig.driver.submit(rx(1) + 1, [Buffer(0, 8 << 20)] * 100)
            rig.write(2, b"my turn")
            assert other.recv(100) == b"my turn"
        rig.driver.reset()
        rig.driver.start()


def test_c8_others_have_their_turn_after_256_kib(tmp_path: Path) -> None:
    with running(tmp_path, "other", terminal=True) as rig:
        rig.tell(0, READY, 1)
        assert [rig.hear()[:2] for _ in range(2)] == [(0, ADD), (1, ADD)]
        rig.tell(1, PORT_READY, 1)
        assert rig.hear()[:2] == (1, NAME)
        rig.tell(1, OPEN, 1)
        with rig.connect("other") as other:
            rig.hear()
            arrives = select.poll()
            arrives.register(other, select.POLLIN)
            shown_first: list[int] = []
            show = rig.show

            def watch(data: bytes) -> bool:
                if not shown_first and arrives.poll(0):
                    shown_first.append(len(rig.screen))
                return show(data)

            assert rig.terminal is not None
            rig.terminal.attach(watch)
            rig.driver.queues[TX0].add([Buffer(0, 4 << 20)])
            rig.driver.queues[TX0].publish()
            rig.write(1, b"my turn")
            rig.driver.wait_used(TX0)
            assert len(rig.screen) == 4 << 20
            assert shown_first == [256 << 10]


def test_c9_no_receive_buffers(rig: Rig) -> None:
    assert rig.terminal is not None
    taken = rig.terminal.enqueue_input(bytes(1 << 20))
    assert 0 < taken <= 4096
    assert rig.terminal.enqueue_input(b"more") == 0


@pytest.mark.parametrize("queue", [RX0, TX0, CONTROL_RX, CONTROL_TX, 4, 5])
def test_row26_a_head_that_is_no_descriptor(tmp_path: Path, queue: int) -> None:
    with running(tmp_path, "agent", terminal=True, start=False) as rig:
        rig.driver.start()
        ring = rig.driver.queues[queue]
        ring.offer(ring.size)
        ring.publish()
        rig.driver.kick(queue)
        if queue in (RX0, CONTROL_RX, 4):  # looked at when there is something for them
            rig.tell(0, READY, 1)
        if queue in (RX0, 4):
            rig.offer(CONTROL_RX, 8)
            for port in (0, 1):
                rig.tell(port, PORT_READY, 1)
                rig.tell(port, OPEN, 1)
            assert rig.terminal is not None
            if queue == RX0:
                rig.terminal.enqueue_input(b"x")
            else:
                client = rig.connect("agent")  # which is looked at, and so for a buffer
        rig.driver.wait_needs_reset()
        if queue == 4:
            assert client.recv(1) == b""
            client.close()
        rig.driver.reset()
        rig._out.clear()
        rig.driver.start()
        rig.write(0, b"alive")


def test_fuzzed_messages(rig: Rig) -> None:
    numbers = random.Random(6)
    for _ in range(500):
        message = CONTROL.pack(
            numbers.choice([0, 1, 2, 2**32 - 1]),
            numbers.choice([*range(9), 0xFFFF]),
            numbers.choice([0, 1, 2, 0xFFFF]),
        )
        rig.tell_raw(message[: numbers.choice([8, 8, 8, 8, 7, 1])])
        while rig.driver.queues[CONTROL_RX].has_used():
            rig.hear()
