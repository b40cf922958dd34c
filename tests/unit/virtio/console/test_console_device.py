"""A terminal and named ports of a guest, through registers, rings and Unix sockets."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from console_rig import (
    ADD,
    CONSOLE_PORT,
    NAME,
    OPEN,
    PORT_READY,
    READY,
    RESIZE,
    RX0,
    TX0,
    Rig,
    running,
    rx,
)
from mmio_harness import wait_for

from pyvmm.testing.mmio_driver import CONFIG_CHANGED, F_VERSION_1
from pyvmm.virtio.console.device import _Reminders


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Rig]:
    with running(tmp_path, terminal=True) as made:
        made.offer(RX0, 4)
        yield made
        assert not made.driver.needs_reset


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Rig]:
    """One named port, open in the guest."""
    with running(tmp_path, "agent") as made:
        made.set_up(1)
        yield made
        assert not made.driver.needs_reset


# --- the terminal --------------------------------------------------------------------------------


def test_the_guest_writes_to_the_terminal(terminal: Rig) -> None:
    terminal.write(0, b"login: ")
    terminal.driver.request(TX0, [b"in ", b"pieces"])
    assert terminal.screen == b"login: in pieces"


def test_keys_reach_the_guest(terminal: Rig) -> None:
    assert terminal.terminal is not None
    assert terminal.terminal.enqueue_input(b"root\n") == 5
    assert terminal.take(RX0) == b"root\n"


def test_more_keys_than_buffers_wait(tmp_path: Path) -> None:
    with running(tmp_path, terminal=True) as rig:
        assert rig.terminal is not None
        room = threading.Event()
        rig.terminal.watch_room(room.set)
        typed = os.urandom(6000)
        taken = rig.terminal.enqueue_input(typed)
        assert 0 < taken < len(typed)
        rig.offer(RX0, 1, 100)
        got = rig.take(RX0)
        while len(got) < taken:
            got += rig.take(RX0)
        assert got == typed[:taken]
        assert room.wait(60)  # what was turned down has a chance again
        assert rig.terminal.enqueue_input(typed[taken:]) == len(typed) - taken


def test_output_waits_for_a_terminal_that_takes_no_more(terminal: Rig) -> None:
    assert terminal.terminal is not None
    terminal.room = 0
    chain = terminal.driver.submit(TX0, [b"held back"])
    terminal.terminal.enqueue_input(b"x")
    assert terminal.take(RX0) == b"x"  # the keys go on
    assert not terminal.driver.queues[TX0].has_used()
    terminal.room = 1 << 20
    terminal.terminal.wake()
    terminal.driver.wait_used(TX0, chain)
    assert terminal.screen == b"held back"


def test_a_reset_returns_output_that_was_held_back(terminal: Rig) -> None:
    terminal.room = 0
    terminal.driver.submit(TX0, [b"lost"])
    terminal.driver.reset()
    terminal.room = 1 << 20
    terminal.driver.start()
    terminal.write(0, b"found")
    assert terminal.screen == b"found"


def test_the_size_is_in_the_configuration_and_changes_are_told(terminal: Rig) -> None:
    assert terminal.driver.config(0, 12) == bytes(12)
    terminal.device.set_size(132, 43)
    wait_for(lambda: terminal.irq.count > 0)
    assert terminal.driver.acknowledge() & CONFIG_CHANGED
    assert struct.unpack("<HHLL", terminal.driver.config(0, 12)) == (132, 43, 0, 0)


def wait_for_change(rig: Rig) -> None:
    seen = 0

    def is_told() -> bool:
        nonlocal seen
        seen |= rig.driver.acknowledge()
        return bool(seen & CONFIG_CHANGED)

    wait_for(is_told)


def test_the_size_is_told_again_after_output(tmp_path: Path) -> None:
    """Linux drops what it is told before its console is set up, and reads the size at no other
    time (drivers/char/virtio_console.c)."""
    with running(tmp_path, terminal=True, start=False) as rig:
        rig.device.set_size(132, 43)  # as it is from the start
        rig.driver.start()
        for _ in range(3):
            rig.driver.acknowledge()
            rig.write(0, b"# ")
            wait_for_change(rig)
        assert struct.unpack("<HHLL", rig.driver.config(0, 12)) == (132, 43, 0, 0)
        rig.device.set_size(0, 0)  # a terminal that tells none
        wait_for_change(rig)
        rig.write(0, b"# ")
        time.sleep(0.3)
        assert not rig.driver.acknowledge() & CONFIG_CHANGED


def test_a_driver_that_takes_no_size_is_not_told(tmp_path: Path) -> None:
    with running(tmp_path, terminal=True, start=False) as rig:
        rig.device.set_size(132, 43)
        rig.driver.start(features=F_VERSION_1)
        rig.write(0, b"# ")
        time.sleep(0.3)
        assert not rig.driver.acknowledge() & CONFIG_CHANGED


def test_reminders_are_few_and_end() -> None:
    now = 0.0
    reminders = _Reminders(lambda: now)
    told = []
    for output in range(1, 200_000):  # an output every 10 ms
        now = output / 100
        due, seconds = reminders.after(output)
        told += [now] if due else []
        assert seconds is None or 0 < seconds < 1.001
    gaps = [after - before for before, after in pairwise(told)]
    assert len(told) == 600 and min(gaps) > 0.09 and min(gaps[100:]) > 0.9
    assert reminders.after(1) == (False, None)


def test_a_console_port_among_named_ones_hears_of_its_size(tmp_path: Path) -> None:
    with running(tmp_path, "agent", terminal=True) as rig:
        rig.tell(0, READY, 1)
        assert {rig.hear()[:2] for _ in range(2)} == {(0, ADD), (1, ADD)}
        rig.device.set_size(80, 25)
        rig.tell(0, PORT_READY, 1)
        assert rig.hear() == (0, CONSOLE_PORT, 1, b"")
        assert rig.hear() == (0, RESIZE, 0, struct.pack("<HH", 80, 25))
        assert rig.hear() == (0, OPEN, 1, b"")
        rig.device.set_size(100, 30)
        assert rig.hear() == (0, RESIZE, 0, struct.pack("<HH", 100, 30))
        rig.tell(0, OPEN, 1)
        rig.write(0, b"both")
        assert rig.screen == b"both"


def test_an_emergency_write_needs_no_driver(tmp_path: Path) -> None:
    with running(tmp_path, terminal=True, start=False) as rig:
        for letter in b"!?":
            rig.driver.registers.write(0x100 + 8, 4, 0xFFFF_FF00 | letter)
        assert rig.screen == b"!?"


def test_a_driver_without_multiport_has_the_terminal(tmp_path: Path) -> None:
    with running(tmp_path, "agent", terminal=True, features=F_VERSION_1) as rig:
        rig.write(0, b"plain")
        assert rig.screen == b"plain"


# --- named ports ---------------------------------------------------------------------------------


def test_a_port_is_announced_with_its_name(tmp_path: Path) -> None:
    with running(tmp_path, "agent", "log") as rig:
        assert struct.unpack("<HHLL", rig.driver.config(0, 12)) == (0, 0, 3, 0)
        rig.tell(0, READY, 1)
        assert [rig.hear() for _ in range(2)] == [(1, ADD, 0, b""), (2, ADD, 0, b"")]
        rig.tell(2, PORT_READY, 1)
        assert rig.hear() == (2, NAME, 0, b"log")


def test_bytes_both_ways(agent: Rig) -> None:
    with agent.connect("agent") as client:
        assert agent.hear() == (1, OPEN, 1, b"")
        client.sendall(b"question")
        assert agent.take(rx(1)) == b"question"
        agent.write(1, b"answer")
        assert client.recv(100) == b"answer"
    assert agent.hear() == (1, OPEN, 0, b"")


def test_a_client_that_leaves_at_once_is_heard_to_the_end(agent: Rig) -> None:
    with agent.connect("agent") as client:
        client.sendall(b"x" * 300)
    assert agent.hear() == (1, OPEN, 1, b"")
    assert agent.take(rx(1)) + agent.take(rx(1)) == b"x" * 300
    assert agent.hear() == (1, OPEN, 0, b"")


def test_a_client_that_half_closes_still_reads(agent: Rig) -> None:
    import socket

    with agent.connect("agent") as client:
        agent.hear()
        client.sendall(b"all")
        client.shutdown(socket.SHUT_WR)
        assert agent.take(rx(1)) == b"all"
        agent.write(1, b"answer")
        assert client.recv(100) == b"answer"


def test_one_client_at_a_time_and_the_driver_hears_of_each(agent: Rig) -> None:
    with agent.connect("agent") as first:
        assert agent.hear() == (1, OPEN, 1, b"")
        with agent.connect("agent") as second:
            second.sendall(b"later")
            first.sendall(b"first")
            assert agent.take(rx(1)) == b"first"
            first.close()
            assert [agent.hear()[2] for _ in range(2)] == [0, 1]
            assert agent.take(rx(1)) == b"later"


def test_a_client_waits_until_the_guest_has_opened_the_port(tmp_path: Path) -> None:
    with running(tmp_path, "agent") as rig, rig.connect("agent") as client:
        client.sendall(b"early")
        rig.set_up(1)
        assert rig.take(rx(1)) == b"early"


def test_the_client_is_disconnected_when_the_guest_closes_the_port(agent: Rig) -> None:
    with agent.connect("agent") as client:
        agent.hear()
        agent.tell(1, OPEN, 0)
        assert client.recv(1) == b""


def test_what_the_guest_wrote_before_it_closed_reaches_a_slow_client(agent: Rig) -> None:
    sent = os.urandom(1 << 20)
    with agent.connect("agent") as client:
        agent.hear()
        agent.driver.submit(rx(1) + 1, [sent])
        agent.tell(1, OPEN, 0)
        received = b""
        while data := client.recv(1 << 16):
            received += data
        assert received == sent


def test_output_without_a_client_is_gone(agent: Rig) -> None:
    agent.write(1, b"nobody hears this")
    with agent.connect("agent") as client:
        agent.hear()
        agent.write(1, b"this")
        assert client.recv(100) == b"this"


def test_a_slow_client_holds_up_its_own_port_only(tmp_path: Path) -> None:
    with running(tmp_path, "slow", "other") as rig:
        rig.set_up(1, 2)
        sent = os.urandom(1 << 20)
        with rig.connect("slow") as slow, rig.connect("other") as other:
            assert {rig.hear()[0] for _ in range(2)} == {1, 2}
            chain = rig.driver.submit(rx(1) + 1, [sent])
            rig.write(2, b"goes on")
            assert other.recv(100) == b"goes on"
            assert not rig.driver.queues[rx(1) + 1].has_used()
            received = b""
            while len(received) < len(sent):
                received += slow.recv(1 << 16)
            assert received == sent
            rig.driver.wait_used(rx(1) + 1, chain)


def test_a_reset_disconnects_and_the_next_driver_begins_anew(agent: Rig) -> None:
    with agent.connect("agent") as client:
        agent.hear()
        agent.driver.reset()
        assert client.recv(1) == b""
    agent._out.clear()
    agent.driver.start()
    agent.offer(2, 8)
    agent.set_up(1)
    with agent.connect("agent") as client:
        assert agent.hear() == (1, OPEN, 1, b"")
        client.sendall(b"anew")
        assert agent.take(rx(1)) == b"anew"
