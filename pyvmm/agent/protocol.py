"""The protocol between a client and the guest's agent: frames of a type and a payload.

A frame is its length and type in four bytes, and the payload; all numbers are little-endian.
docs/guest-agent.md describes each. guest-images/agent/ has the other end.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

PORT = 1023  # below 1024: no unprivileged program of the guest can take the agent's place
VERSION = 1
MAX_DATA = 1 << 16  # bytes of a payload
MAX_REQUEST = 1 << 20  # bytes of a session's first payload
WINDOW = 1 << 16  # bytes of standard input that may be on their way
MAX_DEPTH = 64  # of directories
MAX_NAME = 255

WANTS_STDIN, WANTS_TTY = 1, 2
EXITED, KILLED, TIMED_OUT = range(3)


class FrameType(IntEnum):
    """The first number of a frame."""

    # the client's
    RUN = 1
    STDIN = 2
    STDIN_END = 3
    SIGNAL = 4
    RESIZE = 5
    PUT = 6
    GET = 7
    CLOCK = 8
    POWER_OFF = 9
    # a tree of files, either way
    DIRECTORY = 16
    REGULAR = 17
    LINK = 18
    DATA = 19
    UP = 20
    SKIPPED = 21
    END = 22
    # the agent's
    HELLO = 32
    STARTED = 33
    STDOUT = 34
    STDERR = 35
    MORE_STDIN = 36
    EXIT = 37
    FAILED = 38
    CLOCK_IS = 39
    DONE = 40


HEADER = Struct("<I")  # type | length << 8
HELLO = Struct("<IIqq")  # version, 0, realtime and boottime in nanoseconds
RUN = Struct("<IIHHHH")  # flags, timeout in ms, rows, columns, arguments, variables
EXIT = Struct("<II")  # EXITED, KILLED or TIMED_OUT; the exit code or the signal
NUMBER = Struct("<I")
WINDOW_SIZE = Struct("<HH")  # rows, columns
ENTRY = Struct("<IIqQ")  # mode, 0, modification time in ns, size
TIMES = Struct("<qq")  # realtime and boottime in nanoseconds
TIME = Struct("<q")


class Frame(NamedTuple):
    """One message. `type` may be a number that is not a FrameType."""

    type: int
    payload: bytes


class Entry(NamedTuple):
    """A file, directory or link of a tree; `target` is a link's."""

    mode: int
    mtime_ns: int
    size: int
    name: bytes
    target: bytes = b""


def frame(type: FrameType, payload: bytes = b"") -> bytes:
    """The bytes of a frame."""
    return HEADER.pack(type | len(payload) << 8) + payload


def entry_frame(type: FrameType, entry: Entry) -> bytes:
    """The bytes of a frame that begins a directory, file or link."""
    mtime = max(-(1 << 63), min(entry.mtime_ns, (1 << 63) - 1))
    head = ENTRY.pack(entry.mode & 0o7777, 0, mtime, entry.size)
    target = b"\0" + entry.target if type is FrameType.LINK else b""
    return frame(type, head + entry.name + target)


def parse_entry(payload: bytes) -> Entry | None:
    """The entry in such a frame; None if it makes no sense. Its name is not empty and no path."""
    if len(payload) <= ENTRY.size:
        return None
    mode, _, mtime_ns, size = ENTRY.unpack_from(payload)
    name, _, target = payload[ENTRY.size :].partition(b"\0")
    if not name or len(name) > MAX_NAME or b"/" in name or name in (b".", b"..") or b"\0" in target:
        return None
    return Entry(mode & 0o7777, mtime_ns, size, name, target)
