"""The vhost-user front end in front of our own back end, and what it asks of any."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
from descriptors import open_descriptors
from front_end_rig import (
    ADD_MEM_REG,
    ALL,
    CHECK_DEVICE_STATE,
    F_EVENT_IDX,
    F_INDIRECT,
    F_PROTOCOL,
    F_VERSION_1,
    GET_FEATURES,
    GET_INFLIGHT_FD,
    GET_VRING_BASE,
    P_BACKEND_REQ,
    P_CONFIG,
    P_REPLY_ACK,
    P_SLOTS,
    P_STATE,
    PATIENCE,
    REM_MEM_REG,
    RESET_DEVICE,
    SET_CONFIG,
    SET_DEVICE_STATE_FD,
    SET_FEATURES,
    SET_INFLIGHT_FD,
    SET_MEM_TABLE,
    SET_STATUS,
    SET_VRING_ADDR,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    fake,
    front,
    in_thread,
    opened,
    process,
    restored,
    saved_of,
    until,
)
from vhost_user_rig import Echo

from pyvmm.errors import ConfigError
from pyvmm.kinds.vhost_user.types import served
from pyvmm.testing.attached import attached
from pyvmm.testing.blk_driver import IN, IOERR, OK, BlockDriver, header
from pyvmm.testing.mmio_driver import CONFIG
from pyvmm.virtio.vhost_user.device import VhostUserDevice
from pyvmm.virtio.vhost_user.link import Link
from pyvmm.virtio.vhost_user.served import Served

MIB = 1 << 20
BLK = served("blk", 1, tag="", mac=b"")
ECHO = Served(42, 2, features=0xFF, config_size=16)
PLAIN = replace(ECHO, is_stateless=True)
FS = served("fs", 1, tag="t", mac=b"")
over_both = pytest.mark.parametrize("over", ["mmio", "pci"])


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (MIB // 256))
    return path


@pytest.fixture
def place(tmp_path):
    return tmp_path / "s"


def disk(driver):
    return BlockDriver(driver.mmio)


# --- our own back end -----------------------------------------------------------------------------


@over_both
def test_a_disk_of_our_own_back_end(image, place, over):
    with (
        process("vhost-user-blk", "--disk", str(image), path=place),
        opened(f"socket={place},type=blk", over=over) as driver,
    ):
        assert driver.config(0, 8) == struct.pack("<Q", MIB // 512)
        assert disk(driver).read(1, 512).data == bytes(range(256)) * 2
        assert disk(driver).write(1, b"w" * 512).status == OK
        assert disk(driver).flush().status == OK
        driver.restart()
        assert disk(driver).read(1, 512).data == b"w" * 512
        assert not driver.log
    assert image.read_bytes()[512:1024] == b"w" * 512


def test_several_queues(image, place):
    with (
        process("vhost-user-blk", "--disk", str(image), "--queues", "3", path=place),
        opened(f"socket={place},type=blk,queues=3") as driver,
    ):
        assert driver.config(34, 2) == struct.pack("<H", 3)
        for queue in range(3):
            answer = BlockDriver(driver.mmio, queue).read(queue, 512)
            assert (answer.status, answer.data) == (OK, bytes(range(256)) * 2)


@over_both
def test_packed_rings(place, over):
    with (
        in_thread(lambda: Echo(packed=True), place),
        front(place, ECHO, over=over, ring="packed") as rig,
    ):
        assert rig.driver.features >> 34 & 1
        for n in range(40):  # more than the ring has
            assert rig.driver.request([bytes([n])], [1]).data == bytes([n])
        [queue, _] = rig.driver.transport.negotiation.active_queues
        with queue.lock:
            pass
        assert rig.driver.request([b"on"], [2]).data == b"on"
        rig.driver.restart()
        assert rig.driver.request([b"again"], [5]).data == b"again"
        assert not rig.driver.log


def test_random_numbers(place):
    with (
        process("vhost-user", "--rng", path=place),
        opened(f"socket={place},type=rng") as driver,
    ):
        answer = driver.request([], [64])
        assert answer.written == 64 and any(answer.data)


@over_both
def test_one_queue_is_reset_and_set_up_again(image, place, over):
    with (
        process("vhost-user-blk", "--disk", str(image), "--queues", "2", path=place),
        opened(f"socket={place},type=blk,queues=2", over=over) as driver,
    ):
        for _ in range(2):
            assert BlockDriver(driver.mmio, 1).read(0, 512).status == OK
            driver.mmio.reset_queue(1)
            assert BlockDriver(driver.mmio, 0).read(0, 512).status == OK
        assert BlockDriver(driver.mmio, 1).read(0, 512).status == OK
        assert not driver.log and not driver.needs_reset


def test_while_its_lock_is_held_a_queue_rests(image, place):
    with (
        process("vhost-user-blk", "--disk", str(image), path=place),
        opened(f"socket={place},type=blk") as driver,
    ):
        assert disk(driver).read(0, 512).status == OK
        [queue] = driver.transport.negotiation.active_queues
        with queue.lock:
            chain = driver.mmio.submit(0, [header(IN)], [512, 1])
            before = driver.mmio.queues[0].used_idx
            assert queue.state().next_avail == queue.state().next_used == before
            assert driver.mmio.queues[0].used_idx == before
        driver.mmio.wait_used(0, chain)


# --- what a back end is asked ---------------------------------------------------------------------


def test_what_it_is_told_and_in_what_order(place):
    with fake(place) as back_end, front(place, ECHO, patience=60) as rig:
        rig.until(lambda: back_end.status & 4)
        numbers = back_end.numbers()
        assert numbers.index(SET_FEATURES) < numbers.index(SET_MEM_TABLE)
        assert numbers.index(SET_MEM_TABLE) < numbers.index(GET_INFLIGHT_FD)
        assert numbers.index(GET_INFLIGHT_FD) < numbers.index(SET_INFLIGHT_FD)
        assert numbers.index(SET_INFLIGHT_FD) < numbers.index(SET_VRING_ENABLE)
        asked = dict(back_end.asked)
        assert asked[SET_FEATURES] == struct.pack(
            "=Q", F_VERSION_1 | F_INDIRECT | F_EVENT_IDX | F_PROTOCOL
        )
        assert asked[SET_STATUS] == struct.pack("=Q", 15)
        count, _, *row = struct.unpack("=II4Q", asked[SET_MEM_TABLE])
        assert count == 1 and row[:2] == [0, MIB]
        rig.driver.mmio.reset()
        assert back_end.numbers()[-3:] == [GET_VRING_BASE, GET_VRING_BASE, SET_STATUS]
        assert back_end.status == 0


def test_a_back_end_that_knows_nothing_of_it_all(place):
    """Without protocol features rings begin with their kick, and nothing is acknowledged."""
    with (
        fake(place, features=F_VERSION_1) as back_end,
        front(place, ECHO) as rig,
    ):
        rig.driver.mmio.reset()
        assert not {SET_VRING_ENABLE, SET_STATUS, GET_INFLIGHT_FD} & {*back_end.numbers()}
        assert rig.lines == []


def test_a_device_that_knows_no_status_is_reset_by_its_own_request(place):
    with fake(place, protocol=P_REPLY_ACK | 1 << 13) as back_end, front(place, ECHO) as rig:
        rig.driver.mmio.reset()
        assert back_end.numbers()[-1] == RESET_DEVICE


def test_a_queue_without_an_interrupt_has_no_call(place):
    """A driver on PCI that polls a queue gives it no vector."""
    with fake(place) as back_end, front(place, ECHO, over="pci", start=False) as rig:
        rig.driver.mmio.wants_vectors = False
        rig.driver.mmio.start()
        assert rig.device.stats()["connected"]
        assert back_end.numbers().count(SET_VRING_CALL) == 2


@pytest.mark.parametrize("slots", [0, P_SLOTS])
def test_memory_that_is_added_and_removed_later(place, slots):
    with fake(place, protocol=P_REPLY_ACK | slots) as back_end:
        link = Link.to(str(place))
        link.agree()
        memory = os.memfd_create("memory")
        first, second = (0, MIB, 1 << 30, 0), (4 * MIB, MIB, 1 << 31, MIB)
        link.lend(memory, [first])
        link.lend(memory, [first])
        link.lend(memory, [first, second])
        link.lend(memory, [second])
        number = [n for n in back_end.numbers() if n in (SET_MEM_TABLE, ADD_MEM_REG, REM_MEM_REG)]
        later = [ADD_MEM_REG, REM_MEM_REG] if slots else [SET_MEM_TABLE] * 2
        assert number == [SET_MEM_TABLE, *later]
        os.close(memory)
        link.close()


def test_more_regions_than_a_table_has_room_for(place):
    with fake(place) as back_end:
        link = Link.to(str(place))
        link.agree()
        memory = os.memfd_create("memory")
        link.lend(memory, [(n * MIB, 4096, n * MIB, 0) for n in range(9)])
        assert back_end.numbers().count(ADD_MEM_REG) == 9
        os.close(memory)
        link.close()


def test_the_memory_cannot_be_cut_short_by_the_back_end(place):
    with fake(place) as back_end, front(place, ECHO) as rig:
        rig.until(lambda: back_end.status & 4)
        sizes = {fd: os.fstat(fd).st_size for fd in back_end.kept}
        [memory] = [fd for fd, size in sizes.items() if size == MIB]
        with pytest.raises(PermissionError):
            os.ftruncate(memory, 0)


def test_what_the_driver_writes_to_the_configuration(place):
    with fake(place, config=b"before".ljust(64, b"\0")) as back_end, front(place, ECHO) as rig:
        assert rig.driver.config(0, 6) == b"before"
        back_end.config = b"after!".ljust(64, b"\0")
        rig.driver.mmio.registers.write(CONFIG + 2, 2, int.from_bytes(b"xy", "little"))
        assert dict(back_end.asked)[SET_CONFIG] == struct.pack("=III", 2, 2, 0) + b"xy"
        assert rig.driver.config(0, 6) == b"after!"
        rig.driver.mmio.registers.write(CONFIG + 200, 1, 1)  # past its end: nobody's business
        assert back_end.numbers().count(SET_CONFIG) == 1


def test_a_configuration_that_changes(place):
    with fake(place, protocol=ALL | P_BACKEND_REQ) as back_end, front(place, ECHO) as rig:
        rig.until(lambda: back_end.requests is not None)
        before = rig.driver.irq.count
        back_end.config = b"changed".ljust(64, b"\0")
        back_end.requests.sendall(struct.pack("=III", 2, 1 | 8, 0))
        assert back_end.requests.recv(20) == struct.pack("=IIIQ", 2, 5, 8, 0)
        rig.until(lambda: rig.driver.config(0, 7) == b"changed")
        assert rig.driver.irq.wait(before + 1, 60)
        back_end.requests.sendall(struct.pack("=III", 3, 1 | 8, 0))  # what nobody offered
        assert back_end.requests.recv(20) == struct.pack("=IIIQ", 3, 5, 8, 1)
        rig.until(lambda: rig.lines != [])
        assert rig.lines == [f"the back end at {place} makes request 3, which is not offered"]
        assert rig.device.stats()["connected"]


def test_a_configuration_space_that_lies_about_its_queues(place):
    config = bytearray(64)
    config[34:36] = b"\xff\xff"
    with fake(place, features=F_VERSION_1 | F_PROTOCOL | 1 << 12, config=bytes(config)):
        several = served("blk", 2, tag="", mac=b"")
        with front(place, several) as rig:
            assert rig.driver.config(34, 2) == struct.pack("<H", 2)
        with front(place, BLK, start=False) as rig:
            assert not rig.device.features >> 12 & 1
    with fake(place, config=b"\xff" * 64), front(place, served("fs", 1, tag="t", mac=b"")) as rig:
        assert rig.driver.config(0, 40) == b"t".ljust(36, b"\0") + struct.pack("<I", 1)


def test_features_that_we_cannot_pass_on_are_not_offered(place):
    offered = (1 << 64) - 1
    with fake(place, features=offered), front(place, ECHO, start=False) as rig:
        assert rig.device.features & ~(1 << 40) == 0xFF | F_INDIRECT | F_EVENT_IDX | F_VERSION_1


def test_a_cards_link_is_down_while_nobody_serves_it(place):
    card = served("net", 1, tag="", mac=bytes.fromhex("525400112233"))
    with fake(place, protocol=P_REPLY_ACK) as back_end, front(place, card) as rig:
        assert rig.driver.config(0, 8) == bytes.fromhex("525400112233") + b"\1\0"
        back_end.close()
        rig.until(lambda: rig.driver.config(6, 2) == b"\0\0")


# --- saved and restored ---------------------------------------------------------------------------


@contextmanager
def another(path, served, **options):
    """A device in front of the back end that is at `path` now."""
    device = VhostUserDevice(str(path), served, name="front", queue_size=16, **options)
    try:
        yield device
    finally:
        device.close()


def test_a_saved_disk_goes_on_with_another_back_end(image, place):
    serving = ("vhost-user-blk", "--disk", str(image))
    with process(*serving, path=place) as first, front(place, BLK) as rig:
        driver = rig.driver
        assert disk(driver).write(1, b"w" * 512).status == OK
        saved_of(driver)  # and it goes on
        assert disk(driver).read(1, 512).data == b"w" * 512
        state = saved_of(driver)
        driver.transport.close()
        rig.device.close()
        first.kill()
        first.wait()
        place.unlink()
        with (
            process(*serving, path=place),
            another(place, BLK) as device,
            restored(driver, device, state),
        ):
            for n in range(40):  # more than the ring has
                assert disk(driver).read(n, 512).status == OK
            assert disk(driver).read(1, 512).data == b"w" * 512
            assert not driver.needs_reset and not driver.log
        image.write_bytes(bytes(2 * MIB))
        with (
            process(*serving, path=place),
            another(place, BLK) as device,
            pytest.raises(ConfigError, match=r"front.*has a disk of another size"),
            restored(driver, device, state),
        ):
            pass


def test_a_saved_packed_ring_goes_on(place):
    with in_thread(lambda: Echo(packed=True), place), front(place, PLAIN, ring="packed") as rig:
        for n in range(21):
            rig.driver.request([bytes([n])], [1])
        state = saved_of(rig.driver)
        rig.driver.transport.close()
        rig.device.close()
        with another(place, PLAIN) as device:
            device.features |= 1 << 34
            with restored(rig.driver, device, state):
                for n in range(40):
                    assert rig.driver.request([bytes([n])], [1]).data == bytes([n])


def test_what_a_driver_has_written_is_told_to_the_next_back_end(place):
    """To one that takes the place of another, and to that of a restored device; not after a
    reset."""
    said = (SET_CONFIG, struct.pack("=III", 2, 2, 0) + b"xy")
    with front_of_fake(place) as (rig, first):
        rig.driver.mmio.registers.write(CONFIG + 2, 2, int.from_bytes(b"xy", "little"))
        assert first.asked.count(said) == 1
        first.close()
        with fake(place) as second:
            rig.until(lambda: rig.device.stats()["reconnections"] == 1)
            assert second.asked.count(said) == 1
            state = saved_of(rig.driver)
            rig.driver.transport.close()
            rig.device.close()
        with fake(place) as third, another(place, PLAIN) as device:
            with restored(rig.driver, device, state):
                assert third.asked.count(said) == 1
            device.reset()
            assert device.save()["written"] == []


def test_the_next_back_end_is_told_last_what_was_written_last(place):
    with front_of_fake(place) as (rig, first):
        write = rig.driver.mmio.registers.write
        for offset, text in ((2, b"ab"), (3, b"z"), (2, b"xy")):
            write(CONFIG + offset, len(text), int.from_bytes(text, "little"))
        first.close()
        with fake(place) as second:
            rig.until(lambda: rig.device.stats()["reconnections"] == 1)
            told = [payload[12:] for request, payload in second.asked if request == SET_CONFIG]
    assert told == [b"z", b"xy"]


@contextmanager
def front_of_fake(place):
    with fake(place) as back_end, front(place, PLAIN) as rig:
        yield rig, back_end


def pipes():
    links = (os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if entry.is_symlink())
    return sum(link.startswith("pipe:") for link in links)


def test_what_only_its_back_end_knows_goes_along(place):
    """Once the rings have stopped, and to the next one before they begin."""
    with fake(place, protocol=ALL | P_STATE) as first, front(place, FS) as rig:
        rig.until(lambda: first.status & 4)
        first.state = os.urandom(3 << 14)
        before = pipes()
        state = saved_of(rig.driver)
        assert rig.driver.memory.lent, "what the back end writes there is nobody's change"
        assert pipes() == before
        asked = first.numbers()
        assert GET_VRING_BASE in asked[: asked.index(SET_DEVICE_STATE_FD)]
        known = rig.device.take_state()
        assert known == first.state and rig.device.take_state() == b""
        rig.until(lambda: rig.device.stats()["connected"])
        rig.driver.transport.close()
        rig.device.close()
        first.close()
        with (
            fake(place, protocol=ALL | P_STATE) as second,
            another(place, FS, state=known) as device,
            restored(rig.driver, device, state),
        ):
            assert second.state == known
            asked = second.numbers()
            assert asked.index(CHECK_DEVICE_STATE) < asked.index(SET_VRING_ADDR)
            saved_of(rig.driver)
            assert device.take_state() == known


def test_what_only_its_back_end_knows_is_refused(place):
    """Where that does not give it, or take it."""
    with fake(place), front(place, FS) as rig:
        with pytest.raises(ConfigError, match=r"front cannot be in a snapshot: its state is known"):
            saved_of(rig.driver)
        assert rig.device.stats()["connected"] and not rig.driver.needs_reset
    with fake(place, protocol=ALL | P_STATE), front(place, FS) as rig:
        state = saved_of(rig.driver)
        rig.driver.transport.close()
    with (
        fake(place),
        another(place, FS, state=b"x") as device,
        pytest.raises(ConfigError, match=r"state of front.*does not know how \(DEVICE_STATE\)"),
        restored(rig.driver, device, state),
    ):
        pass
    with front_of_fake(place) as (rig, back_end):
        back_end.close()
        rig.until(lambda: not rig.device.stats()["connected"])
        with pytest.raises(ConfigError, match="front cannot be in a snapshot now: its back end"):
            saved_of(rig.driver)


def test_one_that_does_not_end_what_it_has_taken_is_refused(place):
    """It answers GET_VRING_BASE as if it had taken a request, and never returns that."""

    def takes_one(back_end, number, payload, fds):
        back_end.bases[0] = 1
        return True

    with fake(place, actions={GET_VRING_BASE: takes_one}), front(place, PLAIN) as rig:
        rig.driver.mmio.submit(0, [b"x"], [1])
        rig.wait_no_longer_than(PATIENCE)
        with pytest.raises(ConfigError, match=r"now: its back end has gone, or does not end what"):
            saved_of(rig.driver)


# --- the back end dies ----------------------------------------------------------------------------


def test_one_that_dies_before_a_driver_is_at_work_is_told_at_once(place):
    card = served("net", 1, tag="", mac=bytes(6))
    with fake(place, protocol=P_REPLY_ACK) as back_end, front(place, card, start=False) as rig:
        rig.device.look()
        assert rig.lines == [] and rig.device.read_config(6, 2) == b"\1\0"
        back_end.close()
        rig.until(lambda: rig.device.look() or rig.lines)
        rig.device.look()
        assert rig.lines == [f"the back end at {place} has gone"]
        assert rig.device.read_config(6, 2) == b"\0\0"


def test_one_whose_place_no_other_can_take_is_told_in_one_line(place):
    """As passt, which has one end of a pair of sockets."""
    lines = []
    with fake(place) as back_end, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(place))
        device = VhostUserDevice(
            *("its socket", served("net", 1, tag="", mac=bytes(6))),
            **{"name": "net", "reconnect": 0, "connection": connection, "log": lines.append},
        )
        back_end.close()
        until(lambda: device.look() or lines)
        with attached(device, irqfd=True) as driver:
            until(lambda: device._has_given_up)
            assert driver.config(6, 2) == b"\0\0"
        device.close()
    assert lines == ["the back end at its socket has gone, and no other can take its place"]


def test_one_that_was_just_started_has_more_time_for_its_first_answers(place):
    """As a program may need to begin; whoever was there before has the usual time."""

    def late(back_end, number, payload, fds):
        time.sleep(0.3)
        return True

    with (
        fake(place, actions={GET_FEATURES: late}),
        socket.socket(socket.AF_UNIX) as connection,
    ):
        connection.connect(str(place))
        device = VhostUserDevice(
            *("its socket", served("net", 1, tag="", mac=bytes(6))),
            **{"name": "net", "patience": 0.05, "connection": connection},
        )
        assert device.stats()["connected"] and device._link._patience == 0.05
        device.close()


@over_both
def test_another_back_end_goes_on(image, place, over):
    with opened_disk(image, place, over) as (driver, back_end):
        back_end.kill()
        back_end.wait()
        place.unlink()
        chain = driver.mmio.submit(0, [header(IN)], [512, 1])
        with process("vhost-user-blk", "--disk", str(image), path=place):
            driver.mmio.wait_used(0, chain)
            assert disk(driver).read(1, 512).status == OK
            end = {"served_by": f"the back end at {place}", "connected": True, "reconnections": 1}
            until(lambda: driver.device.stats() == end)
            assert not driver.needs_reset


@contextmanager
def opened_disk(image, place, over="mmio", disk_text=""):
    text = disk_text or str(image)
    with (
        process("vhost-user-blk", "--disk", text, path=place) as back_end,
        opened(f"socket={place},type=blk", over=over) as driver,
    ):
        yield driver, back_end


SLOW = """
import os, time
from pyvmm.virtio.blk.backend import Backend, scatter

class Slow(Backend):
    read_only = True
    size_sectors = 2048

    def readv(self, views, size, offset):
        while offset >= 4096 and not os.path.exists({gate!r}):
            open({reached!r}, "w").close()
            time.sleep(0.01)
        numbers = range(offset // 512, (offset + size) // 512)
        scatter(b"".join(bytes([n]) * 512 for n in numbers), views)
"""


@pytest.fixture
def slow(tmp_path):
    """A disk that hangs in a request until the file `gate` is there; `reached` when it does."""
    gate, reached = tmp_path / "gate", tmp_path / "reached"
    path = tmp_path / "slow.py"
    path.write_text(SLOW.format(gate=str(gate), reached=str(reached)))
    return f"{path}:Slow", gate, reached


def test_requests_that_a_dead_back_end_had_taken_are_done_by_the_next(image, place, slow):
    """Of several in flight, in more than one batch, by the notes on them."""
    text, gate, reached = slow
    with opened_disk(image, place, disk_text=text) as (driver, back_end):
        assert disk(driver).read(1, 512).data == b"\1" * 512
        chains = [driver.mmio.submit(0, [header(IN, 8 + n)], [512, 1]) for n in range(4)]
        until(reached.exists)
        back_end.kill()
        back_end.wait()
        place.unlink()
        gate.touch()
        with process("vhost-user-blk", "--disk", text, path=place):
            for n, chain in enumerate(chains):
                driver.mmio.wait_used(0, chain)
                assert driver.mmio.queues[0].contents(chain) == bytes([8 + n]) * 512 + b"\0"
            assert disk(driver).read(2, 512).data == b"\2" * 512
            assert not driver.needs_reset


def test_without_another_they_fail_and_a_reset_mends_it(image, place, slow):
    text, gate, reached = slow
    spec = f"socket={place},type=blk,reconnect=0"
    with process("vhost-user-blk", "--disk", text, path=place) as back_end, opened(spec) as driver:
        chains = [driver.mmio.submit(0, [header(IN, 8 + n)], [512, 1]) for n in range(3)]
        until(reached.exists)
        back_end.kill()
        back_end.wait()
        place.unlink()
        for chain in chains:
            driver.mmio.wait_used(0, chain)
            assert driver.mmio.queues[0].contents(chain)[-1] == IOERR
        assert disk(driver).read(1, 512).status == IOERR
        assert disk(driver).flush().status == IOERR
        assert not driver.needs_reset
        gate.touch()
        with process("vhost-user-blk", "--disk", text, path=place):
            driver.restart()
            assert disk(driver).read(9, 512).data == b"\x09" * 512


def in_use(rig, readable, writable, count):
    """As many chains as given in queue 0, which nobody serves."""
    return [rig.driver.mmio.submit(0, readable, writable) for _ in range(count)]


def use(rig, chain, written=0):
    """Return `chain` as a back end would."""
    queue = rig.driver.mmio.queues[0]
    memory, at = rig.driver.memory, queue.device_addr
    [idx] = struct.unpack("<H", memory.read(at + 2, 2))
    memory.write(at + 4 + 8 * (idx % queue.size), struct.pack("<II", chain.head, written))
    memory.write(at + 2, struct.pack("<H", (idx + 1) & 0xFFFF))


def test_a_queue_that_is_reset_as_the_back_end_is_given_up_has_one_worker(place):
    """It is seen with its driver's first queue, and by the driver's start of the second one."""
    refusing = replace(PLAIN, refuse=lambda queue: None)
    with fake(place) as back_end, front(place, refusing, reconnect=0) as one:
        device, driver = one.device, one.driver.mmio
        before = device._queues[0]
        back_end.close()
        one.until(lambda: 0 in device._workers and 1 in device._workers)
        driver.reset_queue(0, 8)
        workers = dict(device._workers)
        before.ready = True  # as it was when the one who gives up looked
        for queue in (before, device._queues[0]):
            device._refuse(queue)
        assert device._workers == workers
        assert list(workers[0].queues.values()) == [device._queues[0]]
        assert sum(thread.name == "front-q0" for thread in threading.enumerate()) == 1
        before.ready = False


def test_a_queue_that_was_reset_has_nothing_of_the_one_before(place):
    """Not even for the thread that gives the back end up the moment that there is a new one."""
    seen = []

    class Watched(dict):
        def __setitem__(self, index, queue):
            seen.append((index, set(device._unclean), device._began[index]))
            super().__setitem__(index, queue)

    with fake(place), front(place, PLAIN, reconnect=0) as one:
        device, driver = one.device, one.driver.mmio
        device._queues = Watched(device._queues)
        device._unclean.add(0)
        device._began[0] = 77
        driver.reset_queue(0, 8)
        assert seen == [(0, set(), 0)]


def test_without_notes_requests_in_order_fail_one_by_one(place):
    with (
        fake(place, protocol=P_REPLY_ACK | P_CONFIG) as back_end,
        front(place, BLK, reconnect=0) as rig,
    ):
        chains = in_use(rig, [header(IN)], [512, 1], 3)
        use(rig, chains[0], 513)
        back_end.close()
        for chain in chains:
            rig.driver.mmio.wait_used(0, chain)
        assert rig.driver.mmio.queues[0].contents(chains[1])[-1] == IOERR
        assert not rig.driver.needs_reset


def test_without_notes_requests_out_of_order_want_a_reset(place):
    """Nobody can know which of them is still to be answered."""
    with (
        fake(place, protocol=P_REPLY_ACK | P_CONFIG) as back_end,
        front(place, BLK, reconnect=0) as rig,
    ):
        chains = in_use(rig, [header(IN)], [512, 1], 3)
        use(rig, chains[1], 513)
        back_end.close()
        rig.until(lambda: rig.driver.needs_reset)
        assert "without notes" in rig.driver.log[0]


def test_notes_are_of_no_use_to_one_that_cannot_read_them(place):
    """Features may change from one back end to the next."""
    with fake(place) as back_end, front(place, BLK) as rig:
        rig.until(lambda: back_end.status & 4)
        chains = in_use(rig, [header(IN)], [512, 1], 3)
        use(rig, chains[1], 513)
        back_end.protocol = P_REPLY_ACK | P_CONFIG
        back_end.die()
        rig.until(lambda: rig.driver.needs_reset)
        assert "without notes" in rig.driver.log[0]


def test_notes_that_one_back_end_did_not_keep_are_not_given_to_the_next(place):
    with fake(place) as back_end, front(place, BLK) as rig:
        for number, protocol in enumerate((P_REPLY_ACK | P_CONFIG, ALL), 1):
            rig.until(lambda: back_end.numbers().count(SET_VRING_ENABLE) == number)  # noqa: B023
            back_end.protocol = protocol
            back_end.die()
        rig.until(lambda: rig.device.stats()["reconnections"] == 2)
        assert back_end.numbers().count(GET_INFLIGHT_FD) == 2
        assert not rig.driver.needs_reset


def test_nothing_in_flight_needs_no_notes(place):
    with fake(place, protocol=P_REPLY_ACK | P_CONFIG) as back_end, front(place, BLK) as rig:
        chains = in_use(rig, [header(IN)], [512, 1], 2)
        use(rig, chains[1])
        use(rig, chains[0])
        back_end.die()
        rig.until(lambda: rig.device.stats()["reconnections"] == 1)
        assert back_end.bases[0] == 2
        assert not rig.driver.needs_reset


def test_a_queue_may_be_larger_after_its_reset(place):
    """The notes on its requests in flight (INFLIGHT) are made before, once."""
    with in_thread(Echo, place), front(place, ECHO, start=False) as rig:
        rig.driver.mmio.start(queue_sizes=[4] * len(rig.device.queue_sizes))
        assert rig.driver.request([b"x"], [1]).data == b"x"
        rig.driver.mmio.reset_queue(0, 16)
        assert rig.driver.request([b"y"], [1]).data == b"y"
        assert rig.device.stats()["reconnections"] == 0


def test_a_packed_ring_does_not_tell_where_it_was(place):
    with (
        in_thread(lambda: Echo(packed=True), place) as connections,
        front(place, ECHO, ring="packed") as rig,
    ):
        assert rig.driver.request([b"x"], [1]).data == b"x"
        connections[0].shutdown(socket.SHUT_RDWR)
        rig.until(lambda: rig.driver.needs_reset)
        rig.driver.restart()
        assert rig.driver.request([b"x"], [1]).data == b"x"


def test_a_file_system_answers_that_it_is_gone(place):
    """Its state is one process's, so no other goes on."""
    share = served("fs", 1, tag="home", mac=b"")
    with fake(place, protocol=P_REPLY_ACK) as back_end, front(place, share) as rig:
        request = struct.pack("<IIQQIIII", 40, 3, 77, 1, 0, 0, 0, 0)
        chain = rig.driver.mmio.submit(1, [request], [16, 104])
        back_end.die()
        rig.driver.mmio.wait_used(1, chain)
        answer = rig.driver.mmio.queues[1].contents(chain)
        assert struct.unpack("<IiQ", answer[:16]) == (16, -107, 77)
        forget = struct.pack("<IIQQIIIIQ", 48, 2, 78, 1, 0, 0, 0, 0, 1)
        assert rig.driver.request([forget], [], queue=0).written == 0
        assert not rig.driver.needs_reset


def test_a_device_that_cannot_fail_otherwise_wants_a_reset(place):
    with fake(place) as back_end, front(place, ECHO, reconnect=0) as rig:
        back_end.close()
        rig.until(lambda: rig.driver.needs_reset)
        assert "no back end" in rig.driver.log[0]


def test_a_back_end_that_lacks_what_the_guest_has_is_not_taken(place):
    with fake(place) as back_end, front(place, ECHO, reconnect=0.5) as rig:
        back_end.features = F_VERSION_1 | F_PROTOCOL
        back_end.die()
        rig.until(lambda: rig.driver.needs_reset)
        assert rig.device.stats()["reconnections"] == 0


def test_a_back_end_that_dies_again_and_again_is_given_up(place):
    def die(back_end, *_):
        back_end.die()
        return False

    with fake(place) as back_end, front(place, BLK, reconnect=1) as rig:
        chain = rig.driver.mmio.submit(0, [header(IN)], [512, 1])
        back_end.actions[SET_VRING_ENABLE] = die
        back_end.die()
        rig.driver.mmio.wait_used(0, chain)
        assert rig.driver.mmio.queues[0].contents(chain)[-1] == IOERR
        assert any("requests fail" in line for line in rig.lines)


def test_a_ring_that_the_back_end_calls_broken(place):
    with fake(place) as back_end, front(place, ECHO) as rig:
        rig.until(lambda: back_end.status & 4)
        os.eventfd_write(error_of(back_end), 1)
        rig.until(lambda: rig.driver.needs_reset)
        assert "a ring that it cannot serve" in rig.driver.log[0]
        rig.driver.restart()
        assert not rig.driver.needs_reset


def error_of(back_end):
    """The eventfd of SET_VRING_ERR, which comes first of a ring's."""
    return eventfds(back_end)[0]


def eventfds(back_end):
    return [
        fd for fd in back_end.kept
        if os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    ]  # fmt: skip


def test_a_back_end_that_makes_our_eventfds_wait(place):
    """O_NONBLOCK is the file's, so it can take that away: a reset drains the kick all the same."""
    with fake(place) as back_end, front(place, ECHO) as rig:
        rig.until(lambda: back_end.status & 4)
        kicks = [back_end.kept[-1], back_end.kept[-4]]
        for full in kicks:
            with suppress(BlockingIOError):
                os.eventfd_read(full)
            os.eventfd_write(full, (1 << 64) - 2)
        for fd in eventfds(back_end):
            os.set_blocking(fd, True)
        rig.driver.kick(0)
        rig.driver.mmio.reset()
        rig.driver.kick(0)
        rig.driver.mmio.reset()


def test_there_is_nothing_left(place):
    def use():
        with (
            fake(place, protocol=ALL | P_BACKEND_REQ) as back_end,
            front(place, ECHO, reconnect=0) as rig,
        ):
            rig.driver.restart()
            back_end.close()
            rig.until(lambda: rig.driver.needs_reset)

    use()
    before = open_descriptors()
    for _ in range(5):
        use()
    assert open_descriptors() == before
