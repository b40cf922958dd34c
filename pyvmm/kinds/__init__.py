"""One module for each kind of device: all that a kind needs from outside the device itself."""
