"""Requests in flight when a back end is killed: the next one carries out just those.

QEMU's docs/interop/vhost-user.rst, "Inflight I/O tracking".
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import struct
import subprocess
import sys

import pytest
from queue_rig import Rig
from vhost_user_rig import MIB, Echo, connected

from pyvmm.memory import GuestMemory
from pyvmm.testing import Buffer
from pyvmm.testing.blk_driver import IN, OK, OUT, header
from pyvmm.testing.vhost_user_driver import (
    GET_INFLIGHT_FD,
    RESET_DEVICE,
    SET_INFLIGHT_FD,
    Gone,
    Refused,
    VhostUserDriver,
    connect,
)
from pyvmm.vhost_user import inflight as inflight_module
from pyvmm.vhost_user.inflight import Inflight
from pyvmm.vhost_user.protocol import FrontEndError
from pyvmm.virtio.queue import split as split_queue

SIZE = 16
REGION = 16 + 16 * SIZE  # QueueRegionSplit with its DescStateSplit
USUAL = ([Buffer(0x8000, 16)], [Buffer(0x9000, 512), Buffer(0xA000, 1)])


class Killed(BaseException):
    pass


def killed_after(lines: int, work) -> bool:
    """Run `work`, and end it after so many lines of the code that keeps the notes and the ring;
    whether it was."""
    files = {split_queue.__file__, inflight_module.__file__}
    left = lines

    def each(frame, event, argument):
        nonlocal left
        if event == "line":
            left -= 1
            if left < 0:
                raise Killed
        return each

    def calls(frame, event, argument):
        return each if frame.f_code.co_filename in files else None

    sys.settrace(calls)
    try:
        work()
    except Killed:
        return True
    finally:
        sys.settrace(None)
    return False


def some_life(rig: Rig, chance: random.Random) -> None:
    """A device that takes and returns chains one by one and in batches, in any order."""
    taken = []
    for _ in range(40):
        while rig.driver.room >= 3 and chance.random() < 0.7:
            rig.driver.add(*USUAL)
        rig.driver.publish()
        action = chance.randrange(6)
        if action <= 1:
            chain = rig.queue.pop()
            if chain is not None:
                taken.append(chain)
        elif action == 2 and taken:
            rig.queue.add_used(taken.pop(chance.randrange(len(taken))), 1)
        elif action == 3:
            chains, _ = rig.queue.peek_usual(16, 1, 1 << 20)
            rig.queue.use_peeked([1] * chance.randint(0, len(chains)))
        elif action == 4 and taken:
            youngest = taken[-1]
            try:
                rig.queue.step_back(youngest)
            except ValueError:  # others were returned in a batch since
                continue
            taken.pop()
        else:
            rig.queue.publish_used()
            while rig.driver.pop_used() is not None:
                pass


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_line_nothing_is_lost_and_nothing_is_done_twice(seed):
    lines = 0
    killed = True
    while killed:
        rig = Rig(SIZE, event_idx=bool(seed & 1))
        notes = Inflight.create(1, SIZE)
        journal = notes.journal(0, SIZE)
        rig.queue.keep_journal(journal, journal.resume(0))
        killed = killed_after(lines, lambda rig=rig: some_life(rig, random.Random(seed)))
        for again in range(2):  # the second back end may be killed as well
            while rig.driver.pop_used() is not None:
                pass
            rig.driver.publish()
            wanted = rig.driver.outstanding
            at = rig.driver.used_idx
            queue = rig.restored(_at(rig.queue.state(), at))
            journal = notes.journal(0, SIZE)
            queue.keep_journal(journal, journal.resume(at))
            found = [chain.head for chain in queue]
            assert sorted(found) == sorted(wanted), f"killed after {lines} lines, {again}"
        rig.close()
        notes.close()
        lines += 23
    assert lines > 500


def _at(state, position):
    return state._replace(next_avail=position, next_used=position, in_flight=())


def test_the_order_in_which_they_were_taken_is_kept():
    rig = Rig(SIZE)
    notes = Inflight.create(1, SIZE)
    journal = notes.journal(0, SIZE)
    rig.queue.keep_journal(journal, journal.resume(0))
    given = [rig.driver.add([b"x"], [1], scrambled=True) for _ in range(5)]
    rig.driver.publish()
    chains = list(rig.queue)
    rig.queue.add_used(chains[2], 1)
    rig.queue.publish_used()
    wanted = [given[n].head for n in (0, 1, 3, 4)]
    assert notes.journal(0, SIZE).resume(1) == wanted
    rig.close()
    notes.close()


def test_what_is_taken_again_does_not_come_from_the_ring():
    """The second request was returned before the first, so their places are not their own."""
    rig = Rig(SIZE)
    notes = Inflight.create(1, SIZE)
    first, second, third = (rig.driver.add(*USUAL) for _ in range(3))
    rig.driver.publish()
    journal = notes.journal(0, SIZE)
    rig.queue.keep_journal(journal, journal.resume(0))
    chains = [rig.queue.pop(), rig.queue.pop()]
    rig.queue.add_used(chains[1], 1)
    rig.queue.publish_used()
    assert rig.driver.pop_used().head == second.head
    queue = rig.restored(_at(rig.queue.state(), 1))
    journal = notes.journal(0, SIZE)
    queue.keep_journal(journal, journal.resume(1))
    assert queue.peek_usual(16, 1, 1 << 20) == ([], True)
    again = queue.pop()
    assert again.head == first.head
    queue.step_back(again)
    assert notes.journal(0, SIZE).resume(1) == [first.head]
    queue.add_used(queue.pop(), 1)
    queue.publish_used()
    assert len(queue.peek_usual(16, 1, 1 << 20)[0]) == 1
    queue.use_peeked([1])
    queue.publish_used()
    assert [used.head for used in rig.all_used()] == [first.head, third.head]
    rig.close()
    notes.close()


def test_a_chain_taken_before_one_that_was_returned_is_in_flight():
    rig = Rig(SIZE)
    notes = Inflight.create(1, SIZE)
    journal = notes.journal(0, SIZE)
    rig.queue.keep_journal(journal, journal.resume(0))
    given = [rig.driver.add([b"x"], [1]) for _ in range(2)]
    rig.driver.publish()
    chains = list(rig.queue)
    rig.queue.add_used(chains[1], 1)
    rig.queue.publish_used()
    assert rig.driver.pop_used().head == given[1].head
    assert notes.journal(0, SIZE).resume(1) == [given[0].head]
    rig.close()
    notes.close()


def test_the_layout_is_that_of_the_specification():
    rig = Rig(SIZE)
    notes = Inflight.create(2, SIZE)
    raw = notes._view
    journal = notes.journal(1, SIZE)
    rig.queue.keep_journal(journal, journal.resume(0))
    place = len(raw) // 2
    assert struct.unpack_from("=QHHHH", raw, place) == (0, 1, SIZE, 0, 0)
    given = [rig.driver.add([b"x"]) for _ in range(3)]
    rig.driver.publish()
    chains = list(rig.queue)

    def of(chain):
        return struct.unpack_from("=B5xHQ", raw, place + 16 + 16 * chain.head)

    assert [of(chain)[::2] for chain in given] == [(1, 0), (1, 1), (1, 2)]
    rig.queue.add_used(chains[0], 0)
    rig.queue.add_used(chains[1], 0)
    rig.queue.publish_used()
    assert struct.unpack_from("=QHHHH", raw, place) == (0, 1, SIZE, given[1].head, 2)
    assert [of(chain)[0] for chain in given] == [0, 0, 1]
    assert of(given[1])[1] == given[0].head
    assert bytes(raw[:place]) == bytes(place)
    rig.close()
    notes.close()


def test_marks_of_a_batch_that_was_published_are_taken_away():
    """Killed between the used index and the marks."""
    notes = Inflight.create(1, SIZE)
    raw = notes._view
    notes.journal(0, SIZE).resume(7)
    for head, following in ((3, 5), (5, 9), (9, 0)):
        struct.pack_into("=B5xHQ", raw, 16 + 16 * head, 1, following, head)
    struct.pack_into("=HH", raw, 12, 3, 7)
    assert notes.journal(0, SIZE).resume(9) == [9]
    assert struct.unpack_from("=H", raw, 14) == (9,)
    notes.close()


def test_notes_of_an_earlier_ring_count_for_nothing():
    notes = Inflight.create(1, SIZE)
    journal = notes.journal(0, SIZE)
    journal.resume(500)
    journal.taken(3)
    assert notes.journal(0, SIZE).resume(0) == []
    notes.close()


@pytest.mark.parametrize(
    ("place", "layout", "value"),
    [(8, "=H", 2), (10, "=H", SIZE - 1), (10, "=H", 0xFFFF), (12, "=H", SIZE), (12, "=H", 0xFFFF)],
)
def test_hostile_notes_are_refused(place, layout, value):
    notes = Inflight.create(1, SIZE)
    notes.journal(0, SIZE).resume(7)
    struct.pack_into(layout, notes._view, place, value)
    with pytest.raises(FrontEndError):
        notes.journal(0, SIZE).resume(9)
    notes.close()


def test_hostile_notes_that_mark_everything_make_up_no_request():
    """A buffer that the driver did not offer is not taken, whatever the notes say."""
    rig = Rig(SIZE)
    notes = Inflight.create(1, SIZE)
    notes.journal(0, SIZE).resume(0)
    for head in range(SIZE):
        notes._view[16 + 16 * head] = 0xFF
    given = rig.driver.add([b"x"], [1])
    rig.driver.publish()
    journal = notes.journal(0, SIZE)
    rig.queue.keep_journal(journal, journal.resume(0))
    assert [chain.head for chain in rig.queue] == [given.head]
    rig.close()
    notes.close()


# --- messages -------------------------------------------------------------------------------------


def test_the_back_end_makes_memory_that_cannot_shrink():
    with connected(Echo()) as rig:
        rig.driver.negotiate()
        described, fd = rig.driver.get_inflight(2, 64)
        size, offset, num_queues, queue_size = struct.unpack_from("=QQHH", described)
        assert (offset, num_queues, queue_size) == (0, 2, 64)
        assert os.fstat(fd).st_size == size >= 2 * (16 + 16 * 64)
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 0)
        rig.driver.tell(SET_INFLIGHT_FD, described, [fd])
        os.close(fd)


@pytest.mark.parametrize(
    "num_queues, queue_size", [(0, 64), (3, 64), (0xFFFF, 64), (1, 0), (1, 40000)]
)
def test_memory_that_cannot_be_is_not_made(num_queues, queue_size):
    with connected(Echo()) as rig:
        rig.driver.negotiate()
        with pytest.raises(Gone):
            rig.driver.get_inflight(num_queues, queue_size)
        assert rig.ended() is not None


def description(size=1 << 20, offset=0, num_queues=1, queue_size=64):
    return struct.pack("=QQHH4x", size, offset, num_queues, queue_size)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        description()[:19],
        description(size=100),
        description(offset=4096),
        description(offset=1 << 63),
        description(queue_size=0),
        description(queue_size=0xFFFF),
        description(num_queues=0),
        description(num_queues=0xFFFF, queue_size=32768),
    ],
)
def test_memory_that_cannot_be_is_refused(payload):
    fd = os.memfd_create("notes")
    os.ftruncate(fd, 4096)
    with connected(Echo()) as rig:
        rig.driver.negotiate()
        with pytest.raises(Refused):
            rig.driver.tell(SET_INFLIGHT_FD, payload, [fd])
        rig.driver.lend()
        rig.driver.lay_out(0, 64)
        rig.driver.set_up(0)
        assert rig.echoes()
    os.close(fd)


@pytest.mark.parametrize("count", [0, 2])
def test_it_comes_with_one_file_descriptor(count):
    fds = [os.memfd_create("notes") for _ in range(count)]
    with connected(Echo()) as rig:
        rig.driver.negotiate()
        with pytest.raises(Refused):
            rig.driver.tell(SET_INFLIGHT_FD, description(), fds)
    for fd in fds:
        os.close(fd)


def test_a_pipe_is_no_memory():
    ends = os.pipe()
    with connected(Echo()) as rig:
        rig.driver.negotiate()
        with pytest.raises(Refused):
            rig.driver.tell(SET_INFLIGHT_FD, description(), [ends[0]])
    for end in ends:
        os.close(end)


def test_it_does_not_change_while_a_ring_runs():
    with connected(Echo()) as rig:
        rig.driver.start()
        with pytest.raises(Gone):
            rig.driver.ask(GET_INFLIGHT_FD, description())
        rig.ended()


@pytest.mark.parametrize("sizes", [(1, 64), (2, 32)])
def test_a_ring_that_it_has_no_room_for_does_not_start(sizes):
    num_queues, queue_size = sizes
    with connected(Echo()) as rig:
        driver = rig.driver
        driver.negotiate()
        _, fd = driver.get_inflight(num_queues, queue_size)
        os.close(fd)
        driver.lend()
        for index in range(2):
            driver.lay_out(index, 64)
        with pytest.raises(Refused):
            for index in range(2):
                driver.set_up(index)


def test_packed_rings_do_without():
    with connected(Echo(packed=True)) as rig:
        driver = rig.driver
        driver.negotiate()
        _, fd = driver.get_inflight(1, 64)
        os.close(fd)
        driver.lend()
        driver.lay_out(0, 64)
        driver.set_up(0)
        assert rig.echoes()


def test_a_device_reset_forgets_the_notes():
    with connected(Echo()) as rig:
        driver = rig.driver
        driver.negotiate()
        _, fd = driver.get_inflight(1, 8)
        os.close(fd)
        driver.tell(RESET_DEVICE)
        driver.negotiate()
        driver.lend()
        driver.lay_out(0, 64)
        driver.set_up(0)
        assert rig.echoes()


# --- killed ---------------------------------------------------------------------------------------

# Takes what comes, returns every second request, the youngest first, and keeps the others; with a
# second argument it returns all, in the order in which they come.
HOLDER = """
import sys
from pyvmm.transport.vhost_user import serve
from pyvmm.virtio.worker import QueueDevice

class Holder(QueueDevice):
    name, device_type, queue_sizes = "holder", 42, (64,)

    def serve(self, queue):
        for chain in list(queue) if len(sys.argv) > 2 else list(queue)[1::2][::-1]:
            data = chain.reader().read(chain.readable_size)
            chain.writer().write(data)
            queue.add_used(chain, len(data))

serve(Holder(), sys.argv[1])
"""


def start(*command):
    """A back end in a process group of its own."""
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


def kill(process):
    """It and all that it has started, without a warning."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_device_that_returns_in_any_order_is_killed_and_followed(tmp_path):
    path = tmp_path / "holder.sock"
    memory = GuestMemory([(0, MIB)])
    first = start(sys.executable, "-c", HOLDER, str(path))
    with VhostUserDriver(connect(path), memory) as driver:
        driver.negotiate()
        described, fd = driver.get_inflight(1, 64)
        driver.tell(SET_INFLIGHT_FD, described, [fd])
        driver.lend()
        queue = driver.lay_out(0, 64)
        chains = [queue.add([bytes([65 + n])], [1]) for n in range(20)]
        queue.publish()
        driver.set_up(0)
        driver.kick()
        early = [driver.wait_used(0) for _ in range(10)]
        assert [used.head for used in early] == [chain.head for chain in reversed(chains[1::2])]
        kill(first)
        second = start(sys.executable, "-c", HOLDER, str(path), "go")
        with VhostUserDriver(connect(path), memory) as follower:
            follower.negotiate()
            follower.tell(SET_INFLIGHT_FD, described, [fd])
            follower.take_over(driver)
            late = [follower.wait_used(0) for _ in range(10)]
            # In the order in which they had been taken.
            assert [used.head for used in late] == [chain.head for chain in chains[::2]]
            assert [queue.contents(chain) for chain in chains] == [
                bytes([65 + n]) for n in range(20)
            ]
            assert follower.request(0, [b"new"], [3]) == (3, b"new")
        kill(second)
    os.close(fd)
    memory.close()


def test_a_disk_is_killed_again_and_again_in_the_middle_of_its_work(tmp_path):
    """Each block is written, and read again, whoever did it."""
    image, path = tmp_path / "disk.img", tmp_path / "disk.sock"
    image.write_bytes(bytes(MIB))
    memory = GuestMemory([(0, 4 * MIB)])
    command = (sys.executable, "-m", "pyvmm", "vhost-user-blk")
    command += ("--socket", str(path), "--disk", str(image))
    before: VhostUserDriver | None = None
    described, fd = b"", -1
    blocks = iter(range(256))
    waiting: dict[int, int] = {}
    done: list[int] = []
    while len(done) < 256:
        server = start(*command)
        driver = VhostUserDriver(connect(path), memory)
        driver.negotiate()
        if before is None:
            described, fd = driver.get_inflight(1, 256)
        driver.tell(SET_INFLIGHT_FD, described, [fd])
        if before is None:
            driver.lend()
            driver.lay_out(0, 256)
            driver.set_up(0)
        else:
            driver.take_over(before)
            before.close()
        queue = driver.queues[0]
        # All but the last life end with requests that nobody has waited for.
        for block in itertools.islice(blocks, 70 - len(waiting)):
            chain = queue.add([header(OUT, 2 * block), bytes([block]) * 1024], [1])
            waiting[chain.head] = block
        queue.publish()
        driver.kick()
        last = len(done) + len(waiting) == 256
        for _ in range(len(waiting) if last else 30):
            done.append(waiting.pop(driver.wait_used(0).head))
        if not last:
            kill(server)
        before = driver
    assert sorted(done) == list(range(256)), "a request was lost, or done twice"
    answer = before.request(0, [header(IN, 0)], [512, 1])
    assert answer[1][-1] == OK
    kill(server)
    before.close()
    os.close(fd)
    assert image.read_bytes()[: 256 * 1024] == b"".join(bytes([n]) * 1024 for n in range(256))
    memory.close()
