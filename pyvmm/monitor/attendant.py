"""Watches a guest's console for what goes wrong, and says it with the cure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pyvmm.boot.diagnosis import PANIC, ConsoleWatcher, Finding
from pyvmm.host import log
from pyvmm.machine.builder import GoesOn, Prepared
from pyvmm.transport.base import Transport
from pyvmm.virtio import constants

if TYPE_CHECKING:
    from pyvmm.boot.partitions import Table
    from pyvmm.virtio.device import VirtioDevice

_SILENCE_SECONDS = 20.0


class Attendant:
    """Watches a guest's console for what goes wrong, and says each thing once."""

    def __init__(self, name: str, prepared: Prepared) -> None:
        self._name = name
        self._cmdline = prepared.entry.cmdline
        # A guest that only serves its agent has nothing to say on a console, and one that goes on
        # from a snapshot may have said it all before.
        serves_agent = "pyvmm.exec=agent" in self._cmdline.split()
        self._is_silent = serves_agent or isinstance(prepared.entry, GoesOn)
        # The serial port is always there; both are shown on the terminal.
        self.console = prepared.console  # where the keys go
        self._consoles = tuple(dict.fromkeys((prepared.board.console, self.console)))
        self._early = prepared.board.early_console
        self._transports: Sequence[Transport] = ()
        self._devices = prepared.devices
        transport = "pci" if prepared.spec.transport == "pci" else "mmio"
        self.watcher = ConsoleWatcher(self._disk_ready, self._partition_tables, transport)
        self.on_finding: Callable[[Finding], None] | None = None
        self._passed_on = 0  # findings
        self._said: set[str] = set()
        self._start = time.monotonic()

    def attend(self, transports: Sequence[Transport]) -> None:
        """The guest starts; take the devices' word for whether a driver has found them."""
        self._transports = transports
        self._start = time.monotonic()

    def exchange(self, devices: tuple[VirtioDevice, ...], transports: Sequence[Transport]) -> None:
        """The machine has these from now on."""
        self._devices, self._transports = devices, transports

    @property
    def guest_came_up(self) -> bool:
        """True if a driver of the guest has brought up a device since it started."""
        return any(t.negotiation.activations for t in self._transports)

    def observe(self, data: bytes) -> None:
        """The guest has written `data` to its console."""
        self.watcher.feed(data)
        findings = self.watcher.findings
        while self.on_finding is not None and self._passed_on < len(findings):
            self._passed_on += 1
            self.on_finding(findings[self._passed_on - 1])

    def look(self) -> None:
        """Say what is new since the last look: the most telling finding, or that all is silent; and
        let the devices look."""
        for device in self._devices:
            device.look()
        waited = time.monotonic() - self._start
        found = self.watcher.diagnosis
        if found is None and not self._is_silent:
            found = self.watcher.silence_hint(
                self._cmdline,
                waited,
                patience=_SILENCE_SECONDS,
                consoles=self._consoles,
                early=self._early,
            )
        if found is not None and found.kind not in self._said:
            self._said.add(found.kind)
            more = {"finding": found.kind, "message": found.message, "cure": found.cure}
            log.to_stderr(log.Line(f"{self._name}: {found}", level=log.ERROR, more=more))

    def said(self, kind: str) -> bool:
        """True if a finding of that kind was told to the user."""
        return kind in self._said

    def saw_panic(self) -> bool:
        """True if the guest's kernel panicked."""
        return any(finding.kind == PANIC for finding in self.watcher.findings)

    def silent_reset(self) -> Finding | None:
        """The line for a guest that has reset itself, if it has said nothing."""
        if self._is_silent:
            return None
        return self.watcher.silent_reset(self._cmdline, consoles=self._consoles, early=self._early)

    def _partition_tables(self) -> list[tuple[str, Table]]:
        from pyvmm.boot.partitions import read_disk
        from pyvmm.virtio.blk.device import BlockDevice  # loaded, if there is one

        disks = [device for device in self._devices if isinstance(device, BlockDevice)]
        found = []
        for index, disk in enumerate(disks):
            try:
                table = read_disk(disk.peek, disk.size, disk.block_size)
            except Exception:  # a class of the user's may raise anything; this is only a hint
                continue
            if table is not None:
                found.append((f"/dev/vd{chr(ord('a') + index)}", table))
        return found

    def _disk_ready(self) -> bool:
        return any(
            t.negotiation.read_status() & constants.VIRTIO_CONFIG_S_DRIVER_OK
            for t in self._transports
        )
