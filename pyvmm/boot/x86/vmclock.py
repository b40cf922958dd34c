"""VMClock: a page by which a guest sees that it is a copy, or that its processor's counter is
another one, without asking anybody (UAPI.13 "VMClock", <linux/vmclock-abi.h>).

It gives no time: KVM's own clock does that. What it has is the disruption marker and the generation
counter, which programs can map (/dev/vmclock0).
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from pyvmm.boot.x86 import layout
from pyvmm.memory import GuestMemory

MAGIC = b"VCLK"
VERSION = 1
NO_COUNTER = 0xFF  # VMCLOCK_COUNTER_INVALID
TAI = 1  # VMCLOCK_TIME_TAI: of a time that is not given
GENERATION_COUNTER_PRESENT = 1 << 8  # VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT
NOTIFICATION_PRESENT = 1 << 9  # VMCLOCK_FLAG_NOTIFICATION_PRESENT

_CONSTANT = struct.Struct("<4sIHBB")  # magic, size, version, counter_id, time_type
_SEQUENCE = struct.Struct("<I")
_MARKER = struct.Struct("<Q")
_FLAGS = struct.Struct("<Q")
# Offsets in struct vmclock_abi. All that lies between is 0: the clock's status is unknown.
_SEQ_COUNT, _DISRUPTION_MARKER, _FLAGS_AT, _GENERATION_COUNTER = 0x0C, 0x10, 0x18, 0x68


class Disruption(NamedTuple):
    """What the guest compares: another `marker` says that its counter may have jumped, another
    `generation` that it is a copy. `sequence` is odd while they change."""

    sequence: int
    marker: int
    generation: int


def begin(memory: GuestMemory) -> None:
    """Write the page of a guest that boots."""
    page = bytearray(layout.VMCLOCK_SIZE)
    _CONSTANT.pack_into(page, 0, MAGIC, layout.VMCLOCK_SIZE, VERSION, NO_COUNTER, TAI)
    _FLAGS.pack_into(page, _FLAGS_AT, GENERATION_COUNTER_PRESENT | NOTIFICATION_PRESENT)
    page[_GENERATION_COUNTER : _GENERATION_COUNTER + 8] = os.urandom(8)
    memory.write(layout.VMCLOCK, page)


def read(memory: GuestMemory) -> Disruption | None:
    """What the page says; None if there is none, in a guest that another pyvmm has booted."""
    page = bytes(memory.read(layout.VMCLOCK, _GENERATION_COUNTER + 8))
    magic, size, version, _, _ = _CONSTANT.unpack_from(page)
    if (magic, size, version) != (MAGIC, layout.VMCLOCK_SIZE, VERSION):
        return None
    return Disruption(
        *_SEQUENCE.unpack_from(page, _SEQ_COUNT),
        *_MARKER.unpack_from(page, _DISRUPTION_MARKER),
        *_MARKER.unpack_from(page, _GENERATION_COUNTER),
    )


def disrupt(memory: GuestMemory) -> None:
    """Say so: the guest goes on somewhere else, and may not be the only one. Its vCPUs stand
    still; that it is notified is for the caller."""
    before = read(memory)
    if before is None:
        return
    odd = (before.sequence | 1) & 0xFFFF_FFFF  # the guest can write it, and need not be right
    memory.write(layout.VMCLOCK + _SEQ_COUNT, _SEQUENCE.pack(odd))
    marker = before.marker + 1 & (1 << 64) - 1
    memory.write(layout.VMCLOCK + _DISRUPTION_MARKER, _MARKER.pack(marker))
    memory.write(layout.VMCLOCK + _GENERATION_COUNTER, os.urandom(8))
    memory.write(layout.VMCLOCK + _SEQ_COUNT, _SEQUENCE.pack(odd + 1 & 0xFFFF_FFFF))
