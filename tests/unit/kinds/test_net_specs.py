"""--net: from text to a specification, and what the user is told where that cannot be."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.host import passt, tap, vhost
from pyvmm.host.syscalls import Closable
from pyvmm.kinds import net as device_net
from pyvmm.kinds import registry as devices
from pyvmm.kinds.interface import Context, limiter
from pyvmm.kinds.net import Spec, check, parse, parse_forward
from pyvmm.kinds.vm_spec import from_json, to_json, validate
from pyvmm.spec import rates
from pyvmm.spec.vm import VmSpec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("user", Spec()),
        ("user,host", Spec(host_access=True)),
        ("user,vhost-user", Spec(vhost_user=True)),
        ("user,mac=02:00:00:00:00:07,mtu=1400", Spec(mac="02:00:00:00:00:07", mtu=1400)),
        ("user,forward=8080:80", Spec(forwards=("tcp:127.0.0.1:8080:80",))),
        (
            "user,forward=8080:80,forward=udp:0.0.0.0:5353:53,forward=tcp:[::1]:22:22",
            Spec(forwards=("tcp:127.0.0.1:8080:80", "udp:0.0.0.0:5353:53", "tcp:[::1]:22:22")),
        ),
        ("tap=tap0", Spec(tap="tap0")),
        ("tap=tap0,queues=4", Spec(tap="tap0", queues=4)),
        ("tap=t,create", Spec(tap="t", create=True)),
        ("tap=t,vhost,queues=2", Spec(tap="t", vhost=True, queues=2)),
        ("tap,vhost", Spec(tap="pyvmm%d", create=True, vhost=True)),
        ("tap=t,vhost=on", Spec(tap="t", vhost=True)),
        ("tap=t,vhost=off", Spec(tap="t", vhost=False)),
        ("tap", Spec(tap="pyvmm%d", create=True)),
        (
            "tap,address=10.1.0.1/24,bridge=br0",
            Spec(tap="pyvmm%d", create=True, address="10.1.0.1/24", bridge="br0"),
        ),
    ],
)
def test_what_the_option_says(text: str, spec: Spec) -> None:
    assert parse(text) == spec


@pytest.mark.parametrize(
    "text",
    [
        *(
            "user,vhost",
            "user,vhost=off",
            "tap=t,vhost=",
            "tap=t,vhost=yes",
            "tap=t,create=on",
            "",
            "bridge",
            "user=x",
            "tap=",
            "user,queues=2",
            "tap=tap0,forward=1:2",
            "tap=tap0,host",
        ),
        *("user,mtu=67", "user,mtu=65536", "user,mtu=x", "user,mtu=", "tap=t,queues=0"),
        *("tap=t,queues=17", "user,unknown", "user,forward=", "user,forward=80"),
        *("user,forward=0:80", "user,forward=80:65536", "user,forward=a:b", "user,forward=x:1:2"),
        *("user,forward=sctp:1:2", "user,forward=1.2.3:1:2", "user,forward=²:1", "user,,mtu=1500"),
    ],
)
def test_what_is_wrong_is_one_line_with_a_cure(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).startswith("--net: ") and caught.value.cure
    assert "\n" not in str(caught.value)


def test_a_forward_with_one_port_is_told_that_there_are_two() -> None:
    with pytest.raises(ConfigError, match="forward=8080 does not name two ports"):
        parse("user,forward=8080")


@pytest.mark.parametrize(
    "spec",
    [
        *(Spec(mac=mac) for mac in ("x", "52:54:00:12:34", "01:00:5e:00:00:01", "0:0:0:0:0:0")),
        *(Spec(mac=mac) for mac in ("00:00:00:00:00:00", "52:54:00:12:34:56:78", "525400123456")),
        *(Spec(tap=name) for name in ("a" * 16, "a/b", "a\0b")),
    ],
)
def test_addresses_and_names_are_checked(spec: Spec) -> None:
    with pytest.raises(ConfigError):
        check(spec)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("tap=t,vhost,rx-bps=1M", "vhost and rx-bps exclude each other"),
        ("tap=t,vhost,tx-pps-burst=5,tx-pps=5", "vhost and tx-pps exclude each other"),
        ("tap=t,vhost,packed", "vhost and packed exclude each other"),
        ("tap=t,vhost=on,packed", "vhost and packed exclude each other"),
    ],
)
def test_what_the_kernel_cannot_do(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        check(devices.parse("net", text))  # type: ignore[arg-type]
    assert caught.value.cure == "leave out vhost"
    with pytest.raises(ConfigError, match="vhost goes with a tap"):
        check(Spec(vhost=True))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("user,vhost-user,rx-bps=1M", "vhost-user and rx-bps exclude each other"),
        ("user,vhost-user,packed", "vhost-user and packed exclude each other"),
    ],
)
def test_what_passt_cannot_do_by_vhost_user(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        check(devices.parse("net", text))  # type: ignore[arg-type]
    assert caught.value.cure == "leave out vhost-user"
    with pytest.raises(ConfigError, match="vhost-user goes with user"):
        check(Spec(tap="t", vhost_user=True))
    with pytest.raises(ConfigError, match="unknown option 'vhost-user'"):
        parse("tap=t,vhost-user")


def test_without_vhost_in_the_kernel_it_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vhost, "DEVICE", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="no vhost: open") as caught, ExitStack() as closing:
        spec = check(parse("tap=pyvmmv8,create,vhost"))
        device_net.open_device(spec, Context("vm", None, closing))
    assert caught.value.cure == "`modprobe vhost_net` may help, or leave out vhost"
    assert not tap.exists("pyvmmv8")


class _Opened(Closable):
    """A vhost-net that can be had."""

    features = 0

    def __init__(self) -> None:
        self.closed = False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[_Opened]:
    """The descriptors opened of a /dev/vhost-net of which there are three."""
    found: list[_Opened] = []

    def open_net(option: str) -> _Opened:
        if len(found) == 3:
            raise ConfigError("no vhost: no more", option=option)
        found.append(_Opened())
        return found[-1]

    monkeypatch.setattr(vhost, "open_net", open_net)
    return found


@pytest.mark.parametrize(
    ("text", "traced", "count"),
    [
        ("tap=t", False, 1),
        ("tap=t,queues=3", False, 3),
        ("tap=t,vhost", True, 1),
        ("tap=t,vhost=off", False, 0),
        ("tap=t", True, 0),  # whose frames are to be seen
        ("tap=t,rx-bps=1M", False, 0),
        ("tap=t,packed", False, 0),
        ("user", False, 0),
    ],
)
def test_the_kernel_moves_the_frames_where_it_can(
    text: str, traced: bool, count: int, opened: list[_Opened]
) -> None:
    [spec] = devices.read("net", text)
    with ExitStack() as closing:
        trace = (lambda *_: None) if traced else None
        context = Context("vm", trace, closing)
        assert device_net.vhosts(check(spec), context) == opened  # type: ignore[arg-type]
        assert len(opened) == count and not any(one.closed for one in opened)
    assert all(one.closed for one in opened)


def test_without_vhost_for_every_pair_frames_are_ours_unless_asked_for(
    opened: list[_Opened],
) -> None:
    with ExitStack() as closing:
        context = Context("vm", None, closing)
        assert device_net.vhosts(check(parse("tap=t,queues=4")), context) == []
        assert len(opened) == 3 and all(one.closed for one in opened)
        opened.clear()
        with pytest.raises(ConfigError, match="no vhost: no more"):
            device_net.vhosts(check(parse("tap=t,queues=4,vhost=on")), context)
        assert len(opened) == 3 and all(one.closed for one in opened)


def test_every_card_gets_an_address_of_its_own() -> None:
    macs = {check(Spec()).mac for _ in range(50)}
    assert len(macs) == 50
    for mac in macs:
        first = device_net.mac_bytes(mac)[0]
        assert first & 2 and not first & 1, "locally administered, not a group's"


def test_a_card_survives_the_way_into_another_process() -> None:
    spec = validate(VmSpec(kernel="k", devices=(parse("user,forward=8080:80"), parse("tap=t0"))))
    assert from_json(to_json(spec)) == spec


def test_through_a_port_frames_are_shorter() -> None:
    assert device_net.through_port(check(Spec()), "/run/x").mtu + 18 + 4 <= 32768
    assert device_net.through_port(check(Spec(mtu=1400)), "/run/x").mtu == 1400


# --- what the host may refuse ---------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_port_in_use_is_one_line(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "find_program", lambda name: "/bin/false")
    kind = socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", 0))
        if protocol == "tcp":
            holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{protocol} port {port} of 127.0.0.1 is in use"):
            passt.start([parse_forward(f"{protocol}:{port}:80")])


def test_an_address_that_is_not_ours_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "find_program", lambda name: "/bin/false")
    with pytest.raises(ConfigError, match=r"of 203\.0\.113\.9 cannot be had"):
        passt.start([parse_forward("203.0.113.9:8080:80")])


def test_whatever_else_passt_complains_of_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "find_program", lambda name: "/bin/false")
    monkeypatch.setattr(passt, "_newer", None)
    with pytest.raises(ConfigError, match="passt does not start: exit code 1"):
        passt.start([])


def test_a_place_without_user_namespaces_gets_a_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "passt"
    program.write_text('#!/bin/sh\necho "Couldn\'t create user namespace: $0" >&2; exit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(passt, "find_program", lambda name: str(program))
    monkeypatch.setattr(passt, "_newer", None)
    with pytest.raises(ConfigError, match=r"user namespace: .*max_user_namespaces\), or use a tap"):
        passt.start([])


def test_a_tap_that_is_not_there_is_one_line() -> None:
    with pytest.raises(ConfigError, match="there is no tap nosuchtap0; `ip tuntap add"):
        tap.open_tap("nosuchtap0")


def test_what_is_no_tap_is_one_line() -> None:
    try:
        with pytest.raises(ConfigError, match=r"lo is not a tap interface|taps"):
            tap.open_tap("lo")
    except PermissionError:
        pytest.skip("no /dev/net/tun here")


def test_limits_of_both_directions() -> None:
    spec = parse("user,rx-bps=10M,tx-pps=500,rx-bps-burst=1m,tx-pps-burst=7")
    assert (spec.rx_bps, spec.rx_bps_burst) == (10 << 20, 1 << 20)
    assert (spec.tx_pps, spec.tx_pps_burst) == (500, 7)
    assert limiter(spec, rates.net_fields("rx")) is not None
    assert limiter(Spec(rx_bps=1), rates.net_fields("tx")) is None
    whole = validate(VmSpec(kernel="k", devices=(spec,)))
    assert from_json(to_json(whole)) == whole


@pytest.mark.parametrize("text", ["rx-bps=0", "tx-pps=x", "rx-bps", "tx-iops=3", "rx-pps=1.5"])
def test_limits_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--net"):
        parse(f"user,{text}")


def test_a_burst_needs_its_own_rate() -> None:
    with pytest.raises(ConfigError, match="rx-bps-burst without rx-bps"):
        check(parse("user,rx-bps-burst=1M,tx-bps=3"))
