"""A listening socket for one peer alone, to which we are connected before others know of it."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile


def connected_listener() -> tuple[socket.socket, socket.socket]:
    """A connected stream socket, and the listening one to which it is connected; no name is left in
    the file system."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = tempfile.mkdtemp(prefix="pyvmm-")  # nobody else may look into it
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = f"/proc/self/fd/{fd}/socket"  # short, wherever the folder is
        listener.bind(name)
        listener.listen(1)
        ours.connect(name)
        os.unlink(os.path.join(folder, "socket"))
    except BaseException:
        listener.close()
        ours.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(fd)
    os.rmdir(folder)
    return ours, listener
