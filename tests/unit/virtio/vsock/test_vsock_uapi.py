"""The socket device's numbers and structures against the system's own headers."""

from __future__ import annotations

from pathlib import Path

from c_claims import assert_in_c, needs_headers

from pyvmm.virtio.vsock import packet, uapi

HEADERS = ("linux/virtio_vsock.h", "linux/vm_sockets.h", "linux/virtio_ids.h")
INCLUDES = ("sys/socket.h", *HEADERS)
pytestmark = needs_headers(HEADERS)

# Names of virtio 1.3 that Linux has only in newer headers or not at all: queues are numbers there.
NOT_IN_HEADERS = {
    *("VIRTIO_VSOCK_F_STREAM", "VIRTIO_VSOCK_F_NO_IMPLIED_STREAM"),
    *("VIRTIO_VSOCK_RX", "VIRTIO_VSOCK_TX", "VIRTIO_VSOCK_EVENT"),
}


def test_every_number_is_the_headers(tmp_path: Path) -> None:
    names = {name for name in vars(uapi) if name.startswith(("VIRTIO_", "VMADDR_"))}
    assert len(names) >= 20
    claims = [f"{name} == {getattr(uapi, name)}" for name in sorted(names - NOT_IN_HEADERS)]
    assert_in_c(tmp_path, INCLUDES, claims)


def test_every_feature_has_its_name() -> None:
    expected = {bit: name for name, bit in vars(uapi).items() if name.startswith("VIRTIO_VSOCK_F_")}
    assert expected == uapi.FEATURE_NAMES


def test_the_header_lies_as_the_kernels(tmp_path: Path) -> None:
    struct, offset = "struct virtio_vsock_hdr", 0
    claims = [f"sizeof({struct}) == {packet.HEADER_BYTES}"]
    codes = packet.HEADER.format.removeprefix("<")
    for name, code in zip(packet.Header._fields, codes, strict=True):
        size = {"Q": 8, "I": 4, "H": 2}[code]
        claims.append(f"__builtin_offsetof({struct}, {name}) == {offset}")
        claims.append(f"sizeof((({struct} *)0)->{name}) == {size}")
        offset += size
    claims.append(f"sizeof(struct virtio_vsock_config) == {uapi.CONFIG.size}")
    claims.append(f"sizeof(struct virtio_vsock_event) == {uapi.EVENT.size}")
    assert_in_c(tmp_path, INCLUDES, claims)
