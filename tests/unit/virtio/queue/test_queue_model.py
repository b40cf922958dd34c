"""A lawful driver and a lawful device do what they like, on either ring: nothing is lost, nothing
is doubled, nobody sleeps while there is work for it."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from queue_rig import LAYOUTS, Rig

from pyvmm.testing import Buffer, Used
from pyvmm.virtio.queue.state import QueueState

WRAP = 1 << 15
BUFFER = 0x8000


class Model(RuleBasedStateMachine):
    """`waiting`, `taken`, `returned` and `done` hold the heads on each stage of their way."""

    rig: Rig

    @initialize(
        layout=st.sampled_from(LAYOUTS),
        size=st.sampled_from([1, 2, 4, 8, 16]),
        event_idx=st.booleans(),
        in_order=st.booleans(),
        place=st.sampled_from([0, 1, 65533]),
        wrap=st.booleans(),
    )
    def begin(self, layout, size, event_idx, in_order, place, wrap):
        start = place % size | (WRAP if wrap else 0) if layout == "packed" else place
        self.in_order = in_order
        self.rig = Rig(size, layout=layout, event_idx=event_idx, in_order=in_order, start=start)
        self.unpublished, self.waiting = [], []
        self.taken, self.returned, self.done = [], [], []
        # As after activation: both sides wait for the other.
        self.kicked = self.rig.queue.enable_notification()
        self.interrupted = False

    def teardown(self):
        if hasattr(self, "rig"):
            self.rig.close()

    # --- the driver ----------------------------------------------------------------------------

    @rule(parts=st.integers(1, 3), indirect=st.booleans())
    def driver_adds(self, parts, indirect):
        if self.rig.driver.room < (1 if indirect else parts):
            return
        if indirect and parts > self.rig.driver.size:
            return  # no chain is longer than the queue
        buffers = [Buffer(BUFFER, 4)] * parts
        self.unpublished.append(self.rig.driver.add([], buffers, indirect=indirect))

    @rule()
    def driver_publishes(self):
        if self.rig.driver.publish():
            self.kicked = True
        self.waiting += self.unpublished
        self.unpublished = []

    @rule()
    def driver_takes_all_back(self):
        self.interrupted = False
        assert self.rig.all_used() == self.done
        self.done = []

    # --- the device ----------------------------------------------------------------------------

    @rule()
    def device_takes_one(self):
        chain = self.rig.queue.pop()
        if chain is None:
            assert not self.waiting
        else:
            given = self.waiting.pop(0)
            assert chain.head == given.head
            assert chain.writable == given.writable
            self.taken.append((chain, given))

    @precondition(lambda self: self.taken)
    @rule(data=st.data(), full=st.booleans())
    def device_returns_one(self, data, full):
        place = 0 if self.in_order else data.draw(st.integers(0, len(self.taken) - 1))
        chain, given = self.taken.pop(place)
        written = chain.writable_size if full else 1
        self.rig.queue.add_used(chain, written)
        self.returned.append((chain, given, written))

    @precondition(lambda self: self.taken)
    @rule()
    def device_steps_back(self):
        chain, given = self.taken[-1]
        youngest = self.rig.queue._age(chain) == chain.slots
        try:
            self.rig.queue.step_back(chain)
        except ValueError:
            assert not youngest, "one that was taken later came back already"
            return
        assert youngest
        self.taken.pop()
        self.waiting.insert(0, given)

    @rule()
    def device_publishes(self):
        if self.rig.queue.publish_used():
            self.interrupted = True
        self.done += [Used(given.head, written) for _, given, written in self.returned]
        self.returned = []

    @rule()
    def device_serves_until_idle(self):
        """A worker's steps; then it sleeps."""
        self.kicked = False
        more = True
        while more:
            self.rig.queue.disable_notification()
            while self.waiting:
                self.device_takes_one()
            self.device_takes_one()
            while self.taken:
                chain, given = self.taken.pop(0)
                self.rig.queue.add_used(chain, 4)
                self.returned.append((chain, given, 4))
            self.device_publishes()
            more = self.rig.queue.enable_notification()
        # Asleep: whatever the driver does next must wake it.
        self.driver_adds(1, False)
        if self.unpublished:
            self.driver_publishes()
            assert self.kicked, "the device sleeps and was not kicked"

    @precondition(lambda self: not self.returned)
    @rule()
    def device_is_saved_and_restored(self):
        state = self.rig.queue.state()
        again = QueueState.from_plain(state.to_plain())
        self.rig.queue = self.rig.restored(again)
        assert self.rig.queue.state() == state
        self.taken = [
            (self.rig.queue.chain_in_flight(given.head), given) for _, given in self.taken
        ]
        assert [chain.head for chain, _ in self.taken] == [c.head for c in state.in_flight]

    # --- always --------------------------------------------------------------------------------

    @invariant()
    def an_idle_driver_was_interrupted(self):
        # It asks for an interrupt with the next used buffer whenever it has taken all of them.
        if hasattr(self, "rig") and self.done:
            assert self.interrupted, "buffers were used and nobody told the driver"


Model.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase
