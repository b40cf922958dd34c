"""A running machine's side of a snapshot: it stands still and sends all that it is.

The monitor opens no file for it. Whoever asked, on the control socket, gets the state and all
memory as a stream (snapshot_stream.py) and writes them, with rights of its own, on a machine of its
own: the same from this machine's KVM and from an emulated host.

The state has an id of the snapshot. Where what has changed since another one is asked for, it has
the set of those pages, and no other page is sent.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from threading import Thread
from typing import Any

from pyvmm.control import snapshot_store
from pyvmm.control.protocol import Upgrade
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.host import log
from pyvmm.host.unix_sockets import Socket
from pyvmm.kinds import registry
from pyvmm.kinds.vm_spec import absolute, to_json, with_paths
from pyvmm.machine import saved_machine
from pyvmm.machine.machine import Machine
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.memory import GuestMemory, pages
from pyvmm.monitor.snapshot_stream import DONE, END, LARGEST_PIECE, PIECE, check
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.version import __version__
from pyvmm.virtio.blk.backend import Backend

_PAGE = 4096
# The machine stands still for as long as its client takes: who takes less than this for longer than
# that has the snapshot called off, also if he always takes something.
_PATIENCE = 10.0  # seconds
_SLOWEST = 1 << 20  # bytes in a second
_DONE_PATIENCE = 600.0  # and in which it has written all to its storage
_GLANCE = 0.1  # seconds between looks whether the machine is to end
_ZEROES = bytes(LARGEST_PIECE)


class _CalledOff(Exception):
    """The client has gone or takes nothing, or the machine ends."""


def snapshot(
    machine: Machine,
    described: Callable[[], VmSpec],
    kvm: str,
    *,
    stop: bool,
    track: bool,
    since: str,
) -> Upgrade:
    """Make the connection a stream as above. `described` gives the machine, which is steady then,
    as its user's machine knows it, and `kvm` is "host" or "emulated", as that has it. Raises
    ConfigError for what cannot be saved, before anything stands still."""
    check(described())

    def hand_over(connection: Socket, rest: bytes) -> None:
        sender = _Sender(machine, described, kvm, connection, stop=stop, track=track, since=since)
        Thread(target=sender.run, name="snapshot", daemon=True).start()

    return Upgrade({}, hand_over)


class _Sender:
    def __init__(
        self,
        machine: Machine,
        described: Callable[[], VmSpec],
        kvm: str,
        connection: Socket,
        *,
        stop: bool,
        track: bool,
        since: str,
    ) -> None:
        self._machine = machine
        self._described = described
        self._kvm = kvm
        self._connection = connection
        self._stop = stop
        self._track = track
        self._since = since
        self._poll = select.poll()
        self._may_wait = _PATIENCE  # seconds for room; what is sent earns some more
        self._has_begun = False  # the stream, so that an error is its last piece

    def run(self) -> None:
        try:
            self._run()
        except _CalledOff:
            pass
        except Exception as error:
            log.to_stderr(f"a defect in pyvmm, met by a snapshot: {error!r}")
        finally:
            self._connection.close()

    def _run(self) -> None:
        machine = self._machine
        try:
            with machine.steady, machine.pauser.still():
                began = time.monotonic()
                try:
                    self._send_all()
                except PyvmmError as error:
                    self._send_error(error)
                    return
                finally:
                    if machine.changes is not None:
                        machine.changes.after_reading(machine.parts.vm)
                if not self._stop:
                    paused = time.monotonic() - began
                else:
                    self._send_end(time.monotonic() - began)
                    self._wait_until_written()
                    machine.pauser.ending = True  # not one more write to a disk
                    machine.end(Outcome(Ending.TERMINATED, "ended by pyvmm snapshot --stop"))
                    return
        except ConfigError as error:  # something does not come to rest
            self._send_error(error)
            return
        self._send_end(paused)

    def _send_all(self) -> None:
        machine, spec = self._machine, self._described()
        if self._kvm == "host":
            spec = with_paths(spec, absolute)  # who stores it may be elsewhere
        check(spec)  # again, as devices may have come since
        prepared = machine.parts.prepared
        snapshot_id = os.urandom(16).hex()
        # Before memory is looked at: on some machines a part of it is written there.
        saved = saved_machine.save(machine)
        changed = self._changes(snapshot_id)
        state = {
            "pyvmm": __version__,
            "id": snapshot_id,
            "made": time.time(),
            "kvm": self._kvm,
            "spec": json.loads(to_json(spec)),
            "cmdline": prepared.entry.cmdline,
            "machine": saved,
        }
        files = {snapshot_store.MEMORY: prepared.memory.size}
        pieces: list[Iterable[tuple[int, Any]]]
        if changed is None:
            pieces = [_memory(prepared.memory)]
        else:
            state["pages"] = pages.to_bitmap(changed).hex()
            pieces = [_pages_of(prepared.memory, changed)]
        for index, (disk, device) in enumerate(zip(spec.disks, prepared.devices, strict=False)):
            changes = _changes(disk, device.backend)  # type: ignore[attr-defined]  # disks are first
            if changes is not None:
                files[snapshot_store.device_file("disk", index)], found = changes
                pieces.append(found)
        counts = Counter[str]()
        for part, device in zip(spec.parts, prepared.devices, strict=False):
            if registry.has_contents(part):
                size, contents = registry.contents_of(part, device)
                files[snapshot_store.device_file(part.kind, counts[part.kind])] = size
                pieces.append(_without_zeroes(contents))
            counts[part.kind] += 1
        text = json.dumps(state).encode()
        self._has_begun = True
        self._send(_line({"state": len(text), "files": files}))
        self._send(text)
        for number, of_file in enumerate(pieces):
            for offset, data in of_file:
                self._send(PIECE.pack(number, offset, len(data)))
                self._send(data)

    def _changes(self, snapshot_id: str) -> bytes | None:
        """The pages that are to be sent, None for all; what changes from now on is noted if
        somebody may ask for it."""
        machine = self._machine
        memory, vm = machine.parts.prepared.memory, machine.parts.vm
        if not (self._track or self._since):
            if machine.changes is not None:
                machine.changes.before_reading(vm)
            return None
        from pyvmm.machine.changes import Changes

        if machine.changes is None:
            machine.changes = Changes(memory)
        changed = machine.changes.since(self._since, vm) if self._since else None
        machine.changes.begin(snapshot_id, vm)
        return changed

    def _send_end(self, paused: float) -> None:
        self._send(_last({"paused_ms": round(1000 * paused, 3)}))

    def _send_error(self, error: PyvmmError) -> None:
        values = {"error": str(error)}
        self._send(_last(values) if self._has_begun else _line(values))

    def _send(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data)
        while rest:
            try:
                sent = self._connection.send(rest)
            except (BlockingIOError, InterruptedError):
                began = time.monotonic()
                self._wait(select.POLLOUT, began + self._may_wait)
                self._may_wait -= time.monotonic() - began
            except OSError:
                raise _CalledOff from None
            else:
                rest = rest[sent:]
                self._may_wait = min(_PATIENCE, self._may_wait + sent / _SLOWEST)

    def _wait(self, events: int, deadline: float) -> None:
        self._poll.register(self._connection.fileno(), events)
        while not self._poll.poll(1000 * _GLANCE):
            if self._machine.pauser.ending or time.monotonic() > deadline:
                raise _CalledOff

    def _wait_until_written(self) -> None:
        self._wait(select.POLLIN, time.monotonic() + _DONE_PATIENCE)
        try:
            answer = self._connection.recv(len(DONE))
        except OSError:
            answer = b""
        if answer != DONE:
            raise _CalledOff


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _last(values: dict[str, Any]) -> bytes:
    text = json.dumps(values).encode()
    return PIECE.pack(END, 0, len(text)) + text


def _memory(memory: GuestMemory) -> Iterator[tuple[int, memoryview]]:
    """The pieces of it that are not zero, each with its offset."""
    offset = 0
    for piece in memory.touched():
        if isinstance(piece, int):
            offset += piece
            continue
        for start in range(0, len(piece), LARGEST_PIECE):
            yield from _without_zeroes([(offset + start, piece[start : start + LARGEST_PIECE])])
        offset += len(piece)


def _without_zeroes(
    pieces: Iterable[tuple[int, memoryview]],
) -> Iterator[tuple[int, memoryview]]:
    """Of `pieces`, LARGEST_PIECE at most, the pages that are not zero, with their offsets."""
    for offset, part in pieces:
        for at, data in _not_zero(part):
            yield offset + at, data


def _pages_of(memory: GuestMemory, wanted: bytes) -> Iterator[tuple[int, memoryview]]:
    """Those of the set `wanted`, zeroes too."""
    for region in memory.regions:
        first = region.fd_offset // _PAGE
        for start, count in pages.runs(wanted[first : first + region.size // _PAGE]):
            for at in range(start * _PAGE, (start + count) * _PAGE, LARGEST_PIECE):
                end = min(at + LARGEST_PIECE, (start + count) * _PAGE)
                yield region.fd_offset + at, region.view[at:end]


def _not_zero(part: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The runs of pages that are not all zeroes."""
    copy = bytes(part)  # views are compared byte by byte, bytes by memcmp
    if copy == (_ZEROES if len(copy) == len(_ZEROES) else bytes(len(copy))):
        return
    start, zero_page = -1, _ZEROES[:_PAGE]
    for at in range(0, len(part), _PAGE):
        if copy.startswith(zero_page, at):
            if start >= 0:
                yield start, part[start:at]
                start = -1
        elif start < 0:
            start = at
    if start >= 0:
        yield start, part[start:]


def _changes(
    disk: DiskSpec, backend: Backend
) -> tuple[int, Iterator[tuple[int, bytes | bytearray]]] | None:
    """The part of a disk that goes along: the size of a file, and its pieces. Changes that are in
    images themselves are written to them. Raises HostError."""
    if not disk.base_read_only:
        backend.flush()
        return None
    if not disk.copies_on_write:
        return None
    from pyvmm.virtio.blk.overlay import OverlayBackend
    from pyvmm.virtio.blk.saved_overlay import file_of

    assert isinstance(backend, OverlayBackend)
    try:
        return file_of(backend)
    except HostError as error:
        raise ConfigError(f"the disk {disk.id} cannot be in a snapshot: {error}") from None
