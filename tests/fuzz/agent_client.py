"""The host's side of the guest's agent, before an agent that says anything.

The connection is not one: it gives what the agent says in pieces of any size, takes what we say in
others, breaks at some byte, or falls silent, and time passes only where somebody waits. A model
that reads the same frames, written from docs/guest-agent.md, says what each call has to give. A
case raises AssertionError, with the frames, if

- a command's result, its output, or a copied tree is another one than the model's,
- anything but an error of ours is raised, or one of more than a line,
- more is sent than the agent has granted, or something else than it was to be sent,
- anybody waits without an end, or asks more often than there is something to get,
- the connection, a descriptor or half a file is left, or anything outside the copy has changed.
"""

from __future__ import annotations

import errno
import functools
import os
import select
import shutil
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest import mock

from fuzz.damage import wrong
from fuzz.room import check_closed, open_files, room, told

from pyvmm.agent import client, process, session
from pyvmm.agent.client import Agent
from pyvmm.agent.errors import AgentError, AgentGone, CommandTimeout
from pyvmm.agent.process import Output
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.testing.mmio_driver import Ring

# docs/guest-agent.md
RUN, STDIN, STDIN_END, SIGNAL, RESIZE, PUT, GET, CLOCK, POWER_OFF = range(1, 10)
DIRECTORY, REGULAR, LINK, DATA, UP, SKIPPED, END = range(16, 23)
HELLO, STARTED, STDOUT, STDERR, MORE_STDIN, EXIT, FAILED, CLOCK_IS, DONE = range(32, 41)
MOST, WINDOW, DEEPEST, LONGEST_NAME = 65536, 65536, 64, 255
_FD = 1 << 20  # which is no descriptor of this process


def frame(type: int, payload: bytes = b"", size: int | None = None) -> bytes:
    said = len(payload) if size is None else size
    return struct.pack("<I", type & 0xFF | (said & 0xFFFFFF) << 8) + payload


def hello(version: int = 1) -> bytes:
    return frame(HELLO, struct.pack("<IIqq", version, 0, 10**18, 5 * 10**9))


class Piece(NamedTuple):
    """What comes once so many bytes were sent."""

    after: int
    data: bytes


class Line:
    """Our end of the connection, with a clock of its own."""

    def __init__(self, rng: Random, pieces: list[Piece], *, ends: str, breaks_at: int) -> None:
        self.rng, self.pieces, self.ends, self.breaks_at = rng, pieces, ends, breaks_at
        self.sent = bytearray()
        self.heard = 0
        self.closed = self.broke = False
        self.now = 1000.0
        self.calls = 0
        self.whole = rng.random() < 0.5
        self.ready = bytearray()
        self.most_calls = 2000 + 40 * sum(len(one.data) // 64 + 1 for one in pieces)

    # --- as a socket ------------------------------------------------------------------------------

    def setblocking(self, flag: bool) -> None:
        assert not flag

    def fileno(self) -> int:
        return -1 if self.closed else _FD

    def close(self) -> None:
        self.closed = True

    def _call(self) -> None:
        assert not self.closed, "used when it was closed"
        self.calls += 1
        assert self.calls < self.most_calls, f"{self.calls} calls"
        if not self.whole and self.rng.random() < 0.1:
            raise self.rng.choice((BlockingIOError, InterruptedError))

    def _collect(self) -> None:
        while self.pieces and self.pieces[0].after <= len(self.sent):
            self.ready += self.pieces.pop(0).data

    def recv(self, size: int) -> bytes:
        self._call()
        self._collect()
        if not self.ready:
            if self.ends == "silent" or (self.pieces and not self.broke):
                raise BlockingIOError
            if self.ends == "reset":
                raise ConnectionResetError
            return b""
        count = size if self.whole else self.rng.choice((1, 3, 4, 5, 64, size, size))
        data = bytes(self.ready[: min(count, size)])
        del self.ready[: len(data)]
        self.heard += len(data)
        return data

    def send(self, view: memoryview) -> int:
        self._call()
        if len(self.sent) >= self.breaks_at:
            self.broke = True
            raise self.rng.choice((BrokenPipeError, ConnectionResetError))
        count = len(view) if self.whole else self.rng.choice((1, 4, 100, len(view), len(view)))
        count = min(count, len(view), self.breaks_at - len(self.sent))
        self.sent += view[:count]
        return count

    # --- as select and time -----------------------------------------------------------------------

    POLLIN, POLLOUT = select.POLLIN, select.POLLOUT

    def poll(self) -> _Poll:
        return _Poll(self)

    def wait(self, event: int, milliseconds: float | None) -> bool:
        """Whether it is ready for `event`, in time."""
        self._collect()
        is_over = not self.pieces or self.broke
        readable = self.ready or (is_over and self.ends != "silent")
        if event & select.POLLOUT or readable:
            self.now += 0.001
            return True
        assert milliseconds is not None, "it waits for ever"
        self.now += milliseconds / 1000 + 0.001
        return False

    def monotonic(self) -> float:
        return self.now

    time_ns = staticmethod(time.time_ns)


class _Poll:
    """A poll object of select(3)'s kind."""

    def __init__(self, line: Line) -> None:
        self._line, self._event = line, 0

    def register(self, fd: int, event: int) -> None:
        assert fd == self._line.fileno() != -1
        self._event = event

    def poll(self, milliseconds: float | None) -> list[tuple[int, int]]:
        return [(_FD, self._event)] if self._line.wait(self._event, milliseconds) else []


@contextmanager
def _playing(line: Line) -> Iterator[Agent]:
    with (
        mock.patch.object(session, "select", line),
        mock.patch.object(client, "select", line),
        mock.patch.object(session, "time", line),
        mock.patch.object(process, "time", line),
        mock.patch.object(client, "time", line),
    ):
        lines = [line]

        def connect() -> Any:
            if not lines:
                raise HostError(errno.ECONNREFUSED, "connecting")
            return lines.pop()

        yield Agent(connect)
    assert line.closed, "the connection is left open"


def _checked(error: PyvmmError) -> None:
    assert str(error).isprintable() and len(str(error)) < 2000, error


# --- frames ---------------------------------------------------------------------------------------


class Frame(NamedTuple):
    type: int
    payload: bytes
    size: int | None = None  # that it says it has

    @property
    def raw(self) -> bytes:
        return frame(*self)


def harmed(rng: Random, frames: list[Frame]) -> list[Frame]:
    """Something in the order or in one of the frames is wrong."""
    frames = list(frames)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(frames) + 1)
        kind = rng.randrange(9)
        if kind == 0:
            frames.insert(
                at, Frame(rng.choice((*range(41), 255)), rng.randbytes(rng.randrange(30)))
            )
            continue
        if not frames:
            continue
        at = min(at, len(frames) - 1)
        one = frames[at]
        if kind == 1 and rng.random() < 0.1:
            frames[at] = one._replace(payload=rng.randbytes(MOST + rng.choice((0, 1, MOST))))
        elif kind == 1:
            del frames[at]
        elif kind == 2:
            frames.insert(at, one)
        elif kind == 3:
            to = rng.randrange(len(frames))
            frames[at], frames[to] = frames[to], frames[at]
        elif kind == 4:
            frames[at] = one._replace(type=rng.choice((*range(16, 23), *range(32, 41), 0, 99)))
        elif kind == 5:
            frames[at] = one._replace(payload=one.payload[: rng.randint(0, len(one.payload))])
        elif kind == 6:
            frames[at] = one._replace(payload=one.payload + rng.randbytes(rng.choice((1, 4, 300))))
        elif kind == 7:
            frames[at] = one._replace(size=wrong(rng, len(one.payload), 3))
        elif one.payload:
            data = bytearray(one.payload)
            place = rng.randrange(len(data))
            data[place] ^= 1 << rng.randrange(8)
            frames[at] = one._replace(payload=bytes(data))
    return frames


def parsed(data: bytes) -> tuple[list[tuple[int, bytes]], bool]:
    """The whole frames at the beginning, and whether one of a size follows that may not be."""
    found, at = [], 0
    while at + 4 <= len(data):
        (word,) = struct.unpack_from("<I", data, at)
        size = word >> 8
        if size > MOST:
            return found, True
        if at + 4 + size > len(data):
            break
        found.append((word & 0xFF, data[at + 4 : at + 4 + size]))
        at += 4 + size
    return found, False


def _greeting(rng: Random) -> Frame:
    payload = struct.pack("<IIqq", 1, 0, rng.getrandbits(62), rng.getrandbits(50))
    return Frame(HELLO, payload)


def is_hello(found: list[tuple[int, bytes]]) -> bool:
    return (
        bool(found)
        and found[0][0] == HELLO
        and (len(found[0][1]) >= 24 and found[0][1][:4] == b"\1\0\0\0")
    )


def _line(rng: Random, frames: list[Frame], **options: Any) -> tuple[Line, bytes]:
    """A connection on which these come, cut somewhere now and then, and all that comes."""
    data = b"".join(one.raw for one in frames)
    if rng.random() < 0.1:
        data = data[: rng.randint(0, len(data))]
    if rng.random() < 0.05:
        data = rng.randbytes(rng.randrange(200))
    breaks_at = rng.randrange(rng.choice((40, 2000))) if rng.random() < 0.15 else 1 << 30
    ends = rng.choice(("hangs up", "hangs up", "hangs up", "reset", "silent"))
    pieces = [Piece(options.get("after", 0), data)]
    return Line(rng, pieces, ends=options.get("ends", ends), breaks_at=breaks_at), data


# --- a command ------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """`code` is None for an error."""

    code: int | None
    output: tuple[bytes, bytes] = (b"", b"")
    may_fail: bool = False
    failed: bool = False  # the agent says why


def _of_command(data: bytes, most: int) -> Expected:
    found, too_long = parsed(data)
    if not is_hello(found):
        return Expected(None)
    output = [b"", b""]
    for number, (type, payload) in enumerate(found[1:], 2):
        if type in (STDOUT, STDERR):
            output[type - STDOUT] += payload
            if len(output[type - STDOUT]) > most:
                return Expected(None, (output[0], output[1]))
        elif type in (MORE_STDIN, STARTED) and len(payload) == 4:
            pass
        elif type == EXIT and len(payload) == 8:
            how, value = struct.unpack("<II", payload)
            if how > 2 or value > 255:
                return Expected(None, (output[0], output[1]))
            code = -value if how else value
            # What comes behind the end may be looked at before it.
            worse = too_long or any(type == FAILED for type, _ in found[number:])
            return Expected(None if how == 2 else code, (output[0], output[1]), worse)
        else:
            return Expected(None, (output[0], output[1]), failed=type == FAILED)
    return Expected(None, (output[0], output[1]))


def _command_frames(rng: Random) -> list[Frame]:
    frames = [_greeting(rng), Frame(STARTED, struct.pack("<I", rng.getrandbits(16)))]
    for _ in range(rng.choice((0, 1, 3, 8))):
        if rng.random() < 0.4:
            grant = rng.choice((1, 100, 4096, 65536, 1 << 31))
            frames.append(Frame(MORE_STDIN, struct.pack("<I", grant)))
        else:
            text = rng.randbytes(
                rng.choice((0, 1, 10, 10, 200, 65536 if rng.random() < 0.1 else 7))
            )
            frames.append(Frame(rng.choice((STDOUT, STDERR)), text))
    if rng.random() < 0.9:
        how = rng.choice((0, 0, 0, 1, 2, 3))
        frames.append(Frame(EXIT, struct.pack("<II", how, rng.choice((0, 1, 9, 255, 256)))))
    else:
        words = rng.choice((b"no such command", b"\x1b[2J\n\x07", rng.randbytes(500)))
        frames.append(Frame(FAILED, struct.pack("<I", rng.choice((2, 0, 1 << 31))) + words))
    return frames


def _check_sent(line: Line, words: list[str], given: bytes, granted: int) -> None:
    """What we have sent is a request, and input that was granted."""
    if not line.sent:
        return
    found, too_long = parsed(bytes(line.sent))
    assert not too_long
    if not found:
        return
    type, payload = found[0]
    assert type == RUN, found[0]
    argc, envc = struct.unpack_from("<HH", payload, 12)
    texts = payload[16:].split(b"\0")
    assert (argc, envc) == (len(words), 1) and texts[2 : 2 + argc] == [w.encode() for w in words]
    assert texts[2 + argc :] == [b"A=b", b""]
    said = b"".join(payload for type, payload in found[1:] if type == STDIN)
    assert given.startswith(said) and len(said) <= WINDOW + granted, len(said)
    for type, payload in found[1:]:
        assert type in (STDIN, STDIN_END, SIGNAL, RESIZE), type
        assert len(payload) <= MOST


def _granted(data: bytes) -> int:
    found, _ = parsed(data)
    return sum(
        struct.unpack("<I", payload)[0]
        for type, payload in found
        if type == MORE_STDIN and len(payload) == 4
    )


def _run(rng: Random, said: list[str]) -> None:
    frames = _command_frames(rng)
    if rng.random() < 0.7:
        frames = harmed(rng, frames)
    line, data = _line(rng, frames)
    most = rng.choice((1 << 20, 1 << 20, 100, 0))
    words = ["command", *("word" for _ in range(rng.randrange(3)))]
    given = rng.randbytes(rng.choice((0, 5, 100, 200_000 if rng.random() < 0.1 else 70)))
    limit = rng.choice((None, None, 0.001, 5.0)) if line.ends != "silent" else 5.0
    said += [f"{line.ends}, breaks at {line.breaks_at}, limit {limit}, most {most}", repr(frames)]
    expected = _of_command(data, most)
    with _playing(line) as agent:
        try:
            done = agent.run(words, env={"A": "b"}, input=given, timeout=limit, most=most)
        except AgentError as error:
            _checked(error)
            late = isinstance(error, CommandTimeout) and limit is not None
            assert expected.code is None or expected.may_fail or line.broke or late, error
            # What came before the break is heard, 64 KiB of it at least.
            heard = line.whole and len(data) <= MOST
            assert not (heard and expected.failed and isinstance(error, AgentGone)), "no reason"
            if late and isinstance(error, CommandTimeout):
                for mine, theirs in zip((error.stdout, error.stderr), expected.output, strict=True):
                    assert theirs.startswith(mine[: len(theirs)])
        else:
            assert expected.code is not None, f"{done.returncode}, where an error should be"
            assert (done.returncode, done.stdout, done.stderr) == (expected.code, *expected.output)
    _check_sent(line, words, given, _granted(data))


def _watch(rng: Random, said: list[str]) -> None:
    """A command that somebody sits before: everything that can be asked of it, in any order."""
    frames = _command_frames(rng)
    if rng.random() < 0.6:
        frames = harmed(rng, frames)
    line, data = _line(rng, frames)
    said += [f"{line.ends}, breaks at {line.breaks_at}", repr(frames)]
    expected = _of_command(data, 1 << 30)
    output = [b"", b""]

    def take(found: list[Output]) -> None:
        for stream, piece in found:
            output[stream - 1] += piece

    given = b""
    with _playing(line) as agent:
        try:
            command = agent.open(["command"], env={"A": "b"}, stdin=True, tty=(24, 80), timeout=9.0)
            with command:
                for _ in range(rng.randrange(40)):
                    kind = rng.randrange(8)
                    said.append(f"way {kind}")
                    if kind == 0:
                        take(command.receive())
                    elif kind == 1:
                        piece = command.read(timeout=rng.choice((None, 0.0, 1.0)))
                        take([piece] if piece else [])
                    elif kind == 2:
                        new = rng.randbytes(rng.choice((0, 1, 1000, 70_000)))
                        room = command.room
                        taken = command.write(new)
                        assert taken <= min(room, len(new)) <= WINDOW
                        given += new[:taken]
                    elif kind == 3:
                        command.kill(rng.randrange(1, 32))
                    elif kind == 4:
                        command.resize(rng.choice((0, 24, -1, 1 << 20)), 80)
                    elif kind == 5 and rng.random() < 0.2:
                        command.close_stdin()
                        assert not command.room
                    elif kind == 6:
                        line.now += rng.choice((0.1, 1.0))
                    elif kind == 7 and rng.random() < 0.3:
                        for piece in command.events():
                            take([piece])
                    if command.returncode is not None:
                        break
                for piece in command.events():
                    take([piece])
                if not command.timed_out:
                    assert command.returncode == expected.code, "an error should be here"
                    assert tuple(output) == expected.output
                elif expected.code is not None:
                    assert all(map(bytes.startswith, expected.output, output))
        except CommandTimeout as error:
            _checked(error)
        except AgentError as error:
            _checked(error)
            assert expected.code is None or expected.may_fail or line.broke, error
    _check_sent(line, ["command"], given, _granted(data))


def _ask(rng: Random, said: list[str]) -> None:
    """Its clock, whether it is ready, that it is to power off."""
    frames = [_greeting(rng)]
    line, _ = _line(rng, harmed(rng, frames) if rng.random() < 0.4 else frames)
    times = rng.getrandbits(62), rng.getrandbits(62)
    answer = [Frame(CLOCK_IS, struct.pack("<qq", *times)), Frame(DONE, b"")]
    which = rng.choice(("clock", "set_clock", "power_off", "wait_ready"))
    answer = answer[:1] if "clock" in which else answer[1:]
    if is_bad := rng.random() < 0.4:
        answer = harmed(rng, answer)
    data = b"".join(one.raw for one in answer)
    asked = {"clock": 4, "set_clock": 12, "power_off": 5}.get(which, 0)
    line.pieces += [Piece(asked, data)] if asked else []
    said += [f"{which}, {line.ends}, breaks at {line.breaks_at}", repr((frames, answer))]
    came = line.pieces[0].data
    found, _ = parsed(came)
    with _playing(line) as agent:
        try:
            if which == "wait_ready":
                with mock.patch.object(line, "sleep", _passes(line), create=True):
                    agent.wait_ready(0.01)
            elif which == "power_off":
                agent.power_off(quick=rng.random() < 0.5)
            else:
                clock = agent.clock() if which == "clock" else agent.set_clock(timeout=1.0)
                if not is_bad:
                    assert abs(clock.uptime - times[1] / 1e9) < 1, clock
        except AgentError as error:
            _checked(error)
        else:
            assert which == "power_off" or is_hello(found), "that was no agent"


def _passes(line: Line) -> Callable[[float], None]:
    def sleep(seconds: float) -> None:
        assert 0 <= seconds < 10
        line.now += seconds

    return sleep


# --- a tree out of the guest ----------------------------------------------------------------------

_NAMES = (b"a", b"b", b"c", "ü".encode(), b"\xff\xfe", b"x" * 255, b" ", b"-rf", b"a\nb")
_BAD_NAMES = (b"..", b".", b"a/b", b"/etc", b"x" * 256, b"../../v", b"", b"a\0b")
Node = tuple[Any, ...]
Tree = dict[
    bytes, Node
]  # by path below the folder; ("file", data, mode), ("dir", mode), ("link", …)


def entry(rng: Random, type: int, name: bytes, size: int = 0, target: bytes = b"") -> Frame:
    mode = rng.choice((0o644, 0o755, 0o600, 0o4755, 0o777, 0o1777))
    mtime = rng.choice((0, 10**18, -(10**9), (1 << 63) - 1))
    payload = struct.pack("<IIqQ", mode, 0, mtime, size) + name
    return Frame(type, payload + (b"\0" + target if type == LINK else b""))


def tree_frames(rng: Random, depth: int = 0) -> list[Frame]:
    name = rng.choice(_NAMES if rng.random() < 0.93 else _BAD_NAMES)
    kind = rng.random()
    if kind < 0.3 and depth < 3:
        inner = [one for _ in range(rng.randrange(4)) for one in tree_frames(rng, depth + 1)]
        return [entry(rng, DIRECTORY, name), *inner, Frame(UP, b"")]
    if kind < 0.45 and depth:
        target = rng.choice((b"a", b"/etc/passwd", b"../../..", b"", b"x" * 5000, b"\xff"))
        return [entry(rng, LINK, name, target=target)]
    if kind < 0.5:
        return [Frame(SKIPPED, entry(rng, SKIPPED, name).payload)]
    parts = [rng.choice((b"text", bytes(300), rng.randbytes(9))) for _ in range(rng.randrange(4))]
    size = sum(map(len, parts))
    return [entry(rng, REGULAR, name, size), *(Frame(DATA, p) for p in parts), Frame(UP, b"")]


_UMASK = 0o022


class Model:
    """The folder that is copied to, as it has to be after each frame."""

    bits = 0o777 & ~_UMASK  # of modes that count
    links_first = False  # whether the first may be a link

    def __init__(self, tree: Tree, top: bytes, inside: bytes) -> None:
        """The copy gets the name `top` in the folder `inside`, with what is in `tree`; without a
        name, that of its first entry."""
        self.tree = tree
        self.top = top
        self.stack = [inside]
        self.made: list[bool] = []  # whether each open directory is new
        self.modes: list[int] = []
        self.file: tuple[bytes, int] | None = None
        self.data = b""
        self.topped = False
        self.skipped = self.files = 0

    def take(self, type: int, payload: bytes) -> str:
        """ "go on", "end", or "error"."""
        if type == SKIPPED:
            self.skipped += 1
        elif self.file is not None:
            if type == DATA:
                self.data += payload
            elif type == UP:
                return self._put(self.file[0], ("file", self.data, self.file[1]))
            else:
                return "error"
        elif type == UP and self.made:
            path = self.stack.pop()
            mode = self.modes.pop()
            if self.made.pop():
                self.tree[path] = ("dir", mode)
        elif type == END and not self.made:
            return "end"
        elif type in (DIRECTORY, REGULAR, LINK) and (self.made or not self.topped):
            return self._begin(type, payload)
        else:
            return "error"
        return "go on"

    def _begin(self, type: int, payload: bytes) -> str:
        if len(payload) <= 24:
            return "error"
        (mode,) = struct.unpack_from("<I", payload)
        name, _, target = payload[24:].partition(b"\0")
        wrong_name = not name or len(name) > LONGEST_NAME or b"/" in name or name in (b".", b"..")
        if wrong_name or b"\0" in target or self.is_odd(type, target):
            return "error"
        if not self.made:
            self.topped = True
            name = self.top or name
            if type == LINK and not self.links_first:
                return "error"
        path = self.stack[-1] + b"/" + name if self.stack[-1] else name
        there = self.tree.get(path)
        mode &= self.bits
        if there is not None and there[0] == "fifo":
            return "error"
        if type == DIRECTORY:
            if len(self.stack) > DEEPEST or (there is not None and there[0] != "dir"):
                return "error"
            self.made.append(there is None)
            self.modes.append(mode)
            self.stack.append(path)
            self.tree.setdefault(path, ("dir", 0o700))
        elif type == REGULAR:
            self.file, self.data = (path, mode), b""
        elif not target or len(target) > 4095:
            return "error"
        else:
            return self._put(path, ("link", target))
        return "go on"

    def is_odd(self, type: int, target: bytes) -> bool:
        """Whether a target is where none should be."""
        return bool(target) and type != LINK

    def _put(self, path: bytes, node: Node) -> str:
        there = self.tree.get(path)
        if there is not None and there[0] == "dir":
            return "error"
        self.tree[path] = node
        self.files += node[0] == "file"
        self.file = None
        return "go on"


@functools.cache
def _room() -> Path:
    """A folder for copies, which goes with the process."""
    place = room()
    (place / "victim").write_text("untouched")
    return place


def looked_at(folder: bytes, below: bytes = b"") -> Tree:
    found: Tree = {}
    for one in os.scandir(os.path.join(folder, below)):
        path = os.path.join(below, one.name)
        whole = os.path.join(folder, path)
        mode = one.stat(follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            found[path] = ("link", os.readlink(whole))
        elif stat.S_ISDIR(mode):
            found[path] = ("dir", stat.S_IMODE(mode))
            found |= looked_at(folder, path)
        elif stat.S_ISREG(mode):
            with open(whole, "rb") as file:
                found[path] = ("file", file.read(), stat.S_IMODE(mode))
        else:
            found[path] = ("fifo",)
    return found


def beforehand(rng: Random, folder: Path) -> None:
    """Make `folder`, with what may be there already, of others and of earlier copies."""
    folder.mkdir()
    (folder / "into").mkdir()
    base = folder / "into"
    for _ in range(rng.choice((0, 0, 1, 3))):
        place = base / rng.choice(("a", "b", "copy", "copy/a", "copy/b", "a/a"))
        kind = rng.randrange(5)
        if os.path.lexists(place) or not place.parent.is_dir() or place.parent.is_symlink():
            continue
        if kind == 0:
            place.write_text("old")
        elif kind == 1:
            place.mkdir(mode=0o755)
        elif kind == 2:
            place.symlink_to(rng.choice(("../../victim", "../..", "nowhere")))
        elif kind == 3:
            os.mkfifo(place)
        else:
            place.write_text("linked")
            (base / "other-name").unlink(missing_ok=True)
            os.link(place, base / "other-name")


def _pull(rng: Random, said: list[str]) -> None:
    frames = [_greeting(rng), *tree_frames(rng), Frame(END, b"")]
    if rng.random() < 0.55:
        frames = [frames[0], *harmed(rng, frames[1:])]
    line, data = _line(rng, frames, ends=rng.choice(("hangs up", "reset")))
    folder = _room() / "copies"
    beforehand(rng, folder)
    local = rng.choice(("into", "into", "into/copy", "into/new", "into/a"))
    said += [f"to {local}, {line.ends}, breaks at {line.breaks_at}", repr(frames)]
    path = folder / local
    before = looked_at(os.fsencode(folder))
    is_folder, is_other = path.is_dir(), path.exists() and not path.is_file()
    outside = path.is_symlink() and is_folder
    descriptors = open_files()
    where = (os.fsencode(local), b"copy") if is_folder else os.path.split(os.fsencode(local))
    model = Model(dict(before), where[1] or b"copy", where[0])
    old = os.umask(_UMASK)
    error: PyvmmError | None = None
    done = None
    try:
        with _playing(line) as agent:
            try:
                done = agent.pull("/some/copy", path)
            except PyvmmError as caught:
                _checked(caught)
                error = caught
        check_closed(descriptors)
        assert (_room() / "victim").read_text() == "untouched"
        after = looked_at(os.fsencode(folder))
        if outside:  # the user has named a link, which is followed
            shutil.rmtree(_room() / "copy", ignore_errors=True)
            if (_room() / "copy").is_file():
                (_room() / "copy").unlink()
            return
        assert {one.name for one in _room().iterdir()} == {"victim", "copies"}, "it is elsewhere"
        if is_other and not is_folder:
            assert error is not None and after == before
            return
        _check_copy(model, data, line, error, done, after)
    finally:
        os.umask(old)
        shutil.rmtree(folder)


def _check_copy(
    model: Model, data: bytes, line: Line, error: PyvmmError | None, done: Any, after: Tree
) -> None:
    found, too_long = parsed(data)
    result = "error"
    if is_hello(found):
        result = "go on"
        states = [dict(model.tree)]
        for type, payload in found[1:]:
            result = "error" if type == FAILED else model.take(type, payload)
            if result != "go on":
                break
            states.append(dict(model.tree))
        if line.broke or too_long:  # some of it was not heard, or only looked at
            assert error is not None or result == "end"
            assert after in states or result == "end", "not what any of the frames has made"
            return
        if result == "end" and not model.topped:
            result = "error"
    if result == "end":
        assert error is None, error
        assert done is not None and done.files == model.files
        assert len(done.skipped) == min(model.skipped, 1000)
    else:
        assert error is not None, f"{result}, and no error"
    assert after == model.tree, (set(after) ^ set(model.tree), after, model.tree)


# --- a tree into the guest ------------------------------------------------------------------------


@functools.cache
def _source() -> tuple[Path, bytes]:
    """A tree, and what is to be sent of it."""
    place = room()
    root = place / "tree"
    (root / "b" / "deep").mkdir(parents=True)
    (root / "a").write_bytes(b"text" * 100)
    (root / "b" / "large").write_bytes(bytes(range(256)) * 600)
    (root / "c").symlink_to("a")
    os.mkfifo(root / "fifo")
    sent = frame(PUT, b"/there")

    def add(path: Path) -> None:
        nonlocal sent
        found = path.lstat()
        head = struct.pack("<IIqQ", found.st_mode & 0o7777, 0, found.st_mtime_ns, found.st_size)
        name = os.fsencode(path.name)
        if path.is_symlink():
            sent += frame(LINK, head + name + b"\0" + os.fsencode(os.readlink(path)))
        elif path.is_dir():
            sent += frame(DIRECTORY, head + name)
            for inner in sorted(path.iterdir()):
                add(inner)
            sent += frame(UP)
        elif path.is_file():
            content = path.read_bytes()
            sent += frame(REGULAR, head + name)
            for at in range(0, len(content), MOST):
                sent += frame(DATA, content[at : at + MOST])
            sent += frame(UP)

    add(root)
    return root, sent + frame(END)


def _push(rng: Random, said: list[str]) -> None:
    root, expected = _source()
    answer = [Frame(DONE, b"")]
    if rng.random() < 0.4:
        answer = harmed(rng, answer)
    after = rng.choice((len(expected),) * 3 + (0, rng.randrange(len(expected))))
    greeting = _greeting(rng)
    line, greeted = _line(rng, [greeting])
    line.breaks_at = rng.choice((1 << 30,) * 5 + (rng.randrange(len(expected)),))
    data = b"".join(one.raw for one in answer)
    whole = greeted == greeting.raw
    line.pieces.append(Piece(after, data))
    said += [f"after {after} of {len(expected)}, {line.ends}, breaks at {line.breaks_at}"]
    said.append(repr(answer))
    progress: list[int] = []
    descriptors = open_files()
    with _playing(line) as agent:
        try:
            done = agent.push(
                root, "/there", progress=progress.append, timeout=rng.choice((9.0, 1e9))
            )
        except AgentError as error:
            _checked(error)
            in_time = after == len(expected) and whole and line.breaks_at == 1 << 30
            found, too_long = parsed(data)
            assert not in_time or too_long or found[:1] != [(DONE, b"")], error
        else:
            assert line.sent == expected
            # What is missing of a greeting that was cut off, the answer may bring.
            assert parsed(greeted + data)[0][1][0] == DONE
            assert done.files == 2 and done.skipped == [str(root / "fifo")]
            assert progress == sorted(progress) and done.bytes == progress[-1]
    assert expected.startswith(line.sent), "it sends something else"
    check_closed(descriptors)


_WAYS = (_run, _run, _run, _watch, _watch, _ask, _pull, _pull, _pull, _push)


def agent_client_case(rng: Random, ring: Ring) -> int:
    """One call to an agent that lies, or does not; one step."""
    said: list[str] = []
    way = rng.choice(_WAYS)
    with told(way, said):
        try:
            way(rng, said)
        except ConfigError as error:
            raise AssertionError(f"it is not the user's fault: {error}") from error
    return 1
