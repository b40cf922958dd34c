"""Devices that come to a guest in an emulated host, as the machine outside sees it.

Requests for them are caught on their way in: what a device has of this machine is opened here, by
the user's own word, and gets in by QEMU's hot-plug; the monitor inside is then asked for the device
(`plug`). What is inside cannot ask for anything of the machine.
"""

from __future__ import annotations

import _socket
import json
import os
import select
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.host.syscalls import Closable, EventFd
from pyvmm.host.unix_sockets import Socket
from pyvmm.kinds import registry
from pyvmm.kinds.border import Border, Crossing, Visible
from pyvmm.machine.board.registry import uname_of
from pyvmm.monitor.nodes_inside import PLACE
from pyvmm.spec.vm import DiskSpec, VmSpec

if TYPE_CHECKING:
    from pyvmm.control.protocol import Request
    from pyvmm.emulated_host.spec import Plugs

_CROSS = ("disk", "net", "share")  # kinds that have something of the machine
_PATIENCE = 90.0  # seconds for the monitor inside to plug something in
_SENDING = 10.0


class Plugging(Closable):
    """The outer monitor's part in devices that come and go, from its control socket on."""

    def __init__(self, vm: VmSpec, visible: Visible, inside: str, *, strict: bool = False) -> None:
        """For `vm`. `visible` is a Border's; the monitor inside listens at `inside`, and is
        confined strictly, or not."""
        self._vm = vm
        self._strict = strict
        self._visible = visible
        self._inside = inside
        self._lock = Lock()
        self._releasing = Lock()
        self._number = 0
        self._plugged: dict[tuple[str, str], ExitStack] = {}
        self._listening = False

    def take(self, said: bytes, plugs: Plugs) -> Callable[[Socket, bytes], None] | None:
        """See HostListener: requests to add or remove what is this machine's."""
        if not any(f'"{kind}.'.encode() in said for kind in _CROSS):
            return None
        from pyvmm.control.protocol import ControlError, parse_request

        line, newline, _ = said.partition(b"\n")
        try:
            method = parse_request(line).method if newline else ""
        except ControlError:
            return None
        if method not in {f"{kind}.{verb}" for kind in _CROSS for verb in ("add", "remove")}:
            return None
        return partial(self._begin, plugs)

    def _begin(self, plugs: Plugs, socket: Socket, said: bytes) -> None:
        args = plugs, socket, said
        try:
            Thread(target=self._serve, args=args, name="plug", daemon=True).start()
        except RuntimeError:  # no more threads
            socket.close()

    def _serve(self, plugs: Plugs, socket: Socket, said: bytes) -> None:
        from pyvmm.control.client import send_all
        from pyvmm.control.protocol import parse_request
        from pyvmm.control.server import answered

        try:
            line, _, rest = said.partition(b"\n")
            request = parse_request(line)
            answer = answered(request.id, lambda: self._answer(plugs, request, socket))
            send_all(socket, answer, time.monotonic() + _SENDING)
        except (PyvmmError, OSError):
            socket.close()
            return
        plugs.take_back(socket, rest)

    def _answer(self, plugs: Plugs, request: Request, asker: Socket) -> Any:
        from pyvmm.control.protocol import check_params
        from pyvmm.monitor.hotplug_methods import methods

        kind, _, verb = request.method.partition(".")
        check_params(methods(_nobody)[request.method], request.params)
        if verb == "remove":
            return self._remove(plugs, kind, request.params, asker)
        params = request.params
        value = params.get("device", params.get("table"))
        if len(params) != 1:
            raise ConfigError("say what to add", cure="by device, a text, or by table")
        try:
            return self._add(plugs, kind, value)
        except ConfigError as error:
            raise registry.untyped(kind, error) from None

    # --- a device comes ---------------------------------------------------------------------------

    def _add(self, plugs: Plugs, kind: str, value: Any) -> Any:
        from pyvmm.monitor import given

        specs = registry.read(kind, value)
        if len(specs) != 1:
            raise ConfigError(f"{len(specs)} devices at once", cure="add one after the other")
        if kind == "share" and self._strict:  # whatever else is wrong with it
            raise ConfigError(
                "no directory comes to a strictly confined VM in an emulated KVM host",
                cure="share it from the start, or start the VM with --confine auto",
            )
        [checked] = registry.check(kind, specs, self._vm)
        if isinstance(checked, DiskSpec):  # which others there are is known inside
            checked = replace(checked, id=specs[0].id)
        elif kind == "share":
            checked = replace(checked, tag=specs[0].tag)
        with ExitStack() as opened:
            machine = uname_of(self._vm.arch)
            border = Border(opened, self._visible, runs=True, machine=machine)
            crossing = registry.cross(checked, border)
            spec, disks = self._plug_disks(plugs, crossing, opened)
            spec, streams = self._plug_streams(plugs, crossing, spec, opened)
            self._listen(plugs)
            plain, outside = (json.loads(json.dumps(asdict(one))) for one in (spec, checked))
            params: dict[str, Any] = {"kind": kind, "spec": plain, "described": outside}
            params |= {"disks": disks, "streams": streams}
            given.add_to(self._vm.name, checked)
            told = self._ask(plugs, _PATIENCE, "plug", **params)
            with self._lock:
                before = self._plugged.get((kind, told["id"]))
                self._plugged[kind, told["id"]] = opened.pop_all()
        if before is not None:  # its device has gone, as the name was free
            before.close()
        with suppress(PyvmmError, OSError):
            self._sweep(plugs)  # the guest may have ejected it before it was known here
        return told

    def _plug_disks(
        self, plugs: Plugs, crossing: Crossing, opened: ExitStack
    ) -> tuple[Any, dict[str, str]]:
        """The specification with paths that nothing else has inside, and by them the serial numbers
        of the block devices that are to be there."""
        moved: dict[str, str] = {}
        serials: dict[str, str] = {}
        for disk in crossing.disks:
            real = os.path.realpath(disk.path)
            with self._lock:
                self._number += 1
                moved[real] = f"{PLACE}/{self._number}{real}"
            serials[moved[real]] = plugs.plug_disk(disk, moved[real], opened)
        spec = registry.with_paths(crossing.spec, lambda path: moved.get(path, path))
        if isinstance(spec, DiskSpec) and spec.scratch is not None:
            spec = replace(spec, scratch=moved.get(spec.scratch, spec.scratch))
        return spec, serials

    @staticmethod
    def _plug_streams(
        plugs: Plugs, crossing: Crossing, spec: Any, opened: ExitStack
    ) -> tuple[Any, list[str]]:
        places = [plugs.plug_stream(stream, opened) for stream in crossing.streams]
        return (replace(spec, stream=places[0]) if places else spec), places

    # --- a device goes ----------------------------------------------------------------------------

    def _remove(self, plugs: Plugs, kind: str, params: dict[str, Any], asker: Socket) -> Any:
        from pyvmm.monitor.hotplug_methods import MOST_SECONDS, PATIENCE

        with self._lock:
            opened = self._plugged.get((kind, params["id"]))
        timeout = params.get("timeout_ms", round(1000 * PATIENCE)) / 1000
        patience = min(max(0.0, timeout), MOST_SECONDS) + _PATIENCE
        told = self._ask(plugs, patience, f"{kind}.remove", asker, **params)
        if opened is not None:
            self._release(kind, params["id"], opened)
        return told

    def _release(self, kind: str, id: str, opened: ExitStack) -> None:
        with self._releasing:  # so that whoever comes second waits for the first
            with self._lock:
                if self._plugged.get((kind, id)) is not opened:
                    return  # another device has that name by now
                del self._plugged[kind, id]
            opened.close()

    def _sweep(self, plugs: Plugs) -> None:
        """Give back what devices had that have gone inside. An event that says so may be older than
        a device that has the same name, so those that are there are asked for."""
        with self._lock:
            known = self._plugged.copy()
        there = self._ask(plugs, _SENDING, "status")["devices"]
        for (kind, id), opened in known.items():
            if id not in there:
                self._release(kind, id, opened)

    def _listen(self, plugs: Plugs) -> None:
        """From the first one on: the guest may eject it by itself."""
        with self._lock:
            if self._listening:
                return
            self._listening = True
        Thread(target=self._hear, args=(plugs,), name="plug-events", daemon=True).start()

    def _hear(self, plugs: Plugs) -> None:
        try:
            for event in self._events(plugs):
                if event.get("event") == "device_removed":
                    with suppress(PyvmmError, OSError):  # the next one sweeps for it as well
                        self._sweep(plugs)
        except (PyvmmError, OSError):
            pass
        finally:
            with self._lock:
                self._listening = False  # the next one that comes tries again

    def _events(self, plugs: Plugs) -> Iterator[dict[str, Any]]:
        from pyvmm.control.client import Client, read_events

        stream = Client("", plugs.connect(self._inside)).upgrade("events", history=False).socket
        return read_events(stream)

    def _ask(
        self, plugs: Plugs, patience: float, method: str, asker: Socket | None = None, **params: Any
    ) -> Any:
        """The answer of the monitor inside, or its end once `asker` has hung up. Raises
        ControlError, PyvmmError."""
        from pyvmm.control.client import Client

        with closing(Client("the VM", plugs.connect(self._inside))) as client, ExitStack() as ends:
            if asker is not None:
                ends.enter_context(_cut_with(asker, client.connection))
            return client.call(method, patience=patience, **params)

    def close(self) -> None:
        """The emulated host has gone, and QEMU with it."""
        with self._lock:
            plugged, self._plugged = list(self._plugged.values()), {}
        for opened in plugged:
            with suppress(PyvmmError, HostError, OSError):
                opened.close()


@contextmanager
def _cut_with(asker: Socket, connection: Socket) -> Iterator[None]:
    """As soon as `asker` has hung up, `connection` is at its end."""

    def watch() -> None:
        poll = select.poll()
        poll.register(asker.fileno(), 0)  # a hang-up is always told
        poll.register(done.fd, select.POLLIN)
        if all(fd != done.fd for fd, _ in poll.poll()):
            with suppress(OSError):
                connection.shutdown(_socket.SHUT_RDWR)

    with EventFd() as done:
        thread = Thread(target=watch, name="plug-asker", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.signal()
            thread.join()


def _nobody() -> Any:
    raise AssertionError("it is asked inside")
