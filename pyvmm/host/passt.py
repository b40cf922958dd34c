"""Networking without root: passt(1) takes frames from a socket and makes connections of them.

The guest is alone on a network 10.0.2.0/24 with passt as its gateway, DHCP server and the origin of
all that comes from outside. passt is given one end of a socket pair, so nothing of it has a name;
it ends when our end is closed, by whatever ends us.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.host.programs import find_program
from pyvmm.host.syscalls import read_or_empty

Socket = socket.socket

GUEST, GATEWAY, PREFIX = "10.0.2.15", "10.0.2.2", 24
MTU = 65520  # passt's own default: whole TCP segments of 64 KiB, so that there are few of them
CURE = "apt-get install --no-install-recommends passt, or use --net tap=NAME"
_GATEWAY_MAC = "52:55:0a:00:02:02"
_OPTION = "--net"
_PROTOCOLS = {"tcp": (socket.SOCK_STREAM, "-t"), "udp": (socket.SOCK_DGRAM, "-u")}
SO_SNDBUFFORCE = 32  # <asm-generic/socket.h>
_UNDER_WAY = 8 << 20  # bytes; a guest's TCP window is up to 6 MiB (net.ipv4.tcp_rmem)
_PATIENCE = 20.0  # seconds for passt to start, which takes milliseconds


class Forward(NamedTuple):
    """Connections to `port` at the address `host` of this machine reach `guest_port`.

    `protocol` is "tcp" or "udp"."""

    protocol: str
    host: str
    port: int
    guest_port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.protocol}:{host}:{self.port}:{self.guest_port}"


def start(forwards: Sequence[Forward], mtu: int = MTU, *, host_access: bool = False) -> Socket:
    """Start passt; our end of its socket, on which frames follow their length in 4 bytes.

    With `host_access` the gateway's address stands for this machine's loopback address. Raises
    ConfigError for a missing passt, a port in use, and whatever else it complains of.
    """
    program = find_program("passt")
    if program is None:
        raise ConfigError("user-mode networking needs passt", cure=CURE, option=_OPTION)
    for forward in forwards:
        _check_free(forward)
    arguments = _arguments(forwards, mtu, host_access)
    ours, theirs = socket.socketpair()
    _widen(theirs)
    with theirs:
        complaint = _run([program, *arguments], theirs)
        if complaint is not None and "External interface not usable" in complaint:
            # A machine without a network of its own: the guest still has its forwards.
            complaint = _run([program, *arguments, "-i", "lo"], theirs)
    if complaint is not None:
        ours.close()
        raise ConfigError(f"passt does not start: {complaint}", option=_OPTION)
    return ours


def _widen(theirs: socket.socket) -> None:
    """Let much be under way to the guest: what does not fit passt drops, to send it all again."""
    for option in (SO_SNDBUFFORCE, socket.SO_SNDBUF):  # the first is for root only
        try:
            theirs.setsockopt(socket.SOL_SOCKET, option, _UNDER_WAY)
        except PermissionError:
            continue
        return


def _arguments(forwards: Sequence[Forward], mtu: int, host_access: bool) -> list[str]:
    arguments = [
        *("--quiet", "--stderr"),
        *("--address", GUEST, "--netmask", str(PREFIX), "--gateway", GATEWAY),
        *("--mac-addr", _GATEWAY_MAC, "--mtu", str(mtu)),
    ]
    if not host_access:
        arguments.append("--no-map-gw")
    for server in _name_servers():
        arguments += ["--dns", server]
    for forward in forwards:
        flag = _PROTOCOLS[forward.protocol][1]
        arguments += [flag, f"{forward.host}/{forward.port}:{forward.guest_port}"]
    return arguments


def _name_servers() -> list[str]:
    """Name servers to tell the guest of where the machine's own is a local one (systemd-resolved),
    which the guest cannot reach; none where passt finds them itself."""

    def servers(path: str) -> list[str]:
        lines = (line.split() for line in read_or_empty(path).splitlines())
        return [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]

    configured = servers("/etc/resolv.conf")
    if any(not server.startswith("127.") and server != "::1" for server in configured):
        return []
    return servers("/run/systemd/resolve/resolv.conf")


def _check_free(forward: Forward) -> None:
    """Raise the ConfigError that tells what is wrong with a port better than passt would."""
    family = socket.AF_INET6 if ":" in forward.host else socket.AF_INET
    kind = _PROTOCOLS[forward.protocol][0]
    with socket.socket(family, kind) as probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((forward.host, forward.port))
            if kind == socket.SOCK_STREAM:
                probe.listen(1)
        except OSError as error:
            raise _cannot_bind(forward, error) from None


def _cannot_bind(forward: Forward, error: OSError) -> ConfigError:
    what = f"{forward.protocol} port {forward.port} of {forward.host}"
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"{what} is in use", cure="forward another one", option=_OPTION)
    if error.errno == errno.EACCES:
        return ConfigError(
            f"{what} needs root", cure="use one from 1024 on, as 8080:80", option=_OPTION
        )
    return ConfigError(f"{what} cannot be had: {os.strerror(error.errno or 0)}", option=_OPTION)


def _run(argv: list[str], theirs: socket.socket) -> str | None:
    """Run passt until it serves in the background: None, or what it complained of last."""
    import subprocess  # only where passt is used

    fd = theirs.fileno()
    try:
        done = subprocess.run(
            [*argv, "--fd", str(fd)],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            # Ctrl-C on the terminal is the guest's, or ends us, and passt after us.
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return f"it did not come up in {_PATIENCE:.0f} seconds"
    except OSError as error:
        return os.strerror(error.errno or 0)
    if done.returncode == 0:
        return None
    lines = done.stderr.decode(errors="replace").splitlines()
    told = [line for line in lines if "syslog" not in line and "as root" not in line]
    return told[-1] if told else f"exit code {done.returncode}"
