"""`--kernel` and `--modules`: a tree, a file, a name of Debian's; and what is said beforehand."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import boot_images
import pytest
from boot_images import module

from pyvmm.api import config_file
from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.images import bootable, debian_kernels, fresh_initramfs
from pyvmm.kinds.vm_spec import make_spec
from pyvmm.monitor import kernel_choice
from pyvmm.monitor.kernel_choice import specify

RELEASE = "6.9.1-mine"
OTHER = "arm64" if os.uname().machine == "x86_64" else "x86_64"
LISTS = {"virtio-2": ("virtio_blk",)}


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A cache of its own, no image that is built, and what the user is told."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(
        fresh_initramfs, "_recipe", lambda arch: (b"BASE", {"virtio-2": ("virtio_blk",)})
    )
    image = bootable.MachineImage("debian", "/image/vmlinux", "/image/initrd", "/image/disk")
    monkeypatch.setattr(bootable, "resolve", lambda name, make: image)
    said: list[str] = []
    monkeypatch.setattr(log, "to_stderr", lambda line: said.append(str(line)))
    return said


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A kernel that was just built, with all that it needs in it."""
    linux = tmp_path / "linux"
    (linux / "arch/x86/boot").mkdir(parents=True)
    (linux / "include/config").mkdir(parents=True)
    banner = f"{RELEASE} (me@here) #1".encode()
    (linux / "arch/x86/boot/bzImage").write_bytes(boot_images.bzimage(banner=banner))
    (linux / "include/config/kernel.release").write_text(f"{RELEASE}\n")
    (linux / "modules.order").write_text("")
    built_in = ("virtio_blk", "virtio_mmio", "ext4")
    (linux / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in built_in))
    return linux


def test_a_tree_boots_an_image_by_an_initramfs_of_its_own(tree: Path, world: list[str]) -> None:
    spec, image = specify({"kernel": str(tree)})
    assert (spec.kernel, image) == (str(tree / "arch/x86/boot/bzImage"), "debian")
    assert spec.initrd and Path(spec.initrd).read_bytes().startswith(b"BASE0707")
    assert spec.disks[0].path == "/image/disk"
    assert world == []
    spec, image = specify({"kernel": str(tree), "disks": ["ram:1M"]})
    assert image is None and spec.disks[0].path == "ram:1M" and spec.initrd


def test_an_initrd_that_is_named_is_taken(tree: Path) -> None:
    spec, image = specify({"kernel": str(tree), "initrd": "/my/initrd"})
    assert (spec.initrd, image) == ("/my/initrd", None)


def test_the_newer_of_a_trees_kernels(tree: Path) -> None:
    (tree / "vmlinux").write_bytes(boot_images.Elf().build())
    os.utime(tree / "vmlinux", (1, 1))
    assert specify({"kernel": str(tree)})[0].kernel.endswith("bzImage")
    (tree / "arch/x86/boot/bzImage").unlink()
    assert specify({"kernel": str(tree)})[0].kernel.endswith("vmlinux")


def test_a_tree_without_a_kernel(tree: Path, tmp_path: Path) -> None:
    (tree / "arch/x86/boot/bzImage").unlink()
    with pytest.raises(ConfigError, match=r"has no kernel yet: .*bzImage or vmlinux.*; build it"):
        specify({"kernel": str(tree)})
    (tree / "arch/arm64/boot").mkdir(parents=True)
    (tree / "arch/arm64/boot/Image").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"for another architecture, arch/arm64/boot/Image, and"):
        specify({"kernel": str(tree)})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="is a directory without a kernel"):
        specify({"kernel": str(tmp_path / "empty")})


def test_a_directory_in_a_tree_is_told_from_one_without_a_kernel(tree: Path) -> None:
    for path in ("arch/x86", "tools/testing"):
        (tree / path).mkdir(parents=True, exist_ok=True)
        (tree / path / "Kbuild").touch()  # which the tree itself has, too
        with pytest.raises(ConfigError) as caught:
            specify({"kernel": str(tree / path)})
        assert str(caught.value).endswith(f"was built in; name the tree: --kernel {tree}")


def test_a_tree_that_may_not_be_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.path.isfile", lambda path: False)
    monkeypatch.setattr("os.listdir", refused)
    with pytest.raises(ConfigError, match=r"--kernel: cannot read .*: Permission denied; check"):
        specify({"kernel": str(tree)})


def test_what_make_tar_pkg_leaves(tmp_path: Path) -> None:
    tree = tmp_path / "tar-install"
    (tree / "boot").mkdir(parents=True)
    (tree / "lib/modules" / RELEASE / "kernel").mkdir(parents=True)
    (tree / "lib/modules" / RELEASE / "modules.order").write_text("")
    (tree / f"boot/vmlinuz-{RELEASE}").write_bytes(
        boot_images.bzimage(banner=RELEASE.encode() + b" (me@here)")
    )
    assert specify({"kernel": str(tree)})[0].kernel.endswith(f"vmlinuz-{RELEASE}")
    (tree / f"boot/vmlinuz-{RELEASE}.old").write_bytes(boot_images.bzimage())  # of make install
    assert specify({"kernel": str(tree)})[0].kernel.endswith(f"vmlinuz-{RELEASE}")
    (tree / "boot/vmlinuz-7").write_bytes(boot_images.bzimage())
    with pytest.raises(ConfigError, match="has 2 kernels; name one"):
        specify({"kernel": str(tree)})


def test_modules_of_another_version(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(boot_images.bzimage(banner=b"5.4.0 (me@here) #1"))
    with pytest.raises(ConfigError) as caught:
        specify({"kernel": str(tmp_path / "bzImage"), "modules": str(tree), "disks": ["ram:1M"]})
    assert f"are for Linux {RELEASE}, and the kernel {tmp_path}/bzImage is 5.4.0" in str(
        caught.value
    )


def module_in(tree: Path, name: str, release: str) -> None:
    (tree / f"{name}.ko").write_bytes(module(release=release))
    with open(tree / "modules.order", "a") as file:
        file.write(f"{name}.o\n")


@pytest.mark.parametrize("place", ["", "arch/x86/boot/bzImage"])
def test_a_tree_whose_next_build_has_another_name_boots_what_is_built(
    tree: Path, place: str
) -> None:
    """After a commit `make modules_prepare` (or a build outside of the tree) writes a new release,
    and what was built has the old one still."""
    (tree / "include/config/kernel.release").write_text("6.9.2-next\n")
    (tree / "modules.builtin").write_text("kernel/virtio_mmio.ko\nkernel/ext4.ko\n")
    module_in(tree, "virtio_blk", RELEASE)
    options = {"kernel": str(tree / place), "disks": ["ram:1M"]}
    options |= {"modules": str(tree)} if place else {}
    initrd = specify(options)[0].initrd
    assert initrd and b"virtio_blk.ko" in Path(initrd).read_bytes()
    (tree / "modules.order").write_text("")
    module_in(tree, "virtio_blk", "6.9.2-next")  # they were built later than the kernel
    both = f"built for Linux 6.9.2-next, and the kernel is {RELEASE}; build both again: make -C "
    with pytest.raises(ConfigError, match=re.escape(both + str(tree)) + "$"):
        specify(options)


def test_modules_that_modprobe_will_refuse_are_told(
    tree: Path, tmp_path: Path, world: list[str]
) -> None:
    """What the guest needs is built in, and the kernel was built alone: it boots."""
    (tree / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in FOR_ROOTS))
    (tmp_path / "root").mkdir()
    module_in(tree, "driver", "6.9.0")
    specify({"kernel": str(tree), "root": str(tmp_path / "root")})
    assert world[0] == (
        f"modprobe in the guest will refuse the modules: {tree}/driver.ko was built for Linux "
        f"6.9.0, and the kernel is {RELEASE}; build it again: make -C {tree} modules"
    )
    world.clear()
    (tree / "modules.order").write_text("")
    module_in(tree, "driver", RELEASE)
    specify({"kernel": str(tree), "root": str(tmp_path / "root")})
    assert world == []


@pytest.mark.parametrize("as_file", [False, True])
def test_a_configuration_that_was_changed_after_the_build_is_not_the_kernels(
    as_file: bool, tree: Path, world: list[str]
) -> None:
    names = ("BLK_DEV_INITRD", *(name for name in ON_MMIO if name != "VIRTIO_BLK"))
    built = "".join(f"CONFIG_{name}=y\n" for name in names)
    (tree / "include/config/auto.conf").write_text(built)
    (tree / ".config").write_text(built)
    os.utime(tree / ".config", (1, 1))
    kernel = tree / "arch/x86/boot/bzImage" if as_file else tree
    options = {"kernel": str(kernel), "disks": ["ram:1M"], "initrd": "/my/initrd"}
    specify(options)
    [line] = world
    assert f"by {tree}/.config it lacks CONFIG_VIRTIO_BLK (for its disks)" in line
    world.clear()
    (tree / ".config").write_text(f"{built}CONFIG_VIRTIO_BLK=y\n")  # and nobody has run make
    specify(options)
    changed, line = world
    assert changed == (
        f"{tree}/.config has been changed since the kernel was built; "
        f"build it again: make -C {tree}"
    )
    assert f"by {tree}/include/config/auto.conf it lacks CONFIG_VIRTIO_BLK" in line


def test_a_vmlinux_for_another_architecture_is_none_of_this_ones(tree: Path) -> None:
    """Which every build leaves at the same place."""
    elf = boot_images.Elf(machine=183 if OTHER == "arm64" else 62).build()
    (tree / "arch/x86/boot/bzImage").unlink()
    (tree / "vmlinux").write_bytes(elf)
    with pytest.raises(ConfigError, match=r"for another architecture, vmlinux, and none for this"):
        specify({"kernel": str(tree)})
    (tree / "vmlinux").unlink()
    os.mkfifo(tree / "vmlinux")  # which nobody waits for
    with pytest.raises(ConfigError, match="has no kernel yet"):
        specify({"kernel": str(tree)})


def test_the_name_of_a_tree_may_have_any_characters(tree: Path, world: list[str]) -> None:
    """What one is to do is a command that a shell takes as it is."""
    odd = tree.rename(tree.parent / "my linux, 6:9 $(x)")
    (odd / "scripts").mkdir()
    (odd / "scripts/config").write_text("")
    (odd / ".config").write_text("CONFIG_64BIT=y\n")
    spec, _ = specify({"kernel": str(odd), "disks": ["ram:1M"]})
    assert spec.kernel == str(odd / "arch/x86/boot/bzImage") and spec.initrd
    [line] = world
    words = shlex.split(line.partition("; ")[2])
    assert words[:3] == [f"{odd}/scripts/config", "--file", f"{odd}/.config"]
    assert words[-4:] == ["-C", str(odd), "olddefconfig", "all"]
    (odd / "modules.builtin").write_text("kernel/virtio_mmio.ko\n")
    (odd / ".config").unlink()
    for gone in (None, odd / "arch/x86/boot/bzImage"):
        if gone:
            gone.unlink()
        with pytest.raises(ConfigError) as caught:
            specify({"kernel": str(odd), "disks": ["ram:1M"]})
        assert f"make -C '{odd}'" in str(caught.value)


def test_a_module_that_the_guest_needs_and_nobody_has(tree: Path) -> None:
    (tree / "modules.builtin").write_text("kernel/virtio_mmio.ko\n")
    with pytest.raises(ConfigError, match=r"neither built in nor .*: virtio_blk \(for its disks\)"):
        specify({"kernel": str(tree), "disks": ["ram:1M"]})
    with pytest.raises(ConfigError, match=rf"; make -C {tree} modules \(none are built\)"):
        specify({"kernel": str(tree), "disks": ["ram:1M"]})
    (tree / "include/config/kernel.release").write_text("")  # the kernel's own banner says it
    with pytest.raises(ConfigError, match=re.escape(f"the kernel {RELEASE} has neither built in")):
        specify({"kernel": str(tree), "disks": ["ram:1M"]})


def test_what_the_configuration_lacks_is_one_line(tree: Path, world: list[str]) -> None:
    (tree / ".config").write_text("CONFIG_VIRTIO_BLK=m\nCONFIG_EXT4_FS=y\n")
    specify({"kernel": str(tree), "disks": ["ram:1M"]})
    [line] = world
    assert f"by {tree}/.config it lacks CONFIG_SERIAL_8250_CONSOLE (for its console)" in line
    assert "VIRTIO_BLK" not in line and "EXT4" not in line
    world.clear()
    # The same kernel as a file, without an initramfs: a module is useless then.
    specify({"kernel": str(tree / "arch/x86/boot/bzImage"), "disks": ["ram:1M"]})
    [line] = world
    assert "CONFIG_VIRTIO_BLK=y, which is a module there, (for its disks)" in line


@pytest.mark.parametrize(
    "name", ["debian:", "debian:potato", "debian:6.1=", "debian:6.1=$(reboot)", "debian:../../etc"]
)
def test_names_that_debian_has_no_kernel_for(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--kernel: there is no kernel .*use a series such as"):
        specify({"kernel": name})


def test_a_kernel_of_debians_that_was_fetched_is_taken_as_it_is(
    tmp_path: Path, world: list[str]
) -> None:
    folder = tmp_path / "cache/pyvmm/kernels/sid"
    (folder / "lib/modules" / RELEASE / "kernel").mkdir(parents=True)
    for name in ("modules.order", "modules.dep"):
        (folder / "lib/modules" / RELEASE / name).write_text("")
    built_in = "".join(f"kernel/{name}.ko\n" for name in ("virtio_blk", "virtio_mmio"))
    (folder / "lib/modules" / RELEASE / "modules.builtin").write_text(built_in)
    (folder / "config").write_text("CONFIG_64BIT=y\n")
    (folder / "vmlinux").write_bytes(boot_images.Elf().build())
    spec, image = specify({"kernel": "debian:sid"})
    assert (spec.kernel, image) == (str(folder / "vmlinux"), "debian")
    assert "CONFIG_VIRTIO_BLK" in world[0]
    assert debian_kernels.names() == ["debian:sid"]


def test_a_name_in_a_file_is_no_path(tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text('kernel = "debian:6.12"\nmodules = "modules"\n')
    values = config_file.load(str(file))
    assert values["kernel"] == "debian:6.12"
    assert values["modules"] == str(tmp_path / "modules")
    assert 'kernel = "debian:6.12"' in config_file.describe(values)
    assert f'modules = "{tmp_path}/modules"' in config_file.describe(values)


@pytest.mark.parametrize(
    ("configuration", "asked", "transport"),
    [
        ("PCI PCI_MSI VIRTIO_PCI PCI_DIRECT", "auto", "pci"),
        ("PCI PCI_MSI VIRTIO_PCI PCI_DIRECT", "mmio", "mmio"),
        ("PCI PCI_MSI VIRTIO_PCI PCI_DIRECT VIRTIO_MMIO ACPI", "auto", "auto"),
        ("PCI PCI_MSI VIRTIO_PCI PCI_DIRECT VIRTIO_MMIO", "auto", "pci"),
        ("PCI PCI_DIRECT VIRTIO_PCI VIRTIO_MMIO ACPI", "auto", "auto"),
        ("VIRTIO_BLK", "auto", "auto"),  # neither bus
        ("VIRTIO_MMIO ACPI", "pci", "pci"),
        ("VIRTIO_MMIO ACPI", "auto", "auto"),
        ("", "auto", "auto"),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_kernel_that_finds_devices_on_pci_only_gets_them_there(
    configuration: str, asked: str, transport: str, as_file: bool, tree: Path, tmp_path: Path
) -> None:
    (tree / "modules.builtin").write_text(
        "".join(f"kernel/{n}.ko\n" for n in ("virtio_blk", "ext4"))
    )
    text = "".join(f"CONFIG_{name}=y\n" for name in configuration.split())
    (tree / ".config").write_text(text)
    kernel = tree / "arch/x86/boot/bzImage"
    if as_file:
        (tmp_path / "config-mine").write_text(text)
        kernel = kernel.rename(tmp_path / "vmlinuz-mine")
    options = {"kernel": str(kernel if as_file else tree), "disks": ["ram:1M"]}
    assert specify({**options, "transport": asked})[0].transport == transport


OTHERS = ("SERIAL_8250_CONSOLE", "VIRTIO_BLK", "EXT4_FS")
ON_MMIO = ("VIRTIO_MMIO", "ACPI", *OTHERS)
ON_PCI = ("PCI", "PCI_MSI", "PCI_MMCONFIG", "VIRTIO_PCI", *OTHERS)
NO_BUS = "CONFIG_PCI (for its PCI bus), CONFIG_VIRTIO_PCI (for its devices); use --transport mmio"
NO_MSI = "CONFIG_PCI_MSI (for its devices' interrupts); use --transport mmio"


@pytest.mark.parametrize(
    ("configuration", "transport", "said"),
    [
        (ON_MMIO, "auto", ""),
        (ON_MMIO, "mmio", ""),
        (ON_MMIO, "pci", NO_BUS),
        (ON_PCI, "auto", ""),
        (ON_PCI, "mmio", "use --transport pci"),
        ((*ON_PCI, *ON_MMIO), "pci", ""),
        ([name for name in (*ON_PCI, *ON_MMIO) if name != "PCI_MSI"], "auto", ""),
        ([name for name in (*ON_PCI, *ON_MMIO) if name != "PCI_MSI"], "pci", NO_MSI),
        (OTHERS, "auto", "to find its devices)"),  # no other transport would be better
        (OTHERS, "pci", "CONFIG_VIRTIO_PCI (for its devices)"),
    ],
)
def test_a_bus_that_a_kernel_does_not_know_is_told_with_the_cure(
    configuration: tuple[str, ...],
    transport: str,
    said: str,
    tmp_path: Path,
    world: list[str],
) -> None:
    (tmp_path / "vmlinuz-mine").write_bytes(boot_images.bzimage())
    absent = "# CONFIG_PCI is not set\n" if "PCI" not in configuration else ""
    text = absent + "".join(f"CONFIG_{name}=y\n" for name in configuration)
    (tmp_path / "config-mine").write_text(text)
    kernel = str(tmp_path / "vmlinuz-mine")
    specify({"kernel": kernel, "disks": ["ram:1M"], "transport": transport})
    assert len(world) == bool(said)
    assert not said or world[0].endswith(said)


@pytest.mark.parametrize("scripts", ["scripts", "source/scripts", ""])  # make O= has a link
def test_what_a_tree_lacks_is_told_with_the_commands_that_build_it(
    scripts: str, tree: Path, tmp_path: Path, world: list[str]
) -> None:
    """A usual configuration, and one for guests of KVM, have neither virtiofs nor virtio's
    sockets."""
    if scripts:
        (tree / scripts).mkdir(parents=True)
        (tree / scripts / "config").write_text("")
    on = (
        *ON_PCI,
        *("64BIT", "BINFMT_ELF", "BINFMT_SCRIPT", "BLK_DEV_INITRD", "PROC_FS", "SYSFS", "DEVTMPFS"),
        *("MULTIUSER", "TMPFS", "NET", "VIRTIO_MENU"),
    )
    text = "".join(f"CONFIG_{name}=y\n" for name in on)
    (tree / ".config").write_text(f"{text}CONFIG_FUSE_FS=m\n# CONFIG_VIRTIO_FS is not set\n")
    how = (
        f"{tree}/{scripts}/config --file {tree}/.config -e VSOCKETS -e VIRTIO_VSOCKETS "
        f"-e FUSE_FS -e VIRTIO_FS -e OVERLAY_FS && make -C {tree} olddefconfig all"
    )
    (tmp_path / "root").mkdir()
    with pytest.raises(ConfigError) as caught:
        specify({"kernel": str(tree), "root": str(tmp_path / "root"), "transport": "pci"})
    assert "neither built in nor in" in str(caught.value)
    usual = "modules (none are built), or switch them on to be built in"
    assert str(caught.value).endswith(f"; {how}" if scripts else usual)
    # Where the initramfs is the user's, it boots all the same.
    specify({"kernel": str(tree), "initrd": "/my/initrd", "shares": [str(tmp_path)]})
    assert len(world) == 1 and "it lacks CONFIG_VIRTIO_FS (for its shared directories)" in world[0]
    edit = "-e FUSE_FS -e VIRTIO_FS && make"
    assert (edit in world[0]) == bool(scripts)
    foreign = make_spec({"arch": OTHER, "kernel": "Image", "initrd": "initrd"})
    said = kernel_choice._how_to_switch_on(foreign, text, f"{tree}/.config", own_init=True)
    assert said.endswith(f"make -C {tree} ARCH={OTHER} olddefconfig all") == bool(scripts)


def modules_for(kernel: Path, root: Path) -> list[str]:
    """The folders of modules that a guest on the files in `root` has, with that kernel's file."""
    root.mkdir(exist_ok=True)
    spec = specify({"kernel": str(kernel), "root": str(root)})[0]
    folders = {one.mountpoint: one.path for one in spec.devices if one.kind == "share"}
    return [path for place, path in folders.items() if f"/{RELEASE}" in place]


FOR_ROOTS = ("virtio_mmio", "fuse", "virtiofs", "overlay", "vsock", "virtio_vsock")


def test_a_kernel_that_is_a_file_has_the_modules_around_it(tree: Path, tmp_path: Path) -> None:
    """In its tree, which also has vmlinux; and as systems keep it, beside them or in /boot."""
    built_in = "".join(f"kernel/{name}.ko\n" for name in FOR_ROOTS)
    (tree / "modules.builtin").write_text(built_in)
    banner = boot_images.Load(data=f"Linux version {RELEASE} (me@here)".encode())
    (tree / "vmlinux").write_bytes(boot_images.Elf([banner]).build())
    for path in ("vmlinux", "arch/x86/boot/bzImage"):
        assert modules_for(tree / path, tmp_path / "root")[1] == str(tree)
    installed = tmp_path / "sid/lib/modules" / RELEASE
    (installed / "kernel").mkdir(parents=True)
    (installed / "modules.builtin").write_text(built_in)
    (installed / "modules.dep").write_text("")
    (tmp_path / "sid/boot").mkdir()
    for path in (installed / "vmlinuz", tmp_path / f"sid/boot/vmlinuz-{RELEASE}"):
        path.write_bytes((tree / "arch/x86/boot/bzImage").read_bytes())
        assert modules_for(path, tmp_path / "root") == [str(installed)]


def test_the_modules_of_a_tree_are_there_for_modprobe(
    tree: Path, tmp_path: Path, world: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a root that is a directory, which has none of them: a share of depmod's lists, and the
    tree in it."""
    (tree / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in FOR_ROOTS))
    (tmp_path / "root").mkdir()
    options = {"kernel": str(tree), "root": str(tmp_path / "root")}
    shares = [one for one in specify(options)[0].devices if one.kind == "share"]
    _, lists, modules = shares
    place = f"/lib/modules/{RELEASE}"
    assert (lists.mountpoint, modules.mountpoint) == (place, f"{place}/kernel")
    assert (Path(lists.path) / "modules.dep").is_file() and modules.path == str(tree)
    assert lists.read_only and modules.read_only and world == []
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("pyvmm.images.tools._ADMIN_PATH", "/nowhere")
    (tree / "modules.builtin").write_text(
        "".join(f"kernel/{name}.ko\n" for name in FOR_ROOTS[::-1])
    )
    assert [one.kind for one in specify(options)[0].devices] == ["vsock", "share"]
    assert world == [
        "modprobe in the guest will find no modules: the program depmod is missing; "
        "install it: apt-get install kmod"
    ]
