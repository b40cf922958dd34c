"""Limits of a network card, by a clock in the test's hand: what goes, how long the rest waits."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from net_rig import BROADCAST, MAC, NetRig, frame, header, running, wait_for

from pyvmm.virtio.net.backend import LinkLost
from pyvmm.virtio.net.limits import Limits
from pyvmm.virtio.rate_limit import limiter

SECOND = 1_000_000_000


@dataclass
class Clock:
    """`now` in nanoseconds; real sleeps end at a kick only."""

    now: int = 0
    slept: list[float | None] = field(default_factory=list)

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    from pyvmm.host.poller import Poller

    clock = Clock()
    wait = Poller.wait

    def sleep(self: Poller, seconds: float | None = None) -> None:
        clock.slept.append(seconds)
        wait(self, None)

    monkeypatch.setattr(Poller, "wait", sleep)
    return clock


def limits(clock: Clock, **wanted: int) -> Limits:
    limiting = limiter(**{"bps": 0, "iops": 0, "bps_burst": 0, "iops_burst": 0, **wanted})
    assert limiting is not None
    return Limits(limiting, clock)


def kick(rig: NetRig, clock: Clock) -> None:
    """Have the pair's thread look at all there is, and wait until it sleeps again."""
    for _ in range(2):  # the first time it may be about to sleep, having looked already
        before = len(clock.slept)
        rig.driver.kick(1)
        wait_for(lambda seen=before: len(clock.slept) > seen)  # type: ignore[misc]


def send(rig: NetRig, *sizes: int) -> None:
    queue = rig.driver.queues[1]
    for size in sizes:
        queue.add([header() + frame(size)])
    queue.publish()


def sent(rig: NetRig) -> int:
    """The number of frames that have come along the cable."""
    count = 0
    while not rig.nothing_sent():
        count += 1
    return count


def received(rig: NetRig) -> int:
    queue = rig.driver.queues[0]
    count = 0
    while queue.has_used():
        queue.pop_used()
        count += 1
    return count


def test_frames_that_are_sent_wait_for_their_time(clock: Clock) -> None:
    with running(send_limits=limits(clock, iops=10, iops_burst=2)) as rig:
        send(rig, *[60] * 4)
        kick(rig, clock)
        assert sent(rig) == 2
        assert clock.slept[-1] == pytest.approx(0.1)
        assert rig.driver.queues[1].outstanding, "they wait in the ring"
        clock.now += SECOND // 10
        kick(rig, clock)
        assert sent(rig) == 1
        clock.now += SECOND
        kick(rig, clock)
        assert sent(rig) == 1
        assert clock.slept[-1] is None


def test_bytes_that_are_sent_do_not_count_the_header(clock: Clock) -> None:
    with running(send_limits=limits(clock, bps=1000, bps_burst=200)) as rig:
        send(rig, 100, 100, 100)
        kick(rig, clock)
        assert sent(rig) == 2
        assert clock.slept[-1] == pytest.approx(0.1)


def test_a_lost_link_counts_nothing_so_that_frames_do_not_wait_for_it(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The frame at which the loss is noticed is dropped at once, as all behind it are."""

    def lost(*_: object) -> bool:
        raise LinkLost("the other end of the cable has gone")

    with running(send_limits=limits(clock, iops=1, iops_burst=3)) as rig:
        monkeypatch.setattr(rig.device._transmitters[0], "_send", lost)
        send(rig, *[60] * 3)
        kick(rig, clock)
        assert rig.device.stats()["dropped"] == {"the link is down": 3}
        assert clock.slept[-1] is None


def test_a_frame_larger_than_the_burst_goes_and_is_paid_for(clock: Clock) -> None:
    with running(send_limits=limits(clock, bps=1000, bps_burst=100)) as rig:
        send(rig, 1100, 60)
        kick(rig, clock)
        assert sent(rig) == 1
        assert clock.slept[-1] == pytest.approx(1.06)


def test_frames_that_come_wait_where_they_are(clock: Clock) -> None:
    with running(receive_limits=limits(clock, iops=10, iops_burst=2)) as rig:
        rig.offer(*[2048] * 8)
        for _ in range(4):
            rig.inject(frame(to=BROADCAST))
        kick(rig, clock)
        assert received(rig) == 2
        assert clock.slept[-1] == pytest.approx(0.1)
        clock.now += SECOND // 10
        kick(rig, clock)
        assert received(rig) == 1
        clock.now += SECOND
        kick(rig, clock)
        assert received(rig) == 1
        assert clock.slept[-1] is None


def test_bytes_that_come_are_paid_for_afterwards(clock: Clock) -> None:
    with running(receive_limits=limits(clock, bps=1000, bps_burst=100)) as rig:
        rig.offer(*[2048] * 4)
        rig.inject(frame(1100, to=MAC))
        rig.inject(frame(60, to=MAC))
        kick(rig, clock)
        assert received(rig) == 1
        # 100 were there, so 1,000 are owed, and one byte more is wanted.
        assert clock.slept[-1] == pytest.approx(1.001)
        clock.now += 1001 * SECOND // 1000
        kick(rig, clock)
        assert received(rig) == 1


def test_frames_that_are_not_for_the_guest_cost_it_nothing(clock: Clock) -> None:
    with running(receive_limits=limits(clock, iops=1, iops_burst=1)) as rig:
        rig.offer(2048)
        for _ in range(20):
            rig.inject(frame(to=bytes.fromhex("5254006543ff")))
        rig.inject(frame(to=MAC))
        kick(rig, clock)
        assert received(rig) == 1


def test_one_direction_does_not_slow_the_other(clock: Clock) -> None:
    with running(send_limits=limits(clock, iops=1, iops_burst=1)) as rig:
        send(rig, 60, 60)
        kick(rig, clock)
        for _ in range(5):
            rig.expect(frame(to=BROADCAST))
        assert sent(rig) == 1


def test_a_frame_that_the_cable_does_not_take_is_not_counted_twice(clock: Clock) -> None:
    with running(send_limits=limits(clock, iops=1, iops_burst=40)) as rig:
        end, ours = rig.cable.ends[0], rig.cable.ours[0]
        ours.setsockopt(1, 7, 1)  # SOL_SOCKET, SO_SNDBUF: as few as can be
        send(rig, *[1000] * 40)
        kick(rig, clock)
        got = 0
        for _ in range(40):
            end.setblocking(True)
            end.settimeout(30)
            assert end.recv(2048)
            got += 1
        assert got == 40, "every one was in the burst"


def test_a_reset_does_not_wait_and_does_not_fill_the_bucket(clock: Clock) -> None:
    both = limits(clock, iops=1, iops_burst=1)
    with running(send_limits=both) as rig:
        send(rig, 60, 60)
        kick(rig, clock)
        assert sent(rig) == 1
        rig.device.reset()  # would hang for ever: the clock stands still
        assert both.ready() == 1.0
