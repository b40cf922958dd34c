"""Snapshots' files, as far as they are read before there is a machine: state, seal and memory.

A snapshot is written by the store's own writer, in a place of this process's; then something in it
is another one (tests/fuzz/snapshots.py restores such with a real KVM, a hundred times as slowly). A
case raises AssertionError, with what was changed, if

- a state is taken that its text does not say, or whose checksum is not its own,
- its memory is another one than the files that it names make, page by page,
- a seal holds although the state or a file is not what was sealed, or does not although both are,
- a VM comes of it that writes to an image, or has a directory of this machine without a seal,
- anything but an error of one line is raised, or a descriptor is left.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from fuzz import snapshots as damaged
from fuzz.room import check_closed, open_files, room, told

from pyvmm.control import snapshot_seal
from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError, HostError
from pyvmm.kinds import balloon, rng, share, vsock
from pyvmm.kinds.vm_spec import from_json, to_json
from pyvmm.memory import GuestMemory
from pyvmm.memory.pages import to_bitmap
from pyvmm.monitor.saved_memory import SavedMemory, layers_of
from pyvmm.monitor.snapshots import marks_of, spec_of
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.testing.mmio_driver import Ring

PAGE = 4096
MEMORY = 64 << 20  # of a VM; sparse


class _Place:
    """Where snapshots are, and what their VMs have."""

    def __init__(self) -> None:
        self.folder = room()
        self.environment = {"XDG_STATE_HOME": str(self.folder / "state")}
        (self.folder / "shared").mkdir()
        (self.folder / "disk").write_bytes(bytes(1 << 20))
        with mock.patch.dict(os.environ, self.environment):
            self.store = Path(store.folder())


_place = functools.cache(_Place)


def _one_line(error: BaseException) -> None:
    assert "\n" not in str(error) and len(str(error)) < 2000, error


# --- memory ---------------------------------------------------------------------------------------


def _layered(rng: Random, folder: Path, count: int) -> dict[str, Any]:
    """Files of `count` pages of memory that lie over one another; the state that says so."""
    size = count * PAGE
    layers = rng.choice((1, 1, 2, 3, 5))
    rows: list[dict[str, Any]] = []
    for number in range(layers):
        name = "memory" if number == 0 else f"memory-{number}"
        with open(folder / name, "wb") as file:
            file.truncate(size)
            for page in range(count):
                if rng.random() < 0.4:
                    os.pwrite(file.fileno(), bytes([rng.randrange(256)]) * PAGE, page * PAGE)
        pages = None
        if number < layers - 1:
            text = bytes(rng.choice(b"01") for _ in range(count))
            pages = to_bitmap(text).hex()
        rows.append({"file": name, "pages": pages})
    if layers == 1:
        return {"files": {"memory": size}}
    files = {row["file"]: size for row in rows}
    return {"files": files, "below": rows[1:], "pages": rows[0]["pages"]}


def _as_said(folder: Path, state: dict[str, Any], count: int) -> bytes:
    """The memory that the state describes, page by page."""
    rows = [{"file": "memory", "pages": state.get("pages")}, *state.get("below", [])]
    made = bytearray()
    data = [(folder / row["file"]).read_bytes() for row in rows]
    if "below" not in state:
        return data[0]
    for page in range(count):
        for row, content in zip(rows, data, strict=True):
            which = None if row["pages"] is None else bytes.fromhex(row["pages"])
            if which is None or which[page // 8] >> page % 8 & 1:
                made += content[page * PAGE : (page + 1) * PAGE]
                break
    return bytes(made)


def _memory(rng: Random, note: list[str]) -> None:
    folder = _place().folder / "memory"
    folder.mkdir()
    count = rng.choice((1, 3, 8, 9, 16))
    size = count * PAGE
    try:
        state = _layered(rng, folder, count)
        if rng.random() < 0.6:
            place = rng.choice(list(damaged.leaves(state)))
            holder: Any = state
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = damaged.other(rng, holder[place[-1]])
            note.append(f"{place} is {holder[place[-1]]!r:.300}")
        if rng.random() < 0.3:
            file = folder / rng.choice(sorted(os.listdir(folder)))
            kind = rng.randrange(4)
            note.append(f"{file.name}, way {kind}")
            if kind == 0:
                os.truncate(file, rng.choice((0, size - 1, size + PAGE)))
            else:
                file.unlink()
                if kind == 1:
                    file.symlink_to("/etc/passwd")
                elif kind == 2:
                    os.mkfifo(file)
        try:
            layers = layers_of(state, size)
            assert layers[-1].pages is None and len(layers) <= 32
            memory = SavedMemory(str(folder), state, size)
        except ConfigError as error:
            _one_line(error)
            assert note, error
            return
        with memory:
            expected = _as_said(folder, state, count)
            assert memory.read(0, size) == expected, "other pages"
            at = rng.randrange(size)
            length = rng.randrange(size - at + 1)
            assert memory.read(at, length) == expected[at : at + length]
            pieces = bytearray(size)
            for offset, data in memory.pieces():
                pieces[offset : offset + len(data)] = data
            assert pieces == expected, "other pieces"
            ram = GuestMemory([(0, size)])
            memory.copy_to(ram)
            assert bytes(ram.regions[0].view) == expected, "another copy"
            ram.close()
            other = bytearray(expected)
            changed = {rng.randrange(count) * PAGE for _ in range(rng.randrange(3))}
            for page in changed:
                other[page + 7] ^= 1
            assert memory.differing(0, bytes(other)) == sorted(changed)
            memory.fetch_ahead([(0, count), (count + 5, 9)])
    finally:
        shutil.rmtree(folder)


# --- state and seal -------------------------------------------------------------------------------


def _spec(rng: Random) -> VmSpec:
    place = _place()
    devices: list[Any] = []
    if rng.random() < 0.4:
        devices.append(_RNG())
    if rng.random() < 0.4:
        devices.append(balloon.Spec(1 << 20))
    if rng.random() < 0.4:
        devices.append(vsock.Spec(path=str(place.folder / "vsock")))
    if rng.random() < 0.5:
        devices.append(share.Spec(str(place.folder / "shared"), "/mnt", rng.random() < 0.5, "tag"))
    disks = []
    if rng.random() < 0.6:
        kind = rng.choice(({}, {"read_only": True}, {"snapshot": True}))
        disk = DiskSpec(str(place.folder / "disk"), id="disk0", **kind)
        disks.append(disk)
    return VmSpec("/kernel", disks=tuple(disks), devices=tuple(devices), memory=MEMORY)


_RNG = rng.Spec


@contextmanager
def _written(rng: Random) -> Iterator[tuple[Path, dict[str, Any], VmSpec]]:
    """A snapshot in the store, its state and its VM."""
    spec = _spec(rng)
    state: dict[str, Any] = {
        "spec": json.loads(to_json(spec)),
        "machine": {"board": {"rip": 7, "bytes": "00ff"}, "devices": [{"x": 1}, {}]},
        "disks": marks_of(spec),
        "kvm": rng.choice(("", "host")),
        "paused_ms": 1.5,
    }
    with store.Writer("one") as writer:
        files = {"memory": spec.memory}
        if any(disk.copies_on_write for disk in spec.disks):
            files["disk-0"] = 4096
        if any(device.kind == "share" for device in spec.devices):
            files["share-0"] = 9
        for name, size in files.items():
            writer.make(name, size)
        writer.write("memory", rng.randrange(9) * PAGE, b"x" * 100)
        state["files"] = files
        if any(device.kind == "share" for device in spec.devices):
            state["seal"] = snapshot_seal.seal(state, writer.made)
        writer.finish(state)
    path = _place().store / "one"
    try:
        yield path, state, spec
    finally:
        shutil.rmtree(path)


def _said(state: Any) -> Any:
    """What a seal is of, without the files."""
    if not isinstance(state, dict):
        return None
    left_out = ("seal", "checksum", "format", "version")
    return {key: value for key, value in state.items() if key not in left_out}


def _identities(path: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for one in os.scandir(path):
        status = one.stat(follow_symlinks=False)
        found[one.name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    found.pop(store.STATE, None)
    return found


def _state(rng: Random, note: list[str]) -> None:
    with mock.patch.dict(os.environ, _place().environment), _written(rng) as (path, _, spec):
        good = json.loads((path / store.STATE).read_text())
        files = _identities(path)
        way = rng.choice(("none", "values", "values", "values", "values", "text", "file"))
        note.append(way)
        if way != "none":
            damaged.WAYS[way](rng, path)
        if path.is_dir() and (path / store.STATE).is_file() and way != "text":
            with open(path / store.STATE, errors="replace") as file:
                note.append(file.read(1500))
        try:
            with store.reading("one") as found:
                read = dict(found.state)
        except ConfigError as error:
            _one_line(error)
            assert way != "none", error
            return
        text = (path / store.STATE).read_bytes()
        assert read == json.loads(text) or read != read, "not what it says"
        assert read["checksum"] == store.checksum(read)
        same = json.dumps(_said(read), sort_keys=True) == json.dumps(_said(good), sort_keys=True)
        unchanged = same and read.get("seal") == good.get("seal") and _identities(path) == files
        is_sealed = snapshot_seal.is_sealed(read, str(path))
        if "seal" in good and unchanged:
            assert is_sealed, "what was sealed is not any more"
        else:
            assert not is_sealed, "what was never sealed is"
        try:
            made = spec_of("one", str(path), read)
        except ConfigError as error:
            _one_line(error)
            assert way != "none" and not unchanged, error
            return
        for disk in made.disks:
            assert disk.read_only or (disk.snapshot and not disk.overlay), "it writes to an image"
        lends = [one for one in made.devices if one.kind in ("share", "vhost_user")]
        assert not lends or is_sealed, "a directory without a seal"
        assert from_json(to_json(made)) == made
        with suppress(ConfigError, HostError), SavedMemory(str(path), read, made.memory) as memory:
            assert memory.size == made.memory
            assert len(memory.read(0, 9 * PAGE)) == 9 * PAGE
        if same and way == "none":
            assert made.memory == spec.memory and len(made.devices) == len(spec.devices)


_WAYS = (_memory, _state, _state)


def saved_case(rng: Random, ring: Ring) -> int:
    """One snapshot; one step."""
    note: list[str] = []
    way = rng.choice(_WAYS)
    assert _place()
    descriptors = open_files()
    with told(way, note):
        way(rng, note)
        check_closed(descriptors)
    return 1
