"""`--arch` for a guest of another architecture than this machine's, up to where it would run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvmm.api.vm import VM
from pyvmm.emulated_host import foreign
from pyvmm.emulated_host.find import find_image
from pyvmm.emulated_host.spec import HostImage
from pyvmm.errors import ConfigError
from pyvmm.images import bootable
from pyvmm.machine.board import registry
from pyvmm.monitor.kernel_choice import specify
from pyvmm.monitor.run_spec import run_spec
from pyvmm.monitor.start import start
from pyvmm.spec.vm import ARCHITECTURES, VmSpec

OTHER = "arm64" if os.uname().machine == "x86_64" else "x86_64"


def test_every_architecture_has_a_board() -> None:
    assert {registry.uname_of(one) for one in ARCHITECTURES} == set(registry.BOARDS)
    assert registry.uname_of("") == os.uname().machine
    assert registry.is_foreign(OTHER) and not registry.is_foreign("")


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"kernel": "debian:6.12", "modules": "."}, "--modules"),
        ({"kernel": "disk"}, "--kernel"),
        ({"modules": "."}, "--modules"),
    ],
)
def test_what_has_a_name_is_for_this_machine(options: dict[str, object], refused: str) -> None:
    with pytest.raises(ConfigError, match=f"{refused}: .* is made for this machine, and not for"):
        specify({"arch": OTHER, **options})


@pytest.mark.skipif(OTHER != "arm64", reason="images for others than x86-64 are made there")
@pytest.mark.parametrize("name", ["trixie", "5.10", "6.12=6.12.57-1"])
def test_kernels_by_name_are_the_recipes(name: str) -> None:
    line = f"no kernel 'debian:{name}' for arm64; use debian:6.1 or debian:6.12, or name a file"
    with pytest.raises(ConfigError, match=line):
        specify({"arch": "arm64", "kernel": f"debian:{name}"})


def test_a_kernel_is_the_guests(tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(bytes(4096))
    spec, image = specify({"arch": OTHER, "kernel": str(tmp_path / "kernel")})
    assert (spec.arch, image) == (OTHER, None)


def test_this_machines_kvm_is_no_use() -> None:
    with pytest.raises(ConfigError, match="--kvm: this machine's KVM runs no guests for"):
        run_spec(VmSpec(kernel="kernel", arch=OTHER), "host")


@pytest.mark.skipif(OTHER != "arm64", reason="images for others than x86-64 are made there")
@pytest.mark.parametrize("options", [{"arch": OTHER}, {"image": "debian-arm64"}])
def test_nothing_is_fetched_for_a_kvm_of_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match="--kvm: this machine's KVM runs no guests for arm64"):
        start(kvm="host", **options)
    with pytest.raises(ConfigError, match="--kvm: this machine's KVM runs no guests for arm64"):
        VM(kvm="host", **options).start()
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def no_images(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Images that are there by their names alone; those that were asked for."""
    asked: list[str] = []

    def resolve(name: str | None, *, make: bool) -> bootable.MachineImage:
        name = name or bootable.DEFAULT
        asked.append(name)
        arch = bootable.architecture_of(name)
        return bootable.MachineImage(name, "/kernel", "/initrd", "/disk", arch=arch)

    monkeypatch.setattr(bootable, "resolve", resolve)
    return asked


@pytest.mark.skipif(OTHER != "arm64", reason="images for others than x86-64 are made there")
@pytest.mark.parametrize(
    "options",
    [
        {"arch": "arm64"},
        {"arch": "arm64", "image": "debian"},
        {"arch": "arm64", "image": "debian-arm64"},
        {"image": "debian-arm64"},
    ],
)
def test_an_image_for_another_architecture_has_a_name(
    no_images: list[str], options: dict[str, str]
) -> None:
    spec, image = specify(options)
    assert no_images == ["debian-arm64"]
    assert (spec.arch, image, spec.kernel) == ("arm64", "debian-arm64", "/kernel")
    assert [disk.path for disk in spec.disks] == ["/disk"]
    assert spec.transport == "auto" or registry.board_of("arm64").pci_places is not None


@pytest.mark.skipif(OTHER != "arm64", reason="images for others than x86-64 are made there")
def test_a_kernel_by_name_boots_the_images_disk(
    no_images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def boot_files(kernel: str, *, make: bool) -> tuple[str, str]:
        return f"/{kernel}/kernel", f"/{kernel}/initrd"

    monkeypatch.setattr(bootable, "boot_files", boot_files)
    spec, image = specify({"arch": "arm64", "kernel": "debian:6.12"})
    assert (image, spec.kernel) == ("debian-arm64", "/arm64-6.12/kernel")
    assert (spec.initrd, spec.transport) == ("/arm64-6.12/initrd", "pci")
    spec, image = specify({"arch": "arm64", "kernel": "debian:6.1", "disks": ["/disk"]})
    assert (image, spec.kernel) == (None, "/arm64/kernel")
    assert [disk.path for disk in spec.disks] == ["/disk"]


@pytest.mark.skipif(OTHER != "arm64", reason="images for others than x86-64 are made there")
@pytest.mark.parametrize(
    "options",
    [
        {"arch": "x86_64", "image": "debian-arm64"},
        {"arch": "arm64", "image": "debian-systemd"},
    ],
)
def test_an_image_of_another_architecture_than_asked_for_is_told(
    no_images: list[str], options: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match=f"--arch: the image {options['image']} is for"):
        specify(options)


def test_an_unknown_architecture_is_said() -> None:
    with pytest.raises(ConfigError, match="choose from x86_64, arm64"):
        specify({"arch": "vax", "kernel": "kernel"})


def test_only_arm64_is_emulated_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))
    with pytest.raises(ConfigError, match="x86_64 cannot be emulated on this one"):
        find_image(architecture="x86_64")
    with pytest.raises(ConfigError, match="no emulated KVM host for this machine, which is aarch"):
        find_image()


def test_an_image_knows_whose_programs_it_runs() -> None:
    here = HostImage("kernel", "modules", "busybox", ("qemu",))
    assert not here.is_foreign
    assert HostImage("kernel", "modules", "busybox", ("qemu",), "vax", "/programs").is_foreign


def test_a_python_of_its_own_finds_pyvmm_and_what_it_needs() -> None:
    found = foreign.environment({"PYTHONPATH": "/mine", "PYTHONHOME": "/x", "LANG": "C"})
    first, *others = found["PYTHONPATH"].split(":")
    assert first.startswith("/usr/")
    assert "PYTHONHOME" not in found and found["LANG"] == "C"
    path = ":".join(one.removeprefix("/run/machine") for one in others)
    code = "import pyvmm.errors, ioctl_opt"
    done = subprocess.run([sys.executable, "-S", "-c", code], env={"PYTHONPATH": path}, cwd="/")
    assert done.returncode == 0
