"""Networking without root: passt(1) takes frames from a socket and makes connections of them.

The guest is alone on a network 10.0.2.0/24 with passt as its gateway, DHCP server and the origin of
all that comes from outside. passt is given one end of a socket pair, so nothing of it has a name;
it ends when our end is closed, by whatever ends us.

Which passt: this machine's own if it is recent, else the one of pyvmm.images if that is there, else
this machine's. Decision 0310 has the measurements behind that.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.host.programs import find_program
from pyvmm.host.syscalls import read_or_empty

Socket = socket.socket

GUEST, GATEWAY, PREFIX = "10.0.2.15", "10.0.2.2", 24
DNS = "10.0.2.3"  # queries to it go to the name server on this machine's loopback address
MTU = 65520  # passt's own default: whole TCP segments of 64 KiB, so that there are few of them
IMAGE = "programs-passt"
CURE = (
    f"run: pyvmm image build {IMAGE}, or as root: apt-get install --no-install-recommends passt, "
    "or use --net tap=NAME"
)
_GATEWAY_MAC = "52:55:0a:00:02:02"
_OPTION = "--net"
_WITHOUT_NAMESPACES = "allow user namespaces here (user.max_user_namespaces), or use a tap"
_PROTOCOLS = {"tcp": (socket.SOCK_STREAM, "-t"), "udp": (socket.SOCK_DGRAM, "-u")}
SO_SNDBUFFORCE = 32  # <asm-generic/socket.h>
_UNDER_WAY = 8 << 20  # bytes; a guest's TCP window is up to 6 MiB (net.ipv4.tcp_rmem)
_PATIENCE = 90.0  # seconds for passt to start: milliseconds, but for a machine of fifty VMs
_NOISE = ("syslog", "as root", "AVX2")  # in lines that are not a reason for anything
_ANY = ("0.0.0.0", "::")
_VHOST_USER = ("--vhost-user",)  # of November 2024 and later

_newer: Callable[[bool], Sequence[str]] | None = None


def newer_by(find: Callable[[bool], Sequence[str]]) -> None:
    """From now on `find` is asked for a recent passt where this machine has none: the beginning of
    its command line, made first where missing if the argument is true. It raises ConfigError."""
    global _newer
    _newer = find


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


def start(
    forwards: Sequence[Forward],
    mtu: int = MTU,
    *,
    host_access: bool = False,
    vhost_user: bool = False,
) -> Socket:
    """Start passt; our end of its socket, on which frames follow their length in 4 bytes, or which
    with `vhost_user` is for a vhost-user front end.

    With `host_access` the gateway's address stands for this machine's loopback address. What the
    passt that is there cannot do is said on stderr. Raises ConfigError for a missing passt, a port
    in use, and whatever else it complains of.
    """
    for forward in forwards:
        _check_free(forward)
    names = _NameServers.of_this_machine()
    lacking = [
        f"forward={forward}: clients on this machine's loopback address get no answers"
        for forward in forwards
        if _is_lost(forward, host_access)
    ]
    program = _choose([*lacking, *names.lacking()], vhost_user=vhost_user)
    arguments = [
        *program.command,
        *(_VHOST_USER if vhost_user else ()),
        *_arguments(mtu, host_access, recent=program.recent),
        *names.arguments(recent=program.recent),
    ]
    for forward in forwards:
        flag = _PROTOCOLS[forward.protocol][1]
        arguments += [flag, f"{forward.host}/{forward.port}:{forward.guest_port}"]
    if complaint := names.complaint():
        log.to_stderr(complaint)
    ours, theirs = socket.socketpair()
    _widen(theirs)
    with theirs:
        why = _run(arguments, theirs)
        if why is not None and "External interface not usable" in why:
            # A machine without a network of its own: the guest still has its forwards.
            why = _run([*arguments, "-i", "lo"], theirs)
    if why is not None:
        ours.close()
        cure = _WITHOUT_NAMESPACES if "user namespace" in why else ""
        raise ConfigError(f"passt does not start: {why}", cure=cure, option=_OPTION)
    return ours


# --- which passt ----------------------------------------------------------------------------------


class _Program(NamedTuple):
    command: Sequence[str]
    recent: bool


def is_recent(command: Sequence[str]) -> bool:
    """True if that passt is of August 2024 or later: it then tracks UDP flows by both addresses,
    and has --dns-host. Debian's do not tell their version."""
    return _knows(command, ("--map-host-loopback", "none"))


def _knows(command: Sequence[str], options: Sequence[str]) -> bool:
    """True if that passt takes `options`."""
    import subprocess  # only where passt is used

    try:
        done = subprocess.run(
            [*command, *options, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _choose(lacking: Sequence[str], *, vhost_user: bool) -> _Program:
    """The passt to start. An old one does, but for what is `lacking` then, in sentences: a recent
    one is made first for that, and where it cannot be had, they are said. With `vhost_user` none
    does that is older than that. Raises ConfigError."""
    own = find_program("passt")
    if own is not None and is_recent([own]) and (not vhost_user or _knows([own], _VHOST_USER)):
        return _Program([own], True)
    reason = ""
    for make in (False, True):
        if _newer is None or (make and own is not None and not lacking and not vhost_user):
            continue
        try:
            return _Program(_newer(make), True)
        except ConfigError as error:
            reason = str(error)
    if own is None:
        reason = f" ({reason})" if reason else ""
        raise ConfigError(f"user-mode networking needs passt{reason}", cure=CURE, option=_OPTION)
    if vhost_user:
        raise ConfigError(
            f"{own} has no vhost-user, as it is older than 2025{reason and f' ({reason})'}",
            cure=f"run: pyvmm image build {IMAGE}, or leave out vhost-user",
            option=_OPTION,
        )
    for what in lacking:
        log.to_stderr(
            f"{what} by {own}, which is older than August 2024"
            f" ({reason or f'pyvmm image build {IMAGE} makes a newer one'})"
        )
    return _Program([own], False)


def which() -> str | None:
    """The passt that `start` would take where nothing special is wanted, in words; None if one
    would have to be made first, or installed."""
    own = find_program("passt")
    if own is not None and is_recent([own]):
        return own
    try:
        if _newer is not None:
            _newer(False)
            return f"the image {IMAGE}"
    except ConfigError:
        pass
    return own and f"{own}, older than August 2024: a newer one is made where that matters"


def _is_lost(forward: Forward, host_access: bool) -> bool:
    """True if an old passt loses the guest's answers to this machine's own clients: they come from
    a loopback address, which it shows as its own, and does not know again."""
    return forward.protocol == "udp" and _is_local(forward.host) and not host_access


# --- its arguments --------------------------------------------------------------------------------


def _widen(theirs: socket.socket) -> None:
    """Let much be under way to the guest: what does not fit passt drops, to send it all again."""
    for option in (SO_SNDBUFFORCE, socket.SO_SNDBUF):  # the first is for root only
        try:
            theirs.setsockopt(socket.SOL_SOCKET, option, _UNDER_WAY)
        except PermissionError:
            continue
        return


def _arguments(mtu: int, host_access: bool, *, recent: bool) -> list[str]:
    arguments = [
        "--quiet",
        *("--address", GUEST, "--netmask", str(PREFIX), "--gateway", GATEWAY),
        *("--mac-addr", _GATEWAY_MAC, "--mtu", str(mtu)),
    ]
    if recent:
        return [*arguments, "--map-host-loopback", GATEWAY if host_access else "none"]
    return [*arguments, "--stderr", *(() if host_access else ("--no-map-gw",))]


class _NameServers(NamedTuple):
    """This machine's name servers, by what becomes of them. passt tells the guest of those that are
    not `local`, which it reads from /etc/resolv.conf itself; `behind` are those that a local one
    asks (systemd-resolved)."""

    local: list[str]
    others: list[str]
    behind: list[str]

    @classmethod
    def of_this_machine(cls) -> _NameServers:
        local: list[str] = []
        others: list[str] = []
        for server in _servers("/etc/resolv.conf"):
            (local if _is_local(server) else others).append(server)
        behind = _servers("/run/systemd/resolve/resolv.conf") if local else []
        return cls(local, others, [server for server in behind if not _is_local(server)])

    @property
    def forwarded(self) -> str:
        """The one that a recent passt passes the guest's queries on to; "" for none."""
        return next((server for server in self.local if ":" not in server), "")

    def arguments(self, *, recent: bool) -> list[str]:
        """The options for passt."""
        if recent and self.forwarded:
            return ["--dns-forward", DNS, "--dns-host", self.forwarded]
        told = [] if self.others else self.behind
        return [word for server in told for word in ("--dns", server)]

    def lacking(self) -> list[str]:
        """A message about what an old passt cannot do."""
        if self.forwarded and not self.others and not self.behind:
            return [f"queries of the guest's to the name server {self.forwarded} are not passed on"]
        return []

    def complaint(self) -> str:
        """The reason why the guest has no name server, whatever passt it is; "" if it has one."""
        if self.others or self.behind or self.forwarded:
            return ""
        named = " and ".join(self.local) or "none"
        return f"the guest has no name server: /etc/resolv.conf names {named}"


def _servers(path: str) -> list[str]:
    lines = (line.split() for line in read_or_empty(path).splitlines())
    return [words[1] for words in lines if len(words) > 1 and words[0] == "nameserver"]


def _is_local(server: str) -> bool:
    return server.startswith("127.") or server in ("::1", *_ANY)


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
    told = [line for line in lines if not any(noise in line for noise in _NOISE)]
    return told[-1] if told else f"exit code {done.returncode}"
