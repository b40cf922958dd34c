"""Frames over a byte stream: cut in any way, more than the socket holds, an end without warning."""

from __future__ import annotations

import os
import random
import socket
import struct
import time
from collections.abc import Iterator
from threading import Thread

import pytest
from net_rig import HEADER, MAC, NetRig, frame, header, running, wait_for

from pyvmm.virtio.net.stream import LARGEST_THROUGH_PORT, NO_LENGTH, StreamBackend


class StreamCable(StreamBackend):
    """A stream whose other end is `end`."""

    def __init__(self, **options: int) -> None:
        ours, self.end = socket.socketpair()
        self.end.settimeout(30)
        self.ends = [self.end]
        super().__init__(ours.detach(), 65520, **options)

    def close(self) -> None:
        super().close()
        self.end.close()


@pytest.fixture
def rig() -> Iterator[NetRig]:
    with running(StreamCable(), ram=16 << 20) as made:  # type: ignore[arg-type]
        yield made


def on_the_wire(data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + data


def read_frame(end: socket.socket) -> bytes:
    [length] = struct.unpack(">L", read_all(end, 4))
    return read_all(end, length)


def read_all(end: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        data += end.recv(size - len(data))
    return data


def received(rig: NetRig, chain: object) -> bytes:
    data = rig.received(chain)[1]
    assert data[:HEADER] == header(num_buffers=1)
    return data[HEADER:]


def test_no_offloads_are_offered(rig: NetRig) -> None:
    assert not rig.driver.features & 0x01C0_0000_0000_7F87


def test_frames_come_however_the_stream_is_cut(rig: NetRig) -> None:
    frames = [frame(14 + n * 37, fill=n) for n in range(30)]
    wire = b"".join(map(on_the_wire, frames))
    chance = random.Random(3)
    chains = rig.offer(*[2048] * 30)
    while wire:
        count = chance.choice([1, 2, 3, 5, 100, 3000])
        rig.cable.ends[0].send(wire[:count])
        wire = wire[count:]
    for chain, data in zip(chains, frames, strict=True):
        assert received(rig, chain) == data


def test_the_largest_frames_both_ways(rig: NetRig) -> None:
    data = MAC + os.urandom(65534 - 6)
    chains = rig.offer(*[1526] * 60)
    sender = Thread(target=rig.cable.ends[0].sendall, args=(on_the_wire(data),))
    sender.start()
    got = b"".join(rig.received(chain)[1] for chain in chains[: -(-(HEADER + 65534) // 1526)])
    sender.join()
    assert got[HEADER:] == data
    rig.send(header() + data)
    assert read_frame(rig.cable.ends[0]) == data


def test_a_slow_reader_gets_everything_in_order(rig: NetRig) -> None:
    queue = rig.driver.queues[1]
    frames = [frame(30000 + n, fill=n) for n in range(60)]
    for data in frames:
        queue.add([header() + data], [])
    queue.publish()
    rig.driver.kick(1)
    time.sleep(0.05)  # by then the socket is full
    for data in frames:
        assert read_frame(rig.cable.ends[0]) == data
    wait_for(lambda: queue.used_idx == 60)


def test_the_tail_of_the_last_frame_goes_out_without_another_one(rig: NetRig) -> None:
    end = rig.cable.ends[0]
    queue = rig.driver.queues[1]
    count = 0
    while queue.used_idx == count and count < 60:
        queue.add([header(), bytes(65000)], [])
        queue.publish()
        rig.driver.kick(1)
        count += 1
        time.sleep(0.02)
    for _ in range(count):
        assert read_frame(end) == bytes(65000)
    rig.send(header() + frame())
    assert read_frame(end) == frame()


@pytest.mark.parametrize("length", [65536, 65549, 65589])
def test_s1_a_frame_larger_than_the_mtu_is_dropped_and_the_next_one_comes(
    rig: NetRig, length: int
) -> None:
    # What a UDP datagram of 65,494 bytes and more becomes: passt adds up to 42 bytes of headers.
    [chain] = rig.offer(2048)
    rig.cable.ends[0].sendall(on_the_wire(frame(length)) + on_the_wire(frame()))
    assert received(rig, chain) == frame()
    assert rig.device.received[0].dropped == {"larger than the MTU": 1}
    assert rig.device.link_up


@pytest.mark.parametrize("length", [65590, 300_000, NO_LENGTH])
def test_s1_a_frame_longer_than_any_is_skipped_and_the_next_one_comes(
    rig: NetRig, length: int
) -> None:
    chains = rig.offer(*[2048] * 3)
    frames = [frame(100, fill=1), frame(200, fill=2), frame(300, fill=3)]
    large = on_the_wire(frame(length))
    wire = [on_the_wire(frames[0]), large, on_the_wire(frames[1]), large, on_the_wire(frames[2])]
    rig.cable.ends[0].sendall(b"".join(wire))
    for chain, data in zip(chains, frames, strict=True):
        assert received(rig, chain) == data
    assert rig.device.received[0].dropped == {"larger than any frame": 2}
    assert rig.device.link_up
    assert rig.lines == []


def test_s2_a_length_that_is_none_takes_the_link_down(rig: NetRig) -> None:
    rig.offer(2048)
    rig.cable.ends[0].send(struct.pack(">L", NO_LENGTH + 1) + bytes(100))
    wait_for(lambda: not rig.device.link_up)
    assert str(NO_LENGTH + 1) in rig.lines[0]


def test_s2_an_end_in_the_middle_of_a_frame_gives_the_driver_nothing(rig: NetRig) -> None:
    rig.offer(2048)
    rig.cable.ends[0].send(struct.pack(">L", 1000) + bytes(999))
    rig.cable.ends[0].close()
    wait_for(lambda: not rig.device.link_up)
    assert not rig.driver.queues[0].has_used()
    assert rig.send(header() + frame()) == 0


def test_s2_an_end_in_the_middle_of_a_frame_of_the_driver_takes_the_link_down_alone(
    rig: NetRig,
) -> None:
    """The rest of it waits for the stream to take it, which never will."""
    data = [header() + frame(60_000)]
    chains = [rig.driver.mmio.submit(1, data, []) for _ in range(20)]
    wait_for(lambda: rig.device._backend.channels[0].unsent)
    rig.cable.end.close()
    for chain in chains:
        rig.driver.mmio.wait_used(1, chain)
    assert not rig.device.link_up and not rig.driver.needs_reset
    assert len([line for line in rig.lines if "the link is down" in line]) == 1
    rig.driver.request([header() + frame(60)], [], queue=1)


def test_s1_runt_frames_are_dropped(rig: NetRig) -> None:
    [chain] = rig.offer(2048)
    rig.cable.ends[0].send(on_the_wire(b"") + on_the_wire(bytes(13)) + on_the_wire(frame()))
    assert received(rig, chain) == frame()
    assert rig.device.received[0].dropped == {"too short": 2}


def test_each_frame_is_one_piece_through_a_port() -> None:
    cable = StreamCable(largest=LARGEST_THROUGH_PORT)
    with running(cable, ram=16 << 20) as rig:  # type: ignore[arg-type]
        calls: list[int] = []
        real = os.writev

        def counted(fd: int, pieces: list[bytes]) -> int:
            calls.append(len(pieces))
            return real(fd, pieces)

        os.writev = counted  # type: ignore[assignment]
        try:
            rig.send(header(), bytes(10000), bytes(LARGEST_THROUGH_PORT - 10000))
        finally:
            os.writev = real
        assert len(read_frame(cable.end)) == LARGEST_THROUGH_PORT
        assert calls == [1]
        rig.send(header(), bytes(10000), bytes(LARGEST_THROUGH_PORT - 9999))
        assert rig.device.sent[0].dropped == {"the host did not take it": 1}
