"""Rate limits: what a bucket gives and when, and a queue's worker that waits for it."""

from __future__ import annotations

import os
import random
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from queue_rig import LAYOUTS, Rig
from worker_rig import Bench, Echo, asleep, wait_for

from pyvmm.errors import ConfigError
from pyvmm.kinds import interface
from pyvmm.kinds import registry as devices
from pyvmm.kinds.disk import parse as parse_disk
from pyvmm.kinds.vm_spec import from_json, to_json, validate
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.virtio import rate_limit
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.rate_limit import RateLimiter, TokenBucket, limiter
from pyvmm.virtio.worker import FOR_SOURCE, Rest

SECOND = 1_000_000_000


def take(bucket: TokenBucket, count: int, now: int) -> int:
    wait = bucket.wait_for(count, now)
    if not wait:
        bucket.take(count)
    return wait


# ---- arithmetic


def test_a_bucket_gives_its_burst_and_then_its_rate() -> None:
    bucket = TokenBucket(rate=10, burst=3)
    assert [take(bucket, 1, 0) for _ in range(3)] == [0, 0, 0]
    assert take(bucket, 1, 0) == SECOND // 10
    assert take(bucket, 1, SECOND // 10 - 1) == 1
    assert take(bucket, 1, SECOND // 10) == 0
    assert take(bucket, 1, SECOND // 10) == SECOND // 10


def test_no_more_than_the_burst_is_saved_up() -> None:
    bucket = TokenBucket(rate=10, burst=3)
    hour = 3600 * SECOND
    assert [take(bucket, 1, hour) for _ in range(4)] == [0, 0, 0, SECOND // 10]


def test_the_wait_is_never_too_short_by_a_rounding() -> None:
    bucket = TokenBucket(rate=3, burst=2)
    assert take(bucket, 2, 0) == 0
    now = 0
    for _ in range(100):
        wait = take(bucket, 1, now)
        assert take(bucket, 1, now + wait - 1) == 1
        now += wait
        assert take(bucket, 1, now) == 0
    # 100 thirds of a second, rounded up once in all, not once each
    assert 0 <= now - 100 * SECOND // 3 <= 1


def test_what_is_larger_than_the_burst_goes_and_is_paid_for_afterwards() -> None:
    bucket = TokenBucket(rate=100, burst=10)
    assert take(bucket, 1000, 0) == 0
    # 990 below nothing, and one to be there.
    assert bucket.wait_for(1, 0) == 991 * SECOND // 100
    assert take(bucket, 1000, 5 * SECOND) == 5 * SECOND
    assert take(bucket, 1000, 10 * SECOND) == 0


def test_a_clock_that_goes_back_gives_nothing() -> None:
    bucket = TokenBucket(rate=10, burst=1)
    assert take(bucket, 1, SECOND) == 0
    assert take(bucket, 1, 0) == SECOND // 10
    assert take(bucket, 1, SECOND) == SECOND // 10


def test_the_usual_burst_is_a_tenth_of_a_second() -> None:
    assert TokenBucket(1000).burst == 100
    assert TokenBucket(3).burst == 1


@pytest.mark.parametrize(("rate", "burst"), [(0, 1), (-1, 1), (1, -1)])
def test_what_is_no_rate(rate: int, burst: int) -> None:
    with pytest.raises(ValueError, match="bucket"):
        TokenBucket(rate, burst)


@given(
    st.integers(1, 10**9),
    st.integers(1, 10**9),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 5 * SECOND)), max_size=60),
)
def test_over_any_time_it_gives_burst_and_rate_at_most(
    rate: int, burst: int, steps: list[tuple[int, int]]
) -> None:
    bucket = TokenBucket(rate, burst)
    now = given_away = largest = 0
    for count, pause in steps:
        now += pause
        if not take(bucket, count, now):
            given_away += count
            largest = max(largest, count)
    # The last one may have gone into debt.
    assert given_away * SECOND <= (max(burst, largest) + burst) * SECOND + now * rate


@given(st.integers(1, 10**6), st.integers(1, 1000), st.integers(1, 2000), st.integers(0, SECOND))
def test_whoever_waits_as_told_gets_it(rate: int, burst: int, count: int, now: int) -> None:
    bucket = TokenBucket(rate, burst)
    for _ in range(5):
        now += bucket.wait_for(count, now)
        assert take(bucket, count, now) == 0


def test_both_limits_are_taken_or_none() -> None:
    limits = RateLimiter(TokenBucket(1000, 1000), TokenBucket(10, 2))
    assert limits.take(600, 0) == 0
    assert limits.take(600, 0) == SECOND // 5  # 200 bytes are missing
    # The operation that was refused was not counted.
    assert limits.take(400, 0) == 0
    assert limits.take(0, 0) == SECOND // 10


@pytest.mark.parametrize(
    ("method", "arguments"), [("take", (1, 0)), ("charge", (1,)), ("ready", (0,))]
)
def test_threads_take_one_after_the_other(method: str, arguments: tuple[int, ...]) -> None:
    limits = RateLimiter(TokenBucket(10, 1), None)
    taking = threading.Thread(target=getattr(limits, method), args=arguments, daemon=True)
    with limits._lock:
        taking.start()
        taking.join(0.1)
        assert taking.is_alive()
    taking.join(30)
    assert not taking.is_alive()


def test_no_limits_are_no_limiter() -> None:
    assert limiter(bps=0, iops=0, bps_burst=0, iops_burst=0) is None
    only_bytes = limiter(bps=10, iops=0, bps_burst=0, iops_burst=0)
    assert only_bytes is not None
    assert [only_bytes.take(0, 0) for _ in range(100)] == [0] * 100


# ---- a worker


class Clock:
    """Time that a test moves; the worker's sleep ends when it says so."""

    def __init__(self) -> None:
        self.now = 0
        self.slept: list[float | None] = []


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Workers take their time from it, and sleep until they are kicked or stopped."""
    clock = Clock()
    limited = rate_limit.limited
    monkeypatch.setattr(
        rate_limit,
        "limited",
        lambda serve, limits, size_of: limited(serve, limits, size_of, lambda: clock.now),
    )
    from pyvmm.host.poller import Poller

    wait = Poller.wait

    def sleep(self: Poller, seconds: float | None = None) -> None:
        clock.slept.append(seconds)
        wait(self, None)

    monkeypatch.setattr(Poller, "wait", sleep)
    return clock


class Limited:
    """An echo device with limits, two queues, and a driver that counts what came back."""

    def __init__(
        self, clock: Clock, *, layout: str = "split", event_idx: bool = False, **limits: int
    ) -> None:
        self.clock = clock
        self.bench = Bench(Echo(), queues=2, layout=layout, event_idx=event_idx)
        wanted = {"bps": 0, "iops": 0, "bps_burst": 0, "iops_burst": 0, **limits}
        self.bench.device.limits = limiter(**wanted)
        self.bench.activate()

    def send(self, count: int, index: int = 0, data: bytes = b"x") -> None:
        rig = self.bench.rigs[index]
        for _ in range(count):
            rig.driver.add([data], [len(data)])
        if rig.driver.publish():
            rig.kick.signal()

    def settle(self, index: int = 0) -> None:
        """Wait until the worker has looked and sleeps again."""
        for _ in range(2):  # the first time it may be about to sleep, having looked already
            before = len(self.clock.slept)
            self.bench.rigs[index].kick.signal()
            wait_for(lambda seen=before: len(self.clock.slept) > seen)
        wait_for(lambda: asleep(self.bench.device))

    def back(self, index: int = 0) -> int:
        driver = self.bench.rigs[index].driver
        count = 0
        while driver.has_used():
            driver.pop_used()
            count += 1
        return count


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_burst_goes_through_and_the_rest_waits_for_its_time(
    clock: Clock, layout: str, event_idx: bool
) -> None:
    limited = Limited(clock, layout=layout, event_idx=event_idx, iops=10, iops_burst=2)
    limited.settle()
    limited.send(4)
    limited.settle()
    assert limited.back() == 2
    assert clock.slept[-1] == pytest.approx(0.1)
    clock.now += SECOND // 10 - 1
    limited.settle()
    assert limited.back() == 0
    clock.now += 1
    limited.settle()
    assert limited.back() == 1
    clock.now += SECOND
    limited.settle()
    assert limited.back() == 1
    assert clock.slept[-1] is None  # nothing is left: only a kick wakes it
    limited.bench.close()


def test_while_it_waits_the_driver_need_not_kick(clock: Clock) -> None:
    limited = Limited(clock, iops=1, iops_burst=1)
    limited.settle()
    limited.send(2)
    limited.settle()
    rig = limited.bench.rig
    rig.driver.add([b"y"], [1])
    assert not rig.driver.publish()
    clock.now += 5 * SECOND
    limited.settle()
    assert limited.back() == 2
    clock.now += 5 * SECOND
    limited.settle()
    assert limited.back() == 1
    # Kicks are wanted again.
    rig.driver.add([b"z"], [1])
    assert rig.driver.publish()
    limited.bench.close()


def test_bytes_are_counted_as_the_device_says(clock: Clock) -> None:
    limited = Limited(clock, bps=100, bps_burst=50)
    limited.settle()
    limited.send(4, data=bytes(10))  # 20 bytes each, there and back
    limited.settle()
    assert limited.back() == 2
    assert clock.slept[-1] == pytest.approx(0.1)
    limited.bench.close()


def test_queues_share_the_limits(clock: Clock) -> None:
    limited = Limited(clock, iops=10, iops_burst=3)
    for index in (0, 1):
        limited.settle(index)
    limited.send(2, index=0)
    wait_for(limited.bench.rigs[0].driver.has_used)
    limited.settle(0)
    limited.send(2, index=1)
    limited.settle(1)
    assert (limited.back(0), limited.back(1)) == (2, 1)
    limited.bench.close()


def test_a_reset_does_not_wait_and_does_not_fill_the_bucket(clock: Clock) -> None:
    limited = Limited(clock, iops=1, iops_burst=1)
    limited.settle()
    limited.send(3)
    limited.settle()
    assert limited.back() == 1
    limited.bench.device.reset()  # would hang for ever: the clock stands still
    assert limited.bench.device.limits is not None
    assert limited.bench.device.limits.take(1, clock.now) == SECOND


def test_an_unlimited_device_is_served_by_its_own_method() -> None:
    """So limits cost nothing where there are none."""
    device = Echo()
    assert device._server() == device.serve


# ---- options


def test_disk_options() -> None:
    disk = parse_disk("a.img,bps=10M,iops=500,bps-burst=1g,iops-burst=2k,id=x")
    assert (disk.bps, disk.iops) == (10 << 20, 500)
    assert (disk.bps_burst, disk.iops_burst) == (1 << 30, 2048)
    spec = validate(VmSpec("k", disks=(disk,), devices=(devices.parse("rng", "bps=1K"),)))
    assert from_json(to_json(spec)) == spec
    assert interface.limiter(spec.disks[0]) is not None
    assert interface.limiter(DiskSpec("a.img")) is None


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "", "10x", "9" * 16, "\u0661", "M"])
def test_numbers_that_are_no_limits(text: str) -> None:
    with pytest.raises(ConfigError, match="--disk"):
        parse_disk(f"a.img,bps={text}")


def test_a_burst_needs_a_rate() -> None:
    with pytest.raises(ConfigError, match="bps-burst without bps"):
        validate(VmSpec("k", disks=(parse_disk("a.img,bps-burst=1M,iops=3"),)))
    with pytest.raises(ConfigError, match="negative"):
        validate(VmSpec("k", disks=(replace(DiskSpec("a.img"), iops=-1),)))


def test_rng_options() -> None:
    spec = devices.parse("rng", "bps=4K,iops-burst=7,iops=7")
    assert (spec.bps, spec.iops, spec.iops_burst) == (4096, 7, 7)  # type: ignore[attr-defined]
    for wrong in ("bps", "rate=3", "bps=1,,"):
        with pytest.raises(ConfigError, match="--rng-limit"):
            devices.parse("rng", wrong)
    with pytest.raises(ConfigError) as caught:
        devices.parse("rng", "rate=3")
    assert caught.value.cure == "use [bps=N][,iops=N][,bps-burst=N][,iops-burst=N][,packed]"


def test_a_queue_in_any_order_of_limits_loses_nothing() -> None:
    """Real time, a real worker: whatever is held back comes back, each once."""
    bench = Bench(Echo())
    bench.device.limits = limiter(bps=2_000_000, iops=2_000, bps_burst=100, iops_burst=3)
    bench.activate()
    rng = random.Random(5)
    try:
        for _ in range(60):
            data = os.urandom(rng.randrange(1, 60))
            assert bench.echo(data) == data
    finally:
        bench.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stop", ["halt", "failure"])
def test_within_limits_no_chain_is_taken_from_a_queue_that_is_to_rest(
    layout: str, stop: str
) -> None:
    rig = Rig(layout=layout)
    for _ in range(3):
        rig.driver.add([], [1])
    rig.driver.publish()
    limits = RateLimiter(TokenBucket(1000, 1000), None)
    queue = rate_limit.LimitedQueue(rig.queue, limits, lambda chain: 0, lambda: 0)
    taken = 0
    for _ in queue:
        taken += 1
        if stop == "halt":
            rig.queue.halt = True
        else:
            rig.queue.ready = False
    assert taken == 1
    rig.close()


def test_within_limits_several_chains_can_be_stepped_back_from_the_youngest_on() -> None:
    rig = Rig()
    for size in (100, 200, 300):
        rig.driver.add([], [size])
    rig.driver.publish()
    limits = RateLimiter(TokenBucket(1000, 600), TokenBucket(1000, 3))
    queue = rate_limit.LimitedQueue(rig.queue, limits, lambda chain: chain.writable_size, lambda: 0)
    first, second, third = queue
    assert (first.writable_size, second.writable_size, third.writable_size) == (100, 200, 300)
    assert limits.take(1, 0) > 0
    queue.step_back(third)
    queue.step_back(second)
    assert limits.take(501, 0) > 0, "more was given back than was taken"
    assert limits.take(500, 0) == 0
    limits.charge(-500, -1)
    assert [chain.head for chain in queue] == [second.head, third.head]
    rig.close()


def test_a_device_sees_through_its_limits_that_it_is_to_stop() -> None:
    rig = Rig()
    limits = RateLimiter(TokenBucket(1000), None)
    queue = rate_limit.LimitedQueue(rig.queue, limits, lambda chain: 0, lambda: 0)
    assert not queue.halt
    rig.queue.halt = True
    assert queue.halt
    rig.close()


def test_within_limits_a_device_sleeps_as_it_wants_unless_chains_are_held_back() -> None:
    """Then no source could end the sleep with anything to do."""
    rig = Rig()
    limits = RateLimiter(None, TokenBucket(10, 1))

    def serve_all(queue: Queue) -> Rest:
        for chain in queue:
            queue.add_used(chain, 0)
        return FOR_SOURCE

    serve = rate_limit.limited(serve_all, limits, lambda chain: 0, lambda: 0)
    assert serve(rig.queue) is FOR_SOURCE
    for _ in range(2):
        rig.driver.add([], [1])
    rig.driver.publish()
    assert serve(rig.queue) == Rest(kicks=False, seconds=0.1, sources=False)
    rig.close()
