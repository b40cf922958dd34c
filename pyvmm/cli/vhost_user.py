"""`pyvmm vhost-user-blk`: a disk for another monitor."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import click

from pyvmm.machine.spec import parse_disk

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
    metavar="PATH[,readonly][,id=NAME]",
    required=True,
    help="Raw image or block device to serve.",
)
@click.option("--debug", is_flag=True, help="Show a traceback when pyvmm itself fails.")
def vhost_user_blk(path: str, disk: str, debug: bool) -> int:
    """Serve a disk to QEMU, Cloud Hypervisor or libblkio over vhost-user.

    The same virtio-blk device that `pyvmm run --disk` has. Ends on SIGTERM or Ctrl-C.
    """
    from pyvmm.machine.disks import open_disk
    from pyvmm.transport.vhost_user import serve

    spec = parse_disk(disk)
    with ExitStack() as closing:
        device = open_disk(replace(spec, id=spec.id or "disk0"), None, closing)
        serve(device, path)
    return 0
