"""What an arm64 machine has beside virtio: a clock. Its serial port is a PC's."""
