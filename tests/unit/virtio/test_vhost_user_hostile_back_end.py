"""Back ends that lie, stall, send what nobody asked for, or die at each stage: one clear line each,
no wait without a bound, and a device that its driver can reset."""

from __future__ import annotations

import os
import struct
import time
from contextlib import suppress

import pytest
from front_end_rig import (
    ALL,
    CHECK_DEVICE_STATE,
    GET_CONFIG,
    GET_FEATURES,
    GET_INFLIGHT_FD,
    GET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM,
    GET_STATUS,
    GET_VRING_BASE,
    P_BACKEND_REQ,
    P_MQ,
    P_STATE,
    PATIENCE,
    REPLY,
    REPLYING,
    SET_BACKEND_REQ_FD,
    SET_DEVICE_STATE_FD,
    SET_FEATURES,
    SET_INFLIGHT_FD,
    SET_MEM_TABLE,
    SET_OWNER,
    SET_STATUS,
    SET_VRING_ADDR,
    SET_VRING_BASE,
    SET_VRING_CALL,
    SET_VRING_ENABLE,
    SET_VRING_ERR,
    SET_VRING_KICK,
    SET_VRING_NUM,
    VERSION,
    fake,
    front,
    restored,
    saved_of,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.vhost_user.protocol import BackEndError
from pyvmm.virtio.vhost_user import link
from pyvmm.virtio.vhost_user.device import VhostUserDevice
from pyvmm.virtio.vhost_user.served import Served

ECHO = Served(42, 2, features=0xFF, config_size=16)
EVERYTHING = ALL | P_BACKEND_REQ

# --- what it may do in place of an answer ---------------------------------------------------------


def silence(back_end, number, payload, fds):
    return False


def death(back_end, number, payload, fds):
    back_end.die()
    return False


def other_number(back_end, number, payload, fds):
    back_end.answer(number + 1, bytes(8))
    return False


def short(back_end, number, payload, fds):
    back_end.answer(number, b"\1\0\0")
    return False


def long(back_end, number, payload, fds):
    back_end.answer(number, bytes(1000))
    return False


def huge(back_end, number, payload, fds):
    back_end.connection.sendall(struct.pack("=III", number, VERSION | REPLY, 0xFFFF_FFF0))
    return False


def half(back_end, number, payload, fds):
    back_end.connection.sendall(struct.pack("=III", number, VERSION | REPLY, 8) + b"1234")
    return False


def request_of_its_own(back_end, number, payload, fds):
    back_end.answer(number, bytes(8), flags=VERSION)
    return False


def other_version(back_end, number, payload, fds):
    back_end.answer(number, bytes(8), flags=2 | REPLY)
    return False


def many_descriptors(back_end, number, payload, fds):
    back_end.answer(number, bytes(8), [0] * 9)
    return False


def a_descriptor_too_many(back_end, number, payload, fds):
    back_end.answer(number, bytes(8), [0, 0])
    return False


def twice(back_end, number, payload, fds):
    back_end.usual(number, 8, payload, fds)
    back_end.answer(number, bytes(8))
    return False


def refusal(back_end, number, payload, fds):
    back_end.answer(number, struct.pack("=Q", 1))
    return False


WRONG = (silence, death, other_number, short, long, huge, half, request_of_its_own)
WRONG += (other_version, many_descriptors)
AT_FIRST = (GET_FEATURES, GET_PROTOCOL_FEATURES, SET_OWNER, GET_QUEUE_NUM, SET_BACKEND_REQ_FD)
AT_FIRST += (GET_CONFIG,)
LATER = (SET_FEATURES, SET_STATUS, GET_STATUS, SET_MEM_TABLE, GET_INFLIGHT_FD, SET_INFLIGHT_FD)
LATER += (SET_VRING_NUM, SET_VRING_BASE, SET_VRING_ADDR, SET_VRING_ERR, SET_VRING_CALL)
LATER += (SET_VRING_KICK, SET_VRING_ENABLE)


def cases(numbers):
    return [
        pytest.param(number, action, id=f"{number}-{action.__name__}")
        for number in numbers
        for action in (*WRONG, *(() if number in REPLYING else (refusal,)))
    ]


def patience(action):
    """The time to wait for an answer: for one that does not come, not long."""
    return PATIENCE if action in (silence, half) else 60


def one_line(error):
    text = str(error)
    return "\n" not in text and len(text) < 200


@pytest.mark.parametrize(("number", "action"), cases(AT_FIRST))
def test_before_there_is_a_device(tmp_path, number, action):
    path = tmp_path / "s"
    began = time.monotonic()
    with fake(path, protocol=EVERYTHING, actions={number: action}):
        with pytest.raises((BackEndError, HostError)) as caught:  # noqa: SIM117
            with front(path, ECHO, start=False, patience=patience(action)):
                pass
        assert one_line(caught.value)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("number", "action"), cases(LATER))
def test_when_the_driver_begins(tmp_path, number, action):
    """The device fails, as it has no other back end, and serves again once that is better."""
    path = tmp_path / "s"
    with (
        fake(path, protocol=EVERYTHING, actions={number: action}) as back_end,
        front(path, ECHO, start=False, reconnect=0) as rig,
    ):
        rig.wait_no_longer_than(patience(action))
        rig.driver.mmio.start()
        rig.until(lambda: rig.driver.needs_reset)
        assert rig.lines and all(map(one_line, rig.lines))
        back_end.actions.clear()
        rig.device._patience = 60
        rig.driver.restart()
        rig.until(lambda: back_end.status & 4)
        assert rig.device.stats()["connected"]
        assert not rig.driver.needs_reset


@pytest.mark.parametrize(
    "action", [*WRONG, a_descriptor_too_many], ids=lambda action: action.__name__
)
def test_when_a_ring_is_to_stop(tmp_path, action):
    """The reset ends, and no ring is with the back end then."""
    path = tmp_path / "s"
    with (
        fake(path, protocol=EVERYTHING) as back_end,
        front(path, ECHO) as rig,
    ):
        rig.until(lambda: back_end.status & 4)
        rig.wait_no_longer_than(patience(action))
        back_end.actions[GET_VRING_BASE] = action
        began = time.monotonic()
        rig.driver.mmio.reset()
        assert time.monotonic() - began < 30
        assert not rig.device.stats()["connected"]
        assert rig.lines and all(map(one_line, rig.lines))
        back_end.actions.clear()
        rig.device._patience = 60
        rig.driver.mmio.start()
        rig.until(lambda: back_end.status & 4)


def test_the_base_of_another_ring(tmp_path):
    path = tmp_path / "s"
    with fake(path) as back_end, front(path, ECHO) as rig:
        rig.until(lambda: back_end.status & 4)

        def other(back_end, number, payload, fds):
            back_end.answer(number, struct.pack("=II", 7, 0))
            return False

        back_end.actions[GET_VRING_BASE] = other
        rig.driver.mmio.reset()
        assert "ring 7" in rig.lines[0]


def test_a_base_that_says_more_than_the_used_ring(tmp_path):
    """It may be about to return them: it gets some time, but no more."""
    path = tmp_path / "s"
    with fake(path) as back_end, front(path, ECHO) as rig:
        rig.until(lambda: back_end.status & 4)
        rig.wait_no_longer_than(PATIENCE)
        back_end.bases[0] = 9
        queue = rig.driver.transport.negotiation.active_queues[0]
        with queue.lock:
            assert queue.state().next_avail == 0


def test_what_nobody_asked_for(tmp_path):
    path = tmp_path / "s"
    with (
        fake(path, actions={SET_MEM_TABLE: twice}) as back_end,
        front(path, ECHO, start=False, patience=60, reconnect=0) as rig,
    ):
        rig.driver.mmio.start()
        rig.until(lambda: rig.driver.needs_reset)
        # It may come so late that it looks like an answer to the next request.
        assert "nobody asked for" in rig.lines[0] or "answers request 5" in rig.lines[0]
        assert SET_VRING_NUM not in back_end.numbers()


def test_a_back_end_that_does_not_read(tmp_path):
    """It gets no further than its socket's buffer."""
    path = tmp_path / "s"

    def sleep(back_end, number, payload, fds):
        time.sleep(3)
        return False

    with (
        fake(path, actions={SET_FEATURES: sleep}),
        front(path, ECHO, start=False) as rig,
    ):
        rig.wait_no_longer_than(PATIENCE)
        rig.driver.mmio.start()
        rig.until(lambda: rig.lines != [])
        assert f"has not answered SET_FEATURES in {PATIENCE} s" in rig.lines[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"features": 1 << 30}, "VIRTIO_F_VERSION_1"),
        ({"protocol": P_MQ, "queues": 1}, "has 1 queue, and 2 are wanted"),
    ],
)
def test_a_back_end_that_is_of_no_use(tmp_path, options, text):
    queues = options.pop("queues", None)

    def few(back_end, number, payload, fds):
        back_end.answer(number, struct.pack("=Q", queues))
        return False

    path = tmp_path / "s"
    actions = {GET_QUEUE_NUM: few} if queues else {}
    with fake(path, actions=actions, **options), pytest.raises(BackEndError, match=text):  # noqa: SIM117
        with front(path, ECHO):
            pass


def test_features_that_it_takes_back(tmp_path):
    """FEATURES_OK stays clear there."""
    path = tmp_path / "s"

    def not_ok(back_end, number, payload, fds):
        back_end.answer(number, struct.pack("=Q", 3))
        return False

    with fake(path, actions={GET_STATUS: not_ok}), front(path, ECHO, reconnect=0) as rig:
        rig.until(lambda: rig.driver.needs_reset)
        assert "does not work with the features" in rig.lines[0]


# --- the state of its device ----------------------------------------------------------------------


def said_no(back_end, number, payload, fds):
    back_end.answer(number, struct.pack("=Q", 0x101))
    return False


def never_ends(back_end, number, payload, fds):
    """It keeps its end of the pipe, whichever that is, and neither writes to it nor reads."""
    back_end.answer(number, struct.pack("=Q", 0x100))
    return False


def says_more_than_it_may(back_end, number, payload, fds):
    back_end.answer(number, struct.pack("=Q", 0x100))
    with suppress(BrokenPipeError):
        while True:
            os.write(fds[0], bytes(1 << 16))


OF_STATE = [
    pytest.param(number, action, id=f"{number}-{action.__name__}")
    for number, actions in (
        (SET_DEVICE_STATE_FD, (*WRONG, a_descriptor_too_many, said_no, never_ends)),
        (CHECK_DEVICE_STATE, (*WRONG, a_descriptor_too_many, said_no)),
    )
    for action in actions
]
POLITE = (said_no, never_ends, says_more_than_it_may)


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr(link, "_STATE_PATIENCES", 1)
    monkeypatch.setattr(link, "MOST_STATE", 1 << 20)


@pytest.mark.parametrize(
    ("number", "action"), [*OF_STATE, (SET_DEVICE_STATE_FD, says_more_than_it_may)]
)
def test_when_it_is_to_give_its_state(tmp_path, brief, number, action):
    """There is no snapshot. The device goes on if the back end has kept to the protocol."""
    path = tmp_path / "s"
    with (
        fake(path, protocol=EVERYTHING | P_STATE) as back_end,
        front(path, ECHO, reconnect=0) as rig,
    ):
        rig.until(lambda: back_end.status & 4)
        rig.wait_no_longer_than(PATIENCE if action is never_ends else patience(action))
        back_end.actions[number] = action
        began = time.monotonic()
        with pytest.raises(ConfigError, match="front cannot be in a snapshot: ") as caught:
            saved_of(rig.driver)
        assert "\n" not in str(caught.value) and time.monotonic() - began < 30
        assert rig.device.stats()["connected"] == (action in POLITE)
        if action in POLITE:
            back_end.actions.clear()
            saved_of(rig.driver)
            assert rig.device.take_state() == b"what it knows"


@pytest.mark.parametrize(("number", "action"), OF_STATE)
def test_when_it_is_to_take_a_state(tmp_path, brief, number, action):
    """Nothing goes on from that snapshot."""
    path = tmp_path / "s"
    with fake(path, protocol=EVERYTHING | P_STATE), front(path, ECHO) as rig:
        state = saved_of(rig.driver)
        rig.driver.transport.close()
    with fake(path, protocol=EVERYTHING | P_STATE, actions={number: action}):
        waits = PATIENCE if action is never_ends else patience(action)
        more = bytes(1 << 20)  # than a pipe holds
        device = VhostUserDevice(str(path), ECHO, name="front", patience=waits, state=more)
        began = time.monotonic()
        try:
            with (
                pytest.raises(
                    ConfigError, match=r"the saved state of front.* cannot be: "
                ) as caught,
                restored(rig.driver, device, state),
            ):
                pass
        finally:
            device.close()
        assert "\n" not in str(caught.value) and time.monotonic() - began < 30


def test_notes_that_are_nonsense(tmp_path):
    """The file of notes is the back end's: it is read once, and never mapped."""
    path = tmp_path / "s"
    from pyvmm.kinds.vhost_user.types import served

    blk = served("blk", 1, tag="", mac=b"")
    with fake(path) as back_end, front(path, blk, reconnect=0) as rig:
        rig.until(lambda: back_end.status & 4)
        rig.driver.mmio.submit(0, [bytes(16)], [512, 1])
        notes = back_end.kept[-1]
        for fd in back_end.kept:
            if os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:notes"):
                notes = fd
                os.pwrite(notes, b"\xff" * 4096, 0)
                os.ftruncate(notes, 100)
        back_end.close()
        rig.until(lambda: rig.driver.needs_reset)
        assert "notes" in rig.driver.log[0]


def test_a_back_end_with_many_rings_has_not_ten_seconds_for_each(tmp_path):
    """All that a vCPU, a pause or an end waits for is bounded together."""
    path = tmp_path / "s"

    def slowly(back_end, number, payload, fds):
        time.sleep(0.8 * PATIENCE)
        return True

    def answered(back_end):
        return back_end.numbers().count(GET_VRING_BASE)

    many = Served(42, 16, features=0xFF)
    with fake(path) as back_end, front(path, many) as rig:
        rig.until(lambda: back_end.status & 4)
        rig.wait_no_longer_than(PATIENCE)
        back_end.actions[GET_VRING_BASE] = slowly
        rig.driver.mmio.reset()
        assert answered(back_end) < 8
        assert not rig.device.stats()["connected"]


def test_positions_that_never_come_true_on_many_rings(tmp_path):
    """Three patiences for them together, not sixteen."""
    path = tmp_path / "s"
    many = Served(42, 16, features=0xFF)
    with fake(path) as back_end, front(path, many) as rig:
        rig.until(lambda: back_end.status & 4)
        rig.wait_no_longer_than(2)
        back_end.bases = dict.fromkeys(range(16), 9)
        began = time.monotonic()
        rig.driver.mmio.reset()
        assert time.monotonic() - began < 24


@pytest.mark.parametrize("which", ["many rings", "long rings", "a pipe", "a file"])
def test_notes_that_would_take_memory_or_time_to_read(tmp_path, which):
    """34 GiB by their own account, or a file that some process makes up (FUSE)."""
    path = tmp_path / "s"
    ends = os.pipe()
    (tmp_path / "file").write_bytes(bytes(4096))
    file = os.open(tmp_path / "file", os.O_RDONLY)

    def notes(back_end, number, payload, fds):
        rings, size = struct.unpack_from("=HH", payload, 16)
        rings = 0xFFFF if which == "many rings" else rings
        size = 1 << 15 if which == "long rings" else size
        fd = {"a pipe": ends[0], "a file": file}.get(which, back_end.kept[0])
        back_end.answer(number, struct.pack("=QQHH", 1 << 20, 0, rings, size) + bytes(4), [fd])
        return False

    try:
        with (
            fake(path, actions={GET_INFLIGHT_FD: notes}) as back_end,
            front(path, ECHO, reconnect=0) as rig,
        ):
            rig.until(lambda: rig.driver.needs_reset)
            assert "gives other notes" in rig.lines[0]
            assert SET_INFLIGHT_FD not in back_end.numbers()
    finally:
        for fd in (*ends, file):
            os.close(fd)


# --- anything at all ------------------------------------------------------------------------------

answers = st.one_of(
    st.sampled_from([*WRONG, twice, refusal, a_descriptor_too_many]),
    st.tuples(st.integers(0, 50), st.integers(0, 15), st.binary(max_size=70), st.integers(0, 3)),
)
stages = st.sampled_from([*AT_FIRST, *LATER, GET_VRING_BASE])


@given(
    wrong=st.dictionaries(
        st.sampled_from([*AT_FIRST, *LATER, GET_VRING_BASE]), answers, max_size=2
    ),
    features=st.integers(0, (1 << 64) - 1) | st.just((1 << 32) | (1 << 30)),
    protocol=st.integers(0, (1 << 20) - 1) | st.just(EVERYTHING),
    own=st.binary(max_size=40),
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_anything(tmp_path_factory, wrong, features, protocol, own):
    """Our own errors are raised whatever it says, and every step ends."""
    path = tmp_path_factory.mktemp("fuzz") / "s"

    def action(answer):
        if callable(answer):
            return answer

        def send(back_end, number, payload, fds):
            given, flags, data, count = answer
            back_end.answer(given, data, [0] * count, flags)
            return False

        return send

    actions = {number: action(answer) for number, answer in wrong.items()}
    with fake(path, features=features, protocol=protocol, actions=actions) as back_end:
        try:
            with front(path, ECHO, start=False, patience=0.05, reconnect=0) as rig:
                for _ in range(2):
                    rig.driver.mmio.start()
                    if back_end.requests is not None:
                        with suppress(OSError):  # we have hung up
                            back_end.requests.sendall(own)
                    rig.driver.mmio.submit(0, [b"question"], [8])
                    rig.driver.config(0, 16)
                    rig.driver.mmio.reset()
                    assert rig.driver.mmio.status == 0
        except PyvmmError as error:
            assert one_line(error)
