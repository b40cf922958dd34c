"""Snapshots from outside their VMs: taken of one that runs, and a VM that goes on from one."""

from __future__ import annotations

import json
import os
import select
import stat
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from pyvmm.control import snapshot_store as store
from pyvmm.control.snapshot_seal import is_sealed, seal
from pyvmm.errors import ConfigError, HostError
from pyvmm.host.saved import Saved
from pyvmm.host.syscalls import Closable
from pyvmm.host.unix_sockets import Socket
from pyvmm.kinds import registry
from pyvmm.kinds.vm_spec import from_json, to_json, validate, with_paths
from pyvmm.memory import pages
from pyvmm.memory.guest_memory import PAGE_SIZE
from pyvmm.monitor.saved_memory import SavedMemory, below, is_zero, layers_of
from pyvmm.monitor.snapshot_stream import DONE, END, LARGEST_PIECE, PIECE, check
from pyvmm.spec.options import read_own
from pyvmm.spec.record import replace, with_defaults
from pyvmm.spec.vm import INTERNAL, VmSpec

_PATIENCE = 60.0  # seconds without a byte from the VM
_MOST_LINE = 1 << 16
_MOST_FILES = 64
_DEVICE_FILES = frozenset(
    store.device_file(kind, number) for kind in registry.KINDS for number in range(_MOST_FILES)
)
_LARGEST_FILE = 1 << 52


class Taken(NamedTuple):
    """A snapshot that was taken: its name, and the seconds for which the VM stood still."""

    name: str
    paused: float


def take(
    vm: str, name: str, *, stop: bool = False, track: bool = False, diff_of: str | None = None
) -> Taken:
    """Take the snapshot `name` of the VM called `vm`, which runs on, or with `stop` ends. Nothing
    is left of one that fails.

    With `track` the VM keeps note of what changes from then on. With `diff_of`, the name of another
    snapshot from which it has kept note, what has not changed since is not stored again; it keeps
    note from the new one on as well.

    Raises ConfigError, ControlError, NoAnswer or HostError.
    """
    with ExitStack() as closing:
        writer = closing.enter_context(store.Writer(name))
        base = None if diff_of is None else _Base(closing.enter_context(store.reading(diff_of)))
        asked: dict[str, Any] = {"stop": stop}
        if track:
            asked["track"] = True
        if base is not None:
            asked["since"] = base.id
            closing.enter_context(base)
        from pyvmm.control.client import Client  # not for those who restore

        client = closing.enter_context(Client.connect(vm))
        stream = client.upgrade("snapshot", **asked)
        receiver = closing.enter_context(_Receiver(vm, stream.socket))
        return Taken(name, _receive(receiver, writer, base, stop=stop))


@contextmanager
def taken_once(vm: str) -> Iterator[VmSpec]:
    """A VM that goes on from where the one called `vm` is now, to be started as often as one likes
    inside. Raises as `take` does, and ConfigError for a VM whose disks its copies could not
    share."""
    from pyvmm.control.client import Client

    with store.Writer() as writer:
        with Client.connect(vm) as client:
            stream = client.upgrade("snapshot", stop=False)
            with _Receiver(vm, stream.socket) as receiver:
                _receive(receiver, writer, None, stop=False)
        state = store.read_state(writer.path)
        for disk in from_json(json.dumps(state["spec"])).disks:
            if not disk.base_read_only:
                raise ConfigError(
                    f"copies of {vm} cannot share the disk {disk.id}, which it writes itself",
                    cure="run it with --rm, or the disk with snapshot or overlay=",
                )
        yield _of_now(spec_of(vm, writer.path, state))


@contextmanager
def kept(name: str) -> Iterator[VmSpec]:
    """A VM that goes on from the snapshot `name`, which nobody removes inside. Raises
    ConfigError."""
    with store.reading(name) as found:
        yield _of_now(spec_of(found.name, found.path, found.state))


def _of_now(spec: VmSpec) -> VmSpec:
    """Without what was for another run."""
    return validate(replace(spec, name="", trace=(), trace_file=None))


def copy_of(spec: VmSpec, name: str, *, waits: bool = False) -> VmSpec:
    """`spec` for a VM that shall be a stranger to all others that go on from there: what only one
    VM can have is another one. Its files are called by `name`. Raises ConfigError."""
    devices = tuple(registry.for_copy(device, name) for device in spec.devices)
    return validate(replace(spec, devices=devices, waits=waits))


def merge(name: str, new: str) -> None:
    """Make the snapshot `new`, which has all of its memory in one file, of the snapshot `name`,
    which stays. Raises ConfigError, HostError."""
    with store.Writer(new) as writer, store.reading(name) as found:
        spec = spec_of(found.name, found.path, found.state)
        state = {key: value for key, value in found.state.items() if key not in _OF_LAYERS}
        disks = {
            file: size for file, size in state["files"].items() if not file.startswith(store.MEMORY)
        }
        state["files"] = {store.MEMORY: spec.memory, **disks}
        writer.make(store.MEMORY, spec.memory)
        with SavedMemory(found.path, found.state, spec.memory) as memory:
            for offset, data in memory.pieces():
                writer.write(store.MEMORY, offset, data)
        for file in disks:
            writer.link(file, os.path.join(found.path, file))
        _finish(writer, state, spec)


_OF_LAYERS = ("below", "pages", "base")


class _Base(Closable):
    """The snapshot since which only what has changed is stored."""

    def __init__(self, found: store.Saved) -> None:
        """Raises ConfigError."""
        known = found.state.get("id")
        files = found.state.get("files")
        size = files.get(store.MEMORY) if isinstance(files, dict) else None
        if not isinstance(known, str) or not known or type(size) is not int or size % PAGE_SIZE:
            raise ConfigError(
                f"nothing can be told apart from the snapshot {found.name}: it has no id",
                cure="take a new one with --track",
            )
        self._found = found
        self.name, self.id, self.size = found.name, known, size
        self.below = below(found.path, found.state, size)
        self.memory = SavedMemory(found.path, found.state, size)

    def check_sealed(self) -> None:
        """Raise ConfigError if its memory may be a stranger's."""
        if not is_sealed(self._found.state, self._found.path):
            raise ConfigError(
                f"the snapshot {self.name} bears no seal of yours, as one below a VM with a "
                "directory or a back end of this machine has to",
                cure="take a whole one",
            )

    def close(self) -> None:
        self.memory.close()


def _receive(receiver: _Receiver, writer: store.Writer, base: _Base | None, *, stop: bool) -> float:
    header = receiver.line()
    files = header.get("files")
    if not isinstance(files, dict) or not 0 < len(files) <= _MOST_FILES:
        raise receiver.nonsense()
    names = list(files)
    for name, size in files.items():
        if name != store.MEMORY and name not in _DEVICE_FILES:
            raise receiver.nonsense()
        if type(size) is not int or not 0 <= size < _LARGEST_FILE:
            raise receiver.nonsense()
    state = receiver.state(header.get("state"))
    spec = with_paths(from_json(json.dumps(state["spec"])), os.path.abspath)
    if base is not None and _lends_files(spec):
        base.check_sealed()
    receiver.check(spec)
    state["spec"] = json.loads(to_json(spec))
    state["disks"] = marks_of(spec)  # now: a VM that goes on writes to its images
    for name, size in files.items():
        writer.make(name, size)
    changed = None if base is None else _Changed(receiver, base, state, files[store.MEMORY])
    while True:
        number, offset, length = PIECE.unpack(receiver.take(PIECE.size))
        if length > LARGEST_PIECE:
            raise receiver.nonsense()
        data = receiver.take(length)
        if number == END:
            break
        if number >= len(names) or offset + length > files[names[number]]:
            raise receiver.nonsense()
        if changed is None or names[number] != store.MEMORY:
            writer.write(names[number], offset, data)
        else:
            changed.write(writer, offset, data)
    end = receiver.parsed(data)
    paused = end.get("paused_ms")
    if not isinstance(paused, int | float):
        raise receiver.nonsense()
    state["paused_ms"] = paused
    if base is not None and changed is not None:
        for path, row in base.below:
            writer.link(row["file"], path)
            files[row["file"]] = base.size
        state["below"] = [row for _, row in base.below]
        state["pages"] = pages.to_bitmap(changed.pages).hex()
        state["base"] = {"name": base.name, "id": base.id}
    state["files"] = files
    _finish(writer, state, spec)
    if stop:
        receiver.answer(DONE)
    return paused / 1000


def _finish(writer: store.Writer, state: dict[str, Any], spec: VmSpec) -> None:
    """All files of the snapshot are as they will be. Raises as `seal` and `finish` do."""
    if _lends_files(spec):
        state["seal"] = seal(state, writer.made)
    writer.finish(state)


class _Changed:
    """The pages of a machine's memory that are stored: it names some that are as they were."""

    def __init__(self, receiver: _Receiver, base: _Base, state: dict[str, Any], size: int) -> None:
        """Raises HostError for what the machine should not have sent."""
        self._base, self._receiver = base, receiver
        count = base.size // PAGE_SIZE
        try:
            Saved(state, "the VM").data("pages", -(-count // 8), most=count)
        except ConfigError:
            raise receiver.nonsense() from None
        if size != base.size:
            raise receiver.nonsense()
        self._kept = bytearray(pages.NO * count)

    @property
    def pages(self) -> bytes:
        """The set of them."""
        return bytes(self._kept)

    def write(self, writer: store.Writer, offset: int, data: bytes) -> None:
        """Write those pages of `data` that are new into the file."""
        if offset % PAGE_SIZE or len(data) % PAGE_SIZE:
            raise self._receiver.nonsense()
        for at in self._base.memory.differing(offset, data):
            self._kept[(offset + at) // PAGE_SIZE] = pages.YES[0]
            page = data[at : at + PAGE_SIZE]
            if not is_zero(page):
                writer.write(store.MEMORY, offset + at, page)


class _Receiver(Closable):
    """The stream of a machine that is being saved."""

    def __init__(self, vm: str, socket: Socket) -> None:
        self._vm = vm
        self._socket = socket
        self._poll = select.poll()
        self._poll.register(socket.fileno(), select.POLLIN)
        self._received = bytearray()

    def check(self, spec: VmSpec) -> None:
        """Raise ConfigError if it says that it has more of this machine than it was given."""
        from pyvmm.monitor import given

        given.check(self._vm, spec)

    def nonsense(self) -> HostError:
        """The error for a stream that is not as it should be."""
        return HostError(0, f"the snapshot that {self._vm} sends")

    def take(self, count: int) -> bytes:
        """The next `count` bytes. Raises HostError if they do not come."""
        while len(self._received) < count:
            self._more()
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def _more(self) -> None:
        if not self._poll.poll(1000 * _PATIENCE):
            raise ConfigError(f"{self._vm} does not go on with its snapshot", cure="try again")
        try:
            data = self._socket.recv(LARGEST_PIECE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            raise ConfigError(
                f"{self._vm} has called its snapshot off", cure="has it ended? pyvmm ps shows it"
            )
        self._received += data

    def line(self) -> dict[str, Any]:
        """The first line, or the error that it is."""
        while b"\n" not in self._received:
            if len(self._received) > _MOST_LINE:
                raise self.nonsense()
            self._more()
        return self.parsed(self.take(self._received.index(b"\n") + 1))

    def parsed(self, text: bytes) -> dict[str, Any]:
        """An object of JSON; raises ConfigError if it is an error."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self.nonsense()
        if "error" in found:
            raise ConfigError(f"{found['error']}")
        return found

    def state(self, size: object) -> dict[str, Any]:
        """The state, of so many bytes."""
        if type(size) is not int or not 0 < size <= store.MOST_STATE:
            raise self.nonsense()
        found = self.parsed(self.take(size))
        if "spec" not in found or "machine" not in found:
            raise self.nonsense()
        return found

    def answer(self, data: bytes) -> None:
        """Say so, and wait until the machine has heard it."""
        deadline = time.monotonic() + _PATIENCE
        self._socket.send(data)
        while time.monotonic() < deadline and self._poll.poll(1000 * _PATIENCE):
            try:
                if not self._socket.recv(1):
                    return
            except BlockingIOError:
                continue
            except OSError:
                return

    def close(self) -> None:
        self._socket.close()


# --- images ---------------------------------------------------------------------------------------


def marks_of(spec: VmSpec) -> list[dict[str, Any]]:
    """The marks that tell whether the images of `spec` are still what they were: a row for each
    disk and each other device that has some, in which each file has its size, and when it was last
    written. Raises ConfigError."""
    return [
        {"id": name, "files": {path: _mark(path) for path in files}}
        for name, files in _images_of(spec)
    ]


def _images_of(spec: VmSpec) -> Iterator[tuple[str, tuple[str, ...]]]:
    for disk in spec.disks:
        yield disk.id, (disk.path, *disk.backing, *filter(None, (disk.data_file,)))
    for device in spec.devices:
        if files := registry.images_of(device):
            yield device.kind, files


def _mark(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{_shown(path)}: {error.strerror}", cure="put it back") from None
    if stat.S_ISBLK(found.st_mode):
        return [0, found.st_rdev, 0]  # whether it was written nobody can say
    return [found.st_size, found.st_ino, found.st_mtime_ns]


def _check_images(name: str, spec: VmSpec, saved: object) -> None:
    images = list(_images_of(spec))
    if not isinstance(saved, list) or len(saved) != len(images):
        raise _bad(name, "it has other disks than its machine")
    for marks, now, (_, files) in zip(saved, marks_of(spec), images, strict=True):
        if marks != now:
            raise ConfigError(
                f"the snapshot {name} is of no use: {_shown(files[0])} has changed since it was "
                "taken",
                cure="put the image back as it was, or take a new snapshot",
            )


def _shown(path: str) -> str:
    """A path of a stranger's, in one line."""
    return path if path.isprintable() else repr(path)


def _bad(name: str, what: str) -> ConfigError:
    return ConfigError(f"the snapshot {name} cannot be used: {what}", cure="take a new one")


# --- restored -------------------------------------------------------------------------------------


def spec_of(name: str, path: str, state: Mapping[str, Any]) -> VmSpec:
    """The VM that goes on from the snapshot `name` in the directory `path`. It writes to none of
    the files that the VM had which was saved: what it changes on its disks is thrown away at its
    end. Raises ConfigError for a snapshot that cannot be, or whose disks have changed."""
    spec = _as_a_user_could(from_json(json.dumps(state.get("spec"))))
    if _lends_files(spec) and not is_sealed(state, path):
        raise ConfigError(
            f"the snapshot {name} would give its guest a directory or a back end of this machine, "
            "and is not one that you have taken here",
            cure="take one of your own",
        )
    _check_images(name, spec, state.get("disks"))
    files = state.get("files")
    if not isinstance(files, dict) or files.get(store.MEMORY) != spec.memory:
        raise _bad(name, "its memory is not as large as its machine's")
    for layer in layers_of(state, spec.memory):
        if files.get(layer.file) != spec.memory:
            raise _bad(name, f"{layer.file} is not as large as its machine's memory")
    for file, size in files.items():
        if "/" in file or file.startswith(".") or not _has_size(os.path.join(path, file), size):
            raise _bad(name, f"{file!r} is not as large as it was")
    disks = []
    for index, disk in enumerate(spec.disks):
        if disk.read_only:
            disks.append(disk)
            continue
        changes = store.device_file("disk", index)
        if disk.copies_on_write != (changes in files):
            raise _bad(name, f"the changes of disk {disk.id} are missing")
        saved = os.path.join(path, changes) if changes in files else None
        disks.append(replace(disk, snapshot=True, overlay=None, direct=False, saved=saved))
    devices, counts = [], Counter[str]()
    for device in spec.devices:
        if registry.has_contents(device):
            contents = store.device_file(device.kind, counts[device.kind])
            if contents not in files:
                raise _bad(name, f"{contents} is missing")
            device = registry.with_contents(device, os.path.join(path, contents))
        devices.append(device)
        counts[device.kind] += 1
    kvm = state.get("kvm", "")
    if kvm not in ("", "host", "emulated"):  # those of earlier versions have none
        raise _bad(name, "nobody knows the KVM that its VM had")
    return replace(
        spec,
        disks=tuple(disks),
        devices=tuple(devices),
        restored_from=path,
        saved_on=kvm,
        waits=False,
    )


def _lends_files(spec: VmSpec) -> bool:
    return any(registry.KINDS[device.kind].lends_files for device in spec.devices)


def _as_a_user_could(spec: VmSpec) -> VmSpec:
    """`spec`, which a state has, with nothing in it that is not for a user to say. Raises
    ConfigError if it has what no snapshot of ours has: code, above all, which would run as us."""
    check(spec)
    for device in spec.devices:
        if not registry.KINDS[device.kind].in_snapshots:
            raise ConfigError(
                f"a device of the kind {device.kind} cannot be in a snapshot",
                cure="pyvmm has not made this one: take one of your own",
            )
    return replace(
        with_defaults(spec, INTERNAL),
        disks=tuple(with_defaults(disk, INTERNAL) for disk in spec.disks),
        devices=tuple(with_defaults(device, INTERNAL) for device in spec.devices),
    )


_OF_A_RUN = ("name", "trace", "trace_file", "on_reboot")


def restored(name: str, options: Mapping[str, Any]) -> VmSpec:
    """The VM that goes on from the snapshot `name`. `options` are those of `pyvmm run` that were
    given: a name, and what is to be traced. Raises ConfigError."""
    rows = {row.name: row for row in registry.usual_options()}
    if not options.keys() <= rows.keys():  # which loads all kinds of devices
        rows = {row.name: row for row in registry.options()}
    given = {
        key: value
        for key, value in options.items()
        if value is not None and value not in (rows[key].default, rows[key].typed_default)
    }
    more = [key for key in given if key not in _OF_A_RUN]
    if more:
        raise ConfigError(
            f"{rows[more[0]].flag} is what the snapshot says: a VM goes on with what it had",
            cure=f"use only {', '.join(rows[one].flag for one in _OF_A_RUN)} beside it",
            option="--restore",
        )
    with store.reading(name) as found:
        spec = spec_of(found.name, found.path, found.state)
        fields = {rows[key].field: read_own(rows[key], value) for key, value in given.items()}
        usual = {"name": "", "trace": (), "trace_file": None}
        return validate(replace(spec, **{**usual, **fields}))


def _has_size(path: str, size: object) -> bool:
    try:
        found = os.lstat(path)
    except (OSError, ValueError):  # a name that no file can have
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size
