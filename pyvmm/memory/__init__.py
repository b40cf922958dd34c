"""Guest memory: what the guest sees as RAM, reached by guest-physical address."""

from pyvmm.memory.guest_memory import GuestMemory, Region

__all__ = ["GuestMemory", "Region"]
