"""Frames from the cable into the driver's buffers: whole, in order, or not at all."""

from __future__ import annotations

import errno
import os

import pytest
from net_rig import (
    BROADCAST,
    F_MRG_RXBUF,
    F_MTU,
    HEADER,
    MAC,
    NEEDS_CSUM,
    Cable,
    frame,
    header,
    running,
    wait_for,
)

from pyvmm.testing.ring import Buffer
from pyvmm.virtio.net import receive, tap

GSO = header(NEEDS_CSUM, 1, 54, 1448, 34, 16)


def random_frame(size: int) -> bytes:
    return MAC + os.urandom(size - 6)


@pytest.mark.parametrize("without", [0, F_MRG_RXBUF], ids=["mergeable", "one buffer each"])
@pytest.mark.parametrize("size", [14, 60, 61, 1514])
def test_a_frame_comes_whole(size: int, without: int) -> None:
    with running(without=without) as rig:
        head = rig.expect(random_frame(size))
        assert head == header(num_buffers=1)


@pytest.mark.parametrize("sizes", [[12, 2048], [1, 11, 2048], [5, 20, 30, 2048], [11, 7, 2000]])
def test_the_header_may_lie_in_any_descriptors(sizes: list[int]) -> None:
    with running() as rig:
        [chain] = rig.offer(sizes)
        data = random_frame(700)
        rig.inject(data)
        assert rig.received(chain) == (HEADER + 700, header(num_buffers=1) + data)


@pytest.mark.parametrize("buffer", [64, 1526, 2048, 4096])
@pytest.mark.parametrize("size", [1500, 9000, 65549])
def test_a_large_frame_goes_over_buffers_that_are_filled_up(buffer: int, size: int) -> None:
    count = -(-(HEADER + size) // buffer)
    if count > 64:
        buffer = -(-(HEADER + size) // 64)
        count = -(-(HEADER + size) // buffer)
    with running() as rig:
        chains = rig.offer(*[buffer] * count)
        data = random_frame(size)
        rig.inject(data, GSO)
        parts = [rig.received(chain) for chain in chains]
        assert [written for written, _ in parts[:-1]] == [buffer] * (count - 1)
        whole = b"".join(part for _, part in parts)
        assert whole[HEADER:] == data
        assert whole[:HEADER] == GSO[:10] + count.to_bytes(2, "little")


def test_large_and_small_frames_take_turns() -> None:
    with running() as rig:
        for size in (60, 9000, 60, 61, 20000, 14, 40000, 1514) * 3:
            count = -(-(HEADER + size) // 1526)
            chains = rig.offer(*[1526] * 30)
            data = random_frame(size)
            rig.inject(data, GSO)
            got = b"".join(rig.received(chain)[1] for chain in chains[:count])
            assert got[HEADER:] == data
            # What is left over serves the next frames; the ring is emptied by small ones.
            for chain in chains[count:]:
                rig.inject(frame(fill=1))
                assert rig.received(chain)[1][HEADER:] == frame(fill=1)


def test_frames_wait_until_there_are_buffers() -> None:
    """CVE-2020-16843: a ring that was full, then refilled with one kick, goes on."""
    with running() as rig:
        frames = [random_frame(100 + n) for n in range(20)]
        for data in frames:
            rig.inject(data)
        for data in frames:
            [chain] = rig.offer(2048)
            assert rig.received(chain)[1][HEADER:] == data


def test_a_frame_waits_for_more_buffers_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive, "PATIENCE", 60)
    with running() as rig:
        data = random_frame(5000)
        chains = rig.offer(2048)
        rig.inject(data, GSO)
        wait_for(lambda: rig.device._receivers[0]._waiting is not None)
        chains += rig.offer(2048)
        wait_for(lambda: len(rig.device._receivers[0]._buffers) == 2)
        assert not rig.driver.queues[0].has_used()
        chains += rig.offer(2048)
        got = b"".join(rig.received(chain)[1] for chain in chains)
        assert got[HEADER:] == data
        rig.assert_alive()


def test_a_frame_that_no_buffers_come_for_is_dropped_and_the_next_one_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(receive, "PATIENCE", 0.01)
    with running() as rig:
        [chain] = rig.offer(2048)
        rig.inject(random_frame(5000), GSO)
        rig.inject(frame(fill=3))
        assert rig.received(chain)[1] == header(num_buffers=1) + frame(fill=3)
        assert rig.device.received[0].dropped == {"no buffers": 1}


def test_a_frame_larger_than_all_of_the_ring_is_dropped_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(receive, "PATIENCE", 3600)
    with running(queue_size=4) as rig:
        chains = rig.offer(100, 100, 100, 100)
        rig.inject(random_frame(1000))
        rig.inject(frame(fill=4))
        assert rig.received(chains[0])[1][HEADER:] == frame(fill=4)


@pytest.mark.parametrize("size", [61, 1000, 60000])
def test_without_merging_a_frame_too_large_is_never_given_in_part(size: int) -> None:
    with running(without=F_MRG_RXBUF) as rig:
        [chain] = rig.offer(HEADER + 60)
        rig.inject(random_frame(size), GSO)
        rig.inject(frame(60, fill=5))
        assert rig.received(chain) == (HEADER + 60, header(num_buffers=1) + frame(60, fill=5))
        assert rig.device.received[0].dropped == {"larger than the buffer": 1}


def test_frames_above_the_mtu_are_dropped_unless_to_be_segmented() -> None:
    with running() as rig:
        [chain] = rig.offer(4096)
        rig.inject(random_frame(1515))
        rig.inject(random_frame(1515)[:12] + b"\x08\x00" + bytes(1505))
        tagged = MAC + bytes(6) + b"\x81\x00" + bytes(1504)
        rig.inject(tagged)
        assert rig.received(chain)[1][HEADER:] == tagged
        rig.expect(random_frame(3000), GSO, size=4096)
        assert rig.device.received[0].dropped == {"larger than the MTU": 2}


def test_without_the_mtu_feature_any_size_comes() -> None:
    with running(without=F_MTU) as rig:
        rig.expect(random_frame(1800))


def test_a_flood_arrives_in_order_with_few_interrupts() -> None:
    with running(queue_size=256, ram=8 << 20) as rig:
        count = 2000
        queue = rig.driver.queues[0]
        place = rig.driver.mmio.arena.alloc(1600 * 250)
        buffers = [Buffer(place + 1600 * n, 1600) for n in range(250)]
        sent = received = 0
        chains = {}
        while received < count:
            while buffers:
                chain = queue.add([], [buffers.pop()])
                chains[chain.head] = chain
            if queue.publish():
                rig.driver.kick(0)
            while sent < count and sent - received < 100:
                rig.inject(frame(60, fill=sent % 251))
                sent += 1
            used = rig.driver.mmio.wait_used(0)
            chain = chains.pop(used.head)
            assert used.written == HEADER + 60
            data = queue.contents(chain)[HEADER : HEADER + 60]
            assert data == frame(60, fill=received % 251)
            buffers += chain.writable
            received += 1
        assert rig.device.received[0].frames == count
        assert rig.device.received[0].bytes == count * 60
        assert rig.driver.irq.count <= count


def test_counters_and_trace_tell_of_each_frame() -> None:
    events: list[object] = []
    with running(trace=events.append) as rig:
        rig.expect(frame(to=BROADCAST))
        rig.inject(frame(to=bytes.fromhex("02aabbccddee")))
        rig.send(header() + frame(70))
        rig.expect(frame())
        texts = [str(event) for event in events]
        assert "net0: received frame of 60 bytes" in texts
        assert "net0: received frame of 60 bytes: dropped, not addressed to the guest" in texts
        assert "net0: sent frame of 70 bytes" in texts
        assert (rig.device.sent[0].frames, rig.device.sent[0].bytes) == (1, 70)


def test_a_cable_that_is_cut_is_told_once_and_takes_the_link_down() -> None:
    with running() as rig:
        rig.offer(2048)
        rig.cable.ends[0].close()
        wait_for(lambda: not rig.device.link_up or rig.send(header() + frame()))
        wait_for(lambda: rig.driver.config(6, 2) == b"\0\0")
        # What is sent then goes nowhere, but comes back.
        for _ in range(3):
            assert rig.send(header() + frame()) == 0
        assert len(rig.lines) == 1 and "link is down" in rig.lines[0]
        assert not rig.driver.needs_reset
        rig.device.set_link(True)
        assert not rig.device.link_up


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOMEM, errno.EFAULT])
def test_s3_a_frame_that_the_kernel_cannot_give_is_dropped_and_the_next_one_comes(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with running() as rig:
        bad = frame(99)

        def readv(fd: int, views: list[memoryview]) -> int:
            length = os.readv(fd, views)
            if length == HEADER + len(bad):  # as tun_put_user() does: the frame is gone
                raise OSError(number, os.strerror(number))
            return length

        monkeypatch.setattr(tap, "_readv", readv)
        for _ in range(3):
            rig.inject(bad)
        rig.expect(frame())
        assert rig.device.link_up
        assert rig.device.received[0].dropped == {"too short": 3}


def test_s3_a_cable_that_gives_nothing_but_errors_takes_the_link_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def readv(fd: int, views: list[memoryview]) -> int:
        raise OSError(errno.EINVAL, "no frame")

    with running() as rig:
        monkeypatch.setattr(tap, "_readv", readv)
        rig.offer(2048)
        rig.inject(frame())
        wait_for(lambda: not rig.device.link_up)
        assert "no frame" in rig.lines[0]


def test_the_cable_can_be_pulled_out_and_plugged_in() -> None:
    with running() as rig:
        rig.device.set_link(False)
        assert rig.driver.config(6, 2) == b"\0\0"
        assert rig.driver.mmio.acknowledge() & 2
        [chain] = rig.offer(2048)
        rig.inject(frame(fill=9))
        rig.send(header() + frame())
        assert rig.nothing_sent()
        wait_for(lambda: rig.device.received[0].dropped == {"the link is down": 1})
        rig.device.set_link(True)
        assert rig.driver.config(6, 2) == b"\1\0"
        rig.inject(frame(fill=10))
        assert rig.received(chain)[1][HEADER:] == frame(fill=10)


def test_a_reset_and_a_new_start_in_the_middle_of_traffic() -> None:
    with running(ram=32 << 20) as rig:
        for turn in range(10):
            rig.offer(*[1526] * 20)
            for _ in range(30):
                rig.inject(frame(fill=turn))
            rig.driver.restart()
            # What nobody received is still there, then comes what is new.
            rig.inject(frame(fill=0xEE))
            while True:
                [chain] = rig.offer(2048)
                if rig.received(chain)[1][HEADER:] == frame(fill=0xEE):
                    break


def test_a_cable_without_offloads_offers_none() -> None:
    with running(Cable(offloads=0)) as rig:
        assert not rig.driver.features & 0x7F83
        rig.assert_alive()
