"""The answers of a running machine on its control socket: a method a line, see `methods`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from pyvmm.control.protocol import Method, Upgrade, executes, watches
from pyvmm.host import log
from pyvmm.kinds import registry
from pyvmm.kinds.interface import Running
from pyvmm.machine.builder import Parts, Prepared
from pyvmm.machine.machine import Machine
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.spec.record import replace
from pyvmm.spec.surroundings import STOP_SECONDS
from pyvmm.spec.vm import DeviceSpec, DiskSpec
from pyvmm.version import __version__

if TYPE_CHECKING:
    from pyvmm.monitor.hotplug import Hotplug
    from pyvmm.monitor.stats import MachineStats
    from pyvmm.monitor.watch import Watch
    from pyvmm.spec.vm import VmSpec

PLUG = "plug"  # what one side of an emulated host's border asks the other


def not_confined() -> dict[str, Any]:
    """The description of a process that no Confinement is for."""
    return {"mode": "off", "user": os.geteuid(), "on": [], "off": {}, "refused_calls": 0}


def _types_or_watches(params: Mapping[str, Any]) -> str:
    return executes(params) if params.get("input", True) else watches(params)


ResizeOutside = Callable[[str, int | None], None]


class MachineControl:
    """The methods of one machine, in plain data. They are called in the control server's thread."""

    def __init__(
        self,
        machine: Machine,
        watch: Watch,
        hotplug: Callable[[], Hotplug],
        resize_outside: ResizeOutside | None = None,
        described: VmSpec | None = None,
        *,
        confinement: Callable[[], dict[str, Any]] = not_confined,
    ) -> None:
        """`hotplug` is asked for devices that are to come or go. `described` is the VM as the
        user's machine knows it, where that is another one. `resize_outside` is for where the
        disks are somebody else's: it resizes the storage at a path, to so many bytes or (None) to
        those it has by now, and returns when that shows here. `confinement` tells of
        the box that this process is in.
        """
        self._machine = machine
        self._hotplug = hotplug
        self._watch = watch
        self._resize_outside = resize_outside
        self._described = described
        self._first_devices = self._prepared.devices
        self._confinement = confinement
        self._start = time.monotonic()
        self._stats: tuple[Parts, MachineStats] | None = None

    def method(self, name: str) -> Method | None:
        """The one of `methods` that a request names; None if there is none. Kinds of devices that
        nobody asks about are not loaded for it."""
        found = self._of_machine().get(name)
        if found is None and name == PLUG and self._resize_outside is not None:
            from pyvmm.monitor import plugged_inside

            found = Method(
                partial(plugged_inside.plug, self._hotplug),
                needs=plugged_inside.NEEDS,
                right=executes,
            )
        if found is None and name.endswith((".add", ".remove", ".wait")):
            found = self._of_hotplug().get(name)
        found = found or registry.method(name, self._running())
        return None if found is None else self._guarded(found)

    def methods(self) -> dict[str, Method]:
        """By the names that a request uses. docs/control-socket.md lists them, and a test compares
        it with this."""
        of_kinds = {**self._of_hotplug(), **registry.methods(self._running())}
        methods = {**self._of_machine(), **of_kinds}
        return {name: self._guarded(method) for name, method in methods.items()}

    def _of_machine(self) -> dict[str, Method]:
        return {
            "status": Method(self.status, right=watches),
            "stats": Method(self.stats, right=watches),
            "metrics": Method(self.metrics, right=watches),
            "stop": Method(self.stop, takes={"timeout_ms": int}),
            "quit": Method(self.quit),
            "pause": Method(self.pause),
            "snapshot": Method(
                self.snapshot,
                takes={"stop": bool, "track": bool, "since": str},
                right=executes,
            ),
            "used": Method(self.used, right=executes),
            "resume": Method(self.resume),
            "console": Method(
                self.console, takes={"history": bool, "input": bool}, right=_types_or_watches
            ),
            "events": Method(self.events, takes={"history": bool}, right=watches),
        }

    def _of_hotplug(self) -> dict[str, Method]:
        from pyvmm.monitor import hotplug_methods  # only once somebody asks

        return hotplug_methods.methods(self._hotplug)

    def _guarded(self, method: Method) -> Method:
        return method._replace(run=partial(self._between_starts, method.run))

    def _between_starts(self, run: Callable[..., Any], **params: Any) -> Any:
        """Not while a guest that has rebooted is put together anew."""
        with self._machine.steady:
            return run(**params)

    @property
    def _prepared(self) -> Prepared:
        return self._machine.parts.prepared

    def _running(self) -> Running:
        """The machine as the methods of the kinds of devices see it."""
        return Running(
            self._prepared.spec,
            self._prepared.devices,
            lambda: self._machine.pauser.paused,
            lambda: self._machine.parts.prepared.memory.resident,
            self._resize_outside,
        )

    def status(self) -> dict[str, Any]:
        """A description of the machine and of its state."""
        spec = self._prepared.spec
        devices = self._prepared.devices
        return {
            "name": spec.name,
            "version": __version__,
            "state": "paused" if self._machine.pauser.paused else "running",
            "uptime_seconds": round(time.monotonic() - self._start, 3),
            "restarts": self._machine.boots - 1,
            "cpus": spec.cpus,
            "memory": spec.memory,
            "kernel": spec.kernel,
            "disks": [
                {
                    "id": disk.id,
                    "path": disk.path,
                    "read_only": disk.read_only,
                    "size": device.size,
                }
                for disk, device in self._running().of_kind("disk")
            ],
            "devices": [device.name for device in devices],
            "confinement": self._confinement(),
        }

    def stats(self) -> dict[str, Any]:
        """The counters since the start; docs/watching.md has the names. Raises HostError."""
        console_bytes = self._watch.console_left_out()
        left_out = {"console_bytes": console_bytes, "messages": log.left_out()}
        more = {"left_out": left_out, "confinement": self._confinement()}
        return {**self._counted().read(), **more}

    def metrics(self) -> dict[str, Any]:
        """The same as text in Prometheus' format. Raises HostError."""
        from pyvmm.monitor.stats import CONTENT_TYPE, as_text

        text = as_text(self._prepared.spec.name, self.status(), self.stats())
        return {"content_type": CONTENT_TYPE, "text": text}

    def _counted(self) -> MachineStats:
        parts = self._machine.parts
        if self._stats is None or self._stats[0] is not parts:
            from pyvmm.monitor.stats import MachineStats

            self._stats = parts, MachineStats(parts, parts.counts, self._start)
        return self._stats[1]

    def stop(self, timeout_ms: int = round(1000 * STOP_SECONDS)) -> dict[str, Any]:
        """Have the guest power off, and cut its power after so many milliseconds, at once for 0 or
        the second time it is asked. Returns at once."""
        outcome = Outcome(Ending.TERMINATED, "ended by pyvmm stop")
        self._machine.request_end(outcome, max(0, timeout_ms) / 1000)
        return {}

    def quit(self) -> dict[str, Any]:
        """End the run as Ctrl-A x would."""
        self._machine.end(Outcome(Ending.QUIT, "ended by the control socket's quit"))
        return {}

    def pause(self) -> dict[str, Any]:
        """Return when nothing moves any more. Raises ConfigError if something does not stop."""
        was = self._machine.pauser.paused
        self._machine.pauser.pause()
        if not was:
            self._watch.events.emit("paused")
        return {"state": "paused"}

    def resume(self) -> dict[str, Any]:
        """Go on."""
        was = self._machine.pauser.paused
        self._machine.pauser.resume()
        if was:
            self._watch.events.emit("resumed")
        return {"state": "running"}

    def snapshot(self, stop: bool = False, track: bool = False, since: str = "") -> Upgrade:
        """Have the machine stand still, and make the connection a stream of all that it is; with
        `stop` the run ends then. With `track` note is kept of what changes from then on; with
        `since`, an id, the memory is what has changed since that snapshot. See
        pyvmm.monitor.snapshot_sender. Raises ConfigError."""
        from pyvmm.monitor.snapshot_sender import snapshot

        described = self._as_user_knows
        kvm = "host" if self._described is None else "emulated"
        return snapshot(self._machine, described, kvm, stop=stop, track=track, since=since)

    def used(self) -> dict[str, object]:
        """The runs of pages that have been used of the snapshot's memory that this VM began with.
        Raises ConfigError for one that did not. See pyvmm.monitor.working_set."""
        from pyvmm.monitor import working_set

        snapshot, runs = working_set.used(self._prepared.memory)
        return {"snapshot": snapshot, "runs": runs}

    def _as_user_knows(self) -> VmSpec:
        """The VM with the devices that it has now. The machine is steady."""
        prepared = self._prepared
        if self._described is None:
            return prepared.spec
        if not prepared.late and prepared.devices == self._first_devices:
            return self._described
        known = dict(zip(self._first_devices, self._described.parts, strict=True))
        known |= self._hotplug().described
        parts = [
            known.get(device, spec)
            for device, spec in zip(prepared.devices, prepared.spec.parts, strict=True)
        ]
        return replace(
            self._described,
            disks=tuple(part for part in parts if isinstance(part, DiskSpec)),
            devices=tuple(part for part in parts if isinstance(part, DeviceSpec)),
        )

    def console(self, history: bool = True, input: bool = True) -> Upgrade:
        """Make the connection one end of the console; see Watch."""
        return self._watch.console(history, input)

    def events(self, history: bool = True) -> Upgrade:
        """Make the connection one that gets the events, a line of JSON each; see Events."""
        return self._watch.events.listen(history)
