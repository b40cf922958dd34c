"""Pausing a machine: nothing of its memory moves, nothing is lost, and it can be stopped."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
from worker_rig import Bench, Echo, wait_for

from pyvmm.errors import ConfigError
from pyvmm.machine import pause
from pyvmm.machine.pause import Pauser


class Runner:
    """A vCPU's runner that parks at once, or never."""

    id = 0

    def __init__(self, parks=True):
        self.parks = parks
        self.running = True

    def request_pause(self):
        self.running = False

    def wait_parked(self, seconds):
        return self.parks

    def resume(self):
        self.running = True


@pytest.fixture
def bench():
    made = Bench(Echo(), queues=2)
    made.activate()
    yield made
    made.close()


def transport(bench):
    queues = [rig.queue for rig in bench.rigs]
    negotiation = SimpleNamespace(active_queues=queues)
    return SimpleNamespace(negotiation=negotiation, device=bench.device)


def test_no_request_is_served_while_it_is_paused_and_none_is_lost(bench):
    runner = Runner()
    pauser = Pauser([runner], [transport(bench)])
    assert bench.echo(b"before") == b"before"
    pauser.pause()
    assert pauser.paused and not runner.running
    chains = []
    for rig in bench.rigs:
        chains.append(rig.driver.add([b"meanwhile"], [9]))
        rig.driver.publish()
        rig.kick.signal()
    passes = bench.device.passes
    before = bytes(bench.rig.memory.read(0, 4096))
    assert not threading.Event().wait(0.05)
    assert bench.device.passes == passes
    assert bytes(bench.rig.memory.read(0, 4096)) == before
    pauser.resume()
    assert runner.running and not pauser.paused
    for rig, chain in zip(bench.rigs, chains, strict=True):
        wait_for(rig.driver.has_used)
        assert rig.driver.contents(chain) == b"meanwhile"


def test_what_is_left_of_a_batch_is_served_after_the_pause(bench):
    """A pause ends a batch early, and no further kick will come for what is left of it."""
    started, go = threading.Event(), threading.Event()

    def behave(chain):
        started.set()
        assert go.wait(30)

    bench.device.behave = behave
    driver = bench.rig.driver
    for _ in range(4):
        driver.add([b"x"], [1])
    driver.publish()
    bench.rig.kick.signal()
    assert started.wait(30)
    pauser = Pauser([], [transport(bench)])
    pausing = threading.Thread(target=pauser.pause)
    pausing.start()
    wait_for(lambda: bench.rig.queue.halt)
    go.set()
    pausing.join()
    assert pauser.paused
    pauser.resume()
    for _ in range(4):
        wait_for(driver.has_used)
        driver.pop_used()


def test_what_is_to_be_done_before_it_goes_on_is_done_once(bench):
    runner, seen = Runner(), []
    pauser = Pauser([runner], [transport(bench)])
    pauser.pause()
    pauser.before_first = lambda: seen.append(runner.running)
    with pauser.still():
        pass
    assert not seen, "it was paused, and stays so"
    pauser.resume()
    pauser.pause()
    pauser.resume()
    assert seen == [False]


def test_twice_is_once(bench):
    pauser = Pauser([Runner()], [transport(bench)])
    pauser.resume()
    pauser.pause()
    pauser.pause()
    pauser.resume()
    assert bench.echo(b"on we go") == b"on we go"


def test_a_vcpu_that_does_not_park_calls_it_off(bench):
    runner = Runner(parks=False)
    pauser = Pauser([runner], [transport(bench)])
    with pytest.raises(ConfigError, match="vCPU 0 does not come to rest"):
        pauser.pause()
    assert runner.running and not pauser.paused
    assert bench.echo(b"on we go") == b"on we go"


def test_a_device_that_takes_too_long_calls_it_off(bench, monkeypatch):
    monkeypatch.setattr(pause, "PATIENCE", 0.05)
    runner = Runner()
    pauser = Pauser([runner], [transport(bench)])
    with bench.rigs[1].queue.lock, pytest.raises(ConfigError, match="echo does not come to rest"):
        pauser.pause()
    assert runner.running
    for index in (0, 1):
        assert bench.echo(b"on we go", index) == b"on we go"


def test_a_paused_device_can_be_reset(bench):
    pauser = Pauser([Runner()], [transport(bench)])
    pauser.pause()
    pauser.end()
    bench.device.reset()
    with pytest.raises(ConfigError, match="ending"):
        pauser.pause()


def test_a_queue_that_was_halted_stays_so(bench):
    """A disk that stopped for an error of the host, say."""
    pauser = Pauser([], [transport(bench)])
    bench.rig.queue.end_serving()
    pauser.pause()
    pauser.resume()
    assert bench.rig.queue.halt


def test_a_queue_that_is_started_while_it_is_held_is_served_after_the_pause(bench):
    """A card's pair that a command starts, say: the pause must not bring the old halt back."""
    pauser = Pauser([], [transport(bench)])
    queue = bench.rig.queue
    queue.end_serving()
    pauser.pause()
    queue.begin_serving()
    pauser.resume()
    assert not queue.halt


def test_a_queue_that_is_stopped_while_it_is_held_stays_stopped(bench):
    pauser = Pauser([], [transport(bench)])
    pauser.pause()
    bench.rig.queue.end_serving()
    pauser.resume()
    assert bench.rig.queue.halt


def test_a_command_that_takes_the_other_queues_locks_ends_before_the_pause(bench):
    """The control queue of a card is its last one. A pause that held the others already would wait
    for the command, and the command for the others."""
    data, control = (rig.queue for rig in bench.rigs)
    begun, done = threading.Event(), threading.Event()

    def command(chain):
        if begun.is_set():
            return
        begun.set()
        wait_for(lambda: control.halt)  # the pause has come
        with data.lock:
            done.set()

    bench.device.behave = command
    pauser = Pauser([], [transport(bench)])
    asked = threading.Thread(target=bench.echo, args=(b"command", 1))
    asked.start()
    assert begun.wait(30)
    pauser.pause()
    assert pauser.paused and done.is_set()
    pauser.resume()
    asked.join(30)
    assert not asked.is_alive()


def test_it_stands_still_inside_whoever_asks_for_what(bench):
    runner = Runner()
    pauser = Pauser([runner], [transport(bench)])
    asked = []
    with pauser.still():
        assert pauser.paused and not runner.running
        other = threading.Thread(target=lambda: (pauser.resume(), asked.append("resumed")))
        other.start()
        assert not threading.Event().wait(0.05)
        assert not asked and not runner.running
    other.join(30)
    assert asked and runner.running and not pauser.paused
    pauser.pause()
    with pauser.still():
        pass
    assert pauser.paused and not runner.running, "it was paused before"
    pauser.resume()


def test_one_that_ends_never_runs_again_after_it_stood_still(bench):
    runner = Runner()
    pauser = Pauser([runner], [transport(bench)])
    with pauser.still():
        pauser.ending = True
    assert not runner.running
    with pytest.raises(ConfigError, match="ending"), pauser.still():
        pass
    pauser.end()
