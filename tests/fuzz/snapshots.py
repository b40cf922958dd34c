"""One fuzz case of a snapshot's directory: something in it is not as it was written.

`run_case` draws everything from one `random.Random`. The VM goes on up to where its vCPUs would
run, on real KVM, or it is refused. It raises AssertionError if

- anything but a ConfigError of one line is raised,
- a thread, a descriptor or a socket is left,
- it takes MOST_SECONDS, or this process has MOST_MEMORY.
"""

from __future__ import annotations

import copy
import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.machine.builder import assemble, open_kvm
from pyvmm.machine.outcome import Alarm
from pyvmm.machine.trace import Trace
from pyvmm.monitor import snapshots
from pyvmm.monitor.open_devices import OpenDevices
from pyvmm.monitor.phases import _Files
from pyvmm.monitor.restored import Restoring

MOST_SECONDS = 20.0
MOST_MEMORY = 2 << 30
_STRANGE = (
    *(None, True, False, -1, 0, 1, 1 << 31, 1 << 32, 1 << 63, 1 << 64, 1 << 200, 1.5, float("inf")),
    *("", "zz", "00" * 5000, "x" * 70_000, "\0", "a\nb", "../..", [], {}, [[]], [None], {"": None}),
)


def restore_and_end(name: str, address: int = 0, size: int = 0) -> bytes:
    """All of a restore but that the guest runs; what its memory has there."""
    spec = snapshots.restored(name, {})
    trace = Trace((), None)
    with ExitStack() as closing:
        restoring, alarm = Restoring(spec), Alarm()
        files = _Files(spec, closing)
        opening = closing.enter_context(OpenDevices(name, None, alarm, files.map))
        devices = tuple(opening.open(part) for part in spec.parts)
        prepared = restoring.prepare(devices, alarm, closing, files.mapped)
        kvm = open_kvm(prepared.board, spec.cpus, closing)
        parts = assemble(prepared, kvm, trace, lambda data: None, closing)
        restoring.restore(parts, lambda line: None)
        return prepared.memory.read(address, size)


# --- what can be wrong ----------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of each value in `value`, those of tables and lists included."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in items:
        yield (*path, key)
        if isinstance(one, dict | list):
            yield from leaves(one, (*path, key))


def other(rng: Random, value: Any) -> Any:
    """Something else in the place of `value`."""
    kind = rng.random()
    if isinstance(value, bool) and kind < 0.5:
        return not value
    if isinstance(value, int) and kind < 0.6:
        return value ^ 1 << rng.randrange(64)
    if isinstance(value, int) and kind < 0.7:
        return value + rng.choice((-4096, -1, 1, 4096))
    if isinstance(value, str) and value and kind < 0.6:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice("0123456789abcdef") + value[at + 1 :]
    if isinstance(value, list) and value and kind < 0.5:
        at = rng.randrange(len(value))
        return rng.choice((value[:at], value[at:], value + value[at:], value * 3, value[::-1]))
    if isinstance(value, dict) and value and kind < 0.5:
        gone = rng.choice(list(value))
        return {key: one for key, one in value.items() if key != gone}
    return copy.deepcopy(rng.choice(_STRANGE))


def _values(rng: Random, path: Path) -> None:
    """Some values of the state are others, and its checksum is right."""
    state = json.loads((path / store.STATE).read_text())
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        parts = [key for key in state if key != "checksum"]
        first = rng.choice(("machine",) * 8 + tuple(parts))
        inside = state[first]
        # All that there are are as likely, but a table of 100 MSRs is not to hide the rest.
        place: tuple[Any, ...] = (first,)
        while isinstance(inside, dict | list) and inside and rng.random() < 0.93:
            key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
            place, inside = (*place, key), inside[key]
        holder = state
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = other(rng, inside)
    _write_state(path, state)


def _write_state(path: Path, state: dict[str, Any]) -> None:
    state["checksum"] = store.checksum(state)
    (path / store.STATE).write_text(json.dumps(state))


def _text(rng: Random, path: Path) -> None:
    """The text of the state is another one."""
    data = bytearray((path / store.STATE).read_bytes())
    kind = rng.randrange(6)
    if kind == 0:
        del data[rng.randrange(len(data)) :]
    elif kind == 1:
        for _ in range(rng.choice((1, 2, 10))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data = bytearray(rng.choice((b"[", b'{"a":', b"[1,")) * rng.choice((10, 100_000)))
    elif kind == 3:
        data = bytearray(rng.choice((b"", b"null", b"[]", b"1" * 9999, b"NaN", b'"', b"\xff\0")))
    elif kind == 4:
        at = rng.randrange(len(data))
        data[at:at] = bytes(rng.getrandbits(8) for _ in range(rng.choice((1, 100))))
    else:
        data = data + data
    (path / store.STATE).write_bytes(data)


def _file(rng: Random, path: Path) -> None:
    """A file is shorter, longer, has holes or other bits, or is something else."""
    file = path / rng.choice(sorted(os.listdir(path)))
    size = file.stat().st_size
    kind = rng.randrange(8)
    if kind == 0:
        os.truncate(file, rng.choice((0, 1, size // 2, max(0, size - 1))))
    elif kind == 1:
        os.truncate(file, size + rng.choice((1, 4096, 1 << 30, 1 << 40)))
    elif kind in (2, 3):
        with file.open("r+b") as stream:
            for _ in range(rng.choice((1, 1, 8, 64))):
                at = rng.randrange(max(1, min(size, rng.choice((512, 1 << 16, size or 1)))))
                stream.seek(at)
                stream.write(bytes([rng.getrandbits(8)]))
    elif kind == 4:
        with file.open("r+b") as stream:  # a hole
            stream.truncate(rng.randrange(size + 1))
            stream.truncate(size)
    else:
        file.unlink()
        if kind == 5:
            os.mkfifo(file)
        elif kind == 6:
            file.symlink_to(rng.choice(("/dev/zero", "/etc/passwd", str(file))))
        elif rng.random() < 0.5:
            file.mkdir()


WAYS: dict[str, Callable[[Random, Path], None]] = {"values": _values, "text": _text, "file": _file}
_WEIGHTS = (8, 1, 2)


# --- snapshots that are good, and cases -----------------------------------------------------------

_SNAPSHOTS = {
    "small": [
        ("snapshot", "small", "small", "--track"),
        ("snapshot", "small", "changes", "--diff-of", "small"),
        ("snapshot", "small", "more", "--diff-of", "changes"),
        ("snapshot", "rm", "changes"),
    ],
    "mmio": [("snapshot", "mmio", "mmio")],
    "pci": [("snapshot", "pci", "pci")],
    # Of what comes, one goes again, which this guest does not agree to.
    "late": [
        ("disk", "add", "late", "{folder}/disk,readonly,id=goes", "--timeout", "0"),
        ("rng", "add", "late", "--timeout", "0"),
        ("disk", "add", "late", "{folder}/disk,readonly,id=stays", "--timeout", "0"),
        ("disk", "rm", "late", "goes", "--timeout", "0", "--force"),
        ("snapshot", "late", "late"),
    ],
}


class Snapshots:
    """Snapshots of several VMs in a folder of its own, which are as they should be."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made if need be; XDG_STATE_HOME and XDG_RUNTIME_DIR are below it then."""
        self._folder = folder
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        os.environ["XDG_RUNTIME_DIR"] = str(folder / "runtime")
        folder.mkdir(exist_ok=True)
        (folder / "runtime").mkdir(mode=0o700)
        self._place = Path(store.folder())
        self._good = folder / "good"
        self._good.mkdir()
        for name, options in self._vms().items():
            self._make(name, options)
        self.names = sorted(os.listdir(self._good))
        for name in self.names:  # whatever is imported on the way is, and all are good
            with self._copy(name):
                restore_and_end(name)
        log.to_stderr("the snapshots are made")  # which opens its way to the terminal for good
        gc.collect()
        self._threads = threading.active_count()
        self._open = len(os.listdir("/proc/self/fd"))

    def _vms(self) -> dict[str, tuple[str, ...]]:
        (self._folder / "disk").write_bytes(bytes(1 << 20))
        disk = ("--disk", f"{self._folder}/disk,snapshot")
        (self._folder / "memory").write_bytes(bytes(range(256)) * (8 << 10))
        more = ("--port", f"name=org.test,path={self._folder}/port")
        more += ("--pmem", f"{self._folder}/memory")
        many = ("--rng", "--balloon", "size=16M", "--vsock", f"path={self._folder}/vsock", *more)
        return {
            "small": disk,
            "mmio": (*disk, *many, "--transport", "mmio", "--cpus", "2"),
            "pci": (*disk, *many, "--transport", "pci", "--cpus", "4"),
            "late": ("--disk", f"{self._folder}/disk,readonly", "--transport", "pci"),
        }

    def _make(self, name: str, options: tuple[str, ...]) -> None:
        from echo_guest import echo_kernel

        pyvmm = (sys.executable, "-m", "pyvmm")
        usual = ("--kvm=host", "--kernel", echo_kernel(self._folder), "--memory", "64M")
        with subprocess.Popen(
            [*pyvmm, "run", *usual, "--name", name, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as vm:
            assert vm.stdin is not None and vm.stdout is not None
            try:
                assert b"ready" in vm.stdout.readline()
                for command in _SNAPSHOTS[name]:
                    words = [word.format(folder=self._folder) for word in command]
                    subprocess.run([*pyvmm, *words], check=True, capture_output=True)
                vm.stdin.write(b"O")
                vm.stdin.flush()
                assert vm.wait(60) == 0
            finally:
                vm.kill()
        for path in self._place.iterdir():
            path.rename(self._good / path.name)

    @contextmanager
    def _copy(self, name: str) -> Iterator[Path]:
        copy = self._place / name
        copy.mkdir(mode=0o700)
        for file in (self._good / name).iterdir():
            if file.name == store.STATE or file.name.startswith("disk"):
                shutil.copyfile(file, copy / file.name)
            else:  # large, and seldom changed
                _copy_sparse(file, copy / file.name)
        try:
            yield copy
        finally:
            shutil.rmtree(copy)

    def run_case(self, rng: Random, note: Callable[[str], None] = lambda line: None) -> bool:
        """One case; whether the VM was restored."""
        name = rng.choice(self.names)
        way = rng.choices(list(WAYS), _WEIGHTS)[0]
        note(f"{name}, {way}")
        with self._copy(name) as path:
            WAYS[way](rng, path)
            began = time.monotonic()
            restored = True
            try:
                restore_and_end(name)
            except ConfigError as error:
                assert "\n" not in str(error), error
                restored = False
            took = time.monotonic() - began
            assert took < MOST_SECONDS, f"it took {took:.1f} s"
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
            assert peak < MOST_MEMORY, f"{peak >> 20} MiB"
            assert threading.active_count() == self._threads, threading.enumerate()
            if len(os.listdir("/proc/self/fd")) != self._open:
                gc.collect()  # what an error's traceback has kept
                assert len(os.listdir("/proc/self/fd")) == self._open
            left = [path for path in self._folder.iterdir() if path.is_socket()]
            assert not left, left
        return restored


def _copy_sparse(source: Path, target: Path) -> None:
    size = source.stat().st_size
    with source.open("rb") as read, target.open("wb") as write:
        write.truncate(size)
        at = 0
        while at < size:
            try:
                start = os.lseek(read.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(read.fileno(), start, os.SEEK_HOLE)
            os.pwrite(write.fileno(), os.pread(read.fileno(), at - start, start), start)
