"""Rings that vhost-user back ends leave behind: a back end takes requests and returns some of them,
in whatever order, with notes on what is in flight (INFLIGHT) or without, and dies between any two
lines of that; our front end finds another one, or refuses what is left.

The back end is played here, on the rings in guest memory and on its notes, which have the layout of
QEMU's docs/interop/vhost-user.rst. It raises AssertionError, with the steps so far, if

- a request is returned twice, or by nobody although a back end or our refusal had its turn,
- the next back end is told to begin elsewhere than where the used ring ends,
- the device fails although the rings tell what is to be done, or changes a ring that has failed,
- a descriptor or a thread is left.
"""

from __future__ import annotations

import gc
import os
import struct
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import front_end_rig as rig
from fuzz.peers import ECHO, refuse, told
from fuzz.room import check_closed, check_ended, open_files

from pyvmm.errors import PyvmmError
from pyvmm.host.syscalls import create_memfd
from pyvmm.testing.mmio_driver import NEEDS_RESET, SAFETY_TIMEOUT, Ring
from pyvmm.testing.mock_driver import MockSplitDriver

SIZE = 16  # the largest of a queue
QUEUES = 2
_PATIENCE = 0.03  # seconds for what a back end has taken and does not return
_NOTES = 1 << 12
_HEAD, _STATE = struct.Struct("=QHHHH"), struct.Struct("=B5xHQ")
_REGION = -(-(_HEAD.size + _STATE.size * SIZE) // 64) * 64


class _Served:
    """One ring as the back end sees it: where it goes on, and what it has not returned."""

    def __init__(self, queue: MockSplitDriver, at: int) -> None:
        self.queue, self.at = queue, at
        self.taken: list[int] = []
        self.in_order = True  # whether all that was returned came back as it was made available

    @property
    def used(self) -> int:
        return int.from_bytes(self.queue.memory.read(self.queue.used_addr + 2, 2), "little")

    @property
    def made_available(self) -> int:
        where = self.queue.avail_addr + 2
        return int.from_bytes(self.queue.memory.read(where, 2), "little")

    def available(self) -> int:
        return self.made_available - self.at & 0xFFFF

    @property
    def shows_disorder(self) -> bool:
        """True if some are out, and both rings have all that there ever was in them."""
        all_there = self.made_available <= self.queue.size
        return all_there and not self.in_order and self.made_available != self.used

    def take(self) -> int:
        slot = self.queue.avail_addr + 4 + 2 * (self.at % self.queue.size)
        head = int.from_bytes(self.queue.memory.read(slot, 2), "little")
        self.at = self.at + 1 & 0xFFFF
        self.taken.append(head)
        return head

    def write(self, head: int, at: int) -> None:
        where = self.queue.used_addr + 4 + 8 * (at % self.queue.size)
        self.queue.memory.write(where, struct.pack("<II", head, 8))
        self.queue.memory.write(self.queue.used_addr + 2, (at + 1 & 0xFFFF).to_bytes(2, "little"))


class _Notes:
    """What the back end notes on its requests, if it does."""

    def __init__(self) -> None:
        self.fd = -1
        self.counter = 1

    def at(self, index: int, head: int | None = None) -> int:
        inside = 0 if head is None else _HEAD.size + _STATE.size * head
        return _REGION * index + inside

    def begin(self, index: int, used: int) -> None:
        os.pwrite(self.fd, _HEAD.pack(0, 1, SIZE, 0, used), self.at(index))

    def mark(self, index: int, head: int, on: bool, following: int = 0) -> None:
        _, _, counter = _STATE.unpack(os.pread(self.fd, _STATE.size, self.at(index, head)))
        if on:
            counter, self.counter = self.counter, self.counter + 1
        state = _STATE.pack(on, following, counter)
        os.pwrite(self.fd, state, self.at(index, head))

    def note_batch(self, index: int, head: int) -> None:
        """`head` is about to be published, as the latest."""
        last = struct.unpack("=H", os.pread(self.fd, 2, self.at(index) + 12))[0]
        os.pwrite(self.fd, struct.pack("=H", last), self.at(index, head) + 6)
        os.pwrite(self.fd, struct.pack("=H", head), self.at(index) + 12)

    def note_used(self, index: int, used: int) -> None:
        os.pwrite(self.fd, struct.pack("=H", used), self.at(index) + 14)


class _Case:
    """A driver, our front end, and the back ends at a place."""

    def __init__(self, rng: Random, closing: ExitStack, said: list[str]) -> None:
        self.rng, self.said = rng, said
        self.folder = Path(closing.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        self.notes = _Notes()
        self.keeps_notes = rng.random() < 0.6
        knows = rig.ALL if self.keeps_notes else rig.ALL & ~rig.P_INFLIGHT
        self.back_end = closing.enter_context(
            rig.fake(
                self.folder / "s", protocol=knows, actions={rig.GET_INFLIGHT_FD: self._give_notes}
            )
        )
        self.refuses = rng.random() < 0.7
        self.resumes = rng.random() < 0.8
        served = replace(
            ECHO, refuse=refuse if self.refuses else None, is_stateless=True, resumes=self.resumes
        )
        self.said.append(f"notes {self.keeps_notes}, {self.refuses=}, {self.resumes=}")
        self.front = closing.enter_context(
            rig.front(
                self.folder / "s",
                served,
                start=False,
                reconnect=SAFETY_TIMEOUT,
                queue_size=SIZE,
            )
        )
        self.device, self.driver = self.front.device, self.front.driver.mmio
        self.rings: list[_Served] = []
        self.chains: dict[int, set[int]] = {}  # the heads that are out, of each queue
        self.gone = False
        self.may_fail = False

    def _give_notes(self, back_end: rig.Fake, number: int, payload: bytes, fds: list[int]) -> bool:
        self.notes.fd = create_memfd("notes", _NOTES)
        back_end.kept.append(self.notes.fd)
        described = struct.pack("=QQ", _NOTES, 0) + payload[16:]
        back_end.answer(number, described, (self.notes.fd,))
        return False

    @property
    def has_failed(self) -> bool:
        return bool(self.driver.status & NEEDS_RESET)

    def begin(self) -> None:
        self.said.append("begun")
        self.driver.reset()
        self.driver.start(queue_sizes=[self.rng.choice((4, 8, SIZE)) for _ in range(QUEUES)])
        self.chains = {index: set() for index in range(QUEUES)}
        self.may_fail = False
        self.rings = []
        for index, queue in enumerate(self.driver.queues):
            assert isinstance(queue, MockSplitDriver)
            self.rings.append(_Served(queue, 0))
            if self.keeps_notes and not self.gone:
                self.notes.begin(index, 0)
        if self.gone:  # nobody serves, and the device waits for somebody
            raise _Ended
        # A lie about the first position would be told from here on.
        self.front.wait_no_longer_than(_PATIENCE)

    # --- what is done -----------------------------------------------------------------------------

    def ask(self) -> None:
        index = self.rng.randrange(QUEUES)
        count = self.rng.choice((1, 2, 3))
        queue = self.driver.queues[index]
        count = min(count, (queue.size - 2 * len(self.chains[index])) // 2)
        self.said.append(f"{count} requests in queue {index}")
        for _ in range(count):
            chain = self.driver.submit(index, [b"question"], [8])
            self.chains[index].add(chain.head)

    def take(self) -> None:
        index = self.rng.randrange(QUEUES)
        ring = self.rings[index]
        for _ in range(min(ring.available(), self.rng.choice((1, 2, 5)))):
            head = ring.take()
            self.said.append(f"takes {head} of queue {index}")
            if self.keeps_notes:
                self.notes.mark(index, head, True)

    def give(self) -> None:
        index = self.rng.randrange(QUEUES)
        ring = self.rings[index]
        for _ in range(min(len(ring.taken), self.rng.choice((1, 1, 2, 5)))):
            place = 0 if self.rng.random() < 0.4 else self.rng.randrange(len(ring.taken))
            ring.in_order &= place == 0
            head = ring.taken.pop(place)
            self.said.append(f"returns {head} of queue {index}")
            at = ring.used
            if self.keeps_notes:
                self.notes.note_batch(index, head)
            ring.write(head, at)
            if self.keeps_notes:
                if self.rng.random() < 0.1:  # between these two lines
                    self.said.append("and no more of it")
                    self.die()
                    return
                self.notes.mark(index, head, False)
                self.notes.note_used(index, at + 1 & 0xFFFF)
        self.look()

    def look(self) -> None:
        """The driver takes what has been returned."""
        for index, queue in enumerate(self.driver.queues):
            while (used := queue.pop_used()) is not None:
                assert used.head in self.chains[index], f"{used} of queue {index} came twice"
                self.chains[index].remove(used.head)

    def _say_bases(self) -> None:
        """Where the back end says that it stands, when it is asked."""
        for index, ring in enumerate(self.rings):
            self.back_end.bases[index] = ring.at

    def rest(self) -> None:
        """The rings come back for a moment: somebody looks at them, and the back end goes on."""
        self.said.append("rings are taken back")
        self._say_bases()
        queues = self.front.driver.transport.negotiation.active_queues
        for queue in queues:
            with queue.lock:
                assert queue.stats is not None
        self._go_on()

    def die(self) -> None:
        """It is killed; another one is there at once."""
        self.said.append("dies")
        if not self.resumes:
            self._leave()
            return
        before, must_fail = self.device.stats()["reconnections"], self._must_fail
        self.back_end.die()
        self.front.until(lambda: self.has_failed or self.device.stats()["reconnections"] != before)
        assert self.has_failed or not must_fail, "what was done already is done again"
        self._go_on()

    @property
    def _must_fail(self) -> bool:
        return not self.keeps_notes and any(ring.shows_disorder for ring in self.rings)

    def _go_on(self) -> None:
        """A back end has the rings anew; with what it is told, and its notes."""
        tells = self.keeps_notes or all(ring.in_order for ring in self.rings)
        self._wait_for_a_back_end()
        if self.device._has_given_up and any("lets us wait" in line for line in self.front.lines):
            self.begin()  # a slow machine
            return
        if self.has_failed:
            assert not tells, f"it failed without need: {self.front.driver.log} {self.front.lines}"
            self._check_untouched()
            self.begin()
            return
        for index, ring in enumerate(self.rings):
            base = self.back_end.bases[index]
            assert base == ring.used, f"queue {index} goes on at {base}, not {ring.used}"
            self.may_fail |= not tells
            ring.taken, ring.at = [], base
            if self.keeps_notes:
                ring.taken = self._found(index, ring)
                ring.at = base + len(ring.taken) & 0xFFFF
        if self.may_fail:  # some are lost, and others come twice: nobody could see that
            self.begin()

    def _wait_for_a_back_end(self) -> None:
        """Until it has all rings: on a slow machine one may be given up for being slow."""
        device = self.device

        def has_all() -> bool:
            link = device._session
            rings = [device._away.get(index) for index in range(QUEUES)]
            return link is not None and link is device._link and rings == [link] * QUEUES

        self.front.until(lambda: self.has_failed or device._has_given_up or has_all())

    def _found(self, index: int, ring: _Served) -> list[int]:
        """What the next back end finds in the notes, which it tidies up."""
        if self.notes.fd < 0:
            return []
        head_of = os.pread(self.notes.fd, _HEAD.size, self.notes.at(index))
        _, _, _, last, used = _HEAD.unpack(head_of)
        for _ in range(ring.used - used & 0xFFFF):
            self.notes.mark(index, last, False)
        self.notes.note_used(index, ring.used)
        marked = []
        for head in range(SIZE):
            raw = os.pread(self.notes.fd, _STATE.size, self.notes.at(index, head))
            is_in_flight, _, counter = _STATE.unpack(raw)
            if is_in_flight:
                marked.append((counter, head))
        return [head for _, head in sorted(marked)]

    def _check_untouched(self) -> None:
        """A ring of a device that has failed stays as it is."""
        before = [ring.used for ring in self.rings]
        for index in range(QUEUES):
            self.driver.notify(index)
        assert [ring.used for ring in self.rings] == before

    def leave(self) -> None:
        """It goes, and nobody comes in its place."""
        self.device._reconnect = self.device._give_up_at = 0.0
        self._leave()

    def _leave(self) -> None:
        self.said.append("goes for good")
        self.gone = True
        tells = self.keeps_notes or all(ring.in_order for ring in self.rings)
        must_fail = self._must_fail
        self.back_end.close()
        if self.refuses:
            self.front.until(lambda: self._all_came_back() or self.has_failed)
            assert self.has_failed or not must_fail, "what was done already is refused"
            assert not (self.has_failed and tells), f"it failed without need: {self.front.lines}"
        else:
            self.front.until(lambda: self.has_failed)
        if self.has_failed:
            self._check_untouched()
        raise _Ended

    def _all_came_back(self) -> bool:
        self.look()
        return not any(self.chains.values())

    def run(self) -> None:
        self.begin()
        ways: tuple[Any, ...] = (
            *(self.ask, self.ask, self.ask, self.take, self.take, self.take, self.give, self.give),
            *(self.rest, self.die),
        )
        for _ in range(self.rng.randint(4, 24)):
            self.rng.choice(ways)()
        if self.rng.random() < 0.6:
            for way in (self.ask, self.take, self.give):  # so that there is something to leave
                way()
            self.leave()


class _Ended(Exception):
    """There is nothing left to try."""


def left_rings_case(rng: Random, ring: Ring) -> int:
    """One front end and what its back ends leave, in split rings; how many steps there were."""
    said: list[str] = []
    looks = rng.random() < 0.1  # which costs as much as a case
    gc.collect() if looks else None
    files, threads = open_files(), threading.active_count()
    with told(said):
        _run(rng, said)
    check_ended(threads)
    if looks:
        check_closed(files)
    return len(said)


def _run(rng: Random, said: list[str]) -> None:
    with ExitStack() as closing:
        case = _Case(rng, closing, said)
        try:
            case.run()
        except _Ended:
            pass
        except PyvmmError as error:
            raise AssertionError(f"{error}, {case.front.lines}") from error
        case.driver.reset()
        assert case.driver.status == 0
