"""The guest's agent itself, built for this machine with the address and undefined-behaviour
sanitizers, before a client that says anything.

It runs as a process; a case is a session of its own, through a Unix socket. Whatever a case says,
no command is run but `cat` and others that do no harm, and all files are put into a folder of its
own. It raises AssertionError, with the frames, if

- the folder is afterwards another one than a model's of the same frames, or half a file is there,
- what comes back is not a greeting and frames, or says another end than the model,
- `cat` does not give back what it was given, or a tree does not come as it is,
- the agent has ended, a sanitizer complains, or a process of a session is left.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import struct
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random

import agent_rig
from fuzz import agent_client as said_by
from fuzz.agent_client import (
    CLOCK,
    CLOCK_IS,
    DIRECTORY,
    DONE,
    END,
    EXIT,
    FAILED,
    GET,
    LINK,
    MOST,
    PUT,
    REGULAR,
    RESIZE,
    RUN,
    SIGNAL,
    STARTED,
    STDERR,
    STDIN,
    STDIN_END,
    STDOUT,
    UP,
    WINDOW,
    Frame,
    Model,
    Tree,
    harmed,
    is_hello,
    looked_at,
    parsed,
    tree_frames,
)
from fuzz.room import at_end, room, told

from pyvmm.testing.mmio_driver import Ring

HANG = 60.0  # seconds; no measure of speed


class _Agent:
    """The program, which runs until this process ends."""

    def __init__(self) -> None:
        closing = ExitStack()
        self.folder = room()
        at_end(closing.close)
        program = agent_rig.compile_agent(self.folder)
        running = agent_rig.running(program, self.folder)
        _, self.path, self.log = closing.enter_context(running)

    def pids(self) -> list[int]:
        """The sessions' processes, and what those have started."""
        found = []
        for one in Path("/proc").iterdir():
            with suppress(OSError, ValueError, IndexError):
                text = (one / "cmdline").read_bytes()
                if text.startswith(bytes(self.folder) + b"/pyvmm-agent"):
                    found.append(int(one.name))
        return found[1:]


_agent = functools.cache(_Agent)


class _ByAgent(Model):
    """As the agent puts a tree: with all bits of its modes, and a link if one comes first."""

    bits = 0o7777
    links_first = True

    def is_odd(self, type: int, target: bytes) -> bool:
        return False

    def take(self, type: int, payload: bytes) -> str:
        if type == said_by.SKIPPED:
            return "error"
        return super().take(type, payload)


def _session(data: bytes, *, listen_first: bool = False) -> bytes:
    """All that the agent says of `data`."""
    came = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(HANG)
        client.connect(str(_agent().path))
        with suppress(BrokenPipeError, ConnectionResetError):
            if listen_first:
                came = client.recv(MOST)
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while more := client.recv(MOST):
                came += more
    return came


def _put(rng: Random, note: list[str]) -> None:
    folder = _agent().folder / "put"
    said_by.beforehand(rng, folder)
    frames = [*tree_frames(rng), Frame(END, b"")]
    if rng.random() < 0.55:
        frames = harmed(rng, frames)
    local = rng.choice(("into", "into", "into/copy", "into/new", "into/a", "into/copy/"))
    path = os.fsencode(folder / local) + (b"/" if local.endswith("/") else b"")
    rest = b"".join(one.raw for one in frames)
    if rng.random() < 0.1:
        rest = rest[: rng.randint(0, len(rest))]
    note += [f"to {local}", repr(frames)]
    before = looked_at(os.fsencode(folder))
    outside = set(os.listdir(_agent().folder))
    is_folder, there = os.path.isdir(path), os.path.exists(path)
    named = path.rstrip(b"/")
    inside = os.path.relpath(named if is_folder else os.path.dirname(named), os.fsencode(folder))
    model = _ByAgent(dict(before), b"" if is_folder else os.path.basename(named), inside)
    try:
        came = _session(Frame(PUT, path).raw + rest)
        found, _ = parsed(came)
        assert is_hello(found) and len(found) <= 2, found
        after = looked_at(os.fsencode(folder))
        if is_folder and os.path.islink(named):  # which is followed: the client has named it
            for name in set(os.listdir(_agent().folder)) - outside:
                place = _agent().folder / name
                shutil.rmtree(
                    place
                ) if place.is_dir() and not place.is_symlink() else place.unlink()
            return
        if (there and not is_folder and not os.path.isfile(path)) or (
            not is_folder and path.endswith(b"/")
        ):
            assert found[1:] and found[1][0] == FAILED and after == before
            return
        result = "go on"
        told, _ = parsed(rest)
        for type, payload in told:
            result = model.take(type, payload)
            if result != "go on":
                break
        ended = found[1][0] if found[1:] else None
        wanted = {"end": (DONE,), "error": (FAILED,), "go on": (None, FAILED)}[result]
        assert ended in wanted, f"{found[1:]}, where the model has {result!r}"
        assert after == model.tree, (after, model.tree)
    finally:
        shutil.rmtree(folder)
        left = set(os.listdir(_agent().folder)) - outside
        assert not left, f"{left} is outside"


def _get(rng: Random, note: list[str]) -> None:
    folder = _agent().folder / "get"
    said_by.beforehand(rng, folder)
    name = rng.choice(("into", "into/a", "into/copy", "nothing", "into/..", "into/a/"))
    path = os.fsencode(folder) + b"/" + name.encode()
    if rng.random() < 0.1:
        path = rng.choice((b"", path + b"\0x", path + b"/" + b"x" * 5000, b"\0", path + b"//."))
    request = Frame(GET, path)
    note.append(repr(request))
    before = looked_at(os.fsencode(folder))
    try:
        found, _ = parsed(_session(request.raw))
        assert is_hello(found)
        is_there = path and b"\0" not in path and len(path) < 4096 and os.path.exists(path)
        if not is_there:
            assert [type for type, _ in found[1:]] == [FAILED], found
            return
        assert found[-1] == (END, b""), found[-1]
        sent: Tree = {}
        names: list[bytes] = []
        for type, payload in found[1:-1]:
            mode = struct.unpack_from("<I", payload)[0] if len(payload) >= 24 else 0
            one, _, target = payload[24:].partition(b"\0")
            whole = b"/".join([*names[1:], one]) if names else b""
            if type == DIRECTORY:
                sent[whole] = ("dir", mode)
                names.append(one)
            elif type == REGULAR:
                sent[whole] = ("file", b"", mode)
                names.append(one)
            elif type == said_by.DATA:
                place = b"/".join(names[1:])
                sent[place] = ("file", sent[place][1] + payload, sent[place][2])
            elif type == UP:
                names.pop()
            elif type == LINK:
                sent[whole] = ("link", target)
            else:
                assert type == said_by.SKIPPED, type
                sent[whole] = ("fifo",)
        sent.pop(b"", None)
        real = os.path.realpath(path)
        expected = looked_at(real) if os.path.isdir(real) else {}
        assert sent == expected, (sent, expected)
        assert looked_at(os.fsencode(folder)) == before
    finally:
        shutil.rmtree(folder)


def _run(rng: Random, note: list[str]) -> None:
    words = rng.choice(
        ((b"cat",), (b"cat",), (b"true",), (b"no-such-command",), (b"sleep", b"1000"))
    )
    limit = 30 if words[0] == b"sleep" and rng.random() < 0.3 else 0
    flags = 1 | 2 * (rng.random() < 0.2)
    head = struct.pack("<IIHHHH", flags, limit, 24, 80, len(words), 0)
    usual = flags == 1 and words == (b"cat",)
    if rng.random() < 0.1:
        usual = False
        head = struct.pack("<IIHHHH", flags, limit, 0, 0, rng.choice((0, 2, 9, 65535)), 9)
    request = Frame(RUN, head + b"\0\0" + b"".join(word + b"\0" for word in words))
    if rng.random() < 0.1:
        usual = False
        request = request._replace(payload=request.payload[: rng.randrange(len(request.payload))])
    given, left = [], WINDOW
    for _ in range(rng.randrange(5)):
        part = rng.randbytes(rng.choice((0, 1, 100, 5000)))[:left]
        left -= len(part)
        given.append(Frame(STDIN, part))
    frames = [*given, Frame(STDIN_END, b"")]
    if rng.random() < 0.2:
        frames.insert(0, Frame(RESIZE, struct.pack("<HH", rng.randrange(1 << 16), 9)))
    if rng.random() < 0.5:
        usual = False
        frames = harmed(rng, frames)
        if rng.random() < 0.3:
            frames.append(Frame(SIGNAL, struct.pack("<I", rng.choice((0, 15, 64, 1 << 31)))))
    note.append(repr((request, frames)))
    # To hang up ends the command: what comes back is waited for before.
    came = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(HANG)
        client.connect(str(_agent().path))
        with suppress(BrokenPipeError, ConnectionResetError):
            client.sendall(request.raw + b"".join(one.raw for one in frames))
            if not usual:
                client.shutdown(socket.SHUT_WR)
            while more := client.recv(MOST):
                came += more
    found, _ = parsed(came)
    assert is_hello(found), found[:1]
    known = (STARTED, STDOUT, STDERR, said_by.MORE_STDIN, EXIT, FAILED)
    assert all(type in known for type, _ in found[1:]), found
    if usual:
        output = b"".join(payload for type, payload in found if type == STDOUT)
        assert output == b"".join(one.payload for one in given)
        assert found[-1] == (EXIT, struct.pack("<II", 0, 0)), found[-1]


def _ask(rng: Random, note: list[str]) -> None:
    kind = rng.choice((CLOCK, *range(12), 32, 255))
    if kind in (RUN, PUT, GET):
        kind = CLOCK
    frames = [Frame(kind, rng.randbytes(rng.choice((0, 1, 8, 8, 300))))]
    if rng.random() < 0.3:
        frames[0] = frames[0]._replace(size=rng.choice((0, 1, 1 << 20, (1 << 20) + 1, 0xFFFFFF)))
    note.append(repr(frames))
    found, _ = parsed(_session(frames[0].raw))
    assert is_hello(found) and len(found) <= 2
    if kind == CLOCK and not frames[0].payload and frames[0].size is None:
        assert found[1][0] == CLOCK_IS and len(found[1][1]) == 16


_WAYS = (_put, _put, _put, _get, _run, _run, _ask)
_count = 0


def agent_program_case(rng: Random, ring: Ring) -> int:
    """One session; one step."""
    global _count
    note: list[str] = []
    way = rng.choice(_WAYS)
    with told(way, note):
        way(rng, note)
        log = _agent().log.read_text(errors="replace")
        assert "ERROR" not in log and "runtime error" not in log, log[-4000:]
        _count += 1
        if not _count % 200:
            end = time.monotonic() + HANG
            while left := _agent().pids():
                assert time.monotonic() < end, f"processes {left} are left"
                time.sleep(0.01)
    return 1
