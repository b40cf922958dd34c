"""The types of devices that a back end may serve: how many queues each has, what of its features
can be passed on, what its configuration space is, and how its requests fail.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from pyvmm.errors import GuestMemoryError
from pyvmm.virtio.blk import config as blk_config
from pyvmm.virtio.blk import uapi as blk
from pyvmm.virtio.constants import VIRTIO_ID_BLOCK, VIRTIO_ID_NET, VIRTIO_ID_RNG
from pyvmm.virtio.features import mask
from pyvmm.virtio.net import uapi as net
from pyvmm.virtio.net.config import NetConfig
from pyvmm.virtio.queue.chain import DescriptorChain
from pyvmm.virtio.queue.protocol import Queue
from pyvmm.virtio.vhost_user.served import Served

OWN_BITS = mask(*range(24), *range(50, 64))  # 2.2 Feature Bits: those of a device type
_BLK_FIELDS = blk_config.layout()
_BLK_CONFIG = sum(_BLK_FIELDS["unused1"])  # with that for WRITE_ZEROES, which all back ends know
_BLK_FEATURES = OWN_BITS & (1 << 15) - 1  # those whose fields are in there
_NET_FEATURES = mask(
    net.VIRTIO_NET_F_CSUM,
    net.VIRTIO_NET_F_GUEST_CSUM,
    net.VIRTIO_NET_F_GUEST_TSO4,
    net.VIRTIO_NET_F_GUEST_TSO6,
    net.VIRTIO_NET_F_GUEST_ECN,
    net.VIRTIO_NET_F_GUEST_UFO,
    net.VIRTIO_NET_F_HOST_TSO4,
    net.VIRTIO_NET_F_HOST_TSO6,
    net.VIRTIO_NET_F_HOST_ECN,
    net.VIRTIO_NET_F_HOST_UFO,
    net.VIRTIO_NET_F_MRG_RXBUF,
    net.VIRTIO_NET_F_GUEST_USO4,
    net.VIRTIO_NET_F_GUEST_USO6,
    net.VIRTIO_NET_F_HOST_USO,
)
TAG_BYTES = 36  # 5.11.4 Device configuration layout: tag, then num_request_queues
_FS_CONFIG = struct.Struct(f"<{TAG_BYTES}sI")
_FUSE_IN, _FUSE_OUT = struct.Struct("<IIQ"), struct.Struct("<IiQ")  # len, opcode | error, unique
_ENOTCONN = 107


class Type(NamedTuple):
    """A type by its name: its number, how many queues it has beside those that a user counts, and
    how many belong to each of these. `config_size` is in bytes."""

    number: int
    fixed: int = 0
    each: int = 1
    config_size: int = 0


TYPES = {
    "blk": Type(VIRTIO_ID_BLOCK, config_size=_BLK_CONFIG),
    "net": Type(VIRTIO_ID_NET, each=2),
    "rng": Type(VIRTIO_ID_RNG),
    "fs": Type(26, fixed=1, config_size=_FS_CONFIG.size),
    "console": Type(3, each=2, config_size=12),
    "scsi": Type(8, fixed=2, config_size=36),
    "input": Type(18, each=2, config_size=136),
    "vsock": Type(19, each=3, config_size=8),
    "sound": Type(25, each=4, config_size=12),
    "i2c": Type(34),
    "gpio": Type(41, each=2, config_size=8),
}
"""The types that have names, by their section in chapter 5 of the specification."""
STATELESS = ("blk", "net", "rng")
"""Those whose back ends know nothing of them that is not in their rings."""


def served(name: str, queues: int, *, tag: str, mac: bytes) -> Served:
    """The facts of the type `name` for the front end, with `queues` (pairs, request queues) of a
    device that can have several."""
    known = TYPES[name]
    usual = Served(
        known.number,
        known.fixed + known.each * queues,
        features=OWN_BITS,
        config_size=known.config_size,
        is_stateless=name in STATELESS,
    )
    special = {"blk": _blk, "net": _net, "fs": _fs, "rng": _rng}.get(name)
    return usual if special is None else special(usual, queues, tag, mac)


def _blk(usual: Served, queues: int, tag: str, mac: bytes) -> Served:
    several = 0 if queues > 1 else mask(blk.VIRTIO_BLK_F_MQ)
    return replace(
        usual,
        features=_BLK_FEATURES & ~several,
        needs_config=True,
        config=_with_queues(_BLK_FIELDS["num_queues"][0], "<H", queues),
        refuse=_refuse_blk,
        identity=sum(_BLK_FIELDS["capacity"]),
    )


def _with_queues(at: int, code: str, count: int) -> Callable[[bytes, bool], bytes]:
    """As many queues as there are, whatever a back end says."""

    def config(given: bytes, connected: bool) -> bytes:
        own = struct.pack(code, count)
        return given[:at] + own + given[at + len(own) :]

    return config


def _net(usual: Served, queues: int, tag: str, mac: bytes) -> Served:
    return _card(usual, mac, 0)


def card(mac: bytes, mtu: int) -> Served:
    """A network card that tells its driver an MTU in bytes."""
    return _card(Served(VIRTIO_ID_NET, TYPES["net"].each, is_stateless=True), mac, mtu)


def _card(usual: Served, mac: bytes, mtu: int) -> Served:
    def config(given: bytes, connected: bool) -> bytes:
        return NetConfig(mac, net.VIRTIO_NET_S_LINK_UP if connected else 0, mtu).encode()

    own = mask(net.VIRTIO_NET_F_MAC, net.VIRTIO_NET_F_STATUS)
    return replace(
        usual,
        features=_NET_FEATURES,
        own_features=own | (mask(net.VIRTIO_NET_F_MTU) if mtu else 0),
        config=config,
        refuse=_drop_frames,
    )


def _fs(usual: Served, queues: int, tag: str, mac: bytes) -> Served:
    """The tag is ours, if we are told one."""

    def config(given: bytes, connected: bool) -> bytes:
        own = tag.encode().ljust(TAG_BYTES, b"\0") if tag else given[:TAG_BYTES]
        return _FS_CONFIG.pack(own, queues)

    return replace(
        usual,
        features=0,  # VIRTIO_FS_F_NOTIFICATION would add a queue
        needs_config=not tag,
        config=config,
        resumes=False,
        refuse=_refuse_fuse,
    )


def _rng(usual: Served, queues: int, tag: str, mac: bytes) -> Served:
    return replace(usual, features=0, refuse=_return_empty)


# --- how requests fail ----------------------------------------------------------------------------


def _refuse_blk(queue: Queue) -> None:
    """VIRTIO_BLK_S_IOERR in the last byte: 5.2.6 Device Operation."""
    for chain in queue:
        written = 0
        if chain.writable_size:
            writer = chain.writer()
            try:
                writer.take_last_byte()[0] = blk.VIRTIO_BLK_S_IOERR
                written = int(chain.writable_size == 1)
            except GuestMemoryError:
                pass
        queue.add_used(chain, written)


def _refuse_fuse(queue: Queue) -> None:
    """ENOTCONN, as for a file system whose server has gone; FORGET has no answer."""
    for chain in queue:
        queue.add_used(chain, _fuse_error(chain))


def _fuse_error(chain: DescriptorChain) -> int:
    writer = chain.writer()
    if chain.readable_size < _FUSE_IN.size or chain.writable_size < _FUSE_OUT.size:
        return 0
    try:
        _, _, unique = chain.reader().unpack(_FUSE_IN)
        writer.write(_FUSE_OUT.pack(_FUSE_OUT.size, -_ENOTCONN, unique))
    except GuestMemoryError:
        return 0
    return writer.written


def _drop_frames(queue: Queue) -> None:
    """Drop the frames that the guest sends, and send it none: 5.1.2 Virtqueues."""
    if queue.index % 2:
        _return_empty(queue)


def _return_empty(queue: Queue) -> None:
    for chain in queue:
        queue.add_used(chain, 0)
