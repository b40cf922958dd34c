"""The directory of snapshots: whoever is killed at whichever call leaves a whole snapshot or none,
and two that work on it at once do not harm each other."""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError, HostError

STATE = {"spec": {}, "machine": {}}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return Path(store.folder())


def make(name: str) -> None:
    with store.Writer(name) as writer:
        writer.make(store.MEMORY, 1 << 20)
        writer.write(store.MEMORY, 4096, b"memory")
        writer.finish(STATE)


def interposed(
    monkeypatch: pytest.MonkeyPatch, module: Any, call: str, when: Callable[[], None]
) -> None:
    """Before the first `call` of `module`, do that."""
    usual, waits = getattr(module, call), [when]

    def replaced(*args: Any, **options: Any) -> Any:
        if waits:
            waits.pop()()
        return usual(*args, **options)

    monkeypatch.setattr(module, call, replaced)


@pytest.mark.parametrize(("module", "call"), [(os, "open"), (store.fcntl, "flock")])
def test_another_one_sweeps_before_a_new_directory_is_locked(
    monkeypatch: pytest.MonkeyPatch, folder: Path, module: Any, call: str
) -> None:
    swept = []

    def sweep() -> None:
        assert any(name.startswith(".new-") for name in os.listdir(folder))
        assert store.names() == []
        swept.append(os.listdir(folder))

    def begin() -> None:
        interposed(monkeypatch, module, call, sweep)

    interposed(monkeypatch, os, "mkdir", begin)
    # os.makedirs of the folder itself is not a step of the maker.
    monkeypatch.setattr(store, "folder", lambda: str(folder))
    make("first")
    assert swept == [[]], "the sweep did not come in between"
    assert store.names() == ["first"]


def test_a_snapshot_can_be_read_as_soon_as_it_has_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = []

    def look() -> None:
        with store.reading("first") as found:
            read.append(found.name)

    interposed(monkeypatch, store, "_sync_folder", look)
    make("first")
    assert read == ["first"]


def test_a_snapshot_of_the_same_name_is_not_taken_for_one_that_was_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make("first")

    def exchange() -> None:
        store.remove("first")
        make("first")

    interposed(monkeypatch, store.fcntl, "flock", exchange)
    with pytest.raises(ConfigError, match="no snapshot 'first'"), store.reading("first"):
        pass
    with store.reading("first"):
        pass


# --- killed, or without room, at each call --------------------------------------------------------

MAKING = ("mkdir", "open", "ftruncate", "pwrite", "fsync", "rename")
ALL = (*MAKING, "unlink", "rmdir", "close", "lstat")


def fault_at(
    number: int, calls: tuple[str, ...], fault: Callable[[str], object], met: list[str]
) -> None:
    """Have call `number` of those of `calls` meet `fault` from now on, in this process, and `met`
    say so."""
    count = itertools.count()

    def counted(call: str) -> Callable[..., Any]:
        usual = getattr(os, call)

        def replaced(*args: Any, **options: Any) -> Any:
            if next(count) == number:
                met.append(call)
                fault(call)
            return usual(*args, **options)

        return replaced

    for call in calls:
        setattr(os, call, counted(call))


def stages(
    act: Callable[[], object], calls: tuple[str, ...], fault: Callable[[str], None]
) -> Iterator[tuple[int, int]]:
    """`act` in a process for each of its `calls`, which meets `fault` there: (stage, what the
    process ended with, 1 for a HostError, 3 for nothing), until one has met none."""
    for number in itertools.count():
        pid = os.fork()
        if not pid:
            code = 2
            met: list[str] = []
            try:
                fault_at(number, calls, fault, met)
                act()
                code = 3 if met else 0
            except HostError:
                code = 1
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        ended = os.waitstatus_to_exitcode(status)
        if not ended:
            return
        yield number, ended


def killed(call: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room(call: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def check_whole(name: str) -> None:
    with store.reading(name) as found:
        assert found.state["spec"] == {}
        memory = Path(found.path, store.MEMORY).read_bytes()
        assert len(memory) == 1 << 20 and memory.strip(b"\0") == b"memory"


def test_a_maker_that_is_killed_anywhere_leaves_a_whole_snapshot_or_none(folder: Path) -> None:
    make("former")
    ends = []
    for number, ended in stages(lambda: make("next"), ALL, killed):
        assert ended == -signal.SIGKILL, number
        there = store.names()
        assert there in (["former"], ["former", "next"]), number
        assert sorted(os.listdir(folder)) == there, f"stage {number}: something was left"
        for name in there:
            check_whole(name)
        ends.append("next" in there)
        if ends[-1]:
            store.remove("next")
    assert sorted(ends) == ends and set(ends) == {False, True}, ends
    assert len(ends) > 15


def test_a_remover_that_is_killed_anywhere_leaves_a_whole_snapshot_or_none(folder: Path) -> None:
    ends = []
    make("next")
    for number, ended in stages(lambda: store.remove("next"), ALL, killed):
        assert ended == -signal.SIGKILL, number
        there = store.names()
        assert os.listdir(folder) == there, f"stage {number}: something was left"
        ends.append(bool(there))
        if there:
            check_whole("next")
        else:
            make("next")
    assert sorted(ends, reverse=True) == ends and set(ends) == {False, True}, ends


def test_without_room_nothing_is_left(folder: Path) -> None:
    make("former")
    count = 0
    for number, ended in stages(lambda: make("next"), MAKING, no_room):
        check_whole("former")
        if ended == 3:  # the folder is there already, which is looked for by making it
            store.remove("next")
            continue
        assert ended == 1, f"stage {number}: not a HostError"
        assert os.listdir(folder) == ["former"], number
        count += 1
    assert count > 10
    check_whole("next")


@pytest.mark.parametrize("left", [False, True])
def test_what_somebody_else_has_made_goes_as_a_whole_and_nothing_beside_it(
    folder: Path, tmp_path: Path, left: bool
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    made = folder / (".old-1-x" if left else "first")
    (made / "sub/deeper").mkdir(parents=True)
    (made / "sub/link").symlink_to(other)
    (made / "link").symlink_to(other)
    (made / "memory").touch()
    if left:
        store.names()
    else:
        store.remove("first")
    assert os.listdir(folder) == [] and (other / "file").exists()
