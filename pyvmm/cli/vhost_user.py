"""`pyvmm vhost-user` and `pyvmm vhost-user-blk`: devices for another monitor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from pyvmm.cli.run import parameter
from pyvmm.errors import ConfigError
from pyvmm.kinds import registry
from pyvmm.kinds.disk import parse as parse_disk

if TYPE_CHECKING:
    from pyvmm.virtio.device import VirtioDevice

MAX_QUEUES = 16
MAX_POLL = 1000  # microseconds
# A ring's size is the front end's choice, and nothing tells it of a limit: 128 with QEMU's disk and
# Cloud Hypervisor, 256 with Firecracker, 512 with SPDK, up to 1024 with QEMU's network card. No
# chain may be longer than its ring, so a disk's requests are for the smallest of these.
MAX_QUEUE_SIZE = 1024
SEG_MAX = 126  # and header and status
# The others are part of a machine: its terminal, its memory.
KINDS = ("net", "rng", "vsock", "user")

# What such a device is asked for by, where that differs from a machine's own: metavar and help.
_ROWS = {
    "net": (
        "user|tap=NAME[,OPTIONS]",
        "Serve a network card: on user-mode networking, as user,forward=8080:80, or on a tap "
        "interface; docs/networking.md has the options.",
    ),
    "rng": ("", "Serve a random number generator."),
    "rng_limit": (
        "[bps=N][,iops=N]",
        "Serve one that gives no more than this: bytes, or requests, a second; with bps-burst= and "
        "iops-burst= for how much at once.",
    ),
    "devices": (
        "FILE.py:CLASS[,KEY=VALUE]",
        "Serve a virtio device of your own: a class in a Python file, with its options.",
    ),
    "vsock": (
        "path=PATH[,cid=N]",
        "Serve a virtio-vsock device. A program connects to the socket at PATH and sends CONNECT "
        "PORT; a guest that connects to port N of CID 2 reaches the listener at PATH_N.",
    ),
}

EPILOG = """\b
Examples, with QEMU as the monitor; its guest's memory must be shared:
  pyvmm vhost-user --socket /tmp/net.sock --net user
  qemu-system-x86_64 -accel kvm -m 1G \\
    -object memory-backend-memfd,id=ram,size=1G,share=on -machine q35,memory-backend=ram \\
    -chardev socket,id=net,path=/tmp/net.sock -netdev vhost-user,id=net,chardev=net \\
    -device virtio-net-pci,netdev=net
For a guest on s390x that is -machine s390-ccw-virtio and -device virtio-net-ccw. --rng and --vsock
go with -device vhost-user-rng-pci,chardev=… and vhost-user-vsock-pci,chardev=…
"""
BLK_EPILOG = """\b
Example, with QEMU (10 or 7.2) as the monitor:
  pyvmm vhost-user-blk --socket /tmp/disk.sock --disk debian.img
  qemu-system-x86_64 -accel kvm -m 1G \\
    -object memory-backend-memfd,id=ram,size=1G,share=on -machine q35,memory-backend=ram \\
    -chardev socket,id=disk,path=/tmp/disk.sock,reconnect=1 -device vhost-user-blk-pci,chardev=disk
"""
SOCKET = click.option(
    "--socket",
    "--socket-path",
    "path",
    metavar="PATH",
    required=True,
    help="Unix socket to listen at. One front end is served at a time; another may follow.",
)
DEBUG = click.option("--debug", is_flag=True, help="Show a traceback when pyvmm itself fails.")


def _devices(command: Callable[..., int]) -> Callable[..., int]:
    """`command` with the options that ask for devices, from their rows."""
    for row in reversed(registry.in_order_of_help()):
        if _kind(row.stands_for or row.name) and row.name != "agent":
            metavar, text = _ROWS[row.name]
            command = parameter(row._replace(metavar=metavar, help=text))(command)
    return command


def _kind(name: str) -> str:
    """The kind of which the option called `name` asks for a device; "" for one not served here."""
    return next((kind for kind in KINDS if registry.KINDS[kind][0] == name), "")


@click.command("vhost-user", epilog=EPILOG)
@SOCKET
@_devices
@DEBUG
def vhost_user(path: str, debug: bool, **options: Any) -> int:
    """Serve a device to QEMU, Cloud Hypervisor or another monitor over vhost-user.

    Give one of --net, --rng, --rng-limit, --device and --vsock path=PATH, once: the device is the
    one that `pyvmm run` has with that option. Each front end finds it as new. For disks there is
    `pyvmm vhost-user-blk`. Ends on SIGTERM or Ctrl-C.
    """
    from pyvmm.transport.vhost_user import serve_each

    spec = _spec(options)

    @contextmanager
    def opened() -> Iterator[VirtioDevice]:
        from pyvmm.kinds.interface import Context

        with ExitStack() as closing:
            device = registry.open_device(spec, Context("", None, closing))
            device.queue_sizes = (MAX_QUEUE_SIZE,) * len(device.queue_sizes)
            yield device

    serve_each(opened, path)
    return 0


def _spec(options: dict[str, Any]) -> Any:
    """The specification that the options ask for. Raises ConfigError, also for a number of devices
    other than one."""
    from pyvmm.spec.vm import VmSpec

    rows = {row.name: row for row in registry.options()}
    found = []
    for name, value in options.items():
        row = rows[name]
        if value is None or value == row.typed_default:
            continue
        kind = _kind(row.stands_for or name)
        found += registry.check(kind, registry.read(kind, value), VmSpec(kernel=""))
    if len(found) != 1:
        flags = [rows[name].flag for name in options]
        many = f"{len(found)} devices at one socket" if found else "no device for the socket"
        raise ConfigError(many, cure=f"give one of {', '.join(flags)}")
    [spec] = found
    _refuse(spec)
    return replace(spec, vhost=False) if spec.kind == "net" else spec


def _refuse(spec: Any) -> None:
    flag = registry.option_of(spec.kind).flag
    if spec.packed:
        raise ConfigError(
            "packed is for a machine of our own; over vhost-user rings are split",
            cure="leave it out",
            option=flag,
        )
    if spec.kind == "net" and (spec.vhost or spec.vhost_user):
        what = "vhost-user" if spec.vhost_user else "vhost"
        raise ConfigError(
            f"{what} needs memory that is this process' own, and here it is the front end's",
            cure=f"leave out {what}",
            option=flag,
        )
    if spec.kind == "vsock" and not spec.path:
        raise ConfigError(
            "without a path nobody could reach the guest", cure="add path=PATH", option=flag
        )


@click.command("vhost-user-blk", epilog=BLK_EPILOG)
@SOCKET
@click.option(
    "--disk",
    metavar="PATH[,OPTION...]",
    required=True,
    help="Raw image or block device to serve, with the options of `pyvmm run --disk`.",
)
@click.option(
    "--queues",
    type=int,
    default=1,
    show_default=True,
    help="Request queues, served by a thread each; a front end may use fewer.",
)
@click.option(
    "--poll",
    type=int,
    metavar="MICROSECONDS",
    default=50,
    show_default=True,
    help="Look for the next request for so long before sleeping, while requests come that fast; 0 "
    "never does. It takes a processor's time for latency, and with one queue only.",
)
@DEBUG
def vhost_user_blk(path: str, disk: str, queues: int, poll: int, debug: bool) -> int:
    """Serve a disk to QEMU, Cloud Hypervisor or libblkio over vhost-user.

    The same virtio-blk device that `pyvmm run --disk` has. Ends on SIGTERM or Ctrl-C.
    """
    from pyvmm.kinds.disk.storage import open_backend
    from pyvmm.transport.vhost_user import serve
    from pyvmm.virtio.blk.device import BlockDevice

    spec = parse_disk(disk)
    if spec.on_error == "stop":
        raise ConfigError(
            "on-error=stop needs a machine that could be stopped, which is the front end's here",
            cure="leave it out",
            option="--disk",
        )
    if spec.packed or spec.queues != 1:
        raise ConfigError(
            "packed and queues= are for a machine of our own; over vhost-user rings are split",
            cure="leave them out; --queues N is the number of queues here",
            option="--disk",
        )
    if not 1 <= queues <= MAX_QUEUES:
        raise ConfigError(
            f"{queues} queues cannot be had", cure=f"use 1 to {MAX_QUEUES}", option="--queues"
        )
    if not 0 <= poll <= MAX_POLL:
        raise ConfigError(f"polling for {poll} µs", cure=f"use 0 to {MAX_POLL}", option="--poll")
    name = spec.id or "disk0"
    with ExitStack() as closing:
        backend = open_backend(spec, closing)
        backend.share()  # each connection is a process of its own
        device = BlockDevice(
            backend,
            name=name,
            serial=name,
            block_size=spec.block_size,
            num_queues=queues,
            queue_size=MAX_QUEUE_SIZE,
            seg_max=SEG_MAX,
        )
        # Threads that poll would keep the interpreter from each other.
        device.poll_ns = poll * 1000 if queues == 1 else 0
        serve(device, path)
    return 0
