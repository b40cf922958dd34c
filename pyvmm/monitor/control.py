"""What a running machine answers on its control socket: a method a line, see `methods`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from pyvmm.control.protocol import NOT_READY, PAUSED, ControlError, Method, Upgrade
from pyvmm.errors import ConfigError, HostError
from pyvmm.host import log
from pyvmm.host.files import SECTOR
from pyvmm.machine.builder import Parts, Prepared
from pyvmm.machine.machine import Machine
from pyvmm.machine.outcome import STOP_SECONDS, Ending, Outcome
from pyvmm.spec.vm import DiskSpec
from pyvmm.version import __version__
from pyvmm.virtio.blk.device import BlockDevice

if TYPE_CHECKING:
    from pyvmm.host.unix_sockets import Socket
    from pyvmm.monitor.stats import MachineStats
    from pyvmm.monitor.watch import Watch
    from pyvmm.virtio.balloon.device import BalloonDevice
    from pyvmm.virtio.vsock.device import VsockDevice

ResizeOutside = Callable[[str, int | None], None]
_FIXED = {  # kinds of disks that cannot be resized: what they are, and what to do instead
    "qcow2": (
        "is a qcow2 image in use",
        "stop the VM, then qemu-img resize {path} SIZE; with ,overlay=FILE it could be done live",
    ),
    "python": ("is of a class without resize", "write one: Backend.resize"),
}


class MachineControl:
    """The methods of one machine, in plain data. They are called in the control server's thread."""

    def __init__(
        self,
        machine: Machine,
        prepared: Prepared,
        watch: Watch,
        resize_outside: ResizeOutside | None = None,
    ) -> None:
        """`resize_outside` is for where the disks are somebody else's: it resizes the storage at a
        path, to so many bytes or (None) to those it has by now, and returns when that shows here.
        """
        self._machine = machine
        self._prepared = prepared
        self._watch = watch
        self._resize_outside = resize_outside
        self._start = time.monotonic()
        self._stats: tuple[Parts, MachineStats] | None = None

    def methods(self) -> dict[str, Method]:
        """By the names that a request uses. docs/control-socket.md lists them, and a test compares
        it with this."""
        methods = {
            "status": Method(self.status),
            "stats": Method(self.stats),
            "metrics": Method(self.metrics),
            "stop": Method(self.stop, takes={"timeout_ms": int}),
            "quit": Method(self.quit),
            "pause": Method(self.pause),
            "resume": Method(self.resume),
            "console": Method(self.console, takes={"history": bool, "input": bool}),
            "events": Method(self.events, takes={"history": bool}),
            "disk.resize": Method(
                self.disk_resize, needs={"disk": str}, takes={"size": int, "shrink": bool}
            ),
            "balloon.set": Method(self.balloon_set, needs={"size": int}),
            "balloon.stats": Method(self.balloon_stats),
            "vsock.connect": Method(self.vsock_connect, needs={"port": int}),
        }
        return {
            name: method._replace(run=partial(self._between_starts, method.run))
            for name, method in methods.items()
        }

    def _between_starts(self, run: Callable[..., Any], **params: Any) -> Any:
        """Not while a guest that has rebooted is put together anew."""
        with self._machine.steady:
            return run(**params)

    def status(self) -> dict[str, Any]:
        """What the machine is and whether it runs."""
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
                for disk, device in zip(spec.disks, devices, strict=False)
                if isinstance(device, BlockDevice)
            ],
            "devices": [device.name for device in devices],
        }

    def stats(self) -> dict[str, Any]:
        """What was counted since the start; docs/watching.md has the names. Raises HostError."""
        console_bytes = self._watch.console_left_out()
        left_out = {"console_bytes": console_bytes, "messages": log.left_out()}
        return {**self._counted().read(), "left_out": left_out}

    def metrics(self) -> dict[str, Any]:
        """The same as text in Prometheus' format. Raises HostError."""
        from pyvmm.monitor.metrics import CONTENT_TYPE, as_text

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

    def console(self, history: bool = True, input: bool = True) -> Upgrade:
        """Make the connection one end of the console; see Watch."""
        return self._watch.console(history, input)

    def events(self, history: bool = True) -> Upgrade:
        """Make the connection one that gets the events, a line of JSON each; see Events."""
        return self._watch.events.listen(history)

    def balloon_set(self, size: int) -> dict[str, Any]:
        """Have the balloon want `size` bytes. Raises ConfigError if there is none, or no such
        size."""
        self._balloon().set_target(size, self._prepared.spec.memory)
        return {"size": self._balloon().target}

    def balloon_stats(self) -> dict[str, Any]:
        """What is wanted, what the guest has given, and what its kernel says of its memory."""
        balloon = self._balloon()
        statistics = dict(balloon.statistics())
        resident = self._machine.parts.prepared.memory.resident
        return {**balloon.stats(), "resident": resident, "memory": statistics}

    def _balloon(self) -> BalloonDevice:
        from pyvmm.virtio.balloon.device import BalloonDevice

        for device in self._prepared.devices:
            if isinstance(device, BalloonDevice):
                return device
        raise ConfigError("the VM has no balloon", cure="run it with --balloon")

    def vsock_connect(self, port: int) -> Upgrade:
        """Make the connection one to a port of the guest. Raises ConfigError if there is no such
        port, or no socket device; ControlError as long as the guest has no driver for it, or the VM
        is paused."""
        if not 0 <= port < 1 << 32:
            raise ConfigError(f"there is no port {port}", cure="use 0 to 4294967295")
        device = self._vsock()
        if self._machine.pauser.paused:
            raise ControlError(PAUSED, f"{self._prepared.spec.name} is paused")
        if not device.has_driver:
            raise ControlError(NOT_READY, "the guest has no driver for its vsock device yet")

        def hand_over(connection: Socket, received: bytes) -> None:
            # What a client says before it has seen OK would be lost: nobody shall rely on it.
            if received:
                connection.close()
                return
            try:
                device.call(connection, port)
            except HostError:  # the driver has just gone
                connection.close()

        return Upgrade({}, hand_over)

    def _vsock(self) -> VsockDevice:
        from pyvmm.virtio.vsock.device import VsockDevice

        for device in self._prepared.devices:
            if isinstance(device, VsockDevice):
                return device
        raise ConfigError("the VM has no vsock device", cure="run it with --agent, or --vsock")

    def disk_resize(
        self, disk: str, size: int | None = None, shrink: bool = False
    ) -> dict[str, Any]:
        """Give a disk `size` bytes, its image file with it, or take over those it has by now.

        Raises ConfigError for what would lose data without `shrink`, or cannot be had.
        """
        spec, device = self._disk(disk)
        self._check_resize(spec, device, size, shrink)
        return {"size": device.resize(size, self._change_outside(spec, device, size))}

    def _change_outside(
        self, spec: DiskSpec, device: BlockDevice, size: int | None
    ) -> Callable[[], None] | None:
        """What somebody else has to do for it, if anything."""
        outside = self._resize_outside
        if outside is None:
            return None
        if not spec.copies_on_write:
            return partial(outside, spec.path, size)
        if size is None or size < device.size:
            return None  # its file stays as long as it is, but for holes
        return partial(outside, spec.overlay or spec.scratch or "", device.storage_for(size))

    def _check_resize(
        self, spec: DiskSpec, device: BlockDevice, size: int | None, shrink: bool
    ) -> None:
        if not device.can_resize:
            what, cure = _FIXED.get(spec.kind, _FIXED["python"])
            raise ConfigError(
                f"disk {spec.id} {what}, and keeps its size", cure=cure.format(path=spec.path)
            )
        if size is None:
            if spec.copies_on_write:
                raise ConfigError(
                    f"disk {spec.id} copies on write: its size is not its base's",
                    cure="say which size it shall have",
                )
            return
        if not 0 < size < 1 << 63 or size % SECTOR:
            raise ConfigError(
                f"no disk has {size} bytes", cure=f"use a multiple of {SECTOR}, above 0"
            )
        if spec.read_only:
            raise ConfigError(
                f"disk {spec.id} is read-only",
                cure="resize its image elsewhere, then the disk, without a size",
            )
        if size < device.size and not shrink:
            raise ConfigError(
                f"disk {spec.id} has {device.size} bytes; all behind {size} would be lost",
                cure="if the guest has made room, add --shrink",
            )
        if size < device.size and self._machine.pauser.paused:
            raise ConfigError("a paused VM's disk cannot shrink", cure="resume it first")

    def _disk(self, name: str) -> tuple[DiskSpec, BlockDevice]:
        disks = zip(self._prepared.spec.disks, self._prepared.devices, strict=False)
        for spec, device in disks:
            if spec.id == name and isinstance(device, BlockDevice):
                return spec, device
        known = ", ".join(spec.id for spec in self._prepared.spec.disks) or "none"
        raise ConfigError(f"there is no disk {name!r:.100}", cure=f"there are: {known}")
