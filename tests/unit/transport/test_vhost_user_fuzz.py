"""Messages of a vhost-user front end in any order and with anything in them: each is carried out or
refused, and nothing of it is left when the front end has gone."""

from __future__ import annotations

import contextlib
import gc
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vhost_user_rig import MIB, Echo, started

from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.testing import vhost_user_driver as front_end
from pyvmm.testing.vhost_user_driver import USER_BASE
from pyvmm.transport.vhost_user.back_end import BackEnd
from pyvmm.vhost_user import protocol
from pyvmm.vhost_user.channel import Message
from pyvmm.vhost_user.protocol import FrontEndError

U32, U64 = (1 << 32) - 1, (1 << 64) - 1
index = st.integers(0, 2)
small = st.integers(0, 4) | st.sampled_from([16, 0x8000, 0xFFFF, 0x8000_8000, U32])
address = st.builds(
    lambda base, page, by: (base + page * 4096 + by) & U64,
    st.sampled_from([0, USER_BASE, USER_BASE, USER_BASE, U64]),
    st.integers(0, 17),
    st.sampled_from([0, 0, 0, 2, 4, 8, 1]),
)
region = st.tuples(
    st.sampled_from([0, 0, 4096, 2 * MIB, U64 - 4095]),
    st.sampled_from([MIB, MIB, 4096, 0, 100, 1 << 40, U64]),
    st.sampled_from([USER_BASE, USER_BASE, 0, U64]),
    st.sampled_from([0, 0, 4096, 1, U64]),
)
numbers = {
    "U64": st.tuples(
        st.sampled_from([0, 1, 2, 0x100, 0x101, 1 << 30, 1 << 32, 3 << 32 | 1 << 30, 0x9209, U64])
        | st.integers(0, U64)
    ),
    "VRING_STATE": st.tuples(index, small),
    "VRING_ADDR": st.tuples(index, st.sampled_from([0, 0, 0, 1]), *[address] * 3, st.just(0)),
    "SINGLE_REGION": region.map(lambda row: (0, *row)),
}
LAYOUTS = {id(getattr(protocol, name)): (getattr(protocol, name), some)
           for name, some in numbers.items()}  # fmt: skip
kinds_of_fd = st.sampled_from(["eventfd", "eventfd", "memory", "memory", "pipe", "file"])


@st.composite
def messages(draw):
    """A request's number, flags, payload, and what kinds of file descriptors come along."""
    request = draw(st.sampled_from(protocol.REQUESTS))
    if id(request.layout) in LAYOUTS:
        layout, fields = LAYOUTS[id(request.layout)]
        payload = layout.pack(*draw(fields))
    elif request.name == "SET_MEM_TABLE":
        rows = draw(st.lists(region, max_size=2))
        payload = struct.pack("=II", len(rows), 0) + b"".join(
            struct.pack("=4Q", *row) for row in rows
        )
    elif request.name.endswith("_CONFIG"):
        payload = struct.pack("=III", draw(small), draw(small), draw(st.integers(0, 2)))
        payload += bytes(draw(st.integers(0, 20)))
    elif request.name.endswith("_FD"):
        payload = struct.pack("=QQHH", draw(st.sampled_from([0, 4096, MIB, U64])),
                              draw(st.sampled_from([0, 4096, 5, U64])), draw(index),
                              draw(st.sampled_from([16, 0, 64, 3, 0xFFFF])))  # fmt: skip
    else:
        payload = b""
    if draw(st.integers(0, 9)) == 0:
        payload = payload[: draw(st.integers(0, len(payload)))] + draw(st.binary(max_size=9))
    usual = {"SET_MEM_TABLE": len(payload) // 32, "ADD_MEM_REG": 1, "SET_INFLIGHT_FD": 1}
    count = usual.get(request.name, int("VRING" in request.name and request.layout is protocol.U64))
    kinds = ["memory" if request.name in usual else "eventfd"] * count
    if draw(st.integers(0, 9)) == 0:
        kinds = draw(st.lists(kinds_of_fd, max_size=3))
    flags = draw(st.sampled_from([1, 9, 9]))
    return request.number, flags, payload, kinds


@pytest.fixture(scope="module")
def lent():
    """Files to be handed over, by kind."""
    memory = GuestMemory([(0, MIB)])
    eventfd = EventFd()
    pipe = os.pipe()
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    yield {
        "memory": memory.fd,
        "eventfd": eventfd.fd,
        "pipe": pipe[0],
        "file": null,
        "object": memory,
    }
    for fd in (*pipe, null):
        os.close(fd)
    eventfd.close()
    memory.close()


def beginning(packed, running):
    """Messages that negotiate, and maybe bring ring 0 up."""
    features = 1 << 32 | 1 << 30 | (1 << 34 if packed else 0)
    yield front_end.SET_PROTOCOL_FEATURES, 9, struct.pack("=Q", 0x9209), []
    yield front_end.SET_FEATURES, 9, struct.pack("=Q", features), []
    if running:
        table = struct.pack("=II4Q", 1, 0, 0, MIB, USER_BASE, 0)
        places = [USER_BASE + page * 4096 for page in (1, 2, 3)]
        base = 0x8000_8000 if packed else 0
        yield front_end.SET_MEM_TABLE, 9, table, ["memory"]
        yield front_end.SET_VRING_NUM, 9, struct.pack("=II", 0, 16), []
        yield front_end.SET_VRING_BASE, 9, struct.pack("=II", 0, base), []
        yield front_end.SET_VRING_ADDR, 9, struct.pack("=IIQQQQ", 0, 0, *places, 0), []
        yield front_end.SET_VRING_KICK, 9, struct.pack("=Q", 0), ["eventfd"]
        yield front_end.SET_VRING_ENABLE, 9, struct.pack("=II", 0, 1), []


@pytest.mark.parametrize("packed", [False, True])
def test_any_messages(lent, packed):
    @settings(max_examples=200)
    @given(st.booleans(), st.integers(0, 3), st.lists(messages(), min_size=3, max_size=30))
    def check(running, idx, sent):
        device = Echo((16, 16), packed=packed)
        before = which_files()
        lent["object"].write(3 * 4096 + 2, bytes([idx]))  # of a split ring: so much is available
        back_end = BackEnd(device, log=lambda line: None)
        try:
            for number, flags, payload, kinds in [*beginning(packed, running), *sent]:
                fds = [os.dup(lent[kind]) for kind in kinds]
                with Message(number, flags, payload, fds) as message:
                    try:
                        back_end.handle(message)
                    except FrontEndError as error:
                        assert "\n" not in str(error)
        finally:
            back_end.close()
            lent["object"].write(0, bytes(0x20000))
        del back_end, message
        # Not how many: what an earlier test forgot may be collected, and so closed, at any moment.
        assert which_files() <= before

    check()


def which_files():
    """Numbers and inodes of what is open; not of the directory that is being read for it."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.add((fd, os.readlink(f"/proc/self/fd/{fd}")))
    return {one for one in found if not one[1].startswith("/proc/")}


def mappings():
    with open("/proc/self/maps") as file:
        return sum("memfd:" in line for line in file)


def test_nothing_grows_with_what_a_front_end_repeats():
    """Tables, rings, eventfds and notes that replace one another, while a ring runs."""
    with started(sizes=(16,)) as rig:
        driver = rig.driver
        at = MIB  # next to another region
        row = struct.pack("=5Q", 0, at, MIB, USER_BASE + 16 * MIB, 0)

        def all_of_it():
            driver.lend()
            driver.tell(front_end.ADD_MEM_REG, row, [driver.memory.fd])
            assert rig.echoes()
            driver.tell(front_end.REM_MEM_REG, row)
            driver.tell_u64(front_end.SET_VRING_CALL, 0, [driver.calls[0].fd])
            base = driver.stop()
            os.close(driver.get_inflight(1, 16)[1])
            driver.set_up(0, base)
            assert rig.echoes()

        for _ in range(3):
            all_of_it()
        gc.collect()  # what earlier tests forgot must not be closed in between
        before = len(which_files()), mappings()
        for _ in range(30):
            all_of_it()
        assert (len(which_files()), mappings()) == before
