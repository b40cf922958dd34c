"""A packet's header: struct virtio_vsock_hdr (virtio 1.3, 5.10.6 Device Operation)."""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from pyvmm.virtio.vsock.uapi import OP_NAMES, VIRTIO_VSOCK_TYPE_STREAM, VMADDR_CID_HOST

HEADER = Struct("<QQIIIHHIII")
HEADER_BYTES = HEADER.size  # 44


class Header(NamedTuple):
    """The fields in their order. `len` is the payload's size in bytes; `buf_alloc` and `fwd_cnt`
    are the sender's receive buffer and how much of what it received it has passed on."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int = 0
    type: int = VIRTIO_VSOCK_TYPE_STREAM
    op: int = 0
    flags: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0

    def pack(self) -> bytes:
        """The header's 44 bytes."""
        return HEADER.pack(*self)


@dataclass
class Counters:
    """Counters of a device since the start; bytes are payload."""

    packets_from_guest: int = 0
    packets_to_guest: int = 0
    bytes_from_guest: int = 0
    bytes_to_guest: int = 0


class PacketEvent(NamedTuple):
    """One packet as `--trace` shows it."""

    device: str
    header: Header

    def __str__(self) -> str:
        header = self.header
        op = OP_NAMES[header.op] if header.op < len(OP_NAMES) else f"operation {header.op}"
        flags = f" flags {header.flags:#x}" if header.flags else ""
        return (
            f"{self.device}: {_side(header.src_cid)}:{header.src_port} ->"
            f" {_side(header.dst_cid)}:{header.dst_port} {op} {header.len} bytes{flags},"
            f" buf_alloc {header.buf_alloc} fwd_cnt {header.fwd_cnt}"
        )


def _side(cid: int) -> str:
    return "host" if cid == VMADDR_CID_HOST else f"cid{cid}"
