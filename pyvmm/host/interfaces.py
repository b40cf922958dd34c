"""Settings of a network interface that we made, by rtnetlink(7); pyroute2 speaks it."""

from __future__ import annotations

import os

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from pyvmm.errors import ConfigError

_OPTION = "--net"


def set_up(name: str, *, mtu: int = 0, address: str = "", bridge: str = "") -> None:
    """Bring the interface `name` up, with an `address` as in 192.168.7.1/24 and as a port of
    `bridge`, where they are given. Raises ConfigError."""
    try:
        with IPRoute() as route:
            [index] = route.link_lookup(ifname=name)
            if mtu:
                route.link("set", index=index, mtu=mtu)
            if bridge:
                masters = route.link_lookup(ifname=bridge)
                if not masters:
                    raise ConfigError(
                        f"there is no bridge {bridge}",
                        cure=f"`ip link add {bridge} type bridge` makes it",
                        option=_OPTION,
                    )
                route.link("set", index=index, master=masters[0])
            if address:
                _add_address(route, index, address)
            route.link("set", index=index, state="up")
    except NetlinkError as error:
        raise ConfigError(
            f"the tap {name} cannot be set up: {os.strerror(error.code)}", option=_OPTION
        ) from None


def _add_address(route: IPRoute, index: int, address: str) -> None:
    import ipaddress

    try:
        interface = ipaddress.ip_interface(address)
    except ValueError:
        raise ConfigError(
            f"{address!r} is not an address with a prefix",
            cure="write address=192.168.7.1/24",
            option=_OPTION,
        ) from None
    route.addr("add", index=index, address=str(interface.ip), prefixlen=interface.network.prefixlen)
