"""A whole virtual machine: what was asked for, how it is put together, and running it."""
