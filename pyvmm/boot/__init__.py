"""Start a kernel: what a boot loader does, and the diagnosis of a guest that does not come up."""

from __future__ import annotations


def unpacker() -> str:
    """The module that takes the ELF vmlinux out of a packed kernel, as a program of its own:
    ``python -m MODULE PACKED VMLINUX``."""
    from pyvmm.boot.x86 import payload

    return payload.__name__
