"""virtio-rng over every ring: what the driver gets, and what it gets for breaking the rules."""

from __future__ import annotations

import pytest
from rings import RINGS, for_each_ring, offering

from pyvmm.testing import Buffer, attached, illegal_chains, legal_chains
from pyvmm.testing.mmio_driver import SAFETY_TIMEOUT
from pyvmm.virtio.rng import device as rng_module
from pyvmm.virtio.rng.device import MOST_BYTES, EntropyDevice

MIB = 1 << 20


@pytest.fixture(params=RINGS)
def rng(request):
    with attached(offering(request.param, EntropyDevice()), ring=request.param) as driver:
        yield driver


def test_it_introduces_itself(rng):
    assert rng.mmio.read(0x008) == 4
    assert [queue.size for queue in rng.queues] == [64]
    assert rng.features & 0xFF_FFFF == 0  # 5.4.3: it has no feature bits
    assert rng.config(0, 16) == bytes(16)  # 5.4.4: nor a configuration


def test_each_byte_is_random_and_each_request_another_one(rng):
    answers = [rng.request([], [32]) for _ in range(20)]
    assert all(answer.written == 32 for answer in answers)
    assert len({answer.data for answer in answers}) == 20
    seen = {byte for answer in answers for byte in answer.data}
    assert len(seen) > 200  # of 640 random bytes, that many different ones


def test_a_buffer_in_pieces_is_filled_in_order(rng, monkeypatch):
    monkeypatch.setattr(rng_module.os, "urandom", lambda n: bytes(range(n)))
    for indirect in (False, True):
        answer = rng.request([], [1, 5, 0, 2], indirect=indirect)
        assert answer.data == bytes(range(8))


def test_what_comes_is_the_hosts_random_numbers(rng, monkeypatch):
    monkeypatch.setattr(rng_module.os, "urandom", lambda n: b"\xa7" * n)
    assert rng.request([], [9]).data == b"\xa7" * 9


@pytest.mark.parametrize("size", [MOST_BYTES - 1, MOST_BYTES, MOST_BYTES + 1, MIB // 2])
def test_a_request_is_served_at_a_length_that_keeps_it_short(rng, size):
    answer = rng.request([], [size])
    assert answer.written == min(size, MOST_BYTES)
    # 2.7.8.2: no byte behind the length that is told
    assert answer.buffers[answer.written :] == bytes(size - answer.written)


def test_many_requests_at_once_are_all_served(rng):
    [queue] = rng.queues
    before = rng.irq.count
    chains = [queue.add([], [8]) for _ in range(64)]
    if queue.publish():
        rng.kick()
    assert rng.irq.wait(before + 1, SAFETY_TIMEOUT)  # a driver that has looked needs none
    for chain in chains:
        assert rng.mmio.wait_used(0, chain).written == 8
    assert len({queue.contents(chain) for chain in chains}) == 64
    assert rng.irq.count <= before + 64


def test_it_serves_again_after_a_reset(rng):
    rng.request([], [8])
    rng.restart()
    assert rng.request([], [8]).written == 8


# --- what a driver must not do; row numbers are those of docs/robustness.md ----------------------


def test_row39_readable_buffers_are_not_written_and_get_nothing(rng):
    # 5.4.6.1: the driver must not place device-readable buffers into the queue
    place = rng.mmio.arena.alloc(64)
    answer = rng.request([Buffer(place, 64)], [])
    assert answer.written == 0
    assert rng.memory.read(place, 64) == bytes(64)
    answer = rng.request([Buffer(place, 64)], [4])
    assert answer.written == 4
    assert rng.memory.read(place, 64) == bytes(64)
    assert not rng.needs_reset


def test_row30_a_buffer_of_no_bytes_gets_nothing(rng):
    assert rng.request([], [0]).written == 0
    assert rng.request([], [8]).written == 8


@pytest.mark.parametrize(
    "bad",
    [Buffer(MIB, 16), Buffer(MIB - 8, 16), Buffer(2**64 - 8, 16), Buffer(1 << 40, 0xFFFF_FF00)],
    ids=["outside RAM", "over the end of RAM", "wraps 2^64", "huge"],
)
def test_row29_a_buffer_outside_ram_gets_nothing(rng, bad):
    ram = rng.memory.read(0, 0x1_0000)
    chain = rng.mmio.submit(0, [], [bad])
    assert rng.mmio.wait_used(0, chain).written == 0
    good = rng.mmio.arena.alloc(16)
    chain = rng.mmio.submit(0, [], [Buffer(good, 16), bad])
    assert rng.mmio.wait_used(0, chain).written == 0
    assert rng.memory.read(good, 16) == bytes(16)  # 2.7.8.2: nothing behind a length of 0
    assert rng.memory.read(0, 0x1_0000) == ram
    assert not rng.needs_reset
    assert rng.request([], [8]).written == 8


@pytest.mark.parametrize("ring, legal", for_each_ring(legal_chains))
def test_row35_any_lawful_chain_is_filled(ring, legal):
    with attached(offering(ring, EntropyDevice()), ring=ring) as driver:
        chain = legal.offer(driver.queues[0])
        driver.kick()
        assert driver.mmio.wait_used(0, chain).written == sum(legal.writable)
        assert not driver.needs_reset


@pytest.mark.parametrize("ring, illegal", for_each_ring(illegal_chains))
def test_rows23_to_36_the_device_outlives_every_broken_ring(ring, illegal):
    with attached(offering(ring, EntropyDevice()), ring=ring) as driver:
        illegal.offer(driver.queues[0])
        driver.kick()
        if illegal.outcome == "refused":
            driver.mmio.wait_needs_reset()
        driver.restart()
        assert driver.request([], [8]).written == 8
