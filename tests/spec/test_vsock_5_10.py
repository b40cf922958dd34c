"""virtio 1.3, 5.10 Socket Device: one test for each thing the device must or should do."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from vsock_rig import CID, GUEST_PORT, HOST_PORT, Rig, guest_packet, read_exactly, running

from pyvmm.host import unix_sockets
from pyvmm.testing.mmio_driver import DEVICE_ID, F_VERSION_1, QUEUE_SEL, QUEUE_SIZE_MAX
from pyvmm.testing.vsock_driver import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    EVENT,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    RX,
    SEQPACKET,
    SHUTDOWN,
    SHUTDOWN_RECEIVE,
    SHUTDOWN_SEND,
    TX,
    Packet,
)
from pyvmm.virtio.vsock.device import VsockDevice

F_STREAM, F_SEQPACKET, F_NO_IMPLIED_STREAM = 1 << 0, 1 << 1, 1 << 2
RESERVED_CIDS = (0, 1, 2, 0xFFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with running(tmp_path) as made:
        yield made


def test_5_10_1_device_id(rig: Rig) -> None:
    assert rig.driver.read(DEVICE_ID) == 19


def test_5_10_2_three_queues(rig: Rig) -> None:
    sizes = []
    for index in range(4):
        rig.driver.write(QUEUE_SEL, index)
        sizes.append(rig.driver.read(QUEUE_SIZE_MAX) > 0)
    assert sizes == [True, True, True, False]


def test_5_10_3_2_no_implied_stream_is_offered(rig: Rig) -> None:
    offered = rig.driver.offered_features()
    assert offered & F_NO_IMPLIED_STREAM and offered & F_STREAM
    assert not offered & F_SEQPACKET


@pytest.mark.parametrize("features", [0, F_STREAM, F_STREAM | F_NO_IMPLIED_STREAM])
def test_5_10_3_2_streams_without_any_feature_bit(tmp_path: Path, features: int) -> None:
    with running(tmp_path, features=F_VERSION_1 | features) as rig, rig.dial() as host:
        host.sendall(b"x")
        assert rig.guest.receive().data == b"x"


def test_5_10_3_2_no_streams_if_neither_agreed_nor_implied(tmp_path: Path) -> None:
    with running(tmp_path, features=F_VERSION_1 | F_NO_IMPLIED_STREAM) as rig, rig.listen():
        rig.guest.send(guest_packet(REQUEST))
        assert rig.guest.receive().op == RST


def test_5_10_4_guest_cid_with_its_upper_half_zero(rig: Rig) -> None:
    assert struct.unpack("<Q", rig.driver.config(0, 8)) == (CID,)


@pytest.mark.parametrize("cid", RESERVED_CIDS)
def test_5_10_6_4_no_reserved_cid_is_the_guests(cid: int) -> None:
    ours, other = unix_sockets.pair()
    with pytest.raises(ValueError, match="reserved"):
        VsockDevice(cid, ours, "unused")
    ours.close()
    other.close()


def test_5_10_6_only_len_bytes_of_a_longer_buffer_are_data(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(RW, data=b"1234 and more", len=4))
        rig.guest.send(guest_packet(RW, data=b"5"))
        assert read_exactly(host, 5) == b"12345"


def test_5_10_6_1_transmitting_goes_on_while_the_receive_queue_is_full(tmp_path: Path) -> None:
    with running(tmp_path, receive_buffers=1) as rig, rig.dial() as host:
        host.sendall(bytes(3 * 4096))
        first = rig.guest.receive_and_keep()  # and from here on there is no buffer to receive into
        assert first.op == RW
        for number in range(50):
            rig.guest.send(guest_packet(RW, data=b"%02d" % number))
            assert read_exactly(host, 2) == b"%02d" % number
        rig.guest.offer(2)
        assert len(rig.guest.receive().data) == 4096


def test_5_10_6_2_a_flow_is_known_by_both_addresses(rig: Rig) -> None:
    with rig.listen() as listener:
        hosts = []
        for port in (1, 2):
            rig.guest.send(Packet(REQUEST, port, HOST_PORT))
            assert rig.guest.receive().dst_port == port
            hosts.append(listener.accept()[0])
        rig.guest.send(Packet(RW, 2, HOST_PORT, data=b"two"))
        rig.guest.send(Packet(RW, 1, HOST_PORT, data=b"one"))
        assert [read_exactly(host, 3) for host in hosts] == [b"one", b"two"]
        for host in hosts:
            host.close()


def test_5_10_6_3_2_data_only_as_the_guest_has_room(rig: Rig) -> None:
    with rig.dial(buf_alloc=100) as host:
        host.sendall(bytes(1000))
        received = freed = 0
        while received < 1000:
            packet = rig.guest.receive()
            received += len(packet.data)
            assert received - freed <= 100
            if packet.op == CREDIT_REQUEST:  # there was no more room
                assert received - freed == 100
                freed += min(37, received - freed)
                rig.guest.send(guest_packet(CREDIT_UPDATE, buf_alloc=100, fwd_cnt=freed))


def test_5_10_6_3_2_every_packet_of_a_stream_has_credit_information(rig: Rig) -> None:
    with rig.dial() as host:
        rig.guest.send(guest_packet(RW, data=b"12345", buf_alloc=1))
        read_exactly(host, 5)
        host.sendall(b"xy")
        assert seen(rig, RW) == (1 << 18, 5)
        assert seen(rig, CREDIT_REQUEST) == (1 << 18, 5)
        rig.guest.send(guest_packet(CREDIT_REQUEST, fwd_cnt=1, buf_alloc=1))
        assert seen(rig, RW) == (1 << 18, 5)
    assert seen(rig, SHUTDOWN) == (1 << 18, 5)
    rig.guest.send(guest_packet(SHUTDOWN, flags=3))
    assert seen(rig, RST) == (1 << 18, 5)


def seen(rig: Rig, op: int) -> tuple[int, int]:
    """buf_alloc and fwd_cnt of the device's next packet with `op`."""
    while (packet := rig.guest.receive()).op != op:
        assert packet.buf_alloc == 1 << 18
    return packet.buf_alloc, packet.fwd_cnt


def test_5_10_6_3_a_credit_request_gets_an_update(rig: Rig) -> None:
    with rig.dial():
        rig.guest.send(guest_packet(CREDIT_REQUEST))
        assert rig.guest.receive().op == CREDIT_UPDATE


@pytest.mark.parametrize("type", [0, SEQPACKET, 3, 0xFFFF])
def test_5_10_6_4_an_unknown_type_is_reset(rig: Rig, type: int) -> None:
    rig.guest.send(guest_packet(REQUEST, type=type))
    answer = rig.guest.receive()
    assert (answer.op, answer.src_port, answer.dst_port) == (RST, HOST_PORT, GUEST_PORT)


def test_5_10_6_5_a_request_is_answered_by_response_or_rst(rig: Rig) -> None:
    rig.guest.send(guest_packet(REQUEST))
    assert rig.guest.receive().op == RST
    with rig.listen():
        rig.guest.send(guest_packet(REQUEST))
        assert rig.guest.receive().op == RESPONSE


def test_5_10_6_5_shutdown_of_both_directions_is_answered_by_rst(rig: Rig) -> None:
    with rig.dial():
        rig.guest.send(guest_packet(SHUTDOWN, flags=SHUTDOWN_RECEIVE | SHUTDOWN_SEND))
        assert rig.guest.receive().op == RST


def test_5_10_6_5_hints_are_permanent(rig: Rig) -> None:
    with rig.dial():
        for flags in (SHUTDOWN_SEND, 0, SHUTDOWN_RECEIVE):
            rig.guest.send(guest_packet(SHUTDOWN, flags=flags))
        seen(rig, RST)


def test_5_10_6_5_without_an_answer_to_shutdown_a_rst_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.virtio.vsock.switch.ANSWER_SECONDS", 0.05)
    with running(tmp_path) as rig:
        rig.dial().close()
        assert [rig.guest.receive().op for _ in range(2)] == [SHUTDOWN, RST]


def test_5_10_6_7_a_transport_reset_is_told_on_the_event_queue(rig: Rig) -> None:
    with rig.dial():
        event = rig.driver.submit(EVENT, [], [4])
        rig.device.interrupt_streams()
        assert rig.driver.wait_used(EVENT, event).written == 4
        assert rig.driver.queues[EVENT].contents(event) == struct.pack("<L", 0)
        assert not rig.driver.queues[RX].has_used() and not rig.driver.queues[TX].has_used()
