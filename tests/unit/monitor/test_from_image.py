"""An image's additions to the options of a VM; no image is built for it."""

from __future__ import annotations

from typing import Any

import pytest

from pyvmm import images
from pyvmm.images.bootable import MachineImage
from pyvmm.kinds.vm_spec import make_spec
from pyvmm.monitor.from_image import choose


@pytest.fixture(autouse=True)
def debian(monkeypatch: pytest.MonkeyPatch) -> None:
    image = MachineImage("debian", "/vmlinux", "/initramfs", "/rootfs", has_agent=True)
    monkeypatch.setattr(images, "machine_image", lambda name, *, make: image)


@pytest.mark.parametrize(
    ("options", "transport"),
    [
        ({}, "pci"),
        ({"image": "debian"}, "pci"),
        ({"transport": "auto", "discovery": "auto", "cmdline": "quiet"}, "pci"),
        ({"disks": ["ram:1M"]}, "pci"),
        ({"transport": "mmio"}, "mmio"),
        ({"transport": "pci", "kernel": "/k"}, "pci"),
        ({"discovery": "cmdline"}, "auto"),
        ({"cmdline": "quiet pci=off"}, "auto"),
        ({"initrd": "/i"}, "auto"),
        ({"image": "debian", "kernel": "/k"}, "auto"),
    ],
)
def test_an_images_kernel_finds_its_devices_on_pci(options: dict[str, Any], transport: str) -> None:
    chosen, _ = choose(options)
    assert make_spec(chosen).transport == transport
