"""KVM, the kernel's virtual machine interface: system, VM and vCPU, each a file descriptor."""
