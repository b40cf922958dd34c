"""Our queues in litmus tests: `python litmus_device.py DRIVER LAYOUT ROUNDS [MODE]`.

DRIVER is litmus_driver.c, compiled; it is on another processor. Of each round's outcomes the
forbidden ones are those in which each side has missed what the other one stored: nobody would wake
the other. In the mode `without` the queue has no fence; in the mode `early` it looks at copies of
what the driver writes, made just before its own stores: as a processor may do that has no fence.
What came of it is printed as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from statistics import median
from time import perf_counter_ns
from typing import Any

from pyvmm.host.fences import new_fence
from pyvmm.host.syscalls import EventFd
from pyvmm.memory import GuestMemory
from pyvmm.virtio.features import VIRTIO_F_EVENT_IDX, VIRTIO_F_RING_PACKED, mask
from pyvmm.virtio.queue.build import build_queue
from pyvmm.virtio.queue.state import QueueConfig

SIZE = 16
MEMORY = 1 << 20
DESC, DRIVER, DEVICE, CONTROL, REQUESTS, REPLY, CLUTTER = ADDRESSES = tuple(
    range(0x1000, 0xF000, 0x2000)
)
GO, DONE, ANSWER, SPREAD = 0, 8, 16, 24  # 64-bit words in the control area
REPLY_SIZE = 4096
SPLIT_VIEWS, PACKED_VIEWS = ("_avail",), ("_flags", "_driver_event")  # of what the driver writes
OFTEN = 64  # rounds after which the driver is told anew how long our part takes
LOOKS = 1000  # between two questions whether the driver is still there


def early(queue: Any, packed: bool, call: Callable[[], bool]) -> bool:
    """`call` with its loads before its stores."""
    views = {name: getattr(queue, name) for name in (PACKED_VIEWS if packed else SPLIT_VIEWS)}
    for name, view in views.items():
        setattr(queue, name, memoryview(bytes(view)).cast(view.format))
    try:
        return call()
    finally:
        for name, view in views.items():
            setattr(queue, name, view)


def main(program: str, layout: str, rounds: int, mode: str) -> dict[str, object]:
    """The outcomes of so many rounds."""
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[:1])
    memory = GuestMemory([(0, MEMORY)])
    packed = layout == "packed"
    config = QueueConfig(SIZE, SIZE, DESC, DRIVER, DEVICE, ready=True)
    features = mask(VIRTIO_F_EVENT_IDX, *((VIRTIO_F_RING_PACKED,) if packed else ()))
    queue = build_queue(memory, config, features, 0, EventFd())
    fence = new_fence()
    if mode == "without":
        queue._fence = "".isascii  # type: ignore[attr-defined]

    def do(call: Callable[[], bool]) -> bool:
        return early(queue, packed, call) if mode == "early" else call()

    control = memory.view(CONTROL, 256).cast("Q")
    clutter = memory.view(CLUTTER, REPLY_SIZE)
    noise = bytes(REPLY_SIZE)
    command = [program, memory.fd, MEMORY, layout, SIZE, rounds, cpus[1], *ADDRESSES]
    driver = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, pass_fds=(memory.fd,)
    )

    def begin(meeting: int) -> None:
        fence()
        control[GO] = meeting

    def end(meeting: int) -> int:
        looks = 0
        while control[DONE] != meeting:
            looks += 1
            if looks % LOOKS == 0 and driver.poll() is not None and control[DONE] != meeting:
                sys.exit(f"the driver ended: {driver.returncode}")
        fence()
        return control[ANSWER]

    kicks, interrupts = Counter[tuple[bool, bool]](), Counter[tuple[bool, bool]]()
    stale, took = 0, list[int]()
    for n in range(1, rounds + 1):
        start = perf_counter_ns()
        begin(2 * n - 1)
        clutter[:] = noise
        more = do(queue.enable_notification)
        took.append(perf_counter_ns() - start)
        kicks[bool(end(2 * n - 1)), more] += 1
        chain = queue.pop()
        if chain is None:
            sys.exit(f"round {n}: the buffer that was offered is not there")
        reader, writer = chain.reader(), chain.writer()
        length = reader.available
        stale += length != 8 + n % 8 * 8 or int.from_bytes(reader.read(8), "little") != n
        reply = n.to_bytes(8, "little") * (REPLY_SIZE // 8)
        begin(2 * n)
        writer.write(reply)
        queue.add_used(chain, REPLY_SIZE)
        wanted = do(queue.publish_used)
        interrupts[bool(end(2 * n)), wanted] += 1
        if n % OFTEN == 0:
            control[SPREAD] = int(1.5 * median(took[-OFTEN:]))
    out, _ = driver.communicate()
    return {
        "rounds": rounds,
        "lost kicks": kicks[False, False],
        "lost interrupts": interrupts[False, False],
        "stale requests": stale,
        "stale replies": int(out),
        # Rounds in which only one side saw the other, each way: without any, they never met.
        "kicks": [kicks[True, False], kicks[False, True]],
        "interrupts": [interrupts[False, True], interrupts[True, False]],
    }


if __name__ == "__main__":
    name, layout, rounds, *rest = sys.argv[1:]
    print(json.dumps(main(name, layout, int(rounds), *rest or [""])))
