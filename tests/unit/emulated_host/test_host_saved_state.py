"""Files of saved states, without a QEMU that makes them: keys, damage, locks, room, refusals."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pyvmm.emulated_host import (
    EmulatedHost,
    EmulatedHostError,
    EmulatedHostSpec,
    HostDisk,
    HostImage,
    host,
    launch,
    saved_state,
)
from pyvmm.emulated_host.cache import BootFiles
from pyvmm.emulated_host.saved_state import SavedState
from pyvmm.emulated_host.x86.tsc import frequency_khz
from pyvmm.host.syscalls import EventFd

KEY = "0123456789abcdef01234567"
STREAM = random.Random(1).randbytes((2 << 20) + 5)  # more than is read at a time


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(saved_state, "cache_directory", lambda: str(cache))
    for module in (saved_state, launch):
        monkeypatch.setattr(module, "boot_files", lambda image: BootFiles("kernel", "initramfs"))
    return cache


@pytest.fixture
def stop() -> Iterator[EventFd]:
    with EventFd() as made:
        yield made


def spec_of(*qemu: str, **changes: object) -> EmulatedHostSpec:
    image = HostImage("k", "m", "b", qemu or ("no-such-qemu",), architecture="x86_64")
    return replace(EmulatedHostSpec(image, memory_mib=640), **changes)  # type: ignore[arg-type]


def key_of(spec: EmulatedHostSpec, boot: BootFiles | None = None) -> str:
    return saved_state._key(spec, boot or BootFiles("kernel", "initramfs"))


def write(path: Path, stream: bytes = STREAM, **record: object) -> Path:
    khz = frequency_khz()
    assert khz is not None
    crc = saved_state.zlib.crc32(stream)
    values = {"key": KEY, "length": len(stream), "crc": crc, "tsc_khz": khz, **record}
    path.write_bytes(stream + saved_state._record(**values))  # type: ignore[arg-type]
    return path


def opened(path: Path) -> SavedState | None:
    return saved_state._open(str(path))


# ---- keys


def test_a_key_is_of_what_the_machine_is_made_of_and_of_nothing_else(tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_bytes(b"one")
    spec = spec_of(str(qemu))
    key = key_of(spec)
    run = replace(spec, disks=(HostDisk("/disk"),), cwd="/tmp", env={"A": "b"})
    assert key_of(run) == key
    others = [
        replace(spec, memory_mib=768),
        replace(spec, cpus=1),
        replace(spec, image=replace(spec.image, qemu=(str(qemu), "-L", "firmware"))),
    ]
    keys = {key, *map(key_of, others), key_of(spec, BootFiles("kernel", "another"))}
    keys.add(key_of(spec, BootFiles("another", "initramfs")))
    qemu.write_bytes(b"another")
    keys.add(key_of(spec))
    assert len(keys) == 7


def test_a_key_is_of_a_qemu_that_is_named_as_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of it may not go on from what this one has saved."""
    qemu = tmp_path / "qemu"
    qemu.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    keys = [key_of(spec_of(name)) for name in ("qemu", "./qemu")]
    qemu.write_bytes(b"another")
    keys += [key_of(spec_of(name)) for name in ("qemu", "./qemu")]
    assert len(set(keys)) == 4


def test_a_key_is_of_the_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    key = key_of(spec_of())
    monkeypatch.setattr(saved_state, "MACHINE_PORTS", (*saved_state.MACHINE_PORTS, "another"))
    assert key_of(spec_of()) != key


def test_a_key_is_of_the_processor_and_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvmm.emulated_host.x86 import machine

    key = key_of(spec_of())
    monkeypatch.setattr(machine, "CPU", machine.CPU + ",-smap")
    another = key_of(spec_of())
    monkeypatch.setattr(machine, "_KERNEL_PARAMETERS", "console=ttyS0")
    assert len({key, another, key_of(spec_of())}) == 3


def test_another_architectures_machine_boots(folder: Path, stop: EventFd) -> None:
    spec = spec_of(image=HostImage("k", "m", "b", ("qemu",), architecture="aarch64"))
    assert saved_state.saved_state(spec, stop.fd) is None
    assert not list(folder.iterdir())


# ---- files


def test_a_state_is_found_and_intact(folder: Path) -> None:
    path = write(folder / f"state-{KEY}")
    os.utime(path, (0, 0))
    found = opened(path)
    assert found is not None
    assert found.fits(spec_of())
    assert os.lseek(found.fd, 0, os.SEEK_CUR) == 0  # QEMU reads from here on
    assert path.stat().st_mtime > time.time() - 60  # it goes last
    found.close()


@pytest.mark.parametrize("at", [0, 1 << 20, len(STREAM) - 1])
def test_a_byte_that_has_changed_is_noticed(folder: Path, at: int) -> None:
    path = write(folder / f"state-{KEY}")
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes([STREAM[at] ^ 0x10]))
    found = opened(path)
    assert found is not None and not found.fits(spec_of())
    found.close()


@pytest.mark.parametrize("length", [0, 1, 47, 48, len(STREAM), len(STREAM) + 47])
def test_a_file_that_was_cut_off_is_removed(folder: Path, length: int) -> None:
    path = write(folder / f"state-{KEY}")
    os.truncate(path, length)
    assert opened(path) is None and not path.exists()


@pytest.mark.parametrize(
    "record", [{"key": "f" * 24}, {"length": len(STREAM) - 1}, {"length": 1 << 63}, {"length": 0}]
)
def test_another_machines_file_is_removed(folder: Path, record: dict[str, object]) -> None:
    path = write(folder / f"state-{KEY}", **record)
    assert opened(path) is None and not path.exists()


def test_random_files_are_removed(folder: Path) -> None:
    noise = random.Random(2)
    for size in (0, 10, 48, 5000):
        path = folder / f"state-{KEY}"
        path.write_bytes(noise.randbytes(size))
        assert opened(path) is None and not path.exists()


def test_a_link_is_not_followed(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere")
    (folder / f"state-{KEY}").symlink_to(tmp_path / "elsewhere")
    assert opened(folder / f"state-{KEY}") is None


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_no_state(
    folder: Path,
    stop: EventFd,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[str], None],
) -> None:
    made: list[str] = []
    monkeypatch.setattr(saved_state, "_make", lambda spec, path, stop: made.append(path))
    path = path_for(folder, spec_of())
    make(str(path))
    assert saved_state.saved_state(spec_of(), stop.fd) is None
    # A directory stays, and one that is made could not get its name.
    assert bool(made) is not path.exists()


def test_a_state_that_the_disk_does_not_give_back_is_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, "I/O error")

    path = write(folder / f"state-{KEY}")
    found = opened(path)
    assert found is not None
    with monkeypatch.context() as context:
        context.setattr(saved_state.os, "preadv", fail)
        assert not found.fits(spec_of())
    found.close()
    with monkeypatch.context() as context:
        context.setattr(saved_state.os, "pread", fail)
        assert opened(path) is None and not path.exists()


@pytest.mark.parametrize("left", ["file", "fifo", "link"])
def test_what_another_has_left_is_not_written_to(folder: Path, left: str) -> None:
    path = path_for(folder, spec_of())
    part, elsewhere = Path(f"{path}.making"), folder / "elsewhere"
    elsewhere.write_bytes(b"mine")
    if left == "fifo":
        os.mkfifo(part)
    elif left == "link":
        part.symlink_to(elsewhere)
    else:
        part.touch(0o666)
        part.chmod(0o666)
    assert make_one(folder) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert elsewhere.read_bytes() == b"mine"


def test_a_file_that_shrinks_while_it_is_read_is_no_crash(folder: Path) -> None:
    found = opened(write(folder / f"state-{KEY}"))
    assert found is not None
    os.truncate(found.path, 100)
    assert not found.fits(spec_of())
    found.close()


@pytest.mark.parametrize(("factor", "fits"), [(1.0002, True), (0.9998, True), (1.002, False)])
def test_a_clock_of_another_rate_is_noticed(folder: Path, factor: float, fits: bool) -> None:
    khz = frequency_khz()
    assert khz is not None
    found = opened(write(folder / f"state-{KEY}", tsc_khz=round(khz * factor)))
    assert found is not None
    assert found.fits(spec_of()) is fits
    found.close()


def test_only_so_many_are_kept_and_the_newest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(saved_state.MOST + 3):
        path = folder / f"state-{n:024}"
        path.write_bytes(bytes(100))
        os.utime(path, (n, n))
    (folder / f"state-{KEY}.making").write_bytes(b"of a run that was killed")
    (folder / "state-lock").touch()
    (folder / "initramfs-1").touch()
    newest = folder / f"state-{0:024}"  # by its time the oldest
    saved_state._tidy(str(newest))
    left = {path.name for path in folder.iterdir()}
    kept = [0, *range(4, saved_state.MOST + 3)]
    assert left == {f"state-{n:024}" for n in kept} | {"state-lock", "initramfs-1"}
    monkeypatch.setattr(saved_state, "_MOST_BYTES", 250)
    saved_state._tidy(str(newest))
    assert {path.name for path in folder.glob("state-0*")} == {
        f"state-{n:024}" for n in (0, saved_state.MOST + 2)
    }
    monkeypatch.setattr(saved_state, "_MOST_BYTES", 1)
    saved_state._tidy(str(newest))
    assert [path.name for path in folder.glob("state-0*")] == [newest.name]


# ---- making one, with something else in QEMU's place


def not_to_be_called(*arguments: object) -> None:
    raise AssertionError("one was made")


def path_for(folder: Path, spec: EmulatedHostSpec) -> Path:
    return folder / f"state-{key_of(spec)}"


def test_a_qemu_that_ends_leaves_nothing(folder: Path, stop: EventFd) -> None:
    assert saved_state.saved_state(spec_of("/bin/false"), stop.fd) is None
    assert [path.name for path in folder.iterdir()] == ["state-lock"]


def test_whoever_has_to_stop_does_not_wait(folder: Path, stop: EventFd) -> None:
    stop.signal()
    begin = time.monotonic()
    qemu = "/bin/sh", "-c", "exec sleep 1000"
    assert saved_state.saved_state(spec_of(*qemu), stop.fd) is None
    assert [path.name for path in folder.iterdir()] == ["state-lock"]
    assert time.monotonic() - begin < saved_state._BOOT_PATIENCE / 2
    stop.drain()  # somebody was to read it yet


def test_two_do_not_make_one_at_once(
    folder: Path, stop: EventFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(saved_state, "_make", lambda spec, path, stop: made.append(path))
    with open(folder / "state-lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert saved_state.saved_state(spec_of(), stop.fd) is None
        assert not made
    assert saved_state.saved_state(spec_of(), stop.fd) is None
    assert made == [str(path_for(folder, spec_of()))]


def test_one_that_came_while_the_lock_was_taken_is_used(
    folder: Path, stop: EventFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of()
    path = path_for(folder, spec)
    real = fcntl.flock

    def another_makes_it(fd: int, operation: int) -> None:
        real(fd, operation)
        write(path, key=key_of(spec))

    monkeypatch.setattr(saved_state.fcntl, "flock", another_makes_it)
    monkeypatch.setattr(saved_state, "_make", not_to_be_called)
    found = saved_state.saved_state(spec, stop.fd)
    assert found is not None and found.path == str(path)
    found.close()


def test_a_full_disk_is_not_filled(
    folder: Path, stop: EventFd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_state, "_ROOM", 1 << 62)
    monkeypatch.setattr(saved_state, "_make", not_to_be_called)
    assert saved_state.saved_state(spec_of(), stop.fd) is None


def test_a_cache_that_cannot_be_written_is_passed_by(folder: Path, stop: EventFd) -> None:
    (folder / "state-lock").mkdir()
    assert saved_state.saved_state(spec_of(), stop.fd) is None


def test_what_was_refused_is_not_tried_again_for_a_day(folder: Path, stop: EventFd) -> None:
    spec = spec_of()
    found = opened(write(path_for(folder, spec), key=key_of(spec)))
    assert found is not None
    found.refuse()
    found.close()
    refused = folder / f"state-{key_of(spec)}.refused"
    assert refused.exists() and not path_for(folder, spec).exists()
    assert saved_state.saved_state(spec, stop.fd) is None
    assert not (folder / "state-lock").exists()  # it was not tried
    yesterday = time.time() - saved_state._REFUSED_FOR - 1
    os.utime(refused, (yesterday, yesterday))
    assert not saved_state._is_refused(str(path_for(folder, spec)))


class Machine:
    """What `launch` gives, as far as making a state asks it."""

    qmp = None

    def __init__(self, seconds: int = 1000) -> None:
        self.process = subprocess.Popen(["sleep", str(seconds)])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("booted", "written", "refused"),
    [
        ("UNFIT", None, True),  # a kernel without VMGenID
        ("NO", None, False),  # it took too long
        ("YES", b"", True),  # a QEMU that knows no files, or does not save such a machine
        ("YES", b"the beginning", False),  # the disk is full
    ],
)
def test_only_what_can_never_be_saved_is_refused(
    folder: Path,
    stop: EventFd,
    monkeypatch: pytest.MonkeyPatch,
    booted: str,
    written: bytes | None,
    refused: bool,
) -> None:
    def save(qmp: object, fd: int) -> None:
        assert written is not None, "it was to be saved"
        os.write(fd, written)
        raise EmulatedHostError("no")

    monkeypatch.setattr(saved_state, "launch", lambda spec: Machine())
    monkeypatch.setattr(saved_state, "_booted", lambda *_: getattr(saved_state._Booted, booted))
    monkeypatch.setattr(saved_state, "_save", save)
    monkeypatch.setattr(saved_state, "Qmp", lambda connection: None)
    assert saved_state.saved_state(spec_of(), stop.fd) is None
    names = [path_for(folder, spec_of()).name + ".refused"] if refused else []
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "state-lock"])


RUN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import test_host_saved_state as t
from pyvmm.emulated_host import saved_state

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

saved_state.cache_directory = lambda: {folder!r}
saved_state.boot_files = lambda image: t.BootFiles("kernel", "initramfs")
saved_state.launch = lambda spec: t.Machine(0)
saved_state.Qmp = lambda connection: None
saved_state._booted = lambda *arguments: saved_state._Booted.YES
saved_state._save = lambda qmp, fd: os.write(fd, t.STREAM)
if {stage!r}:
    setattr(os if {stage!r} == "replace" else saved_state, {stage!r}, die)
saved_state.saved_state(t.spec_of(), 0)
"""


def make_one(folder: Path, stage: str = "") -> int:
    """By a process of its own, which dies where it comes to `stage`; its exit code."""
    script = RUN.format(tests=os.path.dirname(__file__), folder=str(folder), stage=stage)
    return subprocess.run([sys.executable, "-c", script]).returncode


@pytest.mark.parametrize("stage", ["_booted", "_save", "_crc", "replace", "_tidy"])
def test_a_kill_leaves_a_whole_state_or_none(folder: Path, stage: str) -> None:
    path = path_for(folder, spec_of())
    part = Path(f"{path}.making")
    assert make_one(folder, stage) == -signal.SIGKILL
    assert path.exists() == (stage == "_tidy")
    assert part.exists() != path.exists()
    assert make_one(folder) == 0
    found = opened(path)
    assert found is not None and found.fits(spec_of())
    found.close()
    assert not part.exists()


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (lambda one: one.request_stop(signal.SIGINT), 128 + signal.SIGINT),
        (lambda one: one.kill(), 128 + signal.SIGKILL),
    ],
)
def test_what_is_to_end_before_it_has_begun_does_not_begin(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[EmulatedHost], None],
    code: int,
    is_there: bool,
) -> None:
    """Asked for while a state is made, say, which ends then."""
    opened_ones: list[SavedState] = []

    def asked_meanwhile(spec: EmulatedHostSpec, stop: int) -> SavedState | None:
        ask(one)
        assert select.select([stop], [], [], 0)[0]
        if is_there:
            found = opened(write(folder / f"state-{KEY}"))
            assert found is not None
            opened_ones.append(found)
        return opened_ones[0] if opened_ones else None

    monkeypatch.setattr(host, "saved_state", asked_meanwhile)
    monkeypatch.setattr(host, "launch", not_to_be_called)
    one = EmulatedHost(spec_of(), ["true"], stdin=None)
    one.start()
    assert one.wait() == code
    for state in opened_ones:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(state.fd)
