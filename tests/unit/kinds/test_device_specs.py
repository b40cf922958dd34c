"""Devices beside the disks: from the command line to a specification, and as JSON and back."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest

from pyvmm.errors import ConfigError
from pyvmm.kinds import port
from pyvmm.kinds import registry as devices
from pyvmm.kinds.border import Border, Crossing
from pyvmm.kinds.interface import Context
from pyvmm.kinds.vm_spec import from_json, to_json, validate
from pyvmm.machine.board.registry import board_for
from pyvmm.machine.cmdline import command_line
from pyvmm.spec.vm import DiskSpec, VmSpec, check

X86 = board_for("x86_64")


def vm(*specs) -> VmSpec:
    return validate(VmSpec(kernel="vmlinuz", devices=specs))


def border(closing: ExitStack) -> Border:
    return Border(closing, lambda path, option: path)


def test_a_device_survives_the_way_into_another_process():
    spec = vm(devices.parse("rng", ""))
    assert from_json(to_json(spec)) == spec
    assert [device.kind for device in spec.devices] == ["rng"]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="no device 'toaster'"):
        devices.parse("toaster", "")


@pytest.mark.parametrize("rows", ['[["toaster", {}]]', '[["rng", {"odd": 1}]]', "[1]"])
def test_json_that_describes_no_device_is_refused(rows):
    text = to_json(vm()).replace('"devices": []', f'"devices": {rows}')
    with pytest.raises(ConfigError):
        from_json(text)


def test_devices_and_disks_share_the_interrupt_lines():
    with pytest.raises(ConfigError, match="interrupt lines"):
        vm(*[devices.parse("rng", "")] * 30)


# --- packed rings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("rng", ""),
        ("rng", "iops=5"),
        ("balloon", "size=1M"),
        ("console", "virtio"),
        ("vsock", "path=/run/a,,packed"),
        ("net", "user,mtu=1400"),
        ("ports", "name=a,path=/run/a\nname=b,path=/run/b"),
        ("user", "d.py:D,text=packed"),
    ],
)
def test_any_device_may_be_packed(kind, text):
    plain = devices.parse(kind, text)
    packed = devices.parse(kind, f"{text},packed".lstrip(","))
    assert not plain.packed and packed.packed
    assert replace(packed, packed=False) == plain
    assert from_json(to_json(vm(packed))).devices[0].packed


@pytest.mark.parametrize("packed", [False, True])
def test_a_packed_device_offers_packed_rings(packed):
    with ExitStack() as closing:
        spec = devices.parse("rng", "packed" if packed else "")
        device = devices.open_device(spec, Context("vm", None, closing))
    assert device.features >> 34 & 1 == packed


# --- vsock ---------------------------------------------------------------------------------------


def test_vsock_options():
    spec = devices.parse("vsock", "cid=7,path=/run/a,,b")
    assert (spec.cid, spec.path) == (7, "/run/a,b")
    assert devices.parse("vsock", "path=x").cid == 3
    assert devices.parse("vsock", "") == devices.parse("vsock", "cid=3")  # without a path
    assert from_json(to_json(vm(spec))) == vm(spec)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("path=", "unknown option"),
        ("path=x,cid=3x", "cannot read the cid"),
        ("path=x,cid=٣", "cannot read the cid"),
        ("path=x,port=1", "unknown option 'port=1'"),
        ("path=x,cid=2", "cannot have the cid 2"),
        ("path=x,cid=4294967295", "cannot have the cid"),
        ("path=x,cid=" + "9" * 5000, "cannot have the cid"),
        ("path=" + "x" * 97, "too long"),
        ("path=" + "x" * 5000, "too long"),
    ],
)
def test_vsock_options_that_cannot_be(text, why):
    with pytest.raises(ConfigError, match=f"--vsock: .*{why}") as refused:
        vm(devices.parse("vsock", text))
    assert len(str(refused.value)) < 300


def test_a_vsock_device_without_a_path_has_no_socket_of_its_own():
    with ExitStack() as closing:
        crossing = devices.cross(devices.parse("vsock", ""), border(closing))
    assert crossing == Crossing(devices.parse("vsock", ""))


def test_vsock_sockets_are_made_here_for_an_emulated_host(tmp_path):
    path = tmp_path / "v"
    with ExitStack() as closing:
        crossing = devices.cross(devices.parse("vsock", f"path={path}"), border(closing))
        [(listener, inside)] = crossing.listening
        assert listener.path == str(path) and path.is_socket()
        assert crossing.reached == (f"{path}_*",)
        assert crossing.spec.listen_at == inside and inside != str(path)
    assert not path.exists()
    rng = devices.parse("rng", "")
    assert devices.cross(rng, border(ExitStack())) == Crossing(rng)


# --- console and ports ---------------------------------------------------------------------------


def test_a_virtio_console_is_the_kernels_console():
    spec = vm(devices.parse("console", "virtio"))
    assert from_json(to_json(spec)) == spec
    assert "console=hvc0" in command_line(spec, X86) and "ttyS0" not in command_line(spec, X86)
    assert "console=ttyS0" in command_line(vm(devices.parse("ports", "name=a,path=b")), X86)
    with pytest.raises(ConfigError, match="--console: unknown console 'vga'"):
        devices.parse("console", "vga")


def test_ports_become_one_device():
    spec = vm(devices.parse("ports", "name=agent,path=/run/a,,b\nname=log,path=c"))
    assert from_json(to_json(spec)) == spec
    [device] = spec.devices
    assert [(port.name, port.path) for port in device.ports] == [
        ("agent", "/run/a,b"),
        ("log", "c"),
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "unknown option"),
        ("name=a", "no name or no path"),
        ("path=a", "no name or no path"),
        ("name=,path=a", "unknown option"),
        ("name=a,path=b,c=d", "unknown option 'c=d'"),
        ("name=a/b,path=c", "has a slash"),
        ("name=..,path=c", "has a slash"),
        ("name=\x1b,path=c", "not printable"),
        ("name=" + "x" * 65 + ",path=c", "too long"),
        ("name=a,path=b\nname=a,path=c", "two ports are called 'a'"),
        ("\n".join(f"name=p{n},path=p{n}" for n in range(16)), "16 ports"),
    ],
)
def test_ports_that_cannot_be(text, why):
    with pytest.raises(ConfigError, match=f"--port: .*{why}"):
        vm(devices.parse("ports", text))


def test_sockets_of_ports_are_made_here_for_an_emulated_host(tmp_path):
    text = "\n".join(f"name={name},path={tmp_path / name}" for name in ("a", "b"))
    with ExitStack() as closing:
        crossing = devices.cross(vm(devices.parse("ports", text)).devices[0], border(closing))
        assert (tmp_path / "a").is_socket() and (tmp_path / "b").is_socket()
        inside = [port.path for port in crossing.spec.ports]
        assert inside == [path for _, path in crossing.listening] and len(set(inside)) == 2
        assert crossing.reached == ()
    assert list(tmp_path.iterdir()) == []


# --- balloon -------------------------------------------------------------------------------------


def test_balloon_options():
    spec = devices.parse("balloon", "size=256M,free-page-reporting,deflate-on-oom")
    assert (spec.size, spec.reporting, spec.deflate_on_oom) == (256 << 20, True, True)
    empty = devices.parse("balloon", "")
    assert (empty.size, empty.reporting, empty.deflate_on_oom) == (0, False, False)
    assert from_json(to_json(vm(spec))) == vm(spec)


@pytest.mark.parametrize("text", ["size=", "size=x", "size=-1", "free-page-reporting=1", "odd"])
def test_balloon_options_that_cannot_be(text):
    with pytest.raises(ConfigError, match="--balloon: "):
        vm(devices.parse("balloon", text))
    with pytest.raises(ConfigError, match="--balloon: a size of"):
        vm(devices.parse("balloon", "size=99999999G"))


@pytest.mark.parametrize("name", ["transport", "arch", "discovery", "on_reboot"])
def test_a_long_value_in_a_saved_spec_is_cut_where_it_is_shown(name: str) -> None:
    data = json.loads(to_json(VmSpec("k")))
    with pytest.raises(ConfigError) as caught:
        check(from_json(json.dumps({**data, name: "x" * 70_000})))
    assert len(str(caught.value)) < 500


def test_a_long_kind_of_a_device_is_cut_where_it_is_shown() -> None:
    data = json.loads(to_json(VmSpec("k")))
    with pytest.raises(ConfigError, match="there is no device 'xxx") as caught:
        from_json(json.dumps({**data, "devices": [["x" * 70_000, {}]]}))
    assert len(str(caught.value)) < 500


def test_a_long_name_of_a_disk_or_port_is_cut_where_it_is_shown() -> None:
    long = "x" * 70_000
    spec = VmSpec("k", disks=(DiskSpec("/d", id=long),))
    ports = VmSpec("k", devices=(port.Spec((port.PortSpec(long, "/p"),)),))
    for wrong in (spec, ports):
        with pytest.raises(ConfigError) as caught:
            validate(wrong)
        assert len(str(caught.value)) < 500
