"""A copy of a VM has its own in place of what only one VM can have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.kinds import net, port, vsock
from pyvmm.kinds.vm_spec import from_json, to_json, validate
from pyvmm.kvm.system import Kvm
from pyvmm.machine import host_kvm
from pyvmm.monitor.run_spec import which_kvm
from pyvmm.monitor.snapshots import copy_of, spec_of
from pyvmm.spec.record import replace
from pyvmm.spec.vm import DeviceSpec, DiskSpec, VmSpec


def of(*devices: DeviceSpec) -> VmSpec:
    return validate(VmSpec("/kernel", devices=devices, memory=64 << 20))


def test_addresses_and_cids_are_each_ones_own() -> None:
    original = of(net.Spec(), vsock.Spec())
    copies = [copy_of(original, f"copy-{number}") for number in range(20)]
    cards = {
        device.mac for vm in (original, *copies) for device in vm.devices if device.kind == "net"
    }  # type: ignore[attr-defined]
    cids = {
        device.cid for vm in (original, *copies) for device in vm.devices if device.kind == "vsock"
    }  # type: ignore[attr-defined]
    assert len(cards) == len(cids) == 21


def test_sockets_are_called_by_its_name() -> None:
    original = of(port.Spec((port.PortSpec("org.test", "/run/port"),)), vsock.Spec("/run/vsock"))
    ports, socket = copy_of(original, "copy").devices
    assert ports.ports[0].path == "/run/port-copy"  # type: ignore[attr-defined]
    assert socket.path == "/run/vsock-copy"  # type: ignore[attr-defined]
    # Without a path it has none.
    assert copy_of(of(vsock.Spec()), "copy").devices[0].path == ""  # type: ignore[attr-defined]


def test_what_is_forwarded_stays_with_the_original() -> None:
    [card] = copy_of(of(net.Spec(forwards=("tcp:127.0.0.1:8080:80",))), "copy").devices
    assert card.forwards == ()  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["tap=tap0", "tap=tap0,create", "tap,address=10.0.0.1/24"])
def test_a_tap_that_only_one_can_have_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="copies cannot share the tap"):
        copy_of(of(net.parse(text)), "copy")


def test_each_has_a_tap_of_its_own_on_a_bridge() -> None:
    [card] = copy_of(of(net.parse("tap,bridge=br0")), "copy").devices
    assert "%d" in card.tap and card.bridge == "br0"  # type: ignore[attr-defined]


def test_a_path_that_is_too_long_is_told() -> None:
    with pytest.raises(ConfigError, match="too long"):
        copy_of(of(vsock.Spec("/run/" + "x" * 80)), "a-long-name")


def test_one_that_waits_says_so_to_another_process() -> None:
    assert from_json(to_json(copy_of(of(), "copy", waits=True))).waits
    assert not copy_of(of(), "copy").waits


def test_a_snapshot_says_nothing_that_a_user_cannot(tmp_path: Path) -> None:
    spec = of(net.Spec(stream="/dev/sda", mac="52:54:00:00:00:01"), vsock.Spec(listen_at="/etc/x"))
    (tmp_path / "memory").touch()
    (tmp_path / "memory").open("r+b").truncate(spec.memory)
    state = {
        "spec": {**json.loads(to_json(spec)), "waits": True, "restored_from": "/elsewhere"},
        "disks": [],
        "files": {"memory": spec.memory},
    }
    found = spec_of("a", str(tmp_path), state)
    card, socket = found.devices
    assert (card.stream, card.mac) == ("", "52:54:00:00:00:01")  # type: ignore[attr-defined]
    assert socket.listen_at == ""  # type: ignore[attr-defined]
    assert (found.waits, found.restored_from) == (False, str(tmp_path))


# What auto is: by where the VM was saved, and by what is the matter with this machine's KVM.
CHOICES = [
    ("host", None, "host", None),
    ("host", "no Linux", "host", None),
    ("emulated", "no Linux", "emulated", "no Linux"),
    ("emulated", None, "emulated", "the VM of the snapshot had an emulated host's KVM"),
    ("", None, "host", None),
    ("", "no Linux", "emulated", "no Linux"),
]


@pytest.mark.parametrize(("saved_on", "matter", "kvm", "because"), CHOICES)
def test_auto_is_where_the_vm_was_saved(
    monkeypatch: pytest.MonkeyPatch, saved_on: str, matter: str, kvm: str, because: str | None
) -> None:
    monkeypatch.setattr(host_kvm, "why_unusable", lambda: matter)
    monkeypatch.setattr(host_kvm, "check_there", lambda why: None)
    spec = replace(of(), saved_on=saved_on)
    assert which_kvm(spec, "auto") == (kvm, because)
    assert which_kvm(from_json(to_json(spec)), "auto") == (kvm, because), "in another process"
    for chosen in ("host", "emulated"):
        assert which_kvm(spec, chosen) == (chosen, None), "a user has said so"


def test_a_vm_that_had_kvm_does_not_go_on_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ConfigError("there is no /dev/kvm")

    monkeypatch.setattr(Kvm, "open", missing)
    with pytest.raises(ConfigError) as caught:
        which_kvm(replace(of(), saved_on="host"), "auto")
    assert str(caught.value) == (
        "the VM of the snapshot had a machine's own KVM, and here is none: there is no /dev/kvm; "
        "restore it on a machine with KVM"
    )


def test_a_snapshots_disk_of_a_strange_name_is_told_in_one_line(tmp_path: Path) -> None:
    disk = tmp_path / "a\nb"
    disk.write_bytes(bytes(512))
    spec = validate(VmSpec("kernel", disks=(DiskSpec(str(disk), id="root"),)))
    marks = [{"id": "root", "files": {}}]
    state = {"spec": json.loads(to_json(spec)), "disks": marks}
    for message in (r"a\\nb' has changed since", r"a\\nb': No such file"):
        with pytest.raises(ConfigError, match=message) as told:
            spec_of("first", "/none", state)
        assert "\n" not in str(told.value)
        disk.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a\nb"])
def test_a_snapshots_file_of_a_name_that_cannot_be_is_told_in_one_line(
    tmp_path: Path, name: str
) -> None:
    spec = of()
    (tmp_path / "memory").touch()
    (tmp_path / "memory").open("r+b").truncate(spec.memory)
    files = {"memory": spec.memory, name: 1}
    state = {"spec": json.loads(to_json(spec)), "disks": [], "files": files}
    with pytest.raises(ConfigError, match="is not as large as it was") as told:
        spec_of("first", str(tmp_path), state)
    assert "\n" not in str(told.value)
