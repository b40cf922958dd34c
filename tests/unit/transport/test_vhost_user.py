"""The vhost-user back end with a front end that behaves."""

from __future__ import annotations

import errno
import itertools
import struct
import threading
from typing import NoReturn

import pytest
from vhost_user_rig import HOLE_END, MIB, Echo, connected, started

from pyvmm.errors import HostError
from pyvmm.host.files import open_image
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing.blk_driver import OK, BlockDriver
from pyvmm.testing.ring import Buffer
from pyvmm.testing.vhost_user_driver import (
    ADD_MEM_REG,
    GET_CONFIG,
    GET_MAX_MEM_SLOTS,
    GET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM,
    P_CONFIG,
    P_INFLIGHT,
    P_MEM_SLOTS,
    P_MQ,
    P_REPLY_ACK,
    P_RESET_DEVICE,
    REM_MEM_REG,
    RESET_DEVICE,
    RESET_OWNER,
    SET_CONFIG,
    SET_FEATURES,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_KICK,
    SET_VRING_NUM,
    USER_BASE,
    Refused,
)
from pyvmm.virtio.blk.backend import FileBackend
from pyvmm.virtio.blk.device import BlockDevice
from pyvmm.virtio.lifecycle import Lifecycle
from pyvmm.virtio.rng.device import EntropyDevice

VERSION_1 = 1 << 32
PROTOCOL = 1 << 30


def slot(guest, size, user, offset):
    return struct.pack("=5Q", 0, guest, size, user, offset)


@pytest.mark.parametrize("indirect", [False, True])
def test_a_device_is_served(indirect):
    with started() as rig:
        assert rig.driver.request(0, [b"abc", b"de"], [5], indirect=indirect) == (5, b"abcde")


def test_the_front_end_is_called_once_buffers_are_used():
    with started() as rig:
        chain = rig.driver.submit(0, [b"x"], [1])
        rig.driver.wait_called()  # before the driver looks: one that has looked needs no call
        assert rig.driver.wait_used(0, chain).written == 1


def test_any_device_can_be_served():
    with started(EntropyDevice(), sizes=(8,)) as rig:
        _, first = rig.driver.request(0, [], [64])
        _, second = rig.driver.request(0, [], [64])
        assert first != second


def test_a_disk_is_served(tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(range(256)) * 64)
    backend = FileBackend(open_image(str(image)))
    with started(BlockDevice(backend, name="disk0"), sizes=(256,)) as rig:
        disk = BlockDriver(rig.driver)
        assert struct.unpack("<Q", rig.driver.config(0, 8)) == (32,)
        assert disk.read(1, 512).data == bytes(range(256)) * 2
        assert disk.write(2, b"x" * 1024).status == OK
        assert disk.flush().status == OK
    backend.close()
    assert image.read_bytes()[1024:2048] == b"x" * 1024


def test_what_libblkio_and_qemu_insist_on_is_offered():
    with connected(Echo()) as rig:
        offered = rig.driver.ask_u64(GET_PROTOCOL_FEATURES)
        assert offered == P_MQ | P_REPLY_ACK | P_CONFIG | P_INFLIGHT | P_RESET_DEVICE | P_MEM_SLOTS


def test_queues_and_slots_are_counted():
    with connected(Echo((64, 64, 16))) as rig:
        rig.driver.negotiate()
        assert rig.driver.ask_u64(GET_QUEUE_NUM) == 3
        assert rig.driver.ask_u64(GET_MAX_MEM_SLOTS) >= 8


def test_without_any_protocol_feature_rings_start_enabled():
    with connected(Echo()) as rig:
        rig.driver.negotiate(features=VERSION_1, protocol_features=0)
        rig.driver.lend()
        rig.driver.lay_out(0, 16)
        rig.driver.set_up(0)
        assert rig.echoes()


@pytest.mark.parametrize(
    "order", [*itertools.permutations("NAKE"), *itertools.permutations("NBAKE")], ids="".join
)
def test_a_ring_is_set_up_in_any_order(order):
    """Size, base, addresses, kick, enable: it runs from the last of them on. (A base that is not
    where rings begin has to come before that; it is, here.)"""
    with connected(Echo()) as rig:
        driver = rig.driver
        driver.negotiate()
        driver.lend()
        queue = driver.lay_out(0, 16)
        tell = {
            "N": lambda: driver.tell_vring(SET_VRING_NUM, 0, queue.size),
            "B": lambda: driver.tell_vring(SET_VRING_BASE, 0, 0),
            "A": lambda: driver.tell(SET_VRING_ADDR, driver.addresses(0)),
            "K": lambda: driver.tell_u64(SET_VRING_KICK, 0, [driver.kicks[0].fd]),
            "E": lambda: driver.tell_vring(SET_VRING_ENABLE, 0, 1),
        }
        for what in order:
            tell[what]()
        assert rig.echoes()


def test_a_ring_that_waits_for_its_kick_alone_can_still_be_given_another_base():
    with connected(Echo()) as rig:
        driver = rig.driver
        driver.start(sizes=(16,))
        assert rig.echoes() and rig.echoes()
        assert driver.stop() == 2
        driver.tell_vring(SET_VRING_BASE, 0, 0)
        driver.tell_vring(SET_VRING_BASE, 0, 2)
        driver.tell_u64(SET_VRING_KICK, 0, [driver.kicks[0].fd])
        assert rig.echoes()


def test_rings_work_side_by_side():
    with started(sizes=(16, 64)) as rig:
        for index in (0, 1, 1, 0):
            assert rig.echoes(index)


def test_a_ring_that_starts_later_does_not_disturb_the_others():
    with connected(Echo()) as rig:
        driver = rig.driver
        driver.start(sizes=(16,))
        for _ in range(20):
            assert rig.echoes(0)
        driver.lay_out(1, 16)
        driver.set_up(1)
        for _ in range(20):
            assert rig.echoes(0)
            assert rig.echoes(1)


def test_a_disabled_ring_waits_until_it_is_enabled_again():
    with started() as rig:
        driver = rig.driver
        driver.tell_vring(SET_VRING_ENABLE, 0, 0)
        chain = driver.submit(0, [b"later"], [5])
        driver.kick()
        driver.config(0, 1)
        assert not driver.queues[0].has_used()
        driver.tell_vring(SET_VRING_ENABLE, 0, 1)
        assert driver.wait_used(0, chain).written == 5


def test_reset_owner_disables_all_rings():
    with started() as rig:
        rig.driver.tell(RESET_OWNER)
        chain = rig.driver.submit(0, [b"later"], [5])
        rig.driver.kick()
        rig.driver.config(0, 1)
        assert not rig.driver.queues[0].has_used()
        rig.driver.tell_vring(SET_VRING_ENABLE, 0, 1)
        rig.driver.wait_used(0, chain)


def test_stopping_a_ring_says_where_it_stands_and_it_goes_on_from_there():
    with started() as rig:
        for _ in range(5):
            assert rig.echoes()
        base = rig.driver.stop()
        assert base == 5
        chain = rig.driver.submit(0, [b"while stopped"], [13])
        rig.driver.kick()
        rig.driver.config(0, 1)
        assert not rig.driver.queues[0].has_used(), "a stopped ring was worked on"
        rig.driver.set_up(0, base)
        assert rig.driver.wait_used(0, chain).written == 13
        assert rig.driver.stop() == 6


def test_stopping_waits_for_the_request_at_hand():
    release, at_hand = threading.Event(), threading.Event()

    class Slow(Echo):
        def serve(self, queue):
            for chain in queue:
                at_hand.set()
                assert release.wait(60)
                queue.add_used(chain, 0)

    with started(Slow()) as rig:
        chain = rig.driver.submit(0, [b"x"], [1])
        assert at_hand.wait(60)
        threading.Timer(0.05, release.set).start()
        assert rig.driver.stop() == 1
        assert rig.driver.queues[0].pop_used().head == chain.head


@pytest.mark.parametrize("size", [16, 7])
def test_packed_rings_work_and_go_on_where_they_were_stopped(size):
    with started(Echo(packed=True), sizes=(size,)) as rig:
        for _ in range(20):
            assert rig.echoes()
        base = rig.driver.stop()
        chain = rig.driver.submit(0, [b"while stopped"], [13])
        rig.driver.set_up(0, base)
        assert rig.driver.wait_used(0, chain).written == 13
        for _ in range(20):
            assert rig.echoes()


def test_a_packed_ring_that_starts_where_spdk_and_dpdk_say():
    """The available half of the base alone, as the specification of vhost-user once had it."""
    with connected(Echo(packed=True)) as rig:
        driver = rig.driver
        driver.negotiate()
        driver.lend()
        driver.lay_out(0, 16)
        driver.set_up(0, 0x8000)
        for _ in range(40):
            assert rig.echoes()


def test_requests_of_a_back_end_that_died_are_taken_again():
    """The front end says that three were taken, and the used ring that one was returned."""
    with connected(Echo()) as rig:
        driver = rig.driver
        driver.negotiate()
        driver.lend()
        queue = driver.lay_out(0, 16)
        chains = [queue.add([bytes([n])], [1]) for n in range(4)]
        queue.publish()
        queue._used[1] = 1
        queue._last_used = 1
        driver.set_up(0, base=3)
        assert [driver.wait_used(0).head for _ in range(3)] == [c.head for c in chains[1:]]


def test_reset_device_forgets_rings_and_features():
    with started() as rig:
        assert rig.echoes()
        driver = rig.driver
        driver.tell(RESET_DEVICE)
        driver.queues.clear()
        driver.tell_u64(SET_FEATURES, VERSION_1 | PROTOCOL)
        driver.features = VERSION_1 | PROTOCOL
        driver.lay_out(0, 8)
        driver.set_up(0)
        assert rig.echoes()


def test_the_call_can_be_replaced_while_the_ring_runs():
    with started() as rig:
        driver = rig.driver
        with EventFd() as other:
            driver.tell_u64(SET_VRING_CALL, 0, [other.fd])
            driver.calls[0].drain()
            chain = driver.submit(0, [b"x"], [1])
            driver.wait(lambda: other.drain() > 0, "a call of the new eventfd")
            assert driver.wait_used(0, chain).written == 1
            assert driver.calls[0].drain() == 0
        driver.tell_u64(SET_VRING_CALL, 0x100)
        assert rig.echoes(), "a ring without a call is polled by its driver"


# --- memory ---------------------------------------------------------------------------------------


def test_buffers_may_lie_in_any_region():
    with started() as rig:
        high = Buffer(HOLE_END + 0x100, 5)
        assert rig.driver.request(0, [b"hello"], [high]) == (5, b"hello")


def test_a_buffer_may_begin_in_one_region_and_end_in_the_next():
    """Modules of memory that were plugged in one after the other, each in a file of its own. The
    guest joins pages that are neighbours, whatever they are made of."""
    first, second = GuestMemory([(0, MIB)]), GuestMemory([(0, MIB)])
    with started() as rig:
        driver = rig.driver
        where = [16 * MIB, 17 * MIB]
        rows = [slot(at, MIB, USER_BASE + at, 0) for at in where]
        for memory, row in zip((first, second), rows, strict=True):
            driver.tell(ADD_MEM_REG, row, [memory.fd])
        first.write(MIB - 100, b"a" * 100)
        second.write(0, b"b" * 100)
        across = Buffer(17 * MIB - 100, 200)
        assert driver.request(0, [across], [200]) == (200, b"a" * 100 + b"b" * 100)
        chain = driver.submit(0, [b"c" * 200], [across])
        assert driver.wait_used(0, chain).written == 200
        assert first.read(MIB - 100, 100) == second.read(0, 100) == b"c" * 100
        # One of them goes: what is left is RAM still, and the rest is not.
        driver.tell(REM_MEM_REG, rows[0])
        assert driver.request(0, [Buffer(17 * MIB, 3)], [3]) == (3, b"ccc")
        driver.submit(0, [across], [200])
        driver.wait_error(0)
    first.close()
    second.close()


def test_memory_can_be_added_and_removed_while_the_ring_runs():
    other = GuestMemory([(0, MIB)])
    where = 16 * MIB
    with started() as rig:
        driver = rig.driver
        assert rig.echoes()
        region = slot(where, MIB, 0x6000_0000_0000, 0)
        driver.tell(ADD_MEM_REG, region, [other.fd])
        other.write(0, b"lent later")
        _, data = driver.request(0, [Buffer(where, 10)], [10])
        assert data == b"lent later"
        driver.tell(REM_MEM_REG, region)
        assert rig.echoes()
        # Nobody can read it any more; the device asks for a reset, as for any range without RAM.
        driver.submit(0, [Buffer(where, 10)], [10])
        driver.wait_error()
    other.close()


def test_memory_is_added_under_load():
    other = GuestMemory([(0, MIB)])
    with started() as rig:
        driver = rig.driver
        stop = threading.Event()

        def load():
            while not stop.is_set():
                assert rig.echoes()

        thread = threading.Thread(target=load)
        thread.start()
        for n in range(20):
            region = slot(16 * MIB + n * MIB, MIB, 0x6000_0000_0000 + n * MIB, 0)
            driver.tell(ADD_MEM_REG, region, [other.fd])
        stop.set()
        thread.join(60)
        assert not thread.is_alive()
        assert rig.echoes()
    other.close()


def test_the_whole_table_can_be_replaced_while_the_ring_runs():
    with started() as rig:
        assert rig.echoes()
        rig.driver.lend()
        assert rig.echoes()


def test_a_region_may_lie_anywhere_in_its_file():
    memory = GuestMemory([(MIB, MIB), (8 * MIB, MIB)])
    with connected(Echo()) as rig:
        rig.driver.memory.close()
        rig.driver.memory = rig.memory = memory
        rig.driver.arena = type(rig.driver.arena)(memory, start=8 * MIB, end=9 * MIB)
        rig.driver.start()
        assert rig.echoes()


# --- configuration --------------------------------------------------------------------------------


def test_the_configuration_space_is_read_and_written():
    with started() as rig:
        driver = rig.driver
        assert driver.config(0, 13) == b"configuration"
        assert driver.config(12, 4) == b"n\0\0\0"
        driver.tell(SET_CONFIG, struct.pack("=III", 3, 2, 0) + b"XY")
        assert driver.config(0, 6) == b"conXYg"


def test_a_message_may_have_room_for_more_configuration_than_it_is_about():
    """SPDK sends 256 bytes whatever it asks for, and expects as many."""
    with started() as rig:
        driver = rig.driver
        asked = struct.pack("=III", 0, 4, 0) + bytes(256)
        assert driver.ask(GET_CONFIG, asked) == struct.pack("=III", 0, 4, 0) + b"conf" + bytes(252)
        driver.tell(SET_CONFIG, struct.pack("=III", 3, 2, 0) + b"XYZ".ljust(256, b"?"))
        assert driver.config(0, 6) == b"conXYg"


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 0), (0, 257), (250, 8), (0xFFFF_FFFF, 1), (256, 1)]
)
def test_a_part_that_is_not_configuration_space_is_answered_with_nothing(offset, length):
    with started() as rig:
        payload = struct.pack("=III", offset, length, 0) + bytes(min(length, 300))
        assert rig.driver.ask(24, payload) == b""
        with pytest.raises(Refused):
            rig.driver.tell(SET_CONFIG, payload)
        assert rig.echoes()


def test_a_ring_that_never_came_up_can_be_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device failed before it had queues; the front end asks where the ring stands."""

    def fail(*_: object) -> NoReturn:
        raise HostError(errno.ENOMEM, "a ring")

    monkeypatch.setattr(Lifecycle, "_build_queues", fail)
    with started() as rig:
        rig.driver.stop()
    assert rig.error is None
