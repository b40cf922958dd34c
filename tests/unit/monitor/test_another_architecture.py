"""`--arch` for a guest of another architecture than this machine's, up to where it would run."""

from __future__ import annotations

import gzip
import lzma
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import boot_images
import partition_tables
import pytest

from pyvmm.api.vm import VM
from pyvmm.emulated_host import foreign
from pyvmm.emulated_host.find import find_image
from pyvmm.emulated_host.spec import HostImage
from pyvmm.errors import ConfigError
from pyvmm.images import bootable, fresh_initramfs
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
        ({"kernel": "debian:6.12"}, "--kernel"),
        ({"kernel": "disk"}, "--kernel"),
        ({"modules": "."}, "--modules"),
        ({"disks": ["ram:1M"]}, "--kernel"),
        ({"kernel": "kernel", "root": "/"}, "--arch"),
    ],
)
def test_nothing_is_made_for_an_architecture_without_images(
    options: dict[str, object], refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))
    with pytest.raises(ConfigError, match=f"{refused}: .* is made for this machine, and not for"):
        specify({"arch": "x86_64", **options})


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


RELEASE = "6.9.1-arm64"
BANNER = f"Linux version {RELEASE} (me@here) #1".encode()
of_images = pytest.mark.skipif(OTHER != "arm64", reason="images for others are made on x86-64")


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, with the recipes' kernels for arm64."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for kernel in ("arm64", "arm64-6.12"):
        folder = tmp_path / kernel
        with_modules(folder / "lib/modules" / RELEASE, "virtio_blk")
        (folder / "config").write_text("CONFIG_64BIT=y\n")
        (folder / "bzImage").write_bytes(boot_images.arm64_image(BANNER))

    def boot_files(kernel: str, *, make: bool) -> tuple[str, str]:
        return str(tmp_path / kernel / "bzImage"), f"/initramfs/{kernel}"

    monkeypatch.setattr(bootable, "boot_files", boot_files)
    lists = {"virtio-2": ("virtio_blk",)}
    monkeypatch.setattr(fresh_initramfs, "_recipe", lambda arch: (f"BASE {arch} ".encode(), lists))
    return tmp_path


def with_modules(folder: Path, *built_in: str) -> None:
    folder.mkdir(parents=True)
    for name in ("modules.dep", "modules.order"):
        (folder / name).write_text("")
    names = (*built_in, "virtio_mmio", "virtio_pci", "ext4", "xfs")
    (folder / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in names))


@of_images
def test_a_kernel_by_name_boots_the_images_disk(no_images: list[str], recipes: Path) -> None:
    spec, image = specify({"arch": "arm64", "kernel": "debian:6.12"})
    assert (image, spec.kernel) == ("debian-arm64", str(recipes / "arm64-6.12/bzImage"))
    assert (spec.initrd, spec.transport) == ("/initramfs/arm64-6.12", "pci")
    spec, image = specify({"arch": "arm64", "kernel": "debian:6.1", "disks": ["/disk"]})
    assert (image, spec.kernel) == (None, str(recipes / "arm64/bzImage"))
    assert [disk.path for disk in spec.disks] == ["/disk"]
    spec, image = specify({"image": "debian-arm64", "kernel": "debian:6.12"})  # without --arch
    assert (spec.arch, spec.kernel) == ("arm64", str(recipes / "arm64-6.12/bzImage"))


@of_images
def test_a_disk_boots_without_an_images_disk(no_images: list[str], recipes: Path) -> None:
    spec, image = specify({"arch": "arm64", "disks": ["/disk"]})
    assert (image, spec.kernel, spec.initrd) == (
        *(None, str(recipes / "arm64/bzImage"), "/initramfs/arm64"),
    )
    assert (spec.transport, no_images) == ("pci", [])
    spec, _ = specify({"arch": "arm64", "disks": ["/disk"], "initrd": "/mine"})
    assert (spec.initrd, spec.transport) == ("/mine", "auto")


@of_images
def test_a_root_without_a_driver_has_it_from_its_kernels_modules(recipes: Path) -> None:
    options = {"arch": "arm64", "disks": ["ram:1M"], "cmdline": "rootfstype=xfs"}
    spec, _ = specify(options)
    assert spec.kernel == str(recipes / "arm64/bzImage")
    assert spec.initrd is not None
    assert Path(spec.initrd).read_bytes().startswith(b"BASE arm64 0707")
    assert b"modules/fs-xfs" in Path(spec.initrd).read_bytes()


@of_images
def test_a_kernel_of_debians_that_was_fetched(no_images: list[str], recipes: Path) -> None:
    """By its release; it is another one than that of the same name for this machine."""
    folder = recipes / "cache/pyvmm/kernels/sid_arm64"
    with_modules(folder / "lib/modules" / RELEASE, "virtio_blk")
    (folder / "config").write_text("CONFIG_64BIT=y\n")
    spec, image = specify({"arch": "arm64", "kernel": "debian:sid"})
    assert (image, spec.kernel) == ("debian-arm64", str(folder / "bzImage"))
    assert spec.initrd is not None
    assert Path(spec.initrd).read_bytes().startswith(b"BASE arm64 0707")
    with pytest.raises(ConfigError, match="there is no kernel 'debian:potato'; use a series such"):
        specify({"arch": "arm64", "kernel": "debian:potato"})


@of_images
@pytest.mark.parametrize("file", ["Image", "Image.gz", "vmlinuz.efi"])
def test_the_tree_that_a_kernel_was_built_in(
    no_images: list[str], recipes: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = recipes / "linux"
    (tree / "arch/arm64/boot").mkdir(parents=True)
    with_modules(tree / "built")
    options = {"arch": "arm64", "kernel": str(tree)}
    (tree / ".config").write_text("CONFIG_64BIT=y\n")
    line = f"has no kernel yet: .* build it: make -C {tree} ARCH=arm64;"
    with pytest.raises(ConfigError, match=line):
        specify(options)
    packed = gzip.compress(boot_images.arm64_image(BANNER))
    content = {"vmlinuz.efi": boot_images.zboot(packed), "Image.gz": packed}
    kernel = tree / "arch/arm64/boot" / file
    kernel.write_bytes(content.get(file, boot_images.arm64_image(BANNER)))
    (tree / "include/config").mkdir(parents=True)
    (tree / "include/config/kernel.release").write_text(f"{RELEASE}\n")
    (tree / "modules.order").write_text("")
    (tree / "modules.builtin").write_text((tree / "built/modules.builtin").read_text())
    with pytest.raises(ConfigError, match=r"has neither built in .* virtio_blk \(for its disks\)"):
        specify(options)
    with open(tree / "modules.builtin", "a") as lists:
        lists.write("kernel/virtio_blk.ko\n")
    found = ["64BIT", "PCI", "PCI_HOST_GENERIC", "PCI_MSI", "VIRTIO_PCI", "SERIAL_8250_CONSOLE"]
    found += ["BINFMT_ELF", "BINFMT_SCRIPT", "BLK_DEV_INITRD", "PROC_FS", "SYSFS", "DEVTMPFS"]
    found += ["VIRTIO_BLK", "EXT4_FS"]
    (tree / ".config").write_text("".join(f"CONFIG_{name}=y\n" for name in found))
    capsys.readouterr()
    spec, image = specify(options)
    assert (image, spec.kernel, spec.transport) == ("debian-arm64", str(kernel), "pci")
    assert spec.initrd is not None
    assert Path(spec.initrd).read_bytes().startswith(b"BASE arm64 0707")
    said = capsys.readouterr().err
    assert f"by {tree}/.config it lacks CONFIG_SERIAL_OF_PLATFORM (to find its console)\n" in said
    modules = {"arch": "arm64", "kernel": str(kernel), "modules": str(tree), "disks": ["ram:1M"]}
    assert specify(modules)[0].initrd == spec.initrd
    with pytest.raises(ConfigError, match=f"for another architecture, arch/arm64/boot/{file}, "):
        specify({"kernel": str(tree)})


@of_images
def test_a_tree_with_more_than_its_image(no_images: list[str], recipes: Path) -> None:
    """What is packed of the Image is newer, and perhaps in a way that nobody here unpacks."""
    boot = recipes / "linux/arch/arm64/boot"
    boot.mkdir(parents=True)
    image = boot_images.arm64_image(BANNER)
    zboot = boot_images.zboot(lzma.compress(image), b"xzkern")
    for age, (name, content) in enumerate({"vmlinuz.efi": zboot, "Image": image}.items()):
        (boot / name).write_bytes(content)
        os.utime(boot / name, (2000 - age, 2000 - age))
    options = {"arch": "arm64", "kernel": str(recipes / "linux"), "disks": ["ram:1M"]}
    assert specify({**options, "initrd": str(boot / "Image")})[0].kernel == str(boot / "Image")


@of_images
def test_what_a_kernel_lacks_is_told_after_a_wrong_start(
    recipes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --arch it is no kernel; that is not to be remembered as one without an opinion."""
    config = b"IKCFG_ST" + gzip.compress(b"CONFIG_64BIT=y\n") + b"IKCFG_ED"
    kernel = recipes / "Image"
    kernel.write_bytes(boot_images.arm64_image(BANNER + config + bytes(1 << 20)))
    options = {"kernel": str(kernel), "disks": ["ram:1M"]}
    specify(options)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        specify({**options, "arch": "arm64"})
        assert "lacks CONFIG_SERIAL_8250_CONSOLE (for its console)" in capsys.readouterr().err


@of_images
def test_what_packages_leave(no_images: list[str], recipes: Path) -> None:
    """The kernel beside its modules, where those of Linux 7 have it."""
    place = recipes / "unpacked/usr/lib/modules" / RELEASE
    with_modules(place, "virtio_blk")
    (place / "vmlinuz").write_bytes(boot_images.arm64_image(BANNER))
    (place / "config").write_text("CONFIG_VIRTIO_BLK=y\n")
    spec, _ = specify({"arch": "arm64", "kernel": str(recipes / "unpacked")})
    assert spec.kernel == str(place / "vmlinuz") and spec.initrd


@of_images
@partition_tables.needs_tools
def test_the_kernel_in_a_disk(recipes: Path) -> None:
    tree = recipes / "tree"
    (tree / "boot").mkdir(parents=True)
    image = boot_images.arm64_image(BANNER)
    (tree / "boot/Image-6.9.1").write_bytes(image)
    (tree / "boot/initrd.img-6.9.1").write_bytes(b"the initrd")
    disk = recipes / "disk.img"
    script = f"label: gpt\nstart=2048, type={partition_tables.ROOT_ARM64}\n"
    partition_tables.partitioned(disk, script, size=32 << 20)
    partition_tables.put_file_system(disk, 1 << 20, 30 << 20, "ext4", "-d", str(tree))
    options = {"arch": "arm64", "kernel": "disk", "disks": [str(disk)]}
    spec, _ = specify(options)
    assert Path(spec.kernel).read_bytes() == image
    assert spec.initrd is not None and Path(spec.initrd).read_bytes() == b"the initrd"
    with pytest.raises(ConfigError, match="--modules: the kernel in a disk has an initrd"):
        specify({**options, "modules": "."})


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
    outer = {"PYTHONPATH": "/mine", "PYTHONHOME": "/x", "LANG": "C"}
    image = HostImage("kernel", "modules", "busybox", ("qemu",), "vax", "/programs")
    found = foreign.environment(outer, image)
    _, first, *others = found["PYTHONPATH"].split(":")
    assert first.startswith("/usr/")
    assert "PYTHONHOME" not in found and found["LANG"] == "C"
    path = ":".join(one.removeprefix("/run/machine") for one in others)
    code = "import pyvmm.errors, ioctl_opt"
    done = subprocess.run([sys.executable, "-S", "-c", code], env={"PYTHONPATH": path}, cwd="/")
    assert done.returncode == 0
