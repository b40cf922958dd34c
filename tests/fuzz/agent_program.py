"""The guest's agent itself, built for this machine with the address and undefined-behaviour
sanitizers, before a client that says anything.

It runs as a process; a case is a session of its own, through a Unix socket. Whatever a case says,
no command is run but `cat` and others that do no harm, and all files are put into a folder of its
own. It raises AssertionError, with the frames, if

- the folder is afterwards another one than a model's of the same frames, with its times, or half a
  file is there,
- what comes back is not a greeting and frames, or says another end than the model, or another
  reason,
- a command has other words, groups, variables, input, output or window than it was to have, ends in
  another way, or more input is taken than may be on its way,
- a tree does not come as it is, with its sizes and times,
- the agent has ended, a sanitizer complains, or a process of a session is left.
"""

from __future__ import annotations

import errno
import functools
import os
import pwd
import select
import shutil
import signal
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
    DATA,
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
    """As the agent puts a tree: with all bits of its modes, and a link if one comes first. `times`
    has those of what it has put."""

    bits = 0o7777
    links_first = True

    def __init__(self, tree: Tree, top: bytes, inside: bytes) -> None:
        super().__init__(tree, top, inside)
        self.times: dict[bytes, int] = {}
        self._open: list[tuple[bytes, int]] = []

    def is_odd(self, type: int, target: bytes) -> bool:
        return False

    def take(self, type: int, payload: bytes) -> str:
        if type == said_by.SKIPPED:
            return "error"
        is_entry = self.file is None and type in (DIRECTORY, REGULAR, LINK)
        is_new = bool(self.made and self.made[-1])
        folder, is_file = self.stack[-1], self.file is not None
        result = super().take(type, payload)
        if result != "go on":
            return result
        if is_entry:
            self.times.pop(folder, None)
            name = payload[24:].partition(b"\0")[0]
            if not self._open:
                name = self.top or name
            path = folder + b"/" + name if folder else name
            (mtime,) = struct.unpack_from("<q", payload, 8)
            if type == LINK:
                self.times[path] = mtime
            else:
                self._open.append((path, mtime))
        elif type == UP:
            path, mtime = self._open.pop()
            if is_file or is_new:
                self.times[path] = mtime
        return result


def _failed(payload: bytes, *numbers: int) -> None:
    """It says why, as it should, with one of those errno."""
    (number,) = struct.unpack_from("<I", payload)
    assert number in numbers and len(payload) <= 260, (payload, numbers)


def _session(data: bytes) -> bytes:
    """All that the agent says of `data`."""
    came = b""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(HANG)
        client.connect(str(_agent().path))
        with suppress(BrokenPipeError, ConnectionResetError):  # it may be cut off before
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while more := client.recv(MOST):
                came += more
    return came


def _put(rng: Random, note: list[str]) -> None:
    folder = _agent().folder / "put"
    said_by.beforehand(rng, folder)
    at_edge = rng.random() < 0.3
    frames = [*(_edge_of_a_tree(rng) if at_edge else tree_frames(rng)), Frame(END, b"")]
    if rng.random() < (0.1 if at_edge else 0.55):
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
            _failed(found[1][1], errno.EEXIST, errno.ENOTDIR, errno.ENOENT)
            return
        result = "go on"
        told, too_long = parsed(rest)
        for type, payload in told:
            result = model.take(type, payload)
            if result != "go on":
                break
        ended = found[1][0] if found[1:] else None
        wanted = {"end": (DONE,), "error": (FAILED,), "go on": (None, FAILED)}[result]
        if result == "go on" and too_long:
            wanted = (FAILED,)
        assert ended in wanted, f"{found[1:]}, where the model has {result!r}"
        assert after == model.tree, (after, model.tree)
        if ended == FAILED:
            _failed(found[1][1], errno.EMSGSIZE if too_long and result == "go on" else 0, *_WHY)
        if result == "end":
            for one, mtime in model.times.items():
                there_now = os.lstat(os.fsencode(folder) + b"/" + one)
                assert there_now.st_mtime_ns == mtime, (one, there_now.st_mtime_ns, mtime)
                if after[one][0] == "file" and not any(after[one][1]):
                    assert there_now.st_blocks == 0, "what is empty takes room"
    finally:
        shutil.rmtree(folder)
        left = set(os.listdir(_agent().folder)) - outside
        assert not left, f"{left} is outside"


_WHY = (
    *(errno.EINVAL, errno.ELOOP, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ENOENT, errno.EMSGSIZE),
)


def _entry(type: int, name: bytes, more: bytes = b"", mtime: int = 0) -> Frame:
    return Frame(type, struct.pack("<IIqQ", 0o750, 0, mtime, 0) + name + more)


def _edge_of_a_tree(rng: Random) -> list[Frame]:
    """Frames of which one number just may be so, or just may not."""
    mtime = rng.choice((0, -1, 1, 10**9, -(10**9), 10**9 - 1, 1 - 10**9, 1_700_000_000 * 10**9 + 7))
    up, kind = Frame(UP, b""), rng.randrange(5)
    if kind == 0:  # as deep as it goes
        deep = rng.choice((62, 63, 64, 65))
        inner = rng.choice(([], [_entry(LINK, b"l", b"\0t")], [_entry(REGULAR, b"f"), up]))
        return [_entry(DIRECTORY, b"d", mtime=mtime)] * deep + inner + [up] * deep
    if kind == 1:
        name = b"n" * rng.choice((1, 254, 255, 256, 257))
        type = rng.choice((DIRECTORY, REGULAR))
        inside = [_entry(DIRECTORY, b"d"), _entry(type, name, mtime=mtime), up, up]
        return inside if rng.random() < 0.5 else [_entry(type, name, mtime=mtime), up]
    if kind == 2:
        target = b"t" * rng.choice((0, 1, 4094, 4095, 4096))
        more = rng.choice((b"\0" + target, b"\0" + target + b"\0", b"", b"\0"))
        return [_entry(DIRECTORY, b"d"), _entry(LINK, b"link", more, mtime), up]
    if kind == 3:
        data = []
        for _ in range(rng.choice((1, 2))):
            size = rng.choice((0, 1, 2, 4096, 65535, 65536, 65537))
            last = rng.choice((b"", b"\0", b"x"))[:size]
            fill = rng.choice((b"\0", b"x"))
            data.append(Frame(DATA, fill * (size - len(last)) + last))
        return [_entry(REGULAR, b"file", mtime=mtime), *data, up]
    turn = rng.choice((DATA, UP, REGULAR, LINK, DIRECTORY, END, 0, 23))
    odd = Frame(turn, b"") if turn in (DATA, UP, END) else _entry(turn, b"odd", b"\0t")
    frames = [_entry(DIRECTORY, b"d"), _entry(REGULAR, b"f", mtime=mtime), up, up]
    frames.insert(rng.randrange(5), odd)
    if rng.random() < 0.2:
        frames[0] = frames[0]._replace(payload=frames[0].payload[: rng.choice((23, 24, 25))])
    return frames


def _get(rng: Random, note: list[str]) -> None:
    folder = _agent().folder / "get"
    said_by.beforehand(rng, folder)
    deepest = 0
    if rng.random() < 0.15:
        deepest = rng.choice((62, 63, 64, 65))
        (folder / "into" / "/".join(["deep"] * deepest)).mkdir(parents=True)
    if rng.random() < 0.2:
        size = rng.choice((0, 1, 65535, 65536, 65537, 131072, 200_000))
        (folder / "into" / "data").write_bytes(rng.randbytes(size))
    if rng.random() < 0.1:
        (folder / "into" / ("n" * rng.choice((254, 255)))).touch()
        os.symlink("t" * rng.choice((1, 4094, 4095)), folder / "into" / "to")
    for one in (folder / "into").iterdir():
        ns = rng.choice((0, -1, 1 - 10**9, 10**18 + 7))
        os.utime(one, ns=(0, ns), follow_symlinks=False)
    name = rng.choice(("into", "into", "into/a", "into/data", "nothing", "into/..", "into/a/"))
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
            bad = not path or b"\0" in path or len(path) >= 4096
            others = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
            _failed(found[1][1], *((errno.EINVAL,) if bad else others))
            return
        real = os.path.realpath(path)
        chain = os.path.realpath(folder / "into" / "/".join(["deep"] * deepest)).encode()
        if deepest and chain.removeprefix(real + b"/").count(b"/") >= 63 and chain.startswith(real):
            assert found[-1][0] == FAILED, "directories are nested too deeply"
            _failed(found[-1][1], errno.ELOOP)
            return
        assert found[-1] == (END, b""), found[-1]
        sent: Tree = {}
        names: list[bytes] = []
        for type, payload in found[1:-1]:
            mode = struct.unpack_from("<I", payload)[0] if len(payload) >= 24 else 0
            one, _, target = payload[24:].partition(b"\0")
            whole = b"/".join([*names[1:], one]) if names else b""
            if len(payload) >= 24 and type in (DIRECTORY, REGULAR, LINK, said_by.SKIPPED):
                now = os.stat(os.path.join(real, whole) if whole else real, follow_symlinks=False)
                _, zero, mtime, size = struct.unpack_from("<IIqQ", payload)
                assert (zero, mtime, size) == (0, now.st_mtime_ns, now.st_size), (whole, now)
                given = path.rstrip(b"/").rpartition(b"/")[2]
                top = os.path.basename(real) if given in (b".", b"..") else given
                assert names or one == top, (one, top)
            if type == DIRECTORY:
                sent[whole] = ("dir", mode)
                names.append(one)
            elif type == REGULAR:
                sent[whole] = ("file", b"", mode)
                names.append(one)
            elif type == said_by.DATA:
                assert payload
                place = b"/".join(names[1:])
                sent[place] = ("file", sent[place][1] + payload, sent[place][2])
            elif type == UP:
                names.pop()
            elif type == LINK:
                sent[whole] = ("link", target)
            else:
                assert type == said_by.SKIPPED, type
                sent[whole] = ("fifo",)
        top_one = sent.pop(b"", None)
        if os.path.isfile(real):
            with open(real, "rb") as file:
                assert top_one and top_one[1] == file.read()
        expected = looked_at(real) if os.path.isdir(real) else {}
        assert sent == expected, (sent, expected)
        assert looked_at(os.fsencode(folder)) == before
    finally:
        shutil.rmtree(folder)


def _request(
    words: list[bytes],
    *,
    flags: int = 1,
    limit: int = 0,
    window: tuple[int, int] = (24, 80),
    folder: bytes = b"",
    user: bytes = b"",
    variables: list[bytes] | None = None,
) -> Frame:
    variables = variables or []
    head = struct.pack("<IIHHHH", flags, limit, *window, len(words), len(variables))
    return Frame(RUN, head + b"".join(one + b"\0" for one in (folder, user, *words, *variables)))


def _conversation(
    request: Frame, given: list[bytes], *, then: list[Frame] | None = None, heeds: bool = True
) -> list[tuple[int, bytes]]:
    """All that comes of a command that is given that, no more at a time than it `heeds`, and then
    other frames."""
    came, left, at = b"", WINDOW, 0
    to_send = bytearray(request.raw)
    given = [*given]
    more: list[Frame] | None = [Frame(STDIN_END, b"")] if then is None else then
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(_agent().path))
        client.setblocking(False)
        watch = select.poll()
        while True:
            while given and (len(given[0]) <= left or not heeds):
                part = given.pop(0)
                left -= len(part)
                to_send += Frame(STDIN, part).raw
            if not given and more is not None:
                to_send += b"".join(one.raw for one in more)
                more = None
            watch.register(client, select.POLLIN | (select.POLLOUT if to_send else 0))
            assert watch.poll(HANG * 1000), "it says nothing more"
            with suppress(BlockingIOError):
                try:
                    data = client.recv(MOST)
                    came += data
                    if not data:
                        break
                except ConnectionResetError:
                    break
            with suppress(BlockingIOError):
                try:
                    del to_send[: client.send(to_send)]
                except (BrokenPipeError, ConnectionResetError):
                    to_send.clear()
            found, _ = parsed(came[at:])
            for type, payload in found:
                at += 4 + len(payload)
                if type == said_by.MORE_STDIN:
                    left += struct.unpack("<I", payload)[0]
    found, is_wrong = parsed(came)
    assert is_hello(found) and not is_wrong
    return found[1:]


def _heard(found: list[tuple[int, bytes]], type: int) -> bytes:
    return b"".join(payload for one, payload in found if one == type)


def _ended(found: list[tuple[int, bytes]], how: int, value: int) -> None:
    assert found[0][0] == STARTED, found[:1]
    assert found[-1] == (EXIT, struct.pack("<II", how, value)), found[-1]
    known = (STARTED, STDOUT, STDERR, said_by.MORE_STDIN, EXIT)
    assert all(type in known for type, _ in found), found


def _input(rng: Random, note: list[str]) -> None:
    """All that is given comes back, and is counted."""
    count = rng.choice((0, 1, 3, 5))
    sizes = [rng.choice((0, 1, 100, 5000, 16384, 65535, 65536)) for _ in range(count)]
    given = [rng.randbytes(size) for size in sizes]
    note.append(f"given {sizes}")
    found = _conversation(_request([b"cat"]), given)
    _ended(found, 0, 0)
    assert _heard(found, STDOUT) == b"".join(given)
    counts = [payload for type, payload in found if type == said_by.MORE_STDIN]
    assert sum(struct.unpack("<I", one)[0] for one in counts) == sum(sizes), counts


def _unread_input(rng: Random, note: list[str]) -> None:
    """A pipe's worth and a window's may wait for a command that does not read, and no byte more."""
    more = rng.choice((0, 0, 1))
    late = rng.random() < 0.3
    number = rng.choice((9, 15, 64))
    ending = [Frame(STDIN, b"x" * more)] if more else []
    note.append(f"{more} more, late {late}, signal {number}")
    if late:  # what comes behind its end
        ending = [Frame(STDIN_END, b""), Frame(STDIN, b"" if rng.random() < 0.5 else b"x")]
        more = 1
    odd = [Frame(SIGNAL, struct.pack("<I", one)) for one in (0, 65, 1 << 31)]
    then = [*ending, *odd, Frame(SIGNAL, struct.pack("<I", number))]
    full = [bytes(WINDOW)] * 2
    found = _conversation(_request([b"sleep", b"1000"]), full, then=then, heeds=False)
    if more:
        assert all(type in (STARTED, said_by.MORE_STDIN) for type, _ in found), found
    else:
        _ended(found, 1, number)


def _output(rng: Random, note: list[str]) -> None:
    sizes = [rng.choice((0, 1, 65535, 65536, 65537, 200_000)) for _ in range(2)]
    code = rng.choice((0, 1, 7, 255))
    script = f"head -c {sizes[0]} /dev/zero; head -c {sizes[1]} /dev/zero >&2; exit {code}"
    note.append(script)
    found = _conversation(_request([b"sh", b"-c", script.encode()], flags=0), [], then=[])
    _ended(found, 0, code)
    assert [len(_heard(found, one)) for one in (STDOUT, STDERR)] == sizes


def _identity(rng: Random, note: list[str]) -> None:
    """Who it is, where, and what it is told."""
    number = rng.choice((4321, 4294967294, 4294967295, 4294967296, 1))
    many = [*range(2000, 2000 + rng.choice((1023, 1024, 1025)))]
    groups = rng.choice((None, None, [77], [77, 5, 6], [4294967295], many))
    user = b"%d" % number
    if groups:
        user += b":%d" % groups[0] + (b":" if groups[1:] else b"")
        user += b",".join(b"%d" % one for one in groups[1:])
    if os.geteuid() or rng.random() < 0.2:
        user = rng.choice((b"", b"", b"nobody-at-all", b"x" * 300, b"4321x", b"-1"))
    is_number = user[:1].isdigit() and user[-1:] != b"x"
    some = (b"A=1", b"B=", b"C=x=y", b"HOME=/h", *((b"=", b"", b"D", b"=x") * (rng.random() < 0.2)))
    variables = [rng.choice(some) for _ in range(rng.choice((0, 1, 3)))]
    folder = rng.choice((b"", b"/", b"/tmp", b"/tmp", b"/nowhere", b"/etc/passwd"))
    script = b'pwd; id -u; id -g; id -G; printf "%s," "$@"; echo; exec env'
    words = [b"a", b"", b"b c", b"\xff"][: rng.randrange(5)]
    argv = [rng.choice((b"sh", b"sh", b"sh", b"no-such-command", b"")), b"-c", script, b"-", *words]
    request = _request(argv, flags=0, folder=folder, user=user, variables=variables)
    note.append(f"{user!r:.60}, {variables}, {folder!r}, {argv[0]!r}")
    found = _conversation(request, [], then=[])
    if (user and not is_number) or (is_number and number > 4294967294):
        return _told(found, errno.ENOENT, b"no such user")
    if is_number and groups and 4294967295 in groups:
        return _told(found, errno.ENOENT, b"no such group")
    if is_number and groups and len(groups) > 1024:
        return _told(found, errno.ENOENT, b"too many groups")
    if any(one[:1] in (b"=", b"") or b"=" not in one for one in variables):
        return _told(found, errno.EINVAL, b"a variable without a name")
    if folder in (b"/nowhere", b"/etc/passwd"):
        return _told(found, errno.ENOENT if folder == b"/nowhere" else errno.ENOTDIR, folder)
    if argv[0] != b"sh":
        return _told(found, errno.ENOENT, argv[0])
    _ended(found, 0, 0)
    place, *numbers, told = _heard(found, STDOUT).split(b"\n")[:5]
    assert (place, told) == (folder or b"/", b"".join(b"%b," % one for one in words or [b""]))
    uid = number if is_number else os.geteuid()
    known = None
    with suppress(KeyError):
        known = pwd.getpwuid(uid)
    if is_number:
        gid = groups[0] if groups else known.pw_gid if known else 0
        wanted = set(groups or ())
        if known and not groups:
            wanted = set(os.getgrouplist(known.pw_name, gid))
        ids = [b"%d" % uid, b"%d" % gid, wanted | {gid}]
        assert [*numbers[:2], set(map(int, numbers[2].split()))] == ids, (numbers, ids)
    expected = {
        b"PATH": b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        b"HOME": os.fsencode(known.pw_dir) if known else b"/",
        **dict.fromkeys((b"USER", b"LOGNAME"), known.pw_name.encode() if known else b"%d" % uid),
        **{name: value for name, _, value in (one.partition(b"=") for one in variables)},
    }
    there = dict(one.split(b"=", 1) for one in _heard(found, STDOUT).split(b"\n")[5:-1])
    for name in (b"PWD", b"OLDPWD", b"SHLVL", b"_"):  # the shell's own
        there.pop(name, None)
    assert there == expected, (there, expected)
    return None


def _told(found: list[tuple[int, bytes]], number: int, text: bytes) -> None:
    assert found == [(FAILED, struct.pack("<I", number) + text[:256])], found


def _limit(rng: Random, note: list[str]) -> None:
    """A time limit, and a terminal of some size."""
    if rng.random() < 0.5:
        found = _conversation(_request([b"sleep", b"1000"], limit=rng.choice((1, 20))), [], then=[])
        return _ended(found, 2, signal.SIGKILL)
    window = rng.choice((24, 0, 1, 65535)), rng.choice((80, 0, 1, 65535))
    note.append(f"{window}")
    request = _request([b"stty", b"size"], flags=2, window=window)
    found = _conversation(request, [], then=[])
    _ended(found, 0, 0)
    assert _heard(found, STDOUT) == b"%d %d\r\n" % window
    return None


def _odd_run(rng: Random, note: list[str]) -> None:
    """Requests and frames that are wrong."""
    request = _request([b"cat"])
    sizes = [rng.choice((0, 1, 100, 5000)) for _ in range(rng.randrange(4))]
    frames = [*(Frame(STDIN, rng.randbytes(size)) for size in sizes), Frame(STDIN_END, b"")]
    kind = rng.randrange(4)
    if kind == 0:
        count = rng.choice((0, 2, 3, 9, 65535))
        payload = struct.pack("<IIHHHH", 0, 0, 0, 0, count, rng.choice((0, 1))) + b"\0\0cat\0"
        request = Frame(RUN, payload)
    elif kind == 1:
        payload = request.payload[: rng.randrange(len(request.payload))]
        request = request._replace(payload=payload)
        if payload[16:] not in (b"", b"\0", b"\0\0"):  # the rest of a word is one
            kind = 3
    else:
        frames = harmed(rng, frames)
    if rng.random() < 0.3:
        frames.insert(0, Frame(RESIZE, rng.randbytes(rng.choice((3, 4, 4, 5)))))
    note.append(repr((request, frames)))
    found, _ = parsed(_session(request.raw + b"".join(one.raw for one in frames)))
    assert is_hello(found), found[:1]
    known = (STARTED, STDOUT, STDERR, said_by.MORE_STDIN, EXIT, FAILED)
    assert all(type in known for type, _ in found[1:]), found
    if kind < 2:
        assert [type for type, _ in found[1:]] == [FAILED], found
        _failed(found[1][1], errno.EINVAL)


def _ask(rng: Random, note: list[str]) -> None:
    kind = rng.choice((CLOCK, CLOCK, said_by.POWER_OFF, *range(12), 32, 255))
    if kind in (RUN, PUT, GET):
        kind = CLOCK
    one = Frame(kind, rng.randbytes(rng.choice((0, 0, 1, 7, 8, 9, 300))))
    if rng.random() < 0.2:
        one = one._replace(payload=bytes((1 << 20) + rng.randrange(-1, 2)))
    elif rng.random() < 0.2:
        sizes = (0, len(one.payload) + 1, 1 << 20, (1 << 20) + 1, 0xFFFFFF)
        one = one._replace(size=rng.choice(sizes))
    note.append(f"{kind}, {one.payload[:300]!r}, {len(one.payload)} bytes, {one.size}")
    before = [time.clock_gettime_ns(which) for which in (time.CLOCK_REALTIME, time.CLOCK_BOOTTIME)]
    found, _ = parsed(_session(one.raw))
    after = [time.clock_gettime_ns(which) for which in (time.CLOCK_REALTIME, time.CLOCK_BOOTTIME)]
    assert is_hello(found) and len(found) <= 2
    times = [struct.unpack("<IIqq", found[0][1])[2:]]
    size = len(one.payload) if one.size is None else one.size
    answer = found[1:]
    if size > 1 << 20:
        assert [type for type, _ in answer] == [FAILED]
        _failed(answer[0][1], errno.EMSGSIZE)
    elif size > len(one.payload):
        assert not answer, "it says something of half a request"
    elif kind == CLOCK and not size:
        [(type, payload)] = answer
        assert type == CLOCK_IS
        times.append(struct.unpack("<qq", payload))
    else:
        assert [type for type, _ in answer] == [FAILED]
        is_clock = errno.EPERM if size == 8 else errno.EINVAL
        known = {CLOCK: is_clock, said_by.POWER_OFF: errno.EPERM}
        _failed(answer[0][1], known.get(kind, errno.ENOSYS))
    for pair in times:
        for low, one_time, high in zip(before, pair, after, strict=True):
            assert low <= one_time <= high, (low, one_time, high)


def _many(rng: Random, note: list[str]) -> None:
    """64 sessions at a time; the next one waits until one has ended."""
    with ExitStack() as closing:
        sessions = []
        for _ in range(64):
            one = closing.enter_context(socket.socket(socket.AF_UNIX))
            one.settimeout(HANG)
            one.connect(str(_agent().path))
            sessions.append(one)
        for one in sessions:
            assert one.recv(MOST)
        late = closing.enter_context(socket.socket(socket.AF_UNIX))
        late.connect(str(_agent().path))
        late.settimeout(0.02)  # too short a time sees less
        with suppress(TimeoutError):
            raise AssertionError(f"one too many: {late.recv(MOST)!r}")
        late.settimeout(HANG)
        rng.choice(sessions).close()
        assert late.recv(MOST)


_RUNS = (_input, _unread_input, _output, _identity, _limit, _odd_run, _odd_run)
_WAYS = (_put, _put, _put, _put, _get, _get, *_RUNS, _ask, _ask)
_count = 0


def agent_program_case(rng: Random, ring: Ring) -> int:
    """One session; one step."""
    global _count
    note: list[str] = []
    way = rng.choice(_WAYS) if rng.random() > 0.002 else _many
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
