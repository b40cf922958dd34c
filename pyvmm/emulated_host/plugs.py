"""Disks and streams that come to an emulated host while it runs, and go, by QEMU's own hot-plug.

Its disks sit behind a bridge of their own, whose slots QEMU's ACPI serves, or where the machine has
none the bridge's own hot-plug controller (SHPC); streams are ports of the virtio-serial device that
has the others.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import time
from contextlib import ExitStack, suppress

from pyvmm.emulated_host.disks import DiskService
from pyvmm.emulated_host.ports import FIRST_SPARE, SPARE_PORTS
from pyvmm.emulated_host.qemu import BRIDGE, PORTS, QCOW2_SETS, disk_device, file_set, open_disk
from pyvmm.emulated_host.qmp import Qmp
from pyvmm.emulated_host.spec import (
    EmulatedHostError,
    EmulatedHostSpec,
    HostDisk,
    HostStream,
)
from pyvmm.errors import HostError
from pyvmm.host.qcow2 import blockdev

_FIRST_DISK = 100  # numbers that no disk from the start has
_SLOTS = range(1, 32)  # of the bridge's SHPC, which has no slot 0
_PATIENCE = 20.0  # seconds for the emulated host's kernel to let a disk go
_STEP = 0.02


class Plugger:
    """Does so by QEMU's `qmp`."""

    def __init__(self, spec: EmulatedHostSpec, qmp: Qmp, disks: DiskService) -> None:
        self._qmp = qmp
        self._disks = disks
        self._numbers = itertools.count(_FIRST_DISK)
        # QEMU chooses one of x86's, which are ACPI's; the first that it chooses is 0.
        self._free_slots = list(_SLOTS) if spec.image.is_foreign else None
        self._free_ports = list(range(FIRST_SPARE, FIRST_SPARE + SPARE_PORTS))

    def plug_disk(self, disk: HostDisk, path: str, closing: ExitStack) -> str:
        """Make `disk` a block device inside, to be known there by `path`; its serial number.
        Raises EmulatedHostError, HostError."""
        number = next(self._numbers)
        node = f"disk{number}"
        with ExitStack() as undo:
            place = self._take_slot(undo)
            if disk.layers:
                self._add_layers(disk, number, undo)
            else:
                self._add_file(disk, number, undo)
            undo.callback(self._drop_node, node)
            name, serial = f"plug{number}", f"pyvmm{number}"
            device: dict[str, object] = {**disk_device(node, serial), "id": name, "bus": BRIDGE}
            self._qmp.execute("device_add", **device, **place)
            undo.callback(self._drop_device, name)
            self._disks.add(path, number, disk)
            undo.callback(self._disks.drop, path)
            closing.enter_context(undo.pop_all())
        return serial

    def _take_slot(self, undo: ExitStack) -> dict[str, str]:
        if self._free_slots is None:
            return {}
        if not self._free_slots:
            raise HostError(errno.ENOSPC, "disks into the emulated KVM host")
        slot = self._free_slots.pop(0)
        undo.callback(self._free_slots.append, slot)
        return {"addr": f"{slot:#x}"}

    def _add_file(self, disk: HostDisk, number: int, undo: ExitStack) -> None:
        assert disk.fd is not None
        opened = open_disk(disk.fd, disk.read_only, disk.direct)
        self._give(disk.fd, number, undo)
        common = {
            "read-only": disk.read_only,
            "discard": "unmap",
            "cache": {"direct": disk.direct},
        }
        block = stat.S_ISBLK(os.fstat(disk.fd).st_mode)
        file = {
            "driver": "host_device" if block else "file",
            "node-name": f"file{number}",
            "filename": file_set(number),
            "locking": "off",
            "auto-read-only": False,
            **common,
        }
        raw = {"driver": "raw", "node-name": f"disk{number}", "file": f"file{number}", **common}
        if opened.odd_tail:
            raw["size"] = opened.size
        self._qmp.execute("blockdev-add", None, **file)
        undo.callback(self._drop_node, f"file{number}")
        self._qmp.execute("blockdev-add", None, **raw)

    def _add_layers(self, disk: HostDisk, number: int, undo: ExitStack) -> None:
        files = [file for layer in disk.layers for file in layer.files]
        sets = {file.fd: QCOW2_SETS * (number + 1) + n for n, file in enumerate(files)}
        for fd, number_of_set in sets.items():
            self._give(fd, number_of_set, undo)
        node = blockdev(
            disk.layers, f"disk{number}", lambda fd: file_set(sets[fd]), direct=disk.direct
        )
        self._qmp.execute("blockdev-add", **node)

    def _give(self, fd: int, number: int, undo: ExitStack) -> None:
        self._qmp.execute("add-fd", fd, **{"fdset-id": number})
        undo.callback(self._quietly, "remove-fd", **{"fdset-id": number})

    def _drop_device(self, name: str) -> None:
        self._quietly("device_del", id=name)

    def _drop_node(self, node: str) -> None:
        """Once the kernel inside has let go of the device in front of it."""
        give_up_at = time.monotonic() + _PATIENCE
        while True:
            try:
                self._qmp.execute("blockdev-del", **{"node-name": node})
                return
            except EmulatedHostError as error:
                if "in use" not in str(error) or time.monotonic() > give_up_at:
                    return  # QEMU has ended, or will take it along
            time.sleep(_STEP)

    def _quietly(self, command: str, **arguments: object) -> None:
        with suppress(EmulatedHostError, HostError):
            self._qmp.execute(command, **arguments)

    def plug_stream(self, stream: HostStream, closing: ExitStack) -> str:
        """Make a port of `stream`; its path inside. Raises EmulatedHostError, HostError."""
        try:
            port = self._free_ports.pop(0)
        except IndexError:
            raise HostError(errno.ENOSPC, "ports into the emulated KVM host") from None
        name = f"port{port}"
        with ExitStack() as undo:
            undo.callback(self._free_ports.append, port)
            self._qmp.execute("getfd", stream.fd, fdname=name)
            address = {"type": "fd", "data": {"str": name}}
            data = {"addr": address, "server": False}
            backend = {"type": "socket", "data": data}
            self._qmp.execute("chardev-add", id=name, backend=backend)
            undo.callback(self._quietly, "chardev-remove", id=name)
            device = {"driver": "virtserialport", "id": f"plug-{name}", "chardev": name}
            self._qmp.execute("device_add", None, **device, bus=f"{PORTS}.0", nr=port)
            undo.callback(self._quietly, "device_del", id=f"plug-{name}")
            closing.enter_context(undo.pop_all())
        return f"/dev/vport0p{port}"
