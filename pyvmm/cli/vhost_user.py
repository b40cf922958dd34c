"""`pyvmm vhost-user-blk`: a disk for another monitor."""

from __future__ import annotations

from contextlib import ExitStack

import click

from pyvmm.errors import ConfigError
from pyvmm.kinds.disk import parse as parse_disk

MAX_QUEUES = 16
MAX_POLL = 1000  # microseconds
# A ring's size is the front end's choice, and nothing tells it of a limit: 128 with QEMU and Cloud
# Hypervisor, 256 with Firecracker, 512 with SPDK. No chain may be longer than its ring, so
# requests are for the smallest of these.
MAX_QUEUE_SIZE = 1024
SEG_MAX = 126  # and header and status

EPILOG = """\b
Example, with QEMU (10 or 7.2) as the monitor:
  pyvmm vhost-user-blk --socket /tmp/disk.sock --disk debian.img
  qemu-system-x86_64 -accel kvm -m 1G \\
    -object memory-backend-memfd,id=ram,size=1G,share=on -machine q35,memory-backend=ram \\
    -chardev socket,id=disk,path=/tmp/disk.sock,reconnect=1 -device vhost-user-blk-pci,chardev=disk
"""


@click.command("vhost-user-blk", epilog=EPILOG)
@click.option(
    "--socket",
    "--socket-path",
    "path",
    metavar="PATH",
    required=True,
    help="Unix socket to listen at. One front end is served at a time; another may follow.",
)
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
@click.option("--debug", is_flag=True, help="Show a traceback when pyvmm itself fails.")
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
