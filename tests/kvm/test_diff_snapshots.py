"""Snapshots of what has changed since another one, of a guest on real KVM that changes memory all
the time: by its vCPUs, by its disk, and by KVM's clock."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from c_guest import c_guest
from documents import commands, run_commands
from echo_guest import echo_kernel
from fuzz.snapshots import restore_and_end
from test_snapshots import SAFETY_TIMEOUT, Guest, folder, pyvmm, refused

from pyvmm import VM
from pyvmm.control import snapshot_store as store
from pyvmm.monitor import working_set
from pyvmm.monitor.saved_memory import SavedMemory

__all__ = ["folder"]  # a fixture

MEMORY = 64 << 20


@pytest.fixture
def busy(folder: Path) -> Iterator[Guest]:
    """A guest called `one` that does not come to rest."""
    kernel, disk = c_guest("busy_guest.c", folder, "DISK"), f"{folder}/disk,snapshot"
    options = ("--memory", "64M", "--cpus", "2", "--balloon", "size=8M")
    with Guest("--kernel", kernel, "--name", "one", "--disk", disk, *options) as made:
        made.says(b"ready")
        yield made


def done(*args: str) -> str:
    ended = pyvmm(*args)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_commands_of_the_page_on_snapshots(folder: Path) -> None:
    kernel, disk = c_guest("busy_guest.c", folder, "DISK"), f"{folder}/disk,snapshot"
    [block] = [block for block in commands("docs/snapshots.md") if "--track" in block]
    assert all("snapshot" in line for line in block.splitlines())
    with Guest("--kernel", kernel, "--name", "warm", "--disk", disk, "--memory", "64M") as guest:
        guest.says(b"ready")
        said = run_commands(block, folder, SAFETY_TIMEOUT)
        assert re.fullmatch(r"(warm stood still for \d+ ms\n){2}", said)
        assert store.names() == ["later", "whole"]
        assert stored("later") < stored("whole") and memory_of("later") == memory_of("whole")
        works_on(guest)


def works_on(guest: Guest) -> int:
    """It has done more than it had, and lost nothing; its rounds."""
    seen = [_rounds(guest) for _ in range(2)]
    while seen[-1] < seen[0] + 20:
        seen.append(_rounds(guest))
    return seen[-1]


def _rounds(guest: Guest) -> int:
    guest.said = b""
    guest.hears(b"s")
    guest.says(b".\n")
    found = re.search(rb"rounds=(\d+) lost=0 failed=0 backwards=0 ticks=\d+ \d+/0 ", guest.said)
    assert found, guest.said
    return int(found[1])


def memory_of(name: str) -> bytes:
    with store.reading(name) as found, SavedMemory(found.path, found.state, MEMORY) as memory:
        return memory.read(0, MEMORY)


def stored(name: str) -> int:
    return Path(store.folder(), name, "memory").stat().st_blocks * 512


def test_a_chain_has_what_a_whole_snapshot_has(busy: Guest) -> None:
    done("snapshot", "one", "base", "--track")
    works_on(busy)
    done("snapshot", "one", "d1", "--diff-of", "base")
    works_on(busy)
    # What the client calls off is not forgotten.
    assert "already" in refused("snapshot", "one", "d1", "--diff-of", "d1")
    done("snapshot", "one", "d2", "--diff-of", "d1")
    works_on(busy)
    done("pause", "one")
    done("snapshot", "one", "full")
    done("snapshot", "one", "d3", "--diff-of", "d2")
    done("snapshot", "one", "d4", "--diff-of", "base")  # notes are kept from each of them
    done("resume", "one")
    assert memory_of("full") == memory_of("d3") == memory_of("d4")
    assert memory_of("base") != memory_of("d1") != memory_of("d2") != memory_of("d3")
    assert "is not known" in refused("snapshot", "one", "d5", "--diff-of", "full")
    busy.off()
    rows = {row["name"]: row for row in json.loads(done("snapshot", "list", "--json"))}
    assert (rows["d2"]["base"], rows["base"]["base"]) == ("d1", None)
    shown = json.loads(done("snapshot", "show", "d2"))
    assert shown["base"]["name"] == "d1" and "pages" not in shown and "below" not in shown

    # Nothing depends on the names of those below.
    done("snapshot", "merge", "d3", "merged")
    assert memory_of("merged") == memory_of("full")
    done("snapshot", "rm", "base", "d1", "d2", "full", "d4")
    for name in ("d3", "merged"):
        with Guest("--restore", name, "--name", "two") as guest:
            works_on(guest)
            # Of a VM that was restored the one that it began with is known.
            done("pause", "two")
            done("snapshot", "two", "after", "--diff-of", name)
            done("snapshot", "two", "whole")
            done("resume", "two")
            works_on(guest)
            guest.off()
        assert memory_of("after") == memory_of("whole")
        assert stored("after") < stored("whole")
        with Guest("--restore", "after") as guest:
            works_on(guest)
            guest.off()
        done("snapshot", "rm", "after", "whole")


def test_a_guest_that_boots_anew_has_changed_altogether(folder: Path) -> None:
    options = ("--kernel", echo_kernel(folder), "--name", "one", "--memory", "64M")
    with Guest(*options) as guest:
        guest.says(b"ready")
        done("snapshot", "one", "base", "--track")
        guest.said = b""
        guest.hears(b"R")
        guest.says(b"ready")
        assert "is not known" in refused("snapshot", "one", "d1", "--diff-of", "base")
        guest.off()
    # In one that was restored each page that is not its file's any more is known.
    with Guest("--restore", "base", "--name", "two") as guest:
        guest.hears(b"R")
        guest.says(b"ready")
        done("pause", "two")
        done("snapshot", "two", "d1", "--diff-of", "base")
        done("snapshot", "two", "full")
        done("resume", "two")
        guest.off()
    assert memory_of("d1") == memory_of("full")


def test_what_a_restored_vm_uses_is_read_ahead_of_the_next(
    busy: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    done("snapshot", "one", "base", "--track")
    works_on(busy)
    done("snapshot", "one", "d1", "--diff-of", "base")
    failed = pyvmm("snapshot", "learn", "one", "d1")
    assert failed.returncode == 1 and "its memory is not that of a snapshot" in failed.stderr
    with Guest("--restore", "d1", "--name", "two") as guest:
        works_on(guest)
        assert "two was not restored from base" in refused("snapshot", "learn", "two", "base")
        assert done("snapshot", "learn", "two", "d1").startswith("two has used ")
        assert VM.attach("two").learn("d1") > 0
        guest.off()
    runs = working_set.noted(str(Path(store.folder(), "d1")))
    fetched: list[object] = []
    monkeypatch.setattr(SavedMemory, "fetch_ahead", lambda self, runs: fetched.append(runs))
    restore_and_end("d1")
    assert fetched == [runs] and runs


def test_a_chain_that_is_damaged_is_refused(busy: Guest, folder: Path) -> None:
    done("snapshot", "one", "base", "--track")
    works_on(busy)
    done("snapshot", "one", "d1", "--diff-of", "base", "--stop")
    path, good = Path(store.folder(), "d1"), folder / "good"
    shutil.copytree(path, good)

    def damaged(message: str, **values: object) -> None:
        state = json.loads((good / "state.json").read_text())
        state.update(values)
        state["checksum"] = store.checksum(state)
        (path / "state.json").write_text(json.dumps(state))
        line = refused("run", "--kvm=host", "--restore", "d1")
        assert message in line, line

    [row] = json.loads((good / "state.json").read_text())["below"]
    damaged("pages has 1 bytes", pages="00")
    damaged("pages is 7", pages=7)
    damaged("below is {}", below={})
    damaged("below 0 cannot be: 7 is not a table", below=[7])
    damaged("nothing is below the last file", below=[])
    damaged("file is not memory-1", below=[{**row, "file": "../base/memory"}])
    damaged("nothing is below the last file", below=[{**row, "pages": "00"}])
    damaged(
        "memory-2 is not as large",
        below=[{**row, "pages": "ff" * 2048}, {**row, "file": "memory-2"}],
    )
    damaged("below is [{", below=[row] * 32)
    damaged("has version 1", version=1)
    (path / "memory-1").unlink()
    damaged("'memory-1' is not as large as it was")
