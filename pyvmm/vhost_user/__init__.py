"""The protocol of both ends of a vhost-user connection: messages, their numbers, notes in flight.

The back end is `pyvmm.transport.vhost_user`, the front end `pyvmm.virtio.vhost_user`.
"""
