"""Serving a virtio device to another monitor: vhost-user's back end.

    serve(BlockDevice(backend, name="disk0"), "/tmp/disk0.sock")

and QEMU, Cloud Hypervisor or libblkio connect to it. Any VirtioDevice can be served.
"""

from pyvmm.transport.vhost_user.server import serve, serve_connection, serve_each
from pyvmm.vhost_user.protocol import FrontEndError

__all__ = ["FrontEndError", "serve", "serve_connection", "serve_each"]
