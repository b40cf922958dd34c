"""The vhost-user back end with a front end that does not behave.

Always: one line says what was wrong, the front end is told or left, nothing hangs, and no file
descriptor stays open.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from types import SimpleNamespace

import pytest
from descriptors import open_descriptors
from mmio_harness import wait_for
from robustness_rows import illegal_params, legal_params
from vhost_user_rig import HOLE_END, MIB, Echo, connected, started

from pyvmm.host.syscalls import EventFd
from pyvmm.testing.vhost_user_driver import (
    ADD_MEM_REG,
    GET_CONFIG,
    GET_FEATURES,
    GET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM,
    GET_VRING_BASE,
    NEED_REPLY,
    P_REPLY_ACK,
    REM_MEM_REG,
    SET_BACKEND_REQ_FD,
    SET_CONFIG,
    SET_FEATURES,
    SET_MEM_TABLE,
    SET_PROTOCOL_FEATURES,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_ERR,
    SET_VRING_KICK,
    SET_VRING_NUM,
    USER_BASE,
    VERSION,
    Gone,
    Refused,
)

PROTOCOL, VERSION_1 = 1 << 30, 1 << 32


def u64(value):
    return struct.pack("=Q", value)


def table(*rows):
    return struct.pack("=II", len(rows), 0) + b"".join(struct.pack("=4Q", *row) for row in rows)


@pytest.fixture(autouse=True)
def no_fd_is_left():
    before = open_descriptors()
    yield
    assert open_descriptors() == before


# --- framing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [1, 11, 12, 15])
def test_a_message_that_ends_early_ends_the_connection(sent):
    with connected(Echo()) as rig:
        message = struct.pack("=III", SET_FEATURES, VERSION, 8) + u64(0)
        rig.driver.connection.sendall(message[:sent])
        rig.driver.connection.shutdown(socket.SHUT_WR)
        assert "ends after" in str(rig.ended())


def test_a_message_may_come_byte_by_byte():
    with connected(Echo()) as rig:
        for byte in struct.pack("=III", GET_FEATURES, VERSION, 0):
            rig.driver.connection.sendall(bytes([byte]))
        assert len(rig.driver.receive(GET_FEATURES)) == 8


@pytest.mark.parametrize("flags", [0, 2, 3, VERSION | 4, 0xFFFF_FFFF])
def test_wrong_flags_end_the_connection(flags):
    with connected(Echo()) as rig:
        rig.driver.send(GET_FEATURES, flags=flags)
        assert "with flags" in str(rig.ended())


@pytest.mark.parametrize("size", [1025, 1 << 20, 0xFFFF_FFFF])
def test_an_immense_payload_is_not_waited_for(size):
    with connected(Echo()) as rig:
        rig.driver.connection.sendall(struct.pack("=III", SET_MEM_TABLE, VERSION, size))
        assert f"payload of {size} bytes" in str(rig.ended())


@pytest.mark.parametrize("count", [9, 64, 253])
def test_too_many_file_descriptors_are_closed(count):
    with connected(Echo()) as rig:
        rig.driver.send(SET_MEM_TABLE, table(), [rig.memory.fd] * count)
        assert "file descriptors" in str(rig.ended())


@pytest.mark.parametrize("size", [0, 7, 9, 100])
def test_a_payload_of_the_wrong_size_is_refused(size):
    with started() as rig:
        with pytest.raises(Refused):
            rig.driver.tell(SET_FEATURES, bytes(size))
        assert rig.echoes()
        assert f"its payload has {size} bytes" in rig.lines[-1]


def test_who_asks_for_no_answer_is_left_instead():
    with started() as rig:
        rig.driver.send(SET_FEATURES, bytes(3))
        rig.driver.wait_gone()
        assert "SET_FEATURES refused" in str(rig.ended())


@pytest.mark.parametrize("request_number", [0, 6, 7, 19, 20, 22, 23, 26, 30, 35, 39, 40, 10**9])
def test_an_unknown_request_is_refused(request_number):
    with started() as rig:
        with pytest.raises(Refused):
            rig.driver.tell(request_number, bytes(16))
        assert rig.echoes()


def test_a_channel_for_requests_of_ours_is_refused_and_closed():
    """BACKEND_REQ was not offered, so its file descriptor is not taken."""
    with started() as rig:
        with pytest.raises(Refused), EventFd() as fd:
            rig.driver.tell(SET_BACKEND_REQ_FD, fds=[fd.fd])
        assert rig.echoes()


@pytest.mark.parametrize(
    ("request_number", "payload"),
    [(GET_FEATURES, b""), (SET_VRING_NUM, bytes(8)), (GET_VRING_BASE, bytes(8))],
)
def test_file_descriptors_that_do_not_belong_are_refused(request_number, payload):
    with started() as rig, EventFd() as fd, pytest.raises((Refused, Gone)):
        rig.driver.tell(request_number, payload, [fd.fd])


def test_a_message_without_its_feature_is_refused():
    with connected(Echo()) as rig:
        rig.driver.negotiate(protocol_features=P_REPLY_ACK)
        with pytest.raises(Refused):
            rig.driver.tell(SET_CONFIG, struct.pack("=III", 0, 1, 0) + b"x")
        rig.driver.send(GET_QUEUE_NUM)
        assert "was not negotiated" in str(rig.ended())


# --- features -------------------------------------------------------------------------------------


def test_features_that_were_not_offered_are_refused():
    with connected(Echo()) as rig:
        rig.driver.negotiate()
        with pytest.raises(Refused):
            rig.driver.tell_u64(SET_FEATURES, 1 << 26 | VERSION_1)
        assert "was not offered" in rig.lines[-1]


def test_protocol_features_that_were_not_offered_are_refused():
    with connected(Echo()) as rig:
        rig.driver.send(SET_PROTOCOL_FEATURES, u64(1 << 63))
        assert "was not offered" in str(rig.ended())


def test_the_legacy_interface_is_refused():
    with connected(Echo()) as rig, pytest.raises(Refused):
        rig.driver.start(features=PROTOCOL)


def test_features_cannot_change_under_a_running_ring():
    with started() as rig:
        with pytest.raises(Refused):
            rig.driver.tell_u64(SET_FEATURES, VERSION_1 | PROTOCOL)
        assert rig.echoes()


# --- memory ---------------------------------------------------------------------------------------

GOOD = (16 * MIB, MIB, 0x6000_0000_0000, 0)
BAD_REGIONS = {
    "empty": (16 * MIB, 0, 0x6000_0000_0000, 0),
    "askew in its file": (16 * MIB, 4096, 0x6000_0000_0000, 8),
    "overlaps in the guest": (MIB - 4096, MIB, 0x6000_0000_0000, 0),
    "the same again": (0, MIB, 0x6000_0000_0000, 0),
    "overlaps in the front end": (16 * MIB, MIB, USER_BASE + MIB - 1, 0),
    "past its file": (16 * MIB, 2 * MIB, 0x6000_0000_0000, 0),
    "starts past its file": (16 * MIB, 4096, 0x6000_0000_0000, MIB),
    "offset wraps": (16 * MIB, MIB, 0x6000_0000_0000, 2**64 - 4096),
    "wraps in the guest": (2**64 - 4096, MIB, 0x6000_0000_0000, 0),
    "wraps in the front end": (16 * MIB, MIB, 2**64 - 4096, 0),
    "immense": (16 * MIB, 2**63, 0x6000_0000_0000, 0),
}


@pytest.fixture
def other():
    """A memory file of one MiB."""
    fd = os.memfd_create("other", os.MFD_CLOEXEC)
    os.ftruncate(fd, MIB)
    yield SimpleNamespace(fd=fd)
    os.close(fd)


@pytest.mark.parametrize("row", BAD_REGIONS.values(), ids=BAD_REGIONS)
def test_a_region_that_cannot_be_is_refused(row, other):
    with started() as rig:
        with pytest.raises(Refused):
            rig.driver.tell(ADD_MEM_REG, struct.pack("=5Q", 0, *row), [other.fd])
        assert rig.echoes(), "a refusal changed something"
        rig.driver.tell(ADD_MEM_REG, struct.pack("=5Q", 0, *GOOD), [other.fd])


@pytest.mark.parametrize("row", BAD_REGIONS.values(), ids=BAD_REGIONS)
def test_a_table_with_such_a_region_is_refused_whole(row, other):
    with started() as rig:
        rows = [(0, MIB, USER_BASE, 0), row]
        with pytest.raises(Refused):
            rig.driver.tell(SET_MEM_TABLE, table(*rows), [rig.memory.fd, other.fd])
        assert rig.echoes()


@pytest.mark.parametrize("kind", ["pipe", "socket", "eventfd", "directory", "read-only"])
def test_a_region_in_something_that_is_no_memory_is_refused(kind, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    fds = {
        "pipe": lambda: list(os.pipe()),
        "socket": lambda: [socket.socket(socket.AF_UNIX).detach()],
        "eventfd": lambda: [os.eventfd(0)],
        "directory": lambda: [os.open(tmp_path, os.O_RDONLY)],
        "read-only": lambda: [os.open(path, os.O_RDONLY)],
    }[kind]()
    try:
        with started() as rig:
            with pytest.raises(Refused):
                rig.driver.tell(ADD_MEM_REG, struct.pack("=5Q", 0, *GOOD), fds[:1])
            assert rig.echoes()
    finally:
        for fd in fds:
            os.close(fd)


@pytest.mark.parametrize("count", [0, 2])
def test_a_region_has_one_file_descriptor(count, other):
    with started() as rig:
        with pytest.raises(Refused):
            rig.driver.tell(ADD_MEM_REG, struct.pack("=5Q", 0, *GOOD), [other.fd] * count)
        assert rig.echoes()


@pytest.mark.parametrize(("regions", "fds"), [(1, 0), (2, 1), (1, 2), (9, 8), (0xFFFF_FFFF, 1)])
def test_a_table_whose_counts_differ_is_refused(regions, fds):
    with started() as rig:
        payload = struct.pack("=II", regions, 0) + struct.pack("=4Q", *GOOD) * 8
        with pytest.raises(Refused):
            rig.driver.tell(SET_MEM_TABLE, payload, [rig.memory.fd] * fds)
        assert rig.echoes()


def test_there_is_an_end_to_slots(other):
    with started() as rig:
        with pytest.raises(Refused):
            for n in range(1000):
                row = (16 * MIB + n * MIB, 4096, 0x6000_0000_0000 + n * MIB, 0)
                rig.driver.tell(ADD_MEM_REG, struct.pack("=5Q", 0, *row), [other.fd])
        assert 8 <= n < 1000
        assert rig.echoes()


def test_a_region_that_is_not_there_cannot_be_removed():
    with started() as rig:
        with pytest.raises(Refused):
            rig.driver.tell(REM_MEM_REG, struct.pack("=5Q", 0, *GOOD))
        assert rig.echoes()


def test_removing_the_memory_of_a_running_ring_fails_the_device():
    with started() as rig:
        guest, size, user, offset = rig.driver.regions()[0]
        with pytest.raises(Refused):
            rig.driver.tell(REM_MEM_REG, struct.pack("=5Q", 0, guest, size, user, offset))
        rig.driver.wait_error()
        rig.driver.submit(0, [b"x"], [1])
        rig.driver.kick()
        rig.driver.stop()
        assert not rig.driver.queues[0].has_used()
        rig.driver.lend()
        rig.driver.set_up(0, base=0)
        rig.driver.wait_used(0)


def test_moving_a_running_ring_fails_the_device(other):
    """Its user addresses lie somewhere else in the guest all of a sudden."""
    with started() as rig:
        with pytest.raises(Refused):
            rig.driver.tell(SET_MEM_TABLE, table((16 * MIB, MIB, USER_BASE, 0)), [rig.memory.fd])
        rig.driver.wait_error()


# --- rings ----------------------------------------------------------------------------------------


@pytest.fixture
def ready():
    """Features and memory are agreed on, and nothing was said of a ring yet."""
    with connected(Echo()) as rig:
        rig.driver.negotiate()
        rig.driver.lend()
        rig.driver.lay_out(0, 16)
        yield rig


@pytest.mark.parametrize("request_number", [SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ENABLE])
@pytest.mark.parametrize("index", [2, 256, 0xFFFF_FFFF])
def test_row13_a_ring_that_is_not_there(ready, request_number, index):
    with pytest.raises(Refused):
        ready.driver.tell_vring(request_number, index, 1)
    ready.driver.set_up(0)
    assert ready.echoes()


@pytest.mark.parametrize("request_number", [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR])
@pytest.mark.parametrize("value", [2, 255, 0x200, 0x1_0000, 1 << 63])
def test_row13_an_eventfd_of_a_ring_that_is_not_there(ready, request_number, value):
    with pytest.raises(Refused):
        ready.driver.tell_u64(request_number, value, [ready.driver.kicks[0].fd])


@pytest.mark.parametrize("size", [0, 3, 128, 0x1_0010, 0xFFFF_FFFF])
def test_row14_a_bad_ring_size(ready, size):
    with pytest.raises(Refused):
        ready.driver.tell_vring(SET_VRING_NUM, 0, size)
    ready.driver.set_up(0)
    assert ready.echoes()


def test_row15_a_running_ring_keeps_its_size_place_and_base():
    with started() as rig:
        driver = rig.driver
        for request_number, num in ((SET_VRING_NUM, 32), (SET_VRING_BASE, 3)):
            with pytest.raises(Refused):
                driver.tell_vring(request_number, 0, num)
        moved = struct.pack("=IIQQQQ", 0, 0, *(USER_BASE + n * 4096 for n in (1, 2, 3)), 0)
        with pytest.raises(Refused):
            driver.tell(SET_VRING_ADDR, moved)
        driver.tell(SET_VRING_ADDR, driver.addresses(0))
        assert rig.echoes()


@pytest.mark.parametrize("part", [0, 1, 2], ids=["descriptors", "used", "available"])
@pytest.mark.parametrize(
    "address",
    [
        0,
        1,
        USER_BASE + 1,
        USER_BASE + MIB - 16,
        USER_BASE + MIB,
        USER_BASE + HOLE_END - 8,
        2**64 - 16,
    ],
    ids=hex,
)
def test_row16_row17_a_ring_in_the_wrong_place(ready, part, address):
    """Misaligned, outside the memory, over its end, or at the end of all addresses."""
    driver = ready.driver
    good = driver.addresses(0)
    fields = list(struct.unpack("=IIQQQQ", good))
    fields[2 + part] = address
    driver.addresses = lambda index: struct.pack("=IIQQQQ", *fields)
    with pytest.raises(Refused):
        driver.set_up(0)
    del driver.addresses
    driver.stop()
    driver.set_up(0)
    assert ready.echoes()


def test_logging_of_writes_is_refused(ready):
    fields = [0, 1, *struct.unpack("=IIQQQQ", ready.driver.addresses(0))[2:]]
    with pytest.raises(Refused):
        ready.driver.tell(SET_VRING_ADDR, struct.pack("=IIQQQQ", *fields))


@pytest.mark.parametrize("base", [0x1_0000, 0xFFFF_FFFF])
def test_a_base_that_is_no_position(ready, base):
    with pytest.raises(Refused):
        ready.driver.tell_vring(SET_VRING_BASE, 0, base)


@pytest.mark.parametrize("base", [17, 0x8000, 0xFFFF])
def test_a_base_that_the_ring_contradicts(ready, base):
    with pytest.raises(Refused):
        ready.driver.set_up(0, base)
    assert "used index" in ready.lines[-1]


@pytest.mark.parametrize("kind", ["file", "pipe", "socket", "memfd"])
@pytest.mark.parametrize("request_number", [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR])
def test_what_is_no_eventfd_is_refused(ready, kind, request_number, tmp_path):
    """A full pipe would block the device for ever, a file could never wake it."""
    path = tmp_path / "file"
    path.touch()
    fds = {
        "file": lambda: [os.open(path, os.O_RDWR)],
        "pipe": lambda: list(os.pipe())[::-1],
        "socket": lambda: [end.detach() for end in socket.socketpair()],
        "memfd": lambda: [os.memfd_create("x")],
    }[kind]()
    try:
        with pytest.raises(Refused):
            ready.driver.tell_u64(request_number, 0, fds[:1])
    finally:
        for fd in fds:
            os.close(fd)
    ready.driver.set_up(0)
    assert ready.echoes()


def test_a_call_that_is_full_and_would_block_does_not_stop_the_device(ready):
    blocking = os.eventfd(0, os.EFD_CLOEXEC)
    ready.driver.set_up(0)
    ready.driver.tell_u64(SET_VRING_CALL, 0, [blocking])
    assert ready.echoes()
    wait_for(lambda: select.select([blocking], [], [], 0)[0])
    assert os.eventfd_read(blocking) == 1
    os.eventfd_write(blocking, 2**64 - 2)
    assert ready.echoes()
    assert ready.echoes()
    assert ready.driver.stop() == 3
    os.close(blocking)


@pytest.mark.parametrize("value", [0x100, 0])
def test_a_ring_without_a_kick_is_refused(ready, value):
    """It would have to be polled for ever."""
    with pytest.raises(Refused):
        ready.driver.tell_u64(SET_VRING_KICK, value)


def test_a_kick_before_set_up_starts_nothing(ready):
    driver = ready.driver
    driver.tell_u64(SET_VRING_KICK, 0, [driver.kicks[0].fd])
    driver.tell_vring(SET_VRING_ENABLE, 0, 1)
    chain = driver.queues[0].add([b"early"], [5])
    driver.queues[0].publish()
    driver.kick()
    driver.config(0, 1)
    assert not driver.queues[0].has_used()
    assert driver.stop() == 0
    driver.set_up(0)
    assert driver.wait_used(0, chain).written == 5


def test_a_ring_before_the_memory_is_refused_and_works_once_it_is_there():
    with connected(Echo()) as rig:
        driver = rig.driver
        driver.negotiate()
        driver.lay_out(0, 16)
        with pytest.raises(Refused):
            driver.set_up(0)
        driver.lend()
        driver.stop()
        driver.set_up(0)
        assert rig.echoes()


def test_a_ring_before_the_features_is_refused():
    with connected(Echo()) as rig:
        driver = rig.driver
        driver.tell_u64(SET_PROTOCOL_FEATURES, P_REPLY_ACK)
        driver.protocol_features = P_REPLY_ACK
        driver.lend()
        driver.lay_out(0, 16)
        with pytest.raises(Refused):
            driver.set_up(0)
            driver.tell_vring(SET_VRING_ENABLE, 0, 1)
        assert "no features" in rig.lines[-1]


@pytest.mark.parametrize("value", [2, 0xFFFF_FFFF])
def test_enable_is_on_or_off(ready, value):
    with pytest.raises(Refused):
        ready.driver.tell_vring(SET_VRING_ENABLE, 0, value)


# --- the rings themselves: rows 23 to 36 of docs/robustness.md -----------------------------------


@pytest.mark.parametrize(("ring", "illegal"), illegal_params())
def test_what_no_driver_may_put_into_a_ring(ring, illegal):
    with started(Echo(packed=ring == "packed")) as rig:
        driver = rig.driver
        assert rig.echoes()
        before = rig.memory.read(HOLE_END, 0x10000)
        illegal.offer(driver.queues[0])
        driver.kick()
        if illegal.outcome == "refused":
            driver.wait_error()
            assert "needs a reset" in rig.lines[-1]
        driver.stop()
        assert rig.memory.read(HOLE_END, 0x10000) == before
        assert driver.config(0, 13) == b"configuration", "the back end lives"


@pytest.mark.parametrize(("ring", "legal"), legal_params())
def test_every_lawful_arrangement_comes_back(ring, legal):
    with started(Echo(packed=ring == "packed")) as rig:
        chain = legal.offer(rig.driver.queues[0])
        rig.driver.kick()
        assert rig.driver.wait_used(0, chain).written <= sum(legal.writable)
        assert rig.echoes()


def test_a_failed_ring_works_again_after_it_was_stopped_and_laid_out_anew():
    with started() as rig:
        driver = rig.driver
        driver.queues[0].avail_idx = 500
        driver.kick()
        driver.wait_error()
        driver.tell_vring(SET_VRING_ENABLE, 0, 0)
        driver.stop()
        driver.queues.clear()
        driver.lay_out(0, 16)
        driver.set_up(0)
        assert rig.echoes()


def test_a_failed_device_stays_off_all_rings_until_they_are_stopped():
    with started(sizes=(16, 16)) as rig:
        driver = rig.driver
        driver.queues[0].avail_idx = 500
        driver.kick()
        driver.wait_error(1)
        driver.stop(0)
        driver.submit(1, [b"x"], [1])
        driver.kick(1)
        driver.config(0, 1)
        assert not driver.queues[1].has_used()


# --- leaving --------------------------------------------------------------------------------------


def test_a_front_end_that_disappears_leaves_nothing_running():
    device = Echo()
    with started(device) as rig:
        for _ in range(10):
            rig.driver.submit(0, [b"x"], [1])
        rig.driver.connection.close()
        assert rig.ended() is None
        assert not device._workers
    with started(device) as rig:
        assert rig.echoes(), "the next one finds it as new"


def test_a_front_end_that_does_not_read_its_answers():
    with connected(Echo()) as rig:
        for _ in range(10):
            rig.driver.send(GET_PROTOCOL_FEATURES)
        rig.driver.send(GET_CONFIG, struct.pack("=III", 0, 1, 0) + b"x", flags=VERSION | NEED_REPLY)
        rig.driver.connection.close()
        rig.ended()
