"""Many Unix stream sockets over one byte stream between two machines that share nothing else.

`frames` is the wire format, `channel` one socket's state, `multiplexer` the thread at each end.
"""

VARIABLE = "PYVMM_SOCKET_RELAY"  # the path of the port inside, set by pyvmm.emulated_host
DISK_SERVICE = "disk-resize"  # the name by which the monitor inside reaches the disks' owner
