"""Devices that are not virtio, and the user's terminal.

`serial` is the 16550A; `console` joins it to the terminal, with `console_output` and `console_pump`
for the two directions, `terminal` for raw mode and `escape` for the Ctrl-A keys. What only a PC has
is in `x86`.
"""
