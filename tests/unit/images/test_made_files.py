"""Files that a start makes: whole or not there, whoever else is at work and however it ends."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.images import made_files


@pytest.fixture(autouse=True)
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which they are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pyvmm/made"


def test_two_at_work_in_one_process_and_in_two(made: Path) -> None:
    """Each finds its own bytes in its file."""
    paths: dict[bytes, str] = {}
    together = threading.Barrier(4)

    def keep(byte: bytes) -> None:
        def pieces() -> Iterator[bytes]:
            for _ in range(50):
                together.wait(60)
                yield byte * 1000

        paths[byte] = made_files.keep(pieces(), ".x")

    threads = [threading.Thread(target=keep, args=(byte,)) for byte in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {byte: Path(path).read_bytes() for byte, path in paths.items()} == {
        byte: byte * 50_000 for byte in (b"a", b"b", b"c", b"d")
    }
    assert len(list(made.iterdir())) == 4


KILLED = """
import os, sys
from pyvmm.images import made_files
def pieces():
    yield bytes(1 << 20)
    print("at work", flush=True)
    sys.stdin.read()
made_files.keep(pieces(), ".x")
"""


def test_what_a_killed_process_has_begun_goes_with_the_next(made: Path) -> None:
    killed, alive = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ),
        )
        for _ in range(2)
    ]
    for process in (killed, alive):
        assert process.stdout is not None and process.stdout.readline() == b"at work\n"
    assert len(list(made.iterdir())) == 2
    killed.kill()
    killed.communicate()
    kept = made_files.keep([b"mine"], ".y")
    assert sorted(map(str, made.iterdir()))[1:] == [kept]  # and what is still being made
    alive.communicate(b"")
    assert alive.returncode == 0
    assert sorted(path.suffix for path in made.iterdir()) == [".x", ".y"]


KILLED_FOLDER = """
import os, sys
from pyvmm.images import made_files
def fill(folder):
    os.mkdir(os.path.join(folder, "in"))
    os.symlink("/nowhere", os.path.join(folder, "in", "link"))
    print("at work", flush=True)
    sys.stdin.read()
made_files.keep_folder("made", sys.argv[1], fill)
"""


def test_the_folder_that_a_killed_process_has_begun_goes_with_the_next(made: Path) -> None:
    killed, alive = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED_FOLDER, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ),
        )
        for name in ("killed", "alive")
    ]
    for process in (killed, alive):
        assert process.stdout is not None and process.stdout.readline() == b"at work\n"
    assert len(list(made.iterdir())) == 2
    killed.kill()
    killed.communicate()
    kept = made_files.keep_folder("made", "mine", lambda folder: None)
    assert sorted(map(str, made.iterdir()))[1:] == [kept]  # and what is still being made
    alive.communicate(b"")
    assert alive.returncode == 0
    assert sorted(path.name for path in made.iterdir()) == ["alive", "mine"]
    assert os.readlink(made / "alive/in/link") == "/nowhere"


def test_no_room(made: Path) -> None:
    """One line, and nothing is left; what need not be kept is not."""
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most[1]))
    try:
        with pytest.raises(ConfigError, match=r"cannot write .*; set XDG_CACHE_HOME"):
            made_files.keep([bytes(60_000)] * 3, ".x")
        made_files.keep_as("made", "name", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        signal.signal(signal.SIGXFSZ, before)
    assert list(made.iterdir()) == []


def test_many_that_nobody_has_wanted_for_long_go(made: Path) -> None:
    for number in range(20):
        made_files.keep_as("made", f"{number}", b"")
        os.utime(made / f"{number}", (1, 1))
    made_files.keep_as("made", "new", b"")
    names = [path.name for path in made.iterdir()]
    assert "new" in names and len(names) < 17
