"""The requests to a VM's monitor, by the VM's control socket: for `VM`, and for the commands
`pyvmm pause`, `resume`, `disk`, `net`, `rng`, `share` and `balloon`."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from pyvmm.control.client import patiently
from pyvmm.control.protocol import NEEDS_FILES, ControlError
from pyvmm.spec.sizes import parse_memory

if TYPE_CHECKING:
    from pyvmm.kinds import net, rng, share
    from pyvmm.kinds.interface import Path, Table
    from pyvmm.spec.vm import DiskSpec

PATIENCE = 60.0  # seconds for an answer; a disk that shrinks waits for its requests
_MOUNT_SECONDS = 150.0  # for an answer, once a guest has mounted what it found
GIVE_UP_SECONDS = 10.0  # that a guest has to give up a device


class InMonitor(ABC):
    """The part of `VM` that its monitor answers."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The VM's name."""

    @abstractmethod
    def _ask(self, method: str, *, patience: float = PATIENCE, **params: Any) -> dict[str, Any]:
        """The monitor's answer to the control socket's `method`, which may take so many seconds."""

    def status(self) -> dict[str, Any]:
        """The VM and its state: the control socket's `status`."""
        return self._ask("status")

    def stats(self) -> dict[str, Any]:
        """Its statistics: the control socket's `stats`."""
        return self._ask("stats")

    def pause(self) -> None:
        """Have it stand still: no vCPU runs, no device works, until `resume`."""
        self._ask("pause")

    def resume(self) -> None:
        """Have it go on."""
        self._ask("resume")

    def snapshot(
        self, name: str, *, stop: bool = False, track: bool = False, diff_of: str | None = None
    ) -> float:
        """Save it as the snapshot `name`, from which `VM.restore` goes on; the seconds for which it
        stood still. With `stop` it ends then.

        With `track` it keeps note of what changes from then on: a later one that is `diff_of` this
        one, by name, has only that, and is kept note from as well. So can be one of a VM that was
        restored, of the snapshot that it began with.

        Raises ConfigError for what cannot be saved, and for a name that is taken.
        """
        from pyvmm.monitor import snapshots

        return snapshots.take(self.name, name, stop=stop, track=track, diff_of=diff_of).paused

    def learn(self, snapshot: str) -> int:
        """Note beside the snapshot of that name, which it was restored from, what it has used of
        its memory until now; the number of bytes. The next VMs that go on from there have that read
        ahead. Raises ConfigError for a VM that was not restored from it."""
        from pyvmm.monitor import working_set

        return working_set.learn(self.name, snapshot)

    def resize_disk(self, disk: str, size: int | str | None = None, *, shrink: bool = False) -> int:
        """Give the disk called `disk` ("disk0", or its id) `size` bytes, and its image too; without
        a size it takes over what its image has by now. Its size. Raises ControlError for what
        cannot be had."""
        params: dict[str, Any] = {} if size is None else {"size": _bytes(size)}
        if shrink:
            params["shrink"] = True
        return int(self._ask("disk.resize", disk=disk, **params)["size"])

    # --- devices that come and go: docs/hotplug.md ------------------------------------------------

    def add_disk(self, disk: DiskSpec | Path | Table) -> str:
        """Plug in a disk, described as for `pyvmm.VM`; its id. The guest finds it by itself.

        Raises ConfigError for what is wrong with the description, ControlError for what cannot be
        had: a VM without a PCI bus, an image that another VM writes.
        """
        return self._add("disk", disk)

    def add_net(self, net: net.Spec | str | Table = "user") -> str:
        """Plug in a network card; likewise."""
        return self._add("net", net)

    def add_rng(self, rng: rng.Spec | bool | str | Table = True) -> str:
        """Plug in a random number generator; likewise."""
        return self._add("rng", rng)

    def share(self, share: share.Spec | Path | Table) -> str:
        """Share a directory with the guest, described as for `pyvmm.VM`; likewise. With a
        mountpoint the guest's agent mounts it there, and ControlError is also raised if it does
        not, though it is plugged in then."""
        value = os.fspath(share) if isinstance(share, os.PathLike) else share
        return self._add("share", value, patience=_MOUNT_SECONDS)

    def remove_disk(
        self, disk: str, *, timeout: float = GIVE_UP_SECONDS, force: bool = False
    ) -> None:
        """Have the guest give up the disk called `disk`; nothing of it is left then.

        Raises ControlError if the guest says by its agent that it uses the disk, or has not given
        it up within `timeout` seconds. With `force` the guest is not asked what for, and the disk
        goes when the time is over: what is on its way to it may be lost.
        """
        self._remove("disk", disk, timeout, force)

    def remove_net(
        self, net: str, *, timeout: float = GIVE_UP_SECONDS, force: bool = False
    ) -> None:
        """Have the guest give up the network card called `net`; likewise."""
        self._remove("net", net, timeout, force)

    def remove_rng(
        self, rng: str, *, timeout: float = GIVE_UP_SECONDS, force: bool = False
    ) -> None:
        """Have the guest give up the random number generator called `rng`; likewise."""
        self._remove("rng", rng, timeout, force)

    def unshare(self, share: str, *, timeout: float = GIVE_UP_SECONDS, force: bool = False) -> None:
        """Have the guest give up the shared directory called `share`; likewise. One that is mounted
        is in use."""
        self._remove("share", share, timeout, force)

    def _add(self, kind: str, value: Any, *, patience: float = PATIENCE) -> str:
        from pyvmm.kinds import registry
        from pyvmm.monitor import given
        from pyvmm.spec import tables

        [spec] = registry.read(kind, value)
        # The monitor may have another current directory.
        spec = registry.with_paths(spec, os.path.abspath)

        def ask(**params: Any) -> str:
            return str(self._ask(f"{kind}.add", patience=patience, **params)["id"])

        try:
            return ask(table=tables.write(spec))
        except ControlError as error:
            if error.code != NEEDS_FILES or not registry.hands_over(kind):
                raise
        id = str(registry.add_opened(spec, ask))  # what it cannot open we can
        given.add_to(self.name, spec)
        return id

    def _remove(self, kind: str, id: str, timeout: float, force: bool) -> None:
        params: dict[str, Any] = {"timeout_ms": round(1000 * timeout)}
        if force:
            params["force"] = True
        self._ask(f"{kind}.remove", patience=timeout + PATIENCE, id=id, **params)

    def wait_for_driver(
        self, kind: str, device: str, *, timeout: float = GIVE_UP_SECONDS
    ) -> str | None:
        """Wait until a driver of the guest serves the device called `device`, of the `kind` "disk",
        "net", "rng" or "share"; None then.

        Otherwise it is what is known of the reason, perhaps nothing (""): for a guest that is
        paused or starts still at once, for others after `timeout` seconds. Raises ControlError if
        there is no such device.
        """
        found = self._ask(
            f"{kind}.wait",
            patience=timeout + PATIENCE,
            id=device,
            timeout_ms=round(1000 * timeout),
        )
        return None if found["taken"] else str(found["why"])

    @property
    def balloon(self) -> BalloonControl:
        """The balloon of a VM that has one."""
        return BalloonControl(self)


class ByName(InMonitor):
    """The running VM of that name, for one question or two."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    def _ask(self, method: str, *, patience: float = PATIENCE, **params: Any) -> dict[str, Any]:
        return patiently(
            self._name, lambda client: client.call(method, patience=patience, **params)
        )


class BalloonControl:
    """The memory that a guest is asked to give back."""

    def __init__(self, vm: InMonitor) -> None:
        """`VM.balloon` is one."""
        self._vm = vm

    def set(self, size: int | str) -> None:
        """Want `size` bytes of the guest's memory; 0 gives it all back. Returns at once."""
        self._vm._ask("balloon.set", size=_bytes(size))

    def stats(self) -> dict[str, Any]:
        """The sizes that are wanted (`target`), given (`actual`) and more: the control socket's
        `balloon.stats`."""
        return self._vm._ask("balloon.stats")


def _bytes(size: int | str) -> int:
    return parse_memory(size, option="SIZE") if isinstance(size, str) else size
