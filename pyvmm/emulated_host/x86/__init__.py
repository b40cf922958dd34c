"""The x86-64 emulated host: QEMU's machine, its kernel and the modules behind /dev/kvm."""
