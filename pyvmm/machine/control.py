"""What a running machine answers on its control socket: a method a line, see `methods`."""

from __future__ import annotations

import time
from typing import Any

from pyvmm import __version__
from pyvmm.control.protocol import Method
from pyvmm.errors import ConfigError
from pyvmm.machine.builder import Prepared
from pyvmm.machine.machine import Machine
from pyvmm.machine.outcome import Ending, Outcome
from pyvmm.virtio.blk.device import BlockDevice


class MachineControl:
    """The methods of one machine, in plain data. They are called in the control server's thread."""

    def __init__(self, machine: Machine, prepared: Prepared) -> None:
        self._machine = machine
        self._prepared = prepared
        self._start = time.monotonic()

    def methods(self) -> dict[str, Method]:
        """By the names that a request uses. docs/control-socket.md lists them, and a test compares
        it with this."""
        return {
            "status": Method(self.status),
            "stats": Method(self.stats),
            "stop": Method(self.stop),
            "quit": Method(self.quit),
            "pause": Method(self.pause),
            "resume": Method(self.resume),
        }

    def status(self) -> dict[str, Any]:
        """What the machine is and whether it runs."""
        spec = self._prepared.spec
        devices = self._prepared.devices
        return {
            "name": spec.name,
            "version": __version__,
            "state": "paused" if self._machine.pauser.paused else "running",
            "uptime_seconds": round(time.monotonic() - self._start, 3),
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
        """The counters of each device that has some."""
        counted = {device.name: dict(device.stats()) for device in self._prepared.devices}
        return {"devices": {name: counters for name, counters in counted.items() if counters}}

    def stop(self) -> dict[str, Any]:
        """End the run as SIGTERM would."""
        self._machine.end(Outcome(Ending.TERMINATED, "ended by pyvmm stop"))
        return {}

    def quit(self) -> dict[str, Any]:
        """End the run as Ctrl-A x would."""
        self._machine.end(Outcome(Ending.QUIT, "ended by the control socket's quit"))
        return {}

    def pause(self) -> dict[str, Any]:
        """Return when nothing moves any more. Raises ConfigError if something does not stop."""
        self._machine.pauser.pause()
        return {"state": "paused"}

    def resume(self) -> dict[str, Any]:
        """Go on."""
        self._machine.pauser.resume()
        return {"state": "running"}

    def _disk(self, name: str) -> BlockDevice:
        disks = [device for device in self._prepared.devices if isinstance(device, BlockDevice)]
        for device in disks:
            if device.name == name:
                return device
        known = ", ".join(device.name for device in disks) or "none"
        raise ConfigError(f"there is no disk {name!r:.100}", cure=f"there are: {known}")
