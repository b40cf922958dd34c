"""The commands of the control queue: parsed from a chain, carried out on a target.

Virtio 1.3, 5.1.6.5 Control Virtqueue. Every length and number is checked; what is wrong, or
belongs to a feature that was not negotiated, is answered with VIRTIO_NET_ERR and changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from pyvmm.errors import DriverError, HostError
from pyvmm.virtio.features import has
from pyvmm.virtio.net import uapi
from pyvmm.virtio.net.filter import MAC_SIZE, ReceiveFilter
from pyvmm.virtio.queue.chain import DescriptorChain

# No command's data is longer than this, two tables of 5,000 addresses.
MOST_DATA = 1 << 16

# Mode → (the feature that it needs, its field in ReceiveFilter)
_MODES = {
    uapi.VIRTIO_NET_CTRL_RX_PROMISC: (uapi.VIRTIO_NET_F_CTRL_RX, "promisc"),
    uapi.VIRTIO_NET_CTRL_RX_ALLMULTI: (uapi.VIRTIO_NET_F_CTRL_RX, "allmulti"),
    uapi.VIRTIO_NET_CTRL_RX_ALLUNI: (uapi.VIRTIO_NET_F_CTRL_RX_EXTRA, "alluni"),
    uapi.VIRTIO_NET_CTRL_RX_NOMULTI: (uapi.VIRTIO_NET_F_CTRL_RX_EXTRA, "nomulti"),
    uapi.VIRTIO_NET_CTRL_RX_NOUNI: (uapi.VIRTIO_NET_F_CTRL_RX_EXTRA, "nouni"),
    uapi.VIRTIO_NET_CTRL_RX_NOBCAST: (uapi.VIRTIO_NET_F_CTRL_RX_EXTRA, "nobcast"),
}


class Target(Protocol):
    """The settings that commands change. A setter raises HostError if the host refuses."""

    def set_filter(self, filter: ReceiveFilter) -> None: ...

    def set_mac(self, mac: bytes) -> None: ...

    def set_pairs(self, pairs: int) -> None: ...

    def set_offloads(self, offloads: int) -> None: ...


class _Wrong(Exception):
    """The command cannot be carried out."""


class Control:
    """Carries out commands for one activation with the negotiated `features`.

    `filter` is the one in force; `most_pairs` what VQ_PAIRS_SET may ask for.
    """

    def __init__(
        self, target: Target, features: int, filter: ReceiveFilter, most_pairs: int
    ) -> None:
        self._target = target
        self._features = features
        self._filter = filter
        self._most_pairs = most_pairs

    def answer(self, chain: DescriptorChain) -> int:
        """Carry out the command in `chain` and write its `ack`; the used length, 0 if there was no
        room for an answer, and then nothing is carried out."""
        try:
            [ack] = chain.writer().take(1)
            if not chain.writable_size or not 2 <= chain.readable_size <= 2 + MOST_DATA:
                raise _Wrong
            text = chain.reader().read(chain.readable_size)
        except (_Wrong, DriverError, ValueError):
            return self._refuse(chain)
        try:
            self._carry_out(text[0], text[1], text[2:])
            ack[0] = uapi.VIRTIO_NET_OK
        except (_Wrong, HostError):
            ack[0] = uapi.VIRTIO_NET_ERR
        return 1

    def _refuse(self, chain: DescriptorChain) -> int:
        try:
            chain.writer().write(bytes([uapi.VIRTIO_NET_ERR]))
        except DriverError:
            return 0
        return 1

    def _need(self, feature: int) -> None:
        if not has(self._features, feature):
            raise _Wrong

    def _carry_out(self, kind: int, command: int, data: bytes) -> None:
        if kind == uapi.VIRTIO_NET_CTRL_RX:
            self._set_mode(command, data)
        elif (kind, command) == (uapi.VIRTIO_NET_CTRL_MAC, uapi.VIRTIO_NET_CTRL_MAC_TABLE_SET):
            self._need(uapi.VIRTIO_NET_F_CTRL_RX)
            unicast, rest = _addresses(data)
            multicast, rest = _addresses(rest)
            if rest:
                raise _Wrong
            self._change(replace(self._filter, unicast=unicast, multicast=multicast))
        elif (kind, command) == (uapi.VIRTIO_NET_CTRL_MAC, uapi.VIRTIO_NET_CTRL_MAC_ADDR_SET):
            self._need(uapi.VIRTIO_NET_F_CTRL_MAC_ADDR)
            if len(data) != MAC_SIZE or data[0] & 1:
                raise _Wrong
            self._change(replace(self._filter, mac=data))
            self._target.set_mac(data)
        elif (kind, command) == (uapi.VIRTIO_NET_CTRL_MQ, uapi.VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET):
            self._need(uapi.VIRTIO_NET_F_MQ)
            pairs = int.from_bytes(data, "little")
            if len(data) != 2 or not 1 <= pairs <= self._most_pairs:
                raise _Wrong
            self._target.set_pairs(pairs)
        elif (kind, command) == (
            uapi.VIRTIO_NET_CTRL_GUEST_OFFLOADS,
            uapi.VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET,
        ):
            self._set_offloads(data)
        else:
            raise _Wrong

    def _set_mode(self, command: int, data: bytes) -> None:
        feature, field = _MODES.get(command, (uapi.VIRTIO_NET_F_CTRL_RX, ""))
        self._need(feature)
        if not field or len(data) != 1 or data[0] > 1:
            raise _Wrong
        self._change(replace(self._filter, **{field: bool(data[0])}))  # type: ignore[arg-type]

    def _set_offloads(self, data: bytes) -> None:
        self._need(uapi.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)
        offloads = int.from_bytes(data, "little")
        if len(data) != 8 or offloads & ~(self._features & GUEST_OFFLOADS):
            raise _Wrong
        for feature, needed in NEEDED_OFFLOADS:
            if offloads & feature and not offloads & needed:
                raise _Wrong
        self._target.set_offloads(offloads)

    def _change(self, filter: ReceiveFilter) -> None:
        self._target.set_filter(filter)
        self._filter = filter


def _mask(*bits: int) -> int:
    return sum(1 << bit for bit in bits)


_CSUM = _mask(uapi.VIRTIO_NET_F_GUEST_CSUM)
_TSO = _mask(uapi.VIRTIO_NET_F_GUEST_TSO4, uapi.VIRTIO_NET_F_GUEST_TSO6)
_OTHER = _mask(
    uapi.VIRTIO_NET_F_GUEST_UFO, uapi.VIRTIO_NET_F_GUEST_USO4, uapi.VIRTIO_NET_F_GUEST_USO6
)
_ECN = _mask(uapi.VIRTIO_NET_F_GUEST_ECN)
GUEST_OFFLOADS = _CSUM | _TSO | _OTHER | _ECN
"""All offloads that concern received frames, as feature bits."""
NEEDED_OFFLOADS = ((_TSO | _OTHER, _CSUM), (_ECN, _TSO))
"""(features, those of which one is needed by each of them): 5.1.3.1 Feature bit requirements."""


def _addresses(data: bytes) -> tuple[frozenset[bytes], bytes]:
    """The table at the beginning of `data` (struct virtio_net_ctrl_mac), and what follows it."""
    entries = int.from_bytes(data[:4], "little")
    end = 4 + entries * MAC_SIZE
    if len(data) < 4 or end > len(data):
        raise _Wrong
    return frozenset(data[at : at + MAC_SIZE] for at in range(4, end, MAC_SIZE)), data[end:]
