"""``--net``: a virtio-net device, on a tap interface or on user-mode networking (passt)."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, ClassVar

from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.kinds.interface import Context, limiter
from pyvmm.spec import rates
from pyvmm.spec.options import Option, unknown_option
from pyvmm.spec.record import field, replace
from pyvmm.spec.vm import INTERNAL, DeviceSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TypedDict

    from pyvmm.host import passt
    from pyvmm.host.passt import Forward
    from pyvmm.host.vhost import VhostNet
    from pyvmm.kinds.border import Border, Crossing
    from pyvmm.kinds.interface import Table
    from pyvmm.virtio.net.backend import Backend
    from pyvmm.virtio.net.device import NetDevice
    from pyvmm.virtio.net.limits import Limits
    from pyvmm.virtio.net.tap import TapBackend
    from pyvmm.virtio.vhost_user.device import VhostUserDevice

    class Keywords(TypedDict, total=False):
        """The keywords that `pyvmm.VM` takes."""

        net: Spec | str | Table | Iterable[Spec | str | Table]


OPTION = "--net"
SYNTAX = (
    "user[,forward=[tcp:|udp:][ADDRESS:]PORT:GUESTPORT][,host][,vhost-user] or "
    "tap=NAME[,queues=N][,vhost[=on|off]][,create][,address=A.B.C.D/N][,bridge=NAME], "
    "and mac=, mtu=, packed, rx-bps=, rx-pps=, tx-bps=, tx-pps= and their -burst="
)
LEAST_MTU, MOST_MTU = 68, 65535  # 5.1.4.1 Device Requirements: Device configuration layout
MOST_QUEUES = 16
_ON_OFF = {"on": True, "off": False}
_FOR_BOTH = ("mac", "mtu", "packed", *rates.NET_KEYS)
_FOR_TAP = ("queues", "create", "vhost", "address", "bridge")
_FOR_USER = ("forward", "host", "vhost-user")
_VHOST_USER_QUEUE = 1024  # entries: a frame of 64 KiB takes 44 buffers
# The names of what is handed over; the last for a tap whose frames the kernel moves.
_CABLE, _QUEUE, _VHOST, _TOLD = "passt", "tap-queue-", "vhost-", ("tap-counters", "tap-changes")
_TAP_NAME = "pyvmm%d"  # the kernel puts a number there

OPTIONS = (
    Option(
        "net",
        OPTION,
        metavar="user|tap=NAME[,OPTIONS]",
        device="net",
        many=True,
        default=(),
        repeats=True,
        help="Add a network card: user-mode networking, as user,forward=8080:80, or a tap "
        "interface. Both take mac=, mtu= and packed; docs/networking.md has the other options.",
    ),
)


class Spec(DeviceSpec):
    """A network card on the tap interface `tap`, or on user-mode networking where `tap` is "".

    `mac` is as in 52:54:00:12:34:56; `mtu` is in bytes, 0 for what suits the other end. A tap with
    `create` is made, and vanishes with the VM; `address` and `bridge` say what becomes of the
    host's end. `queues` are pairs. With `vhost` the kernel moves the frames, if it is None where it
    can. `forwards` are `Forward` as text; `host_access` lets the guest reach this machine's
    loopback address through its gateway. With `vhost_user` passt reads and writes the guest's
    memory itself. `stream` is the path of a character device that a passt
    serves already, which is how it is in an emulated host.

    `rx_bps`, `rx_pps` and so on limit bytes and packets a second that the guest receives and sends
    (spec.rates); those larger than the burst go when the bucket is full.
    """

    kind: ClassVar[str] = "net"
    tap: str = ""
    create: bool = False
    address: str = ""
    bridge: str = ""
    queues: int = 1
    vhost: bool | None = None
    forwards: tuple[str, ...] = ()
    host_access: bool = False
    vhost_user: bool = False
    mac: str = ""
    mtu: int = 0
    stream: str = field(default="", metadata=INTERNAL)
    rx_bps: int = 0
    rx_pps: int = 0
    rx_bps_burst: int = 0
    rx_pps_burst: int = 0
    tx_bps: int = 0
    tx_pps: int = 0
    tx_bps_burst: int = 0
    tx_pps_burst: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "forwards", tuple(self.forwards))


# --- from text ------------------------------------------------------------------------------------


def parse(text: str) -> Spec:
    """The device of ``--net TEXT``. Raises ConfigError."""
    kind, *options = text.split(",")
    kind, equals, name = kind.partition("=")
    if kind == "user" and not equals:
        spec = Spec()
    elif kind == "tap" and (name or not equals):
        spec = Spec(tap=name or _TAP_NAME, create=not name)
    else:
        raise _wrong(f"{text!r} is neither user nor tap=NAME")
    for option in options:
        spec = _with_option(spec, option)
    return spec


def _with_option(spec: Spec, option: str) -> Spec:
    key, equals, value = option.partition("=")
    is_tap = bool(spec.tap)
    if key == "mac" and value:
        return replace(spec, mac=value)
    if key in rates.NET_KEYS:
        limit = {rates.NET_KEYS[key]: rates.parse_rate(key, value, OPTION)}
        return replace(spec, **limit)  # type: ignore[arg-type]  # the fields are integers
    if key == "mtu":
        return replace(spec, mtu=_number(option, value, LEAST_MTU, MOST_MTU))
    if is_tap and key == "queues":
        return replace(spec, queues=_number(option, value, 1, MOST_QUEUES))
    if is_tap and key == "create" and not equals:
        return replace(spec, create=True)
    if is_tap and key == "vhost" and (not equals or value in _ON_OFF):
        return replace(spec, vhost=_ON_OFF[value or "on"])
    if is_tap and key in ("address", "bridge") and value:
        return replace(spec, create=True, **{key: value})  # type: ignore[arg-type]
    if not is_tap and key == "forward":
        return replace(spec, forwards=(*spec.forwards, str(parse_forward(value))))
    if not is_tap and key == "host" and not equals:
        return replace(spec, host_access=True)
    if not is_tap and key == "vhost-user" and not equals:
        return replace(spec, vhost_user=True)
    known = (*_FOR_BOTH, *(_FOR_TAP if is_tap else _FOR_USER))
    where = f" of {'a tap' if is_tap else 'user'}"
    raise unknown_option(option, known, usage=f"write {SYNTAX}", flag=OPTION, where=where)


def parse_forward(text: str) -> Forward:
    """``[tcp:|udp:][ADDRESS:]PORT:GUESTPORT``. Without an address, only this machine itself can
    connect. Raises ConfigError."""
    from pyvmm.host.passt import Forward

    rest = text
    protocol = "tcp"
    for known in ("tcp", "udp"):
        if rest.startswith(known + ":"):
            protocol, rest = known, rest[len(known) + 1 :]
    if ":" not in rest:
        raise _wrong(f"forward={text} does not name two ports, this machine's and the guest's")
    host, _, ports = rest.rpartition(":")
    host, _, port = host.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not _is_address(host):
        raise _wrong(f"{host!r} in forward={text} is not an IP address")
    return Forward(protocol, host, _port(text, port), _port(text, ports))


def _port(forward: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text[:9]) < 1 << 16):
        raise _wrong(f"{text!r} in forward={forward} is not a port")
    return int(text)


def _is_address(text: str) -> bool:
    import socket

    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except OSError:
            continue
        return True
    return False


def _number(option: str, text: str, least: int, most: int) -> int:
    if not (text.isascii() and text.isdigit() and least <= int(text[:9]) <= most):
        raise _wrong(f"{option!r} is not between {least} and {most}")
    return int(text)


def _wrong(what: str) -> ConfigError:
    return ConfigError(what, cure=f"write {SYNTAX}", option=OPTION)


# --- checked --------------------------------------------------------------------------------------


def check(spec: Spec) -> Spec:
    """`spec` with an address of its own. Raises ConfigError for what cannot be."""
    from pyvmm.host import tap

    if len(spec.tap.encode()) >= tap.IFNAMSIZ or "/" in spec.tap or "\0" in spec.tap:
        raise ConfigError(
            f"{spec.tap!r} is not a name of an interface",
            cure=f"use at most {tap.IFNAMSIZ - 1} characters",
            option=OPTION,
        )
    if not spec.mac:
        spec = replace(spec, mac=random_mac())
    mac_bytes(spec.mac)
    rates.check(spec, OPTION, rates.NET_KEYS)
    if spec.vhost:
        _check_vhost(spec)
    if spec.vhost_user:
        _check_vhost_user(spec)
    for text in spec.forwards:
        parse_forward(text)
    return spec


def for_copy(spec: Spec, name: str) -> Spec:
    """`spec` for the VM `name`, a copy of one that has this: with an address and another end of
    its own. Raises ConfigError for another end that only one VM can have."""
    if spec.tap and not (spec.create and "%d" in spec.tap and not spec.address):
        raise ConfigError(
            f"copies cannot share the tap {spec.tap}, or its address",
            cure="use --net user, or --net tap,bridge=NAME, in a VM that is to be copied",
        )
    # What this machine forwards stays the original's: a port has one listener.
    return replace(spec, mac=random_mac(), forwards=())


def _check_vhost(spec: Spec) -> None:
    why_not = _excludes_vhost(spec)
    if why_not:
        raise ConfigError(f"vhost {why_not}", cure="leave out vhost", option=OPTION)


def _check_vhost_user(spec: Spec) -> None:
    limits = [key for key, field in rates.NET_KEYS.items() if getattr(spec, field)]
    why_not = ""
    if spec.tap:
        why_not = "goes with user: a tap has vhost"
    elif limits:
        why_not = f"and {limits[0]} exclude each other: passt moves frames as fast as it can"
    elif spec.packed:
        why_not = "and packed exclude each other: passt knows split virtqueues only"
    if why_not:
        raise ConfigError(f"vhost-user {why_not}", cure="leave out vhost-user", option=OPTION)


def _excludes_vhost(spec: Spec) -> str:
    """The reason why the kernel cannot move the frames of `spec`; "" if nothing does."""
    limits = [key for key, field in rates.NET_KEYS.items() if getattr(spec, field)]
    if not spec.tap:
        return "goes with a tap: passt's frames come through a socket"
    if limits:
        return f"and {limits[0]} exclude each other: the kernel moves frames as fast as it can"
    if spec.packed:
        return "and packed exclude each other: the kernel knows split virtqueues only"
    return ""


def random_mac() -> str:
    """A card's address that no other has, most likely."""
    # Locally administered, unicast (IEEE 802); QEMU's and KVM's usual prefix.
    return b"\x52\x54\x00".hex(":") + ":" + os.urandom(3).hex(":")


def mac_bytes(text: str) -> bytes:
    """The 6 bytes of ``52:54:00:12:34:56``. Raises ConfigError, for a group's address too."""
    parts = text.split(":")
    try:
        mac = bytes(int(part, 16) for part in parts if len(part) == 2)
    except ValueError:
        mac = b""
    if len(mac) != 6 or len(parts) != 6 or mac[0] & 1 or not any(mac):
        raise ConfigError(
            f"{text!r} is not a card's address", cure="write it as 52:54:00:12:34:56", option=OPTION
        )
    return mac


# --- opened ---------------------------------------------------------------------------------------


def open_device(spec: Spec, context: Context) -> NetDevice | VhostUserDevice:
    """Open the tap or start passt, and put a device in front of it. Raises ConfigError."""
    from pyvmm.virtio.net.device import NetDevice

    if spec.vhost_user:
        return _open_vhost_user(spec, context)
    if served := vhosts(spec, context):
        return _open_vhost(spec, context, served)
    backend: Backend
    backend, other_end = _open_tap(spec) if spec.tap else (_open_stream(spec), "user")
    context.closing.callback(backend.close)
    name = f"net-{other_end}"
    return NetDevice(
        backend,
        name=name,
        mac=mac_bytes(spec.mac),
        trace=context.trace,
        receive_limits=_limits(spec, "rx"),
        send_limits=_limits(spec, "tx"),
    )


def vhosts(spec: Spec, context: Context) -> list[VhostNet]:
    """One for each pair of queues, if the kernel is to move the frames. Raises ConfigError."""
    is_asked_for = spec.vhost is not None
    # Whoever traces requests wants to see the frames, which only our own path shows.
    if not (spec.vhost if is_asked_for else not (_excludes_vhost(spec) or context.trace)):
        return []
    with ExitStack() as opened:
        try:
            served = [opened.enter_context(_vhost_net(number)) for number in range(spec.queues)]
        except PyvmmError:
            if is_asked_for:
                raise
            return []
        context.closing.push(opened.pop_all())
    return served


def _vhost_net(number: int) -> VhostNet:
    """For that pair of queues. Raises ConfigError, HostError."""
    from pyvmm.host import handed, vhost

    if handed.present():
        return vhost.take_net(handed.need(f"{_VHOST}{number}"))
    return vhost.open_net(OPTION)


def _open_vhost(spec: Spec, context: Context, served: Sequence[VhostNet]) -> NetDevice:
    from pyvmm.host import handed, log, tap
    from pyvmm.virtio.net.vhost_device import VhostNetDevice

    backend, tap_name = _open_tap(spec)
    context.closing.callback(backend.close)
    interface = tap.Interface(tap_name)
    if handed.present():
        told = []
        for one in _TOLD:
            told.append(handed.need(one))
            context.closing.callback(os.close, told[-1])
        interface = tap.Interface(tap_name, *told)
    name = f"net-{tap_name}"
    if context.trace is not None:
        log.to_stderr(f"{name}: the kernel moves its frames (vhost); they are not traced")
    return VhostNetDevice(backend, served, interface, name=name, mac=mac_bytes(spec.mac))


def _open_vhost_user(spec: Spec, context: Context) -> VhostUserDevice:
    from pyvmm.errors import HostError
    from pyvmm.host import log, passt
    from pyvmm.kinds.vhost_user import types
    from pyvmm.vhost_user.protocol import BackEndError
    from pyvmm.virtio.vhost_user.device import VhostUserDevice

    name = "net-user"
    if context.trace is not None:
        log.to_stderr(f"{name}: passt moves its frames (vhost-user); they are not traced")
    try:
        device = VhostUserDevice(
            "the other end of its socket (passt)",
            types.card(mac_bytes(spec.mac), spec.mtu or passt.MTU),
            name=name,
            queue_size=_VHOST_USER_QUEUE,
            reconnect=0,  # it is the one that we have started: no other comes
            connection=start_passt(spec),
            server="passt",
        )
    except (BackEndError, HostError) as error:
        raise ConfigError(f"passt {error}", cure="leave out vhost-user", option=OPTION) from None
    context.closing.callback(device.close)
    return device


def _limits(spec: Spec, way: str) -> Limits | None:
    limits = limiter(spec, rates.net_fields(way))
    if limits is None:
        return None
    from pyvmm.virtio.net.limits import Limits

    return Limits(limits)


def _open_stream(spec: Spec) -> Backend:
    from pyvmm.host import handed, passt, syscalls
    from pyvmm.virtio.net.stream import LARGEST_THROUGH_PORT, StreamBackend

    if spec.stream:
        fd = handed.take(spec.stream)
        if fd is None:
            fd = syscalls.open_file(spec.stream, os.O_RDWR | os.O_NONBLOCK)
        return StreamBackend(fd, spec.mtu, LARGEST_THROUGH_PORT)
    return StreamBackend(start_passt(spec).detach(), spec.mtu or passt.MTU)


def start_passt(spec: Spec) -> passt.Socket:
    """User-mode networking as `spec` wants it; our end of the cable. Raises ConfigError."""
    from pyvmm import images
    from pyvmm.host import handed, passt

    if handed.has(_CABLE):
        return handed.take_stream(_CABLE)
    passt.newer_by(images.passt_command)
    forwards = [parse_forward(text) for text in spec.forwards]
    mtu = spec.mtu or passt.MTU
    access, vhost_user = spec.host_access, spec.vhost_user
    return passt.start(forwards, mtu, host_access=access, vhost_user=vhost_user)


def cross(spec: Spec, border: Border) -> Crossing:
    """passt stays here, where the network is: its frames come through a stream. Raises ConfigError
    for a tap, which is here too."""
    from pyvmm.kinds.border import Crossing

    if spec.tap:
        raise ConfigError(
            f"the emulated KVM host cannot reach {spec.tap}, a tap of this machine",
            cure="use --net user",
            option=OPTION,
        )
    from pyvmm.emulated_host import HostStream

    if spec.vhost_user:
        from pyvmm.host import log

        log.to_stderr(
            "passt serves the card by its socket, and not by vhost-user: it is out here, and the "
            "guest's memory in the emulated KVM host"
        )
        spec = replace(spec, vhost_user=False)
    inside = through_port(spec, border.place("net"))
    cable = start_passt(inside)
    border.closing.callback(cable.close)
    return Crossing(inside, streams=(HostStream(inside.stream, cable.fileno()),))


def opens_by_name(spec: Spec) -> bool:
    """A tap, or a program."""
    return True


def hand_over(spec: Spec, closing: ExitStack) -> tuple[Spec, dict[str, int]]:
    """The queues of its tap, with what has the kernel move its frames, or the cable of its passt.
    Raises ConfigError."""
    if not spec.tap:
        cable = start_passt(spec)
        closing.callback(cable.close)
        return spec, {_CABLE: cable.fileno()}
    fds, name, mtu = _tap_here(spec)
    for fd in fds:
        closing.callback(os.close, fd)
    found = {f"{_QUEUE}{number}": fd for number, fd in enumerate(fds)}
    vhosts = _vhosts_here(spec, closing)
    spec = replace(spec, tap=name, mtu=mtu, vhost=spec.vhost if vhosts else False)
    return spec, found | vhosts


def _vhosts_here(spec: Spec, closing: ExitStack) -> dict[str, int]:
    """What has the kernel move the frames of `spec` in another process; nothing if that is not
    wanted, or cannot be had. Raises ConfigError if it is asked for."""
    from pyvmm.errors import HostError
    from pyvmm.host import tap, vhost

    if spec.vhost is False or (spec.vhost is None and _excludes_vhost(spec)):
        return {}
    found: dict[str, int] = {}
    try:
        for number in range(spec.queues):
            found[f"{_VHOST}{number}"] = fd = vhost.open_device(OPTION)
            closing.callback(os.close, fd)
        for name, opens in zip(_TOLD, (tap.open_counts, _changes_here), strict=True):
            found[name] = fd = opens()
            closing.callback(os.close, fd)
    except (PyvmmError, OSError) as error:
        if not spec.vhost:
            return {}
        if isinstance(error, OSError):
            raise HostError(error.errno or 0, "counters of interfaces") from None
        raise
    return found


def _changes_here() -> int:
    from pyvmm.host import tap

    return tap.interface_changes().detach()


def through_port(spec: Spec, path: str) -> Spec:
    """`spec` with its passt elsewhere, at the other end of the virtio-serial port `path`."""
    from pyvmm.virtio.net.header import ETH_HEADER, VLAN_TAG
    from pyvmm.virtio.net.stream import LARGEST_THROUGH_PORT

    most = LARGEST_THROUGH_PORT - ETH_HEADER - VLAN_TAG
    return replace(spec, stream=path, mtu=min(spec.mtu or most, most))


def _open_tap(spec: Spec) -> tuple[TapBackend, str]:
    from pyvmm.host import handed
    from pyvmm.virtio.net.tap import TapBackend

    fds, name, mtu = _tap_handed(spec) if handed.present() else _tap_here(spec)
    try:
        return TapBackend(fds, mtu), name
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _tap_handed(spec: Spec) -> tuple[list[int], str, int]:
    """The queues of a tap that somebody else has opened. Raises ConfigError."""
    from pyvmm.host import handed, tap

    fds: list[int] = []
    try:
        while (fd := handed.take(f"{_QUEUE}{len(fds)}")) is not None:
            fds.append(fd)
            if not tap.is_queue(fd):
                raise ConfigError(f"what was handed over is no queue of the tap {spec.tap}")
            os.set_blocking(fd, False)
        if len(fds) != spec.queues or not spec.mtu:
            raise ConfigError(
                f"{len(fds)} queues of the tap {spec.tap} were handed over",
                cure="as many as queues= says, and say mtu=",
            )
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds, spec.tap, spec.mtu


def _tap_here(spec: Spec) -> tuple[list[int], str, int]:
    """The queues of a tap, its name and its MTU. Raises ConfigError."""
    from pyvmm.host import log, tap

    fds, name = tap.open_tap(spec.tap, spec.queues, create=spec.create)
    try:
        if spec.create:
            from pyvmm.host import interfaces  # which takes a while to import

            interfaces.set_up(name, mtu=spec.mtu, address=spec.address, bridge=spec.bridge)
        elif not tap.is_up(name):
            log.to_stderr(f"the tap {name} is down: `ip link set {name} up` lets frames through")
        return fds, name, spec.mtu or max(LEAST_MTU, min(tap.mtu_of(name), MOST_MTU))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
