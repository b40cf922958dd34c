"""The device of an arm64 machine beside virtio: a clock. Its serial port is a PC's."""
