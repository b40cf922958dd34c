"""Devices beside the disks: from the command line to a specification, and as JSON and back."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from pyvmm.errors import ConfigError
from pyvmm.machine import devices
from pyvmm.machine.spec import VmSpec, from_json, to_json, validate


def vm(*specs) -> VmSpec:
    return validate(VmSpec(kernel="vmlinuz", devices=specs))


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


# --- vsock ---------------------------------------------------------------------------------------


def test_vsock_options():
    spec = devices.parse("vsock", "cid=7,path=/run/a,,b")
    assert (spec.cid, spec.path) == (7, "/run/a,b")
    assert devices.parse("vsock", "path=x").cid == 3
    assert from_json(to_json(vm(spec))) == vm(spec)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "unknown option"),
        ("cid=3", "no path"),
        ("path=", "unknown option"),
        ("path=x,cid=3x", "cannot read the cid"),
        ("path=x,cid=٣", "cannot read the cid"),
        ("path=x,port=1", "unknown option 'port=1'"),
        ("path=x,cid=2", "cannot have the cid 2"),
        ("path=x,cid=4294967295", "cannot have the cid"),
        ("path=x,cid=" + "9" * 5000, "cannot have the cid"),
        ("path=" + "x" * 97, "too long"),
    ],
)
def test_vsock_options_that_cannot_be(text, why):
    with pytest.raises(ConfigError, match=f"--vsock: .*{why}"):
        vm(devices.parse("vsock", text))


def test_vsock_sockets_are_made_here_for_an_emulated_host(tmp_path):
    path = tmp_path / "v"
    with ExitStack() as closing:
        crossing = devices.cross(devices.parse("vsock", f"path={path}"), closing)
        [(listener, inside)] = crossing.listening
        assert listener.path == str(path) and path.is_socket()
        assert crossing.reached == (f"{path}_*",)
        assert crossing.spec.listen_at == inside and inside != str(path)
    assert not path.exists()
    assert devices.cross(devices.parse("rng", ""), ExitStack()) == (
        devices.parse("rng", ""),
        (),
        (),
    )
