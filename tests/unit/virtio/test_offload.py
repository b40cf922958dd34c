"""The holder of a queue's lock has its ring, also where something else serves it."""

from __future__ import annotations

import random
from threading import Thread

import pytest

from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.offload import OffloadLock


class Ring:
    """Its owner: nobody, a server, or the holder of its lock."""

    def __init__(self) -> None:
        self.owner: object = None

    def take(self, owner: object) -> None:
        assert self.owner is None, f"{owner} takes the ring from {self.owner}"
        self.owner = owner

    def leave(self, owner: object) -> None:
        assert self.owner is owner, f"{owner} leaves the ring of {self.owner}"
        self.owner = None


class Server:
    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.taken = 0

    def hand_over(self) -> None:
        self.ring.take(self)
        self.taken += 1

    def take_back(self) -> None:
        self.ring.leave(self)


@pytest.fixture
def ring() -> Ring:
    return Ring()


def test_the_server_has_the_ring_while_nobody_holds_the_lock(ring: Ring) -> None:
    lock, server = OffloadLock(), Server(ring)
    lock.serve_by(server)
    assert ring.owner is server
    with lock:
        assert ring.owner is None
    assert ring.owner is server
    lock.serve_by(None)
    assert ring.owner is None
    with lock:
        pass
    assert ring.owner is None


def test_a_server_that_comes_while_the_lock_is_held_begins_at_the_release(ring: Ring) -> None:
    """A pause holds the lock. Whoever starts a server then neither waits nor gets the ring."""
    lock, server = OffloadLock(), Server(ring)
    lock.acquire()
    lock.serve_by(server)
    assert ring.owner is None
    lock.release()
    assert ring.owner is server


def test_a_server_that_goes_while_the_lock_is_held_does_not_come_back(ring: Ring) -> None:
    lock, server = OffloadLock(), Server(ring)
    lock.serve_by(server)
    lock.acquire()
    lock.serve_by(None)
    lock.release()
    assert ring.owner is None and server.taken == 1


def test_another_server_takes_the_place_of_the_first(ring: Ring) -> None:
    lock, first, second = OffloadLock(), Server(ring), Server(ring)
    lock.serve_by(first)
    lock.serve_by(second)
    assert ring.owner is second


def test_a_lock_that_cannot_be_had_leaves_the_ring_to_its_holder(ring: Ring) -> None:
    lock, server = OffloadLock(), Server(ring)
    lock.serve_by(server)
    with lock:
        assert not lock.acquire(blocking=False)
        assert not lock.acquire(timeout=0.001)
        assert ring.owner is None
    assert ring.owner is server


@pytest.mark.parametrize("change", ["serve_by", "acquire", "release"])
def test_a_ring_changes_hands_by_one_thread_at_a_time(ring: Ring, change: str) -> None:
    lock, server = OffloadLock(), Server(ring)
    lock.serve_by(server)
    if change == "release":
        lock.acquire()
    before = ring.owner
    arguments = (None,) if change == "serve_by" else ()
    changing = Thread(target=getattr(lock, change), args=arguments, daemon=True)
    with lock._changing:
        changing.start()
        changing.join(0.1)
        assert changing.is_alive() and ring.owner is before
    changing.join(60)
    assert not changing.is_alive() and ring.owner is not before


def test_holders_and_servers_from_many_threads(ring: Ring) -> None:
    lock, servers = OffloadLock(), [Server(ring), Server(ring)]
    failures: list[BaseException] = []

    def act(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(2000):
                if chance.random() < 0.3:
                    lock.serve_by(chance.choice([*servers, None]))
                elif lock.acquire(timeout=chance.choice([0, 0.001, 30])):
                    holder = object()
                    ring.take(holder)
                    ring.leave(holder)
                    lock.release()
        except BaseException as error:
            failures.append(error)

    threads = [Thread(target=act, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    assert not any(thread.is_alive() for thread in threads), "a deadlock"


def test_every_queue_of_a_device_has_a_lock_of_its_kind() -> None:
    from pyvmm.testing import attached
    from pyvmm.virtio.rng.device import EntropyDevice

    class Offloading(EntropyDevice):
        def queue_lock(self) -> OffloadLock:
            return OffloadLock()

    device: VirtioDevice = Offloading()
    with attached(device) as driver:
        [queue] = driver.transport.negotiation.active_queues
        first = queue.lock
        assert isinstance(first, OffloadLock)
        assert driver.request([], [16]).written == 16
        driver.mmio.reset_queue(0)
        [queue] = driver.transport.negotiation.active_queues
        assert isinstance(queue.lock, OffloadLock) and queue.lock is not first
        assert driver.request([], [16]).written == 16
