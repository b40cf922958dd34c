"""QEMU's command line for an emulated host."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from pyvmm.emulated_host.architecture import emulated_machine
from pyvmm.emulated_host.cache import BootFiles
from pyvmm.emulated_host.ports import SPARE_PORTS, Port
from pyvmm.emulated_host.spec import EmulatedHostSpec, HostFolder, HostImage
from pyvmm.host.qcow2 import Layer, blockdev

SECTOR = 512
QCOW2_SETS = 1000  # numbers for the files of one disk; there are fewer disks than that
PROGRAMS = "programs"  # the mount tag of another architecture's; init.sh knows it
BRIDGE = "plugs"  # behind which disks can come and go
PORTS = "ports"  # the device of the ports that each machine has
STATE_SET = 1 << 30  # a number that no disk's file has
PROCESS_NAME = "pyvmm-emulator"  # at most 15 characters


@dataclass(frozen=True)
class OpenDisk:
    """A disk as QEMU gets it: an open `fd`, `size` in bytes (whole sectors), and whether the file
    has more (`odd_tail`)."""

    fd: int
    size: int
    read_only: bool
    is_block_device: bool
    direct: bool = False
    odd_tail: bool = False


def open_disk(fd: int, read_only: bool, direct: bool = False) -> OpenDisk:
    """Describe the open file `fd`. Raises OSError."""
    size = os.lseek(fd, 0, os.SEEK_END)
    is_block_device = stat.S_ISBLK(os.fstat(fd).st_mode)
    odd = size % SECTOR
    return OpenDisk(fd, size - odd, read_only, is_block_device, direct, bool(odd))


@dataclass(frozen=True)
class Qcow2Disk:
    """A disk in a format that QEMU knows: the open images of which it consists."""

    layers: tuple[Layer, ...]
    direct: bool


def machine_arguments(
    spec: EmulatedHostSpec, *, console_fd: int, qmp_fd: int, ports: Sequence[Port]
) -> list[str]:
    """The arguments for what every run of such a machine has, without the program: what a saved
    state of it is a state of. The descriptors in them must be inherited."""
    machine = emulated_machine(spec.image.architecture)
    return [
        *machine.machine_arguments(spec.cpus, spec.memory_mib),
        *("-nodefaults", "-no-user-config", "-no-reboot"),
        # What ps shows; the program's file is the dynamic loader.
        *("-name", f"pyvmm,process={PROCESS_NAME}"),
        *("-display", "none", "-monitor", "none"),
        *("-chardev", f"socket,id=console,fd={console_fd}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=qmp,fd={qmp_fd}", "-mon", "chardev=qmp,mode=control"),
        # The first virtio device, as the ports' names inside begin with its number: /dev/vport0p1.
        *_port_arguments(PORTS, [(port.number, port.name, port.theirs.fileno()) for port in ports]),
        *_root_arguments(),
        *_folder_arguments(_program_folders(spec.image)),
        *("-device", f"pcie-pci-bridge,id={BRIDGE}"),
    ]


def run_arguments(
    spec: EmulatedHostSpec,
    *,
    ports: Sequence[Port],
    disks: Sequence[OpenDisk | Qcow2Disk],
    stream_fds: Sequence[int] = (),
) -> list[str]:
    """The arguments, to follow the machine's, for what one run has beside that. In a machine that
    goes on from a saved state the kernel finds it when init.sh asks it to look again."""
    return [
        *_run_port_arguments(ports, stream_fds),
        *_disk_arguments(disks),
        *_folder_arguments(spec.folders),
    ]


def boot_arguments(spec: EmulatedHostSpec, boot: BootFiles, tsc_khz: int | None) -> list[str]:
    """The arguments with which the machine boots."""
    machine = emulated_machine(spec.image.architecture)
    return [
        *("-kernel", boot.kernel),
        *("-initrd", boot.initramfs),
        *("-append", machine.kernel_parameters(tsc_khz)),
    ]


def restore_arguments(state_fd: int) -> list[str]:
    """The arguments with which the machine goes on from the state in an open file."""
    name = file_set(STATE_SET)
    return ["-add-fd", f"fd={state_fd},set={STATE_SET}", "-incoming", f"file:{name}"]


def file_set(number: int) -> str:
    """What QEMU opens for a descriptor that it has been given."""
    return f"/dev/fdset/{number}"


def _root_arguments() -> list[str]:
    # multidevs=remap: the machine's mounts below / are seen too, with inode numbers of their own.
    fsdev = "local,id=machine,path=/,security_model=none,readonly=on,multidevs=remap"
    return ["-fsdev", fsdev, "-device", "virtio-9p-pci,fsdev=machine,mount_tag=machine"]


def _program_folders(image: HostImage) -> list[HostFolder]:
    return [HostFolder(PROGRAMS, image.programs, read_only=True)] if image.is_foreign else []


def _folder_arguments(folders: Sequence[HostFolder]) -> list[str]:
    """As root QEMU keeps owners as they are inside; as another user all is that user's."""
    arguments = []
    for folder in folders:
        path = folder.path.replace(",", ",,")
        mode = "on" if folder.read_only else "off"
        fsdev = f"local,id={folder.tag},path={path},security_model=none,readonly={mode}"
        device = f"virtio-9p-pci,fsdev={folder.tag},mount_tag={folder.tag}"
        arguments += ["-fsdev", f"{fsdev},multidevs=remap", "-device", device]
    return arguments


def _port_arguments(device: str, rows: Sequence[tuple[int, str, int]]) -> list[str]:
    # One more than the numbers of ports, which begin at 1, and those that come later.
    most = len(rows) + 1 + (SPARE_PORTS if device == PORTS else 0)
    arguments = ["-device", f"virtio-serial-pci,id={device},max_ports={most}"]
    for number, name, fd in rows:
        arguments += [
            *("-chardev", f"socket,id={name},fd={fd}"),
            *("-device", f"virtserialport,bus={device}.0,nr={number},chardev={name}"),
        ]
    return arguments


def _run_port_arguments(ports: Sequence[Port], stream_fds: Sequence[int]) -> list[str]:
    if not ports:
        return []
    *sinks, gate = ports
    first = gate.number - len(stream_fds)
    rows = [(port.number, port.name, port.theirs.fileno()) for port in sinks]
    rows += [(first + n, f"stream{n}", fd) for n, fd in enumerate(stream_fds)]
    rows.append((gate.number, gate.name, gate.theirs.fileno()))
    # The first of a run's devices, for the same reason: /dev/vport2p1.
    return _port_arguments("run", rows)


def _disk_arguments(disks: Sequence[OpenDisk | Qcow2Disk]) -> list[str]:
    arguments = []
    for index, disk in enumerate(disks):
        if isinstance(disk, Qcow2Disk):
            arguments += _qcow2_nodes(index, disk)
        else:
            arguments += _raw_nodes(index, disk)
        device = disk_device(f"disk{index}", f"pyvmm{index}")
        driver, *options = device.items()
        arguments += ["-device", ",".join((driver[1], *(f"{key}={word}" for key, word in options)))]
    return arguments


def disk_device(node: str, serial: str) -> dict[str, str]:
    """The device in front of a node, as QMP's device_add has it."""
    # Else QEMU stops its machine when the file system is full, and nobody is there to let it go on.
    on_error = {"werror": "report", "rerror": "report"}
    return {"driver": "virtio-blk-pci", "drive": node, "serial": serial, **on_error}


def _raw_nodes(index: int, disk: OpenDisk) -> list[str]:
    mode = "on" if disk.read_only else "off"
    direct = "on" if disk.direct else "off"
    driver = "host_device" if disk.is_block_device else "file"
    # The one who hands us the disk has locked it; QEMU's own locks would collide with that.
    # A size cuts off an odd tail, which QEMU would otherwise round up to a whole sector; such a
    # disk cannot be resized later.
    size = f"size={disk.size}," if disk.odd_tail else ""
    file = (
        f"driver={driver},node-name=file{index},filename={file_set(index)},locking=off,"
        f"read-only={mode},auto-read-only=off,discard=unmap,cache.direct={direct}"
    )
    raw = (
        f"driver=raw,node-name=disk{index},file=file{index},{size}"
        f"read-only={mode},discard=unmap,cache.direct={direct}"
    )
    return ["-add-fd", f"fd={disk.fd},set={index}", "-blockdev", file, "-blockdev", raw]


def _qcow2_nodes(index: int, disk: Qcow2Disk) -> list[str]:
    files = [file for layer in disk.layers for file in layer.files]
    # Sets that no other disk has.
    sets = {file.fd: number for number, file in enumerate(files, QCOW2_SETS * (index + 1))}
    given = [("-add-fd", f"fd={fd},set={number}") for fd, number in sets.items()]
    node = blockdev(disk.layers, f"disk{index}", lambda fd: file_set(sets[fd]), direct=disk.direct)
    return [*(word for pair in given for word in pair), "-blockdev", json.dumps(node)]
