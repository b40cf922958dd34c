"""The network device's numbers and structures against the system's own headers."""

from __future__ import annotations

from pathlib import Path
from struct import Struct

from c_claims import assert_in_c, needs_headers

from pyvmm.host import passt, tap, vhost
from pyvmm.virtio.net import config, header, uapi

HEADERS = ("linux/virtio_net.h", "linux/if_tun.h", "linux/if_ether.h")
pytestmark = needs_headers(HEADERS)
# In the headers from Linux 6.2 on.
NEWER = {
    *("VIRTIO_NET_F_GUEST_USO4", "VIRTIO_NET_F_GUEST_USO6", "VIRTIO_NET_F_HOST_USO"),
    *("VIRTIO_NET_HDR_GSO_UDP_L4", "TUN_F_USO4", "TUN_F_USO6"),
}


def test_every_number_is_the_headers(tmp_path: Path) -> None:
    names = [name for name in vars(uapi) if name.startswith("VIRTIO_")]
    assert len(names) >= 45
    assert_in_c(tmp_path, HEADERS, [f"{name} == {getattr(uapi, name)}" for name in names], NEWER)


def test_every_feature_has_its_name() -> None:
    expected = {bit: name for name, bit in vars(uapi).items() if name.startswith("VIRTIO_NET_F_")}
    assert expected == uapi.FEATURE_NAMES


def test_every_field_of_the_configuration_lies_where_the_header_has_it(tmp_path: Path) -> None:
    claims = []
    for name, (offset, size) in config.layout().items():
        claims.append(f"__builtin_offsetof(struct virtio_net_config, {name}) == {offset}")
        claims.append(f"sizeof(((struct virtio_net_config *)0)->{name}) == {size}")
    total = len(config.NetConfig(mac=bytes(6), status=1, mtu=1500).encode())
    claims.append(f"sizeof(struct virtio_net_config) == {total}")
    assert_in_c(tmp_path, HEADERS, claims, NEWER)


def test_the_header_of_a_frame(tmp_path: Path) -> None:
    struct = "struct virtio_net_hdr_v1"
    fields = ("flags", "gso_type", "hdr_len", "gso_size", "csum_start", "csum_offset")
    offsets = (0, 1, 2, 4, 6, 8)
    claims = [f"sizeof({struct}) == {header.HEADER_SIZE}"]
    for name, offset in zip(fields, offsets, strict=True):
        claims.append(f"__builtin_offsetof({struct}, {name}) == {offset}")
    claims.append(f"__builtin_offsetof({struct}, num_buffers) == {header.NUM_BUFFERS_AT}")
    claims += [f"ETH_HLEN == {header.ETH_HEADER}", f"ETH_P_8021Q == {0x8100}"]
    claims += [f"ETH_P_8021AD == {0x88A8}", "ETH_MAX_MTU == 65535"]
    assert_in_c(tmp_path, HEADERS, claims, NEWER)


def test_vhosts_numbers_and_structures(tmp_path: Path) -> None:
    includes = ("linux/vhost.h", "sys/ioctl.h")
    names = [name for name in vars(vhost) if name.startswith("VHOST_")]
    assert len(names) >= 10
    claims = [f"{name} == {getattr(vhost, name)}" for name in names]
    layouts = {
        "memory": (vhost.MEMORY, ("nregions", "padding")),
        "memory_region": (
            vhost.MEMORY_REGION,
            ("guest_phys_addr", "memory_size", "userspace_addr", "flags_padding"),
        ),
        "vring_state": (vhost.VRING_STATE, ("index", "num")),
        "vring_file": (vhost.VRING_FILE, ("index", "fd")),
        "vring_addr": (
            vhost.VRING_ADDR,
            (
                *("index", "flags", "desc_user_addr", "used_user_addr", "avail_user_addr"),
                "log_guest_addr",
            ),
        ),
    }
    for name, (layout, fields) in layouts.items():
        struct = f"struct vhost_{name}"
        claims.append(f"sizeof({struct}) == {layout.size}")
        at = 0
        for field, code in zip(fields, layout.format.lstrip("="), strict=True):
            claims.append(f"__builtin_offsetof({struct}, {field}) == {at}")
            at += Struct(f"={code}").size
    assert_in_c(tmp_path, includes, claims)


def test_numbers_of_taps(tmp_path: Path) -> None:
    includes = (
        *HEADERS,
        "linux/if.h",
        "linux/sockios.h",
        "linux/rtnetlink.h",
        "sys/socket.h",
        "sys/ioctl.h",
    )
    names = [
        name
        for name in vars(tap)
        if name.startswith(("TUN", "IFF_", "SIOC", "RTMGRP_")) or name == "IFNAMSIZ"
    ]
    assert len(names) >= 20
    claims = [f"{name} == {getattr(tap, name)}" for name in names]
    claims += [
        f"sizeof(struct ifreq) == {tap._IFREQ.size}",
        f"__builtin_offsetof(struct ifreq, ifr_flags) == {tap.IFNAMSIZ}",
        f"SO_SNDBUFFORCE == {passt.SO_SNDBUFFORCE}",
    ]
    assert_in_c(tmp_path, includes, claims, NEWER)
