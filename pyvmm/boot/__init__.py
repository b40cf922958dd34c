"""Start a kernel: what a boot loader does, and the diagnosis of a guest that does not come up."""
