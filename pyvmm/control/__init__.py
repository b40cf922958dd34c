"""The control socket of a running VM: where it is, what is spoken there, both ends.

docs/control-socket.md describes it for other programs. `registry` is the place, `protocol` the
messages, `server` the monitor's end, `client` the other one. What the methods do is not here: see
`pyvmm.monitor.control`.
"""
