"""The devices of a VM, opened: each with what it has of the host, which is given back when the
device goes or the run ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

from pyvmm.host.syscalls import Closable
from pyvmm.kinds import registry
from pyvmm.kinds.interface import Context, Spec
from pyvmm.machine.outcome import Alarm

if TYPE_CHECKING:
    from pyvmm.kinds.interface import MapFile
    from pyvmm.machine.trace import Hook
    from pyvmm.virtio.device import VirtioDevice


class OpenDevices(Closable):
    """Opens them, under names that no two share. Any thread may call it."""

    def __init__(
        self,
        vm_name: str,
        trace: Hook | None,
        alarm: Alarm,
        map_file: MapFile,
        poll_ns: int = 0,
    ) -> None:
        """The context that they are opened with: see pyvmm.kinds.interface.Context."""
        self._context = vm_name, trace, alarm, map_file, poll_ns
        self._lock = Lock()
        self._closing: dict[VirtioDevice, ExitStack] = {}
        # In a box what has a name is opened, and its programs are ended, elsewhere.
        self.run_by: Callable[[Callable[[], Any]], Any] = lambda job: job()
        self.opens_nothing: Callable[[], bool] = lambda: False  # not even elsewhere

    def open(self, spec: Spec) -> VirtioDevice:
        """Raises ConfigError for what the user can mend; nothing is left open then."""
        name, trace, alarm, map_file, poll_ns = self._context
        with ExitStack() as closing:
            context = Context(name, trace, closing, alarm, map_file, poll_ns)
            device: VirtioDevice = self.run_by(partial(registry.open_device, spec, context))
            with self._lock:
                taken = {other.name for other in self._closing}
                usual, number = device.name, 2
                while device.name in taken:
                    device.name = f"{usual}-{number}"
                    number += 1
                self._closing[device] = closing.pop_all()
        return device

    def close_one(self, device: VirtioDevice) -> None:
        """Give back what `device` has; nothing may use it any more."""
        with self._lock:
            closing = self._closing.pop(device, None)
        if closing is not None:
            self.run_by(closing.close)

    def close(self) -> None:
        closing = ExitStack()  # the last first, and all of them whatever one raises
        for stack in self._closing.values():
            closing.callback(stack.close)
        self._closing = {}
        self.run_by(closing.close)
