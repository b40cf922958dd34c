"""Devices beside the disks: from the command line to a specification, and as JSON and back."""

from __future__ import annotations

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
