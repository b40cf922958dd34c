"""The control socket's methods for devices that come and go: `disk.add`, `disk.wait`, `disk.remove`
and those of the other kinds (docs/control-socket.md)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, Any

from pyvmm.control.protocol import BAD_REQUEST, ControlError, Later, Method, executes, watches
from pyvmm.errors import ConfigError
from pyvmm.host.handed import Descriptors
from pyvmm.kinds import registry

if TYPE_CHECKING:
    from pyvmm.monitor.hotplug import Hotplug

PATIENCE = 10.0  # seconds for a guest to give a device up, unless somebody says otherwise
MOST_SECONDS = 24 * 3600.0


def methods(hotplug: Callable[[], Hotplug]) -> dict[str, Method]:
    """The methods of the control socket, by name."""
    found = {}
    for kind in registry.come_and_go():
        takes: dict[str, type] = {"device": str, "table": dict, "files": list}
        run: Callable[..., Later] = partial(_add_later, hotplug, kind)
        found[f"{kind}.add"] = Method(run, takes=takes, right=executes, takes_descriptors=True)
        takes = {"timeout_ms": int, "force": bool}
        run = partial(_remove_later, hotplug, kind)
        found[f"{kind}.remove"] = Method(run, needs={"id": str}, takes=takes)
        found[f"{kind}.wait"] = Method(
            partial(_wait_later, hotplug, kind),
            needs={"id": str},
            takes={"timeout_ms": int},
            right=watches,
        )
    return found


def _add_later(
    hotplug: Callable[[], Hotplug],
    kind: str,
    device: str | None = None,
    table: dict[str, Any] | None = None,
    files: list[str] | None = None,
    *,
    descriptors: Descriptors,
) -> Later:
    value = table if device is None else device
    if value is None or (device is not None and table is not None):
        raise ConfigError("say what to add", cure="by device, a text, or by table")
    if files is None:
        return Later(partial(hotplug().add, kind, value))
    if not all(isinstance(name, str) for name in files) or len(set(files)) != len(files):
        raise ControlError(BAD_REQUEST, "the files are not different texts")
    if len(files) != len(descriptors.fds):
        raise ControlError(
            BAD_REQUEST, f"{len(descriptors.fds)} descriptors came for {len(files)} files"
        )
    names = dict(zip(files, descriptors.fds, strict=True))
    return Later(partial(hotplug().add_handed, kind, value, names, descriptors))


def _remove_later(
    hotplug: Callable[[], Hotplug],
    kind: str,
    id: str,
    timeout_ms: int = round(1000 * PATIENCE),
    force: bool = False,
) -> Later:
    wake = Event()
    run = partial(hotplug().remove, kind, id, _seconds(timeout_ms), force, wake)
    return Later(run, cancel=wake.set)


def _wait_later(
    hotplug: Callable[[], Hotplug], kind: str, id: str, timeout_ms: int = round(1000 * PATIENCE)
) -> Later:
    wake = Event()
    run = partial(hotplug().wait_for_driver, kind, id, _seconds(timeout_ms), wake)
    return Later(run, cancel=wake.set)


def _seconds(timeout_ms: int) -> float:
    return min(max(0, timeout_ms) / 1000, MOST_SECONDS)
