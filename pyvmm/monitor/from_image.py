"""`pyvmm run IMAGE`: the image's kernel and disk, and where what the guest changes is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pyvmm import images
from pyvmm.errors import ConfigError
from pyvmm.images import bootable, machines
from pyvmm.machine.board.registry import board_of, is_foreign, uname_of
from pyvmm.machine.cmdline import turns_pci_off
from pyvmm.spec.options import as_list
from pyvmm.spec.vm import DiskSpec, VmSpec


def choose(options: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """`options` with what their image adds, and the name of the image that their first disk is.

    Without an image it is the one of the VM of their name, or else the default. A kernel that is
    given replaces the image's and its initrd; where only disks are given, the first of them is
    booted from. Raises ConfigError.
    """
    chosen = dict(options)
    arch = chosen.get("arch") or ""
    name, vm = chosen.get("image"), chosen.get("name")
    if name is None and vm:
        name = image_of(vm)
    disks = as_list(chosen.get("disks", ()))
    its_own = arch in bootable.FOREIGN and is_foreign(arch)
    if its_own and name is None and disks:
        # The root is there already, and an image's takes minutes to make.
        chosen["kernel"], initrd = images.boot_files(arch, make=True)
        if not chosen.get("initrd"):
            chosen["initrd"] = initrd
            choose_transport(chosen)
        return chosen, None
    if its_own:
        found = images.machine_image(bootable.named_for(name, arch), make=True)
    else:
        found = images.machine_image(name, make=True)
    _check_arch(found.name, found.arch, arch)
    if found.arch:
        chosen["arch"] = found.arch
    if chosen.get("kernel") is None:
        chosen["kernel"] = found.kernel
        if not chosen.get("initrd"):
            chosen["initrd"] = found.initrd
            choose_transport(chosen)
    if name is None and disks:
        return chosen, None
    # Until the VM has its name, what it changes has no place: a snapshot stands for it.
    chosen["disks"] = [DiskSpec(found.disk, snapshot=True), *disks]
    chosen["cmdline"] = f"{found.cmdline} {chosen.get('cmdline', '')}".strip()
    return chosen, found.name


def architecture(options: Mapping[str, Any]) -> str:
    """The architecture that `options` ask for, by themselves or by their image, which need not be
    there; "" for this machine's. Raises ConfigError."""
    if options.get("arch"):
        return str(options["arch"])
    name, vm = options.get("image"), options.get("name")
    if name is None and vm and options.get("kernel") is None:
        found = machines.find(vm)
        name = None if found is None else found.image
    return "" if name is None else bootable.architecture_of(name)


def _check_arch(image: str, its: str, wanted: str) -> None:
    if not wanted or uname_of(its) == uname_of(wanted):
        return
    other = its or uname_of("")
    raise ConfigError(
        f"the image {image} is for {other}, and not for {wanted}",
        cure=f"leave that out, or make one: pyvmm image build --arch {wanted} --from …",
        option="--arch",
    )


def choose_transport(chosen: dict[str, Any]) -> None:
    """Put a guest on PCI where nobody has chosen: its initramfs has both drivers, and PCI makes
    fewer exits (decision 0442). Whoever hides the bus from the guest, or says how virtio-mmio
    devices are told of, wants these."""
    wishes = chosen.get("transport") or "auto", chosen.get("discovery") or "auto"
    has_bus = board_of(chosen.get("arch") or "").pci_places is not None
    if has_bus and wishes == ("auto", "auto") and not turns_pci_off(chosen.get("cmdline") or ""):
        chosen["transport"] = "pci"


def image_of(vm: str) -> str | None:
    """The image that the VM called `vm` was made from. Raises ConfigError if it is damaged."""
    found = machines.find(vm)
    if found is None:
        return None
    machines.check(found)
    return found.image


@contextmanager
def changes_kept(spec: VmSpec, image: str) -> Iterator[VmSpec]:
    """`spec`, whose first disk is `image`'s, with the changes of the VM of that name. Nothing is
    left of a new one that a ConfigError ends before it has changed anything.

    Raises ConfigError if that VM was made from another image, or its image is not as it was.
    """
    is_new = not machines.has(spec.name)
    try:
        yield _keep_changes(spec, image)
    except ConfigError:
        if is_new and (made := machines.find(spec.name)) is not None:
            from pyvmm.virtio.blk.overlay_file import is_unused

            if is_unused(made.overlay):
                machines.remove(spec.name)
        raise


def _keep_changes(spec: VmSpec, image: str) -> VmSpec:
    disk = spec.disks[0]
    machine = machines.keep(spec.name, image, disk.path)
    disk = replace(disk, path=machine.base, snapshot=False, overlay=machine.overlay)
    return replace(spec, disks=(disk, *spec.disks[1:]))
