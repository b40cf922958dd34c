"""The driver's filter of incoming frames: virtio 1.3, 5.1.6.5.1 Packet Receive Filtering and
5.1.6.5.2 Setting MAC Address Filtering.

A filter is a value. The control queue's thread replaces it whole; receive threads use the one that
they find.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pyvmm.host.saved import Saved

BROADCAST = b"\xff" * 6
MAC_SIZE = 6
# A driver may give any number of addresses; past this many of a kind all of that kind pass, which
# the specification leaves us free to do.
MOST_ADDRESSES = 1024


# In the order of the fields.
_MODES = ("promisc", "allmulti", "alluni", "nomulti", "nouni", "nobcast")


@dataclass(frozen=True)
class ReceiveFilter:
    """`mac` is the card's own address, `unicast` and `multicast` the table; the rest are the modes
    by their names in VIRTIO_NET_CTRL_RX_*."""

    mac: bytes
    unicast: frozenset[bytes] = frozenset()
    multicast: frozenset[bytes] = frozenset()
    promisc: bool = False
    allmulti: bool = False
    alluni: bool = False
    nomulti: bool = False
    nouni: bool = False
    nobcast: bool = False

    def save(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "mac": self.mac.hex(),
            "unicast": b"".join(sorted(self.unicast)).hex(),
            "multicast": b"".join(sorted(self.multicast)).hex(),
            **{mode: getattr(self, mode) for mode in _MODES},
        }

    def accepts(self, destination: bytes) -> bool:
        """True if a frame to this address, 6 bytes, is for the driver."""
        if self.promisc:
            return True
        if destination == BROADCAST:
            return not self.nobcast
        if destination[0] & 1:
            if self.nomulti:
                return False
            return (
                self.allmulti
                or destination in self.multicast
                or len(self.multicast) > MOST_ADDRESSES
            )
        if self.nouni:
            return False
        return (
            destination == self.mac
            or self.alluni
            or destination in self.unicast
            or len(self.unicast) > MOST_ADDRESSES
        )


def filter_from(saved: Saved) -> ReceiveFilter:
    """Restore what `ReceiveFilter.save` gave. Raises ConfigError."""
    unicast, multicast = _table(saved, "unicast"), _table(saved, "multicast")
    modes = [saved.flag(mode) for mode in _MODES]
    return ReceiveFilter(saved.data("mac", MAC_SIZE), unicast, multicast, *modes)


def _table(saved: Saved, name: str) -> frozenset[bytes]:
    data = saved.data(name)
    if len(data) % MAC_SIZE:
        raise saved.wrong(f"{name} has {len(data)} bytes")
    return frozenset(data[at : at + MAC_SIZE] for at in range(0, len(data), MAC_SIZE))
