"""A guest whose agent lies: the client ends in one line, with nothing written where it must not be
and no more kept than it said it would."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
from agent_rig import GREETING, liar, saying
from descriptors import open_descriptors
from mmio_harness import wait_for

from pyvmm.agent import Agent, AgentError, CommandTimeout, NoAgent, client, files, process
from pyvmm.agent.protocol import (
    EXIT,
    HEADER,
    HELLO,
    NUMBER,
    TIMED_OUT,
    TIMES,
    VERSION,
    Entry,
    FrameType,
    entry_frame,
    frame,
)
from pyvmm.agent.session import NOT_THE_AGENT
from pyvmm.api import clones
from pyvmm.api.errors import VMTimeout
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.kinds import vsock
from pyvmm.spec.vm import VmSpec


def entry(type: FrameType, name: bytes, target: bytes = b"", mode: int = 0o644) -> bytes:
    return entry_frame(type, Entry(mode, 0, 0, name, target))


FILE = entry(FrameType.REGULAR, b"file") + frame(FrameType.DATA, b"evil")
UP, END = frame(FrameType.UP), frame(FrameType.END)


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n" * 9,
        b"\0" * 9,
        frame(FrameType.STDOUT, b"x"),
        frame(FrameType.HELLO, b"short"),
        HEADER.pack(FrameType.HELLO | 0xFFFFFF << 8),
        frame(FrameType.HELLO, HELLO.pack(VERSION + 1, 0, 0, 0)),
        frame(FrameType.FAILED, NUMBER.pack(1) + b"no"),
        frame(FrameType.FAILED),
    ],
    ids=lambda said: f"{len(said)}-{said[:4].hex()}",
)
def test_s8_what_is_no_agent_is_not_taken_for_one(said: bytes) -> None:
    def act(end: socket.socket) -> None:
        end.sendall(said)
        end.shutdown(socket.SHUT_WR)
        while end.recv(1 << 16):
            pass

    with liar(act) as agent:
        for ask in (lambda: agent.run(["true"]), agent.clock, lambda: agent.wait_ready(0.01)):
            with pytest.raises(AgentError):
                ask()


@pytest.mark.parametrize("type", [FrameType.STARTED, FrameType.STDOUT, FrameType.DONE])
def test_what_greets_in_another_frame_is_no_agent(type: FrameType) -> None:
    def act(end: socket.socket) -> None:
        end.sendall(
            frame(type, HELLO.pack(VERSION, 0, 0, 0)) + frame(FrameType.EXIT, EXIT.pack(0, 0))
        )
        end.recv(1)

    with liar(act) as agent:
        for ask in (lambda: agent.run(["true"]), agent.wait_ready):
            with pytest.raises(AgentError, match=NOT_THE_AGENT):
                ask()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        frame(FrameType.EXIT),
        frame(FrameType.EXIT, EXIT.pack(9, 0)),
        frame(FrameType.EXIT, EXIT.pack(0, 256)),
        frame(FrameType.MORE_STDIN, b"x"),
        frame(FrameType.STARTED),
        frame(FrameType.CLOCK_IS, TIMES.pack(0, 0)),
        HEADER.pack(FrameType.STDOUT | ((1 << 16) + 1) << 8),
        frame(FrameType.STDOUT, b"half")[:-1],
        frame(FrameType.HELLO, HELLO.pack(VERSION, 0, 0, 0)),
    ],
    ids=lambda said: f"{len(said)}-{said[:6].hex()}",
)
def test_s8_answers_that_make_no_sense_end_a_command(said: bytes) -> None:
    is_cut_short = said[:1] in (b"", bytes([FrameType.STDOUT]))
    why = "has ended|is not" if is_cut_short else "what answers in the guest is not"
    with liar(saying(said)) as agent, pytest.raises(AgentError, match=why) as caught:
        agent.run(["true"], input=bytes(1 << 20))
    assert "\n" not in str(caught.value)


def test_s8_a_command_that_had_no_limit_cannot_have_taken_too_long() -> None:
    said = frame(FrameType.EXIT, EXIT.pack(TIMED_OUT, 0))
    with liar(saying(said)) as agent:
        with pytest.raises(AgentError, match=NOT_THE_AGENT):
            agent.run(["true"])
        with pytest.raises(CommandTimeout, match="true took longer than 60 s"):
            agent.run(["true"], timeout=60)


@pytest.mark.parametrize(
    ("said", "is_sane"),
    [(frame(FrameType.EXIT, EXIT.pack(0, 7)), True), (frame(FrameType.CLOCK_IS, bytes(16)), False)],
)
def test_what_was_said_before_the_connection_broke_is_heard(said: bytes, is_sane: bool) -> None:
    has_gone = threading.Event()

    def act(end: socket.socket) -> None:
        end.sendall(GREETING)
        end.recv(1 << 16)
        end.sendall(said)
        end.close()
        has_gone.set()

    with liar(act) as agent, agent.open(["true"], stdin=True) as command:
        assert has_gone.wait(60)
        for _ in range(2):
            command.write(b"nobody reads this")
        if is_sane:
            assert command.wait() == 7
        else:
            with pytest.raises(AgentError, match=NOT_THE_AGENT):
                command.wait()


def test_the_words_of_a_guest_cannot_play_tricks_on_a_terminal() -> None:
    said = frame(FrameType.FAILED, NUMBER.pack(2) + b"\x1b]0;owned\x07\r\n" + b"x" * 5000)
    with liar(saying(said)) as agent, pytest.raises(AgentError) as caught:
        agent.run(["true"])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_a6_output_without_end_is_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "OUTPUT_LIMIT", 1 << 20)

    def act(end: socket.socket) -> None:
        end.sendall(GREETING)
        while True:
            end.sendall(frame(FrameType.STDERR, bytes(1 << 16)))

    with liar(act) as agent, pytest.raises(AgentError, match="writes more than 1 MiB"):
        agent.run(["true"])


def test_many_clones_keep_little_of_what_their_guests_say(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = VmSpec("/kernel", devices=(vsock.Spec(),))
    notes: list[str] = []
    sent: list[int] = []

    def act(end: socket.socket) -> None:
        end.sendall(GREETING)
        sent.append(0)
        if len(sent) == 1:
            end.recv(1 << 16)
            end.sendall(frame(FrameType.CLOCK_IS, TIMES.pack(1, 2)))
        while len(sent) > 1 and sent[-1] < 64 << 20:
            end.sendall(frame(FrameType.STDERR, bytes(1 << 16)))
            sent[-1] += 1 << 16

    with liar(act) as agent:
        monkeypatch.setattr(clones, "connect_vsock", lambda *_, **__: agent._connection(1))
        monitor = SimpleNamespace(name="a", spec=spec, note=notes.append, outcome=None)
        clones.introduce(monitor, spec)  # type: ignore[arg-type]
    assert len(sent) == 2 and sent[-1] < 4 << 20, sent
    assert notes == [
        "a: its guest is as the original: /bin/sh writes more than 65536 bytes; use open(), or "
        "write to a file"
    ]


def test_a_clone_is_not_waited_for_longer_than_its_caller_wants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = VmSpec("/kernel", devices=(vsock.Spec(),))
    with liar(saying(b"", stay=True)) as agent:
        monkeypatch.setattr(clones, "connect_vsock", lambda *_, **__: agent._connection(1))
        monitor = SimpleNamespace(name="a", spec=spec, note=print, outcome=None)
        with pytest.raises(VMTimeout, match="the guest of a did not answer in time"):
            clones.introduce(monitor, spec, time.monotonic() + 0.2)  # type: ignore[arg-type]


def test_an_agent_that_grants_too_much_gets_no_more_at_a_time() -> None:
    said = frame(FrameType.MORE_STDIN, NUMBER.pack(0xFFFFFFFF)) * 3
    said += frame(FrameType.STDOUT, b"granted")
    with liar(saying(said, stay=True)) as agent, agent.open(["cat"], stdin=True) as command:
        assert command.write(bytes(5)) == 5 and command.room == (1 << 16) - 5
        assert command.read(60) == (1, b"granted")
        assert command.room == 1 << 16


FLOOD = [frame(FrameType.STDOUT, b"x"), frame(FrameType.MORE_STDIN, NUMBER.pack(0))]


@pytest.mark.parametrize("said", FLOOD, ids=["output", "grants"])
def test_a6_a_guest_that_never_stops_talking_is_late_all_the_same(
    said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_GRACE", 0.05)

    def act(end: socket.socket) -> None:
        end.sendall(GREETING)
        while True:
            end.sendall(said * 1000)

    with liar(act) as agent:
        with pytest.raises(CommandTimeout, match="true took longer than"):
            agent.run(["true"], timeout=0.05)
        with agent.open(["true"]) as command, pytest.raises(CommandTimeout):
            command.wait(0.05)


def test_a_guest_that_grants_and_never_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "PATIENCE", 0.05)

    def act(end: socket.socket) -> None:
        end.sendall(GREETING)
        while True:
            end.sendall(frame(FrameType.MORE_STDIN, NUMBER.pack(1 << 16)))

    with liar(act) as agent, pytest.raises(CommandTimeout):
        agent.run(["cat"], input=bytes(4 << 20), timeout=1000)


def test_who_is_silent_or_does_not_read_costs_the_time_that_was_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "PATIENCE", 1000.0)
    silent = threading.Event()
    with liar(lambda end: silent.wait() and None) as agent:
        with pytest.raises(NoAgent, match=r"no agent answers in the guest after 0\.05 s"):
            agent.wait_ready(0.05)
        for ask in (
            lambda: agent.run(["true", "x" * (1 << 19), "x" * (1 << 18)], timeout=0.05),
            lambda: agent.pull("x" * 60_000, "/tmp", timeout=0.05),
        ):
            with pytest.raises(CommandTimeout, match=r"took longer than 0\.05 s"):
                ask()
        silent.set()


def test_waiting_for_an_agent_of_another_version_does_not_help() -> None:
    def act(end: socket.socket) -> None:
        end.sendall(frame(FrameType.HELLO, HELLO.pack(VERSION + 1, 0, 0, 0)))
        end.recv(1)

    with liar(act) as agent, pytest.raises(AgentError, match=r"version 2, not 1; build the image"):
        agent.wait_ready()


def test_the_names_that_a_guest_sends_cannot_play_tricks_on_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/\x1b[2J").write_text("in the way")
    top, odd = entry(FrameType.DIRECTORY, b"tree"), entry(FrameType.DIRECTORY, b"\x1b[2J")
    for path, lie in (("tree", top + odd), ("tree/\x1b[2J", odd), ("tree/\x1b[2J/\nx", odd)):
        with liar(saying(lie)) as agent, pytest.raises((ConfigError, AgentError)) as caught:
            agent.pull(path, tmp_path / (path if "\n" in path else os.path.dirname(path)))
        assert str(caught.value).isprintable()


def test_a_full_disk_is_the_hosts_failure(tmp_path: Path) -> None:
    said = FILE + frame(FrameType.DATA, bytes(range(256)) * 64) * 2 + UP + END
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, before[1]))
    try:
        with liar(saying(said)) as agent, pytest.raises(HostError, match="file: File too large"):
            agent.pull("file", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


def test_an_agent_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.05)
    monkeypatch.setattr(client, "_GRACE", 0.05)
    with liar(saying(b"", stay=True)) as agent:
        with pytest.raises(CommandTimeout, match="true took longer than"):
            agent.run(["true"], timeout=0.01)
        for ask in (agent.clock, lambda: agent.power_off(timeout=0.05)):
            with pytest.raises(CommandTimeout, match="does not answer"):
                ask()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A directory to pull into, and beside it what a guest is not to reach."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious").write_text("precious")
    (tmp_path / "target").mkdir()
    (tmp_path / "target/link").symlink_to("../outside")
    (tmp_path / "target/tree").mkdir(mode=0o700)
    (tmp_path / "target/tree/link").symlink_to("../../outside")
    return tmp_path / "target"


def everything_outside(target: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (target.parent / "outside").iterdir()}


@pytest.mark.parametrize(
    "said",
    [
        entry(FrameType.REGULAR, b"../outside/precious"),
        entry(FrameType.REGULAR, b"/etc/passwd"),
        entry(FrameType.REGULAR, b".."),
        entry(FrameType.REGULAR, b"."),
        entry(FrameType.REGULAR, b""),
        entry(FrameType.REGULAR, b"x" * 256),
        entry(FrameType.DIRECTORY, b".."),
        # Through a link that is there already, and through one that it makes itself.
        entry(FrameType.DIRECTORY, b"tree") + entry(FrameType.DIRECTORY, b"link") + FILE,
        entry(FrameType.LINK, b"tree", b"../outside") + END,
        entry(FrameType.REGULAR, b"tree", b"behind a NUL"),
        entry(FrameType.DIRECTORY, b"top", mode=0o755)
        + entry(FrameType.LINK, b"way", b"../../outside")
        + entry(FrameType.DIRECTORY, b"way")
        + FILE,
        entry(FrameType.LINK, b"name", b""),
        entry(FrameType.DIRECTORY, b"top", mode=0o755) + entry(FrameType.LINK, b"way", b"a\0b"),
        entry(FrameType.DIRECTORY, b"d") * 100,
        FILE + UP + FILE + UP,
        FILE + END,
        FILE + frame(FrameType.STDOUT, b"x"),
        UP,
        frame(FrameType.DATA, b"x"),
        frame(FrameType.REGULAR, b"short"),
        frame(FrameType.DONE),
        FILE,
    ],
    ids=lambda said: f"{len(said)}-{said[:24].hex()}",
)
def test_a_guest_writes_nowhere_but_below_the_target(said: bytes, target: Path) -> None:
    with liar(saying(said)) as agent, pytest.raises(PyvmmError) as caught:
        agent.pull("/tree", target)
    assert "\n" not in str(caught.value)
    assert everything_outside(target) == {"precious": "precious"}
    assert sorted(os.listdir(target.parent)) == ["outside", "target"]
    assert not [name for name in os.listdir(target) if name.startswith(".pyvmm")]


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (FILE + UP + entry(FrameType.REGULAR, b"x") + frame(FrameType.DATA, b"2") + UP, b"evil"),
        (FILE + UP + UP, b"evil"),
        (FILE + UP + frame(FrameType.DATA, b"2"), b"evil"),
        (FILE + FILE, None),
        (FILE + END, None),
        (frame(FrameType.DATA, b"2"), None),
        (UP, None),
        (entry(FrameType.LINK, b"new", b"/etc/passwd") + END, None),
    ],
    ids=range(8),
)
def test_s8_frames_out_of_turn_end_a_copy(said: bytes, left: bytes | None, target: Path) -> None:
    before = open_descriptors()
    with (
        liar(saying(said)) as agent,
        pytest.raises(AgentError, match=f"{NOT_THE_AGENT}|invalid name"),
    ):
        agent.pull("/new", target)
    new = target / "new"
    assert not new.is_symlink()
    assert (new.read_bytes() if new.exists() else None) == left
    assert not [name for name in os.listdir(target) if name.startswith(".pyvmm")]
    assert open_descriptors() == before


def test_a_file_system_that_keeps_no_times_is_no_reason_to_fail(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def utime(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "a FUSE file system without them")

    monkeypatch.setattr(os, "utime", utime)
    with liar(saying(FILE + UP + END)) as agent:
        agent.pull("/x", target)
    assert (target / "x").read_text() == "evil"


def test_names_that_are_skipped_are_kept_to_a_thousand(target: Path) -> None:
    skipped = entry(FrameType.SKIPPED, b"s" * 255) * 3000
    top = entry(FrameType.DIRECTORY, b"x", mode=0o755)
    with liar(saying(top + skipped + frame(FrameType.SKIPPED, b"bad") + UP + END)) as agent:
        assert agent.pull("/x", target).skipped == ["s" * 255] * 1000
    with liar(saying(top + frame(FrameType.SKIPPED, b"bad") + UP + END)) as agent:
        assert agent.pull("/x", target).skipped == ["?"]


@pytest.mark.parametrize(
    "said", [entry(FrameType.LINK, b"l"), frame(FrameType.DONE), frame(FrameType.EXIT)]
)
def test_s8_what_is_no_file_below_a_directory_ends_a_copy(said: bytes, target: Path) -> None:
    top = entry(FrameType.DIRECTORY, b"x", mode=0o755)
    with (
        liar(saying(top + said)) as agent,
        pytest.raises(AgentError, match=f"{NOT_THE_AGENT}|invalid name"),
    ):
        agent.pull("/x", target)
    assert os.listdir(target / "x") == []


def test_a_half_copy_is_nobody_elses_to_read(target: Path) -> None:
    modes: list[int] = []

    def act(end: socket.socket) -> None:
        saying(entry(FrameType.REGULAR, b"x", mode=0o666) + frame(FrameType.DATA, b"1"))(end)
        wait_for(lambda: any(target.glob(".pyvmm-part*")))
        modes.extend(part.stat().st_mode & 0o7777 for part in target.glob(".pyvmm-part*"))

    with liar(act) as agent, suppress(AgentError):
        agent.pull("/new", target)
    assert modes == [0o600]


def test_a2_a_file_takes_the_place_of_a_link_and_does_not_go_through_it(target: Path) -> None:
    said = entry(FrameType.REGULAR, b"link", mode=0o6755) + frame(FrameType.DATA, b"new") + UP + END
    with liar(saying(said)) as agent:
        agent.pull("/link", target)
    assert (target / "link").read_text() == "new"
    assert not (target / "link").is_symlink()
    assert (target / "link").stat().st_mode & 0o7777 == 0o755
    assert everything_outside(target) == {"precious": "precious"}


@pytest.mark.parametrize(
    ("remote", "name"),
    [
        ("/etc/hosts", "hosts"),
        ("hosts", "hosts"),
        ("/var/log/", "log"),
        ("//var//log//", "log"),
        ("/var/log/.", "log"),
        ("/var/./log/../lib", "lib"),
        ("/a/b/..", "a"),
        ("/", "root"),
        ("//", "root"),
        (".", "root"),
        ("..", "root"),
        ("/a/..", "root"),
        ("/a/../../..", "root"),
        ("/.bashrc", ".bashrc"),
        ("/etc/...", "..."),
        ("/with\nnewline", "with\nnewline"),
        ("/not \udcff UTF-8", "not \udcff UTF-8"),
        ("/-", "-"),
        ("/" + "x" * 255, "x" * 255),
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_row73_the_guest_does_not_choose_the_name(remote: str, name: str, tmp_path: Path) -> None:
    """CVE-2019-6111: whatever the far end calls it, the copy has the name that was asked for."""
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".profile").write_text("mine")
    for said in (
        entry(FrameType.REGULAR, b".profile") + frame(FrameType.DATA, b"evil") + UP,
        entry(FrameType.REGULAR, b".ssh") + frame(FrameType.DATA, b"evil") + UP,
        entry(FrameType.DIRECTORY, b".ssh", mode=0o777) + FILE + UP + UP,
        entry(FrameType.LINK, b".profile", b"/etc/passwd"),
    ):
        place = home / name
        if place.exists():
            place.unlink()
        with suppress(AgentError), liar(saying(said + END)) as agent:
            agent.pull(remote, home)
        assert {*os.listdir(home)} <= {".ssh", ".profile", name}
        assert os.listdir(home / ".ssh") == []
        assert (home / ".profile").read_text() == "mine"
        if place.is_dir():
            shutil.rmtree(place)


@pytest.mark.parametrize(
    ("remote", "local", "why"),
    [
        ("", ".", "'' is not a path"),
        ("a\0b", ".", "is not a path"),
        ("\ud800", ".", "is not a path"),
        ("/x", "", "'' is not a path"),
        ("/x", "a\0b", "is not a path"),
        ("/x", "\ud800", "is not a path"),
        ("/x", "x" * 8192, "File name too long"),
        ("/x", "no/such", "No such file"),
        ("/x", "no/such/", "is not a directory"),
        ("/" + "x" * 8192, ".", "File name too long"),
        ("/" + "x" * 256, ".", "File name too long"),
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_a1_names_that_cannot_be_are_one_line(
    remote, local, why, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with liar(saying(FILE + UP + END)) as agent, pytest.raises(ConfigError, match=why) as caught:
        agent.pull(remote, local)
    assert "\n" not in str(caught.value)
    assert os.listdir() == []


def test_a2_a_link_of_an_earlier_copy_is_not_followed_by_a_later_one(target: Path) -> None:
    top = entry(FrameType.DIRECTORY, b"x", mode=0o755)
    out = entry(FrameType.LINK, b"way", b"../../outside")
    first = top + out + entry(FrameType.LINK, b"new", b"../../outside/new") + UP + END
    with liar(saying(first)) as agent:
        agent.pull("/x", target)
    for second in (
        top + entry(FrameType.DIRECTORY, b"way", mode=0o777) + FILE + UP + UP + UP + END,
        top + entry(FrameType.REGULAR, b"new") + frame(FrameType.DATA, b"evil") + UP + UP + END,
        top + entry(FrameType.REGULAR, b"way") + frame(FrameType.DATA, b"evil") + UP + UP + END,
    ):
        with suppress(ConfigError), liar(saying(second)) as agent:
            agent.pull("/x", target)
        assert everything_outside(target) == {"precious": "precious"}
        assert (target.parent / "outside").stat().st_mode & 0o777 == 0o755
    assert not (target / "x/way").is_symlink(), "the file took the link's place"


def test_a2_what_becomes_a_link_between_two_frames_is_not_followed(target: Path) -> None:
    """Somebody else may write to the target as well."""

    def act(end: socket.socket) -> None:
        end.sendall(GREETING)
        end.recv(1 << 16)
        end.sendall(entry(FrameType.DIRECTORY, b"x", mode=0o755) + FILE)
        while not list((target / "x").glob(".pyvmm*")):
            time.sleep(0.01)
        (target / "x").rename(target / "moved")
        (target / "x").symlink_to("../outside")
        end.sendall(frame(FrameType.DATA, b"more") + UP + entry(FrameType.REGULAR, b"b") + UP)
        end.sendall(UP + END)

    with liar(act) as agent:
        agent.pull("/x", target)
    assert sorted(os.listdir(target / "moved")) == ["b", "file"]
    assert everything_outside(target) == {"precious": "precious"}


def test_a3_a_file_with_two_names_is_replaced_and_not_written_to(target: Path) -> None:
    (target / "x").hardlink_to(target.parent / "outside/precious")
    with liar(saying(FILE + UP + END)) as agent:
        agent.pull("/x", target)
    assert (target / "x").read_text() == "evil"
    assert everything_outside(target) == {"precious": "precious"}


TWICE = {
    "file, then directory": FILE + UP + entry(FrameType.DIRECTORY, b"file") + FILE,
    "directory, then file": entry(FrameType.DIRECTORY, b"file") + UP + FILE + UP,
    "link, then directory": entry(FrameType.LINK, b"file", b"../../outside")
    + entry(FrameType.DIRECTORY, b"file")
    + FILE,
    "directory, then link": entry(FrameType.DIRECTORY, b"file")
    + UP
    + entry(FrameType.LINK, b"file", b"../../outside"),
}


@pytest.mark.parametrize("said", TWICE.values(), ids=TWICE)
def test_a3_one_name_for_two_kinds_is_refused(said: bytes, target: Path) -> None:
    top = entry(FrameType.DIRECTORY, b"x", mode=0o755)
    with liar(saying(top + said)) as agent, pytest.raises(ConfigError) as caught:
        agent.pull("/x", target)
    assert "\n" not in str(caught.value)
    assert everything_outside(target) == {"precious": "precious"}
    assert not [name for name in os.listdir(target / "x") if name.startswith(".pyvmm")]


@pytest.mark.parametrize(
    "second", [FILE + UP, entry(FrameType.LINK, b"file", b"../../outside/precious")]
)
def test_the_last_of_two_files_of_one_name_counts(second: bytes, target: Path) -> None:
    top = entry(FrameType.DIRECTORY, b"x", mode=0o755)
    link = entry(FrameType.LINK, b"file", b"../../outside/precious")
    with liar(saying(top + link + second + UP + END)) as agent:
        agent.pull("/x", target)
    assert os.listdir(target / "x") == ["file"]
    assert everything_outside(target) == {"precious": "precious"}


def test_a4_modes_are_less_the_users_mask_and_what_was_there_keeps_its_own(target: Path) -> None:
    said = (
        entry(FrameType.DIRECTORY, b"x", mode=0o7777)
        + entry(FrameType.REGULAR, b"file", mode=0o7666)
        + UP
        + entry(FrameType.DIRECTORY, b"new", mode=0o7777)
        + UP * 2
        + END
    )
    (target / "x").mkdir(mode=0o700)
    before = os.umask(0o027)
    try:
        with liar(saying(said)) as agent:
            agent.pull("/x", target)
    finally:
        os.umask(before)
    found = {name: (target / "x" / name).stat().st_mode & 0o7777 for name in (".", "file", "new")}
    assert found == {".": 0o700, "file": 0o640, "new": 0o750}


def test_a5_more_bytes_than_were_said_are_no_more_than_a_longer_file(target: Path) -> None:
    head = entry_frame(FrameType.REGULAR, Entry(0o644, 0, 3, b"x"))
    with liar(saying(head + frame(FrameType.DATA, b"12345") * 2 + UP + END)) as agent:
        copied = agent.pull("/x", target)
    assert (target / "x").read_text() == "1234512345"
    assert copied.bytes == 10


@pytest.mark.parametrize("seed", range(10))
def test_random_trees_stay_below_the_target(seed: int, target: Path) -> None:
    random_ = random.Random(seed)
    names = [b"a", b"b", b"link", b"..", b"top", b"../outside", b"precious"]
    for _ in range(30):
        parts = [entry(FrameType.DIRECTORY, b"top", mode=0o755)]
        for _ in range(random_.randrange(20)):
            kind = random_.choice([FrameType.DIRECTORY, FrameType.REGULAR, FrameType.LINK])
            parts.append(
                random_.choice(
                    [
                        entry(kind, random_.choice(names), b"../../outside", mode=0o755),
                        frame(FrameType.DATA, b"evil"),
                        UP,
                        UP,
                    ]
                )
            )
        data = bytearray(b"".join(parts) + END)
        for _ in range(random_.randrange(3)):
            data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        with suppress(PyvmmError), liar(saying(bytes(data))) as agent:
            agent.pull("/tree", target)
    assert everything_outside(target) == {"precious": "precious"}


def test_an_agent_that_refuses_in_the_middle_is_heard(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(8 << 20))

    def act(end: socket.socket) -> None:
        end.sendall(GREETING)
        end.recv(100_000)
        end.sendall(frame(FrameType.FAILED, NUMBER.pack(28) + b"big"))
        end.shutdown(socket.SHUT_WR)
        while end.recv(1 << 20):
            pass

    with liar(act) as agent, pytest.raises(AgentError, match="big: No space left") as caught:
        agent.push(tmp_path / "big", "/big")
    assert caught.value.errno == 28


def test_connecting_may_fail_in_its_own_way() -> None:
    def connect():
        raise ConfigError("no VM called 'vm' is running")

    with pytest.raises(ConfigError, match="no VM called"):
        Agent(connect).run(["true"])
    with pytest.raises(ConfigError, match="no VM called"):
        Agent(connect).wait_ready(1)


def test_a_way_that_does_not_say_what_it_wants_gets_nothing() -> None:
    class Way:
        @property
        def __signature__(self) -> object:
            raise ValueError("a function in C")

        def __call__(self) -> object:
            raise ConfigError("called without arguments")

    with pytest.raises(ConfigError, match="called without"):
        Agent(Way()).run(["true"])  # type: ignore[arg-type]


def test_only_a_refused_connection_may_become_an_agent() -> None:
    calls = []

    def connect():
        calls.append(1)
        raise HostError(errno.ECONNREFUSED if len(calls) < 3 else errno.EACCES, "connect")

    with pytest.raises(HostError, match="Permission denied"):
        Agent(connect).wait_ready()
    assert len(calls) == 3


def test_an_interrupt_behind_the_close_of_a_file_is_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor that is closed twice may be another's by then, or nobody's (EBADF)."""
    said = entry_frame(FrameType.REGULAR, Entry(0o644, 0, 0, b"x")) + frame(FrameType.UP)
    is_interrupted = False

    def close(fd: int) -> None:
        nonlocal is_interrupted
        os.close(fd)
        if not is_interrupted:
            is_interrupted = True
            raise KeyboardInterrupt

    changed = SimpleNamespace(**{**vars(os), "close": close})
    with liar(saying(said, stay=True)) as agent, pytest.raises(KeyboardInterrupt):
        monkeypatch.setattr(files, "os", changed)
        agent.pull("/x", tmp_path / "x")
    assert (tmp_path / "x").exists()
