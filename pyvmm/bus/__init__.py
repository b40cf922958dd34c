"""Ranges of I/O ports or guest-physical addresses, and who answers there."""

from pyvmm.bus.bus import Action, Bus, Handler

__all__ = ["Action", "Bus", "Handler"]
