"""pyvmm: a KVM microVM monitor in Python."""

__version__ = "0.1.0"
