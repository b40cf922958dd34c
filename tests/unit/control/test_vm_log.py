"""A VM's words are kept, bounded, for its owner only, and harmless to read."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.cli.main import main
from pyvmm.cli.plain_text import PlainText
from pyvmm.control import registry, vm_log
from pyvmm.control.vm_log import CONSOLE, MESSAGE, PIECE, VmLog
from pyvmm.errors import ConfigError

PATIENCE = 60.0


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path)


def said(place: str, name: str = "web") -> list[tuple[str, bytes]]:
    return [(record.kind, record.data) for record in vm_log.read(place, name)]


def test_console_and_messages_come_back_in_order(place: str) -> None:
    log = VmLog(place, "web")
    log.console(b"boot\nconsole 1.0 3\n\x00\xff")
    log.messages(b"pyvmm: web: one\npyvmm: ")
    log.console(b"")
    log.messages(b"web: two\r\nrest")
    assert said(place) == [
        (CONSOLE, b"boot\nconsole 1.0 3\n\x00\xff"),
        (MESSAGE, b"pyvmm: web: one"),
        (CONSOLE, b""),
        (MESSAGE, b"pyvmm: web: two"),
    ]
    assert log.last_message == b"pyvmm: web: two"
    log.end(11, message="two")
    assert len(said(place)) == 4


def test_only_its_owner_can_read_it(place: str) -> None:
    before = os.umask(0)
    try:
        log = VmLog(place, "web")
        log.console(b"secret")
        log.end(0)
    finally:
        os.umask(before)
    folder = Path(place) / "logs"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"web.log": 0o600, "web.end": 0o600}


def test_it_is_bounded_and_keeps_the_end(place: str) -> None:
    log = VmLog(place, "web")
    pieces = [b"%06d" % number * 1000 for number in range(1000)]  # 6 MB
    for piece in pieces:
        log.console(piece)
    sizes = [path.stat().st_size for path in (Path(place) / "logs").iterdir()]
    assert len(sizes) == 2 and max(sizes) <= PIECE
    kept = [data for _, data in said(place)]
    assert kept == pieces[-len(kept) :]
    assert sum(map(len, kept)) >= PIECE - 20000
    log.end(0)


def test_the_next_vm_of_that_name_goes_on_with_it(place: str) -> None:
    for text in (b"first", b"second"):
        log = VmLog(place, "web")
        assert vm_log.ended(place) == []
        log.console(text)
        log.end(0)
        assert [row["name"] for row in vm_log.ended(place)] == ["web"]
    assert [data for _, data in said(place)] == [b"first", b"second"]


def test_what_is_no_record_is_passed_over(place: str) -> None:
    log = VmLog(place, "web")
    log.console(b"one")
    path = Path(place) / "logs/web.log"
    whole = path.read_bytes()
    for odd in (b"x" * 500, b"console 1 99999999999\n", b"console 1.0 -5\n", b"\n\n", whole[:20]):
        path.write_bytes(odd + b"\n" + whole)
        said(place)  # does not raise, nor goes on for ever
    path.write_bytes(whole + whole[:-4])
    assert said(place) == [(CONSOLE, b"one")]


def running(place: str, name: str = "web") -> VmLog:
    """The log of one that opens nothing by name from now on."""
    (Path(place) / f"{name}.sock").touch()
    log = VmLog(place, name)
    log.keep_open()
    return log


def test_what_is_kept_open_needs_no_names(place: str) -> None:
    log = running(place)
    assert vm_log.ended(place) == []
    os.rename(Path(place) / "logs", Path(place) / "moved")
    log.console(b"said")
    log.end(11, message="x" * 10_000, ending="panic")
    assert not (Path(place) / "logs").exists()
    os.rename(Path(place) / "moved", Path(place) / "logs")
    [end] = vm_log.ended(place)
    assert (end["exit_code"], end["ending"], len(end["message"])) == (11, "panic", 4096)
    assert said(place) == [(CONSOLE, b"said")]


def test_a_killed_one_is_told_by_who_finds_it(place: str) -> None:
    running(place)
    vm_log.note_killed(place, "web")
    [end] = vm_log.ended(place)
    assert (end["exit_code"], end["message"]) == (None, "its monitor was killed")
    running(place, "other").end(0)
    vm_log.note_killed(place, "other")
    assert vm_log.ended(place)[0]["exit_code"] == 0


def test_one_that_never_began_is_not_kept(place: str) -> None:
    running(place)
    (Path(place) / "web.sock").unlink()
    running(place, "other")
    assert [path.name for path in (Path(place) / "logs").glob("*.end")] == ["other.end"]


@pytest.mark.parametrize(
    ("text", "known"),
    [
        (b'{"exit_code": 3, "name": "x", "ended": "now", "more": 1, "ending": 5}', {"ended": 0.0}),
        (b'{"exit_code": 3, "ended": 1e300, "message": "why"}', {"ended": 0.0, "message": "why"}),
        (b'{"exit_code": 3, "ended": NaN}', {"ended": 0.0}),
        (b'{"exit_code": 3, "ended": 5}', {"ended": 5.0}),
        (b'{"exit_code": true}', None),
        (b'{"exit_code": "3"}', None),
        (b'{"exit_code": 3}' + b" " * (1 << 16) + b"x", {"ended": 0.0}),
        (b'{"exit_code": 3, "message": "' + b"x" * (1 << 16) + b'"}', None),
        (b"[" * 60_000, None),
        (b"[]", None),
        (b"\xff", None),
    ],
)
def test_an_end_that_a_guest_may_have_written(
    place: str, text: bytes, known: dict[str, object] | None
) -> None:
    """One that has taken its monitor over, which has the file open."""
    running(place)
    (Path(place) / "logs/web.end").write_bytes(text)
    wanted = [] if known is None else [{"name": "web", "exit_code": 3, **known}]
    assert vm_log.ended(place) == wanted
    if known is None:
        vm_log.note_killed(place, "web")
        assert len(vm_log.ended(place)) == 1


def test_a_full_disk_is_told_once_and_holds_up_nobody(place: str, capsys) -> None:
    (Path(place) / "logs").mkdir()
    os.symlink("/dev/full", Path(place) / "logs/web.log")
    log = VmLog(place, "web")
    for _ in range(3):
        log.console(b"text")
    assert capsys.readouterr().err.count("pyvmm logs gets no more of this VM") == 1
    log.end(0)


def test_one_that_runs_and_has_said_nothing_is_known(place: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", place)
    with registry.register("web"), pytest.raises(SystemExit) as ended:
        main(["logs", "web"])
    assert (ended.value.code, *capsys.readouterr()) == (0, "", "")
    with pytest.raises(SystemExit) as ended:
        main(["logs", "web"])
    assert ended.value.code == 2 and "nothing is known" in capsys.readouterr().err


def test_so_many_and_no_older_ones_are_remembered(place: str, monkeypatch) -> None:
    monkeypatch.setattr(vm_log, "MOST_ENDED", 5)
    for number in range(20):
        log = VmLog(place, f"vm-{number}")
        log.console(b"x")
        log.end(number)
        at = time.time() - 1000 + number
        os.utime(Path(place) / f"logs/vm-{number}.end", (at, at))
    assert [row["exit_code"] for row in vm_log.ended(place)] == [19, 18, 17, 16, 15]
    assert len(list((Path(place) / "logs").iterdir())) == 10
    old = Path(place) / "logs/vm-18.end"
    os.utime(old, (0, 0))
    VmLog(place, "another").end(0)
    assert not old.exists() and not old.with_suffix(".log").exists()


def test_remove_leaves_nothing(place: str) -> None:
    log = VmLog(place, "web")
    for _ in range(20):
        log.console(b"x" * 60000)
    log.end(0)
    assert vm_log.remove(place, "web")
    assert list((Path(place) / "logs").iterdir()) == []
    assert not vm_log.remove(place, "web")
    with pytest.raises(ConfigError, match="nothing is known of a VM called 'web'"):
        said(place)


def test_who_follows_misses_nothing_and_ends_with_it(place: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as monitor:
        process = os.pidfd_open(monitor.pid)
        heard: list[bytes] = []
        reader = threading.Thread(
            target=lambda: heard.extend(r.data for r in vm_log.read(place, "web", process))
        )
        reader.start()
        log = VmLog(place, "web")
        pieces = [b"%d" % number * 3000 for number in range(600)]
        for piece in pieces:
            log.console(piece)
            if len(heard) < 500:
                time.sleep(0.0005)
            while len(pieces) - len(heard) > 500 and reader.is_alive() and piece != pieces[99]:
                break
        deadline = time.monotonic() + PATIENCE
        while len(heard) < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        log.console(b"the end")
        log.end(0)
        monitor.communicate(b"\n")
        reader.join(PATIENCE)
        assert not reader.is_alive()
        assert heard[-1] == b"the end"
        os.close(process)


# --- for a terminal -------------------------------------------------------------------------------


def plain(*pieces: bytes) -> str:
    text = PlainText()
    return "".join(map(text.feed, pieces)) + text.end()


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (b"login: \r\nok\n", "login: \nok\n"),
        (b"\x1b[1;32mOK\x1b[0m", "\x1b[1;32mOK\x1b[0m"),
        (b"a\x1b[2J\x1b[1;1Hb", "ab"),
        (b"\x1b]0;title\x07x", "^[]0;title^Gx"),
        (b"\x1bP$qm\x1b\\", "^[P$qm^[\\"),
        (b"\x1bc", "^[c"),
        (b"50%\r100%", "50%\n100%"),
        ("\x9b2J\u202eabc".encode(), "\ufffd2J\ufffdabc"),
        (b"\x9b2J", "\ufffd2J"),
        ("grüß\t\u2713\n".encode(), "grüß\t\u2713\n"),
        (b"\x1b[" + b"1" * 500 + b"m", "^[[" + "1" * 500 + "m"),
        (b"\x08\x7f\x0e", "^H^?^N"),
    ],
)
def test_what_a_terminal_gets(data: bytes, shown: str) -> None:
    assert plain(data) == shown
    assert plain(*(data[i : i + 1] for i in range(len(data)))) == shown


@given(st.lists(st.binary(max_size=40)))
def test_w6_no_control_sequence_but_a_colour_reaches_a_terminal(pieces: list[bytes]) -> None:
    import re

    shown = plain(*pieces)
    rest = re.sub(r"\x1b\[[0-9;:]*m", "", shown)
    assert all(char.isprintable() or char in "\n\t" for char in rest)
