"""What is fuzzed without a device of ours, by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from random import Random
from typing import NamedTuple

from fuzz.agent_client import agent_client_case
from fuzz.agent_program import agent_program_case
from fuzz.archives import archive_case
from fuzz.both_ends import both_ends_case
from fuzz.control import control_case
from fuzz.disks import disk_case
from fuzz.file_systems import file_system_case
from fuzz.keeper import keeper_case
from fuzz.kernels import kernel_case
from fuzz.left_rings import left_rings_case
from fuzz.peers import back_end_case, front_end_case, server_case
from fuzz.queues import queue_case
from fuzz.saved import saved_case
from fuzz.storage import storage_case
from fuzz.vsock_streams import vsock_streams_case

from pyvmm.testing.mmio_driver import Ring


class Cases(NamedTuple):
    """`run` does one, for a kind of ring (which some do not care about), and says how many steps it
    had; `share` come for each case of a device: many of what takes little time."""

    run: Callable[[Random, Ring], int]
    share: int


CASES = {
    "agent-client": Cases(agent_client_case, 200),
    "archive": Cases(archive_case, 40),
    "back-end": Cases(back_end_case, 32),
    "both-ends": Cases(both_ends_case, 1),
    "control": Cases(control_case, 40),
    "disk": Cases(disk_case, 50),
    "file-system": Cases(file_system_case, 40),
    "front-end": Cases(front_end_case, 4),
    "keeper": Cases(keeper_case, 16),
    "kernel": Cases(kernel_case, 24),
    "left-rings": Cases(left_rings_case, 1),
    "queue": Cases(queue_case, 384),
    "saved": Cases(saved_case, 24),
    "server": Cases(server_case, 1),
    "storage": Cases(storage_case, 4),
    "vsock-streams": Cases(vsock_streams_case, 1),
}
if shutil.which("cc"):  # which compiles it
    CASES["agent"] = Cases(agent_program_case, 6)
