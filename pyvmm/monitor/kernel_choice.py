"""The kernel that a VM boots, and its terms: `--kernel` and `--modules` become files.

A kernel may be a file, the tree it was built in, or one of Debian's by its name. With the last two,
and with --modules, an initramfs is made that has the modules the guest needs. What a kernel lacks
by its own configuration is told before it boots.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from shlex import join, quote
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm.boot.cmdline import split
from pyvmm.boot.cmdline import values as values_of
from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.kinds.vm_spec import make_spec, validate
from pyvmm.spec.record import replace
from pyvmm.spec.vm import ARCHITECTURES, IN_DISK, VmSpec, names_kernel

if TYPE_CHECKING:
    from pyvmm.boot.kernel_config import Wants
    from pyvmm.images.modules import ModuleTree, UnreadTree

_OPTION = "--kernel"
_SMALLEST_REAL = 1 << 20  # bytes; a kernel with less has no configuration in it
# What the initramfs calls the modules of a device, by its kind; all of them drive a virtio type.
_LISTS = {
    "disk": ("virtio-2", "for its disks"),
    "net": ("virtio-1", "for its network"),
    "console": ("virtio-3", "for its console"),
    "ports": ("virtio-3", "for its ports"),
    "rng": ("virtio-4", "for its random numbers"),
    "balloon": ("virtio-5", "for its balloon"),
    "vsock": ("virtio-19", "for its agent, over vsock"),
    "share": ("virtio-26", "for its shared directories"),
    "pmem": ("virtio-27", "for its persistent memory"),
}
_USUAL = frozenset(("ext4",))  # the file systems that the recipes' initramfs can have as root
_IN_RECIPES = _USUAL | {"ext3", "ext2", "auto"}  # served by the same driver, or tried with it


class _Kernel(NamedTuple):
    """A kernel's file; where its configuration and its modules are, "" for nowhere; an initramfs
    that has been made for it; and its release, "" where the file has yet to be asked."""

    path: str
    config: str = ""
    modules: str = ""
    initrd: str | None = None
    release: str = ""


def specify(options: Mapping[str, Any]) -> tuple[VmSpec, str | None]:
    """The machine that `options` describe (pyvmm.kinds.vm_spec.make_spec), with an image's files
    and the kernel's filled in, and the name of the image that its first disk is.

    Raises ConfigError for what cannot be booted.
    """
    image: str | None = None
    arch = _foreign(options)
    if arch:
        _check_foreign(arch, options)
    if options.get("root") is not None or options.get("rw"):
        from pyvmm.monitor import host_root

        return _with_kernel(host_root.choose(options), None), None
    has_esp = False
    if options.get("kernel") == IN_DISK:
        options = _with_disks_own(options)
    else:
        options, has_esp = _for_disks_root(options)
    given = options
    named = _is_more_than_a_file(given)
    if given.get("image") is not None or given.get("kernel") is None or _needs_an_image(given):
        from pyvmm.monitor.from_image import choose

        options, image = choose(options)
    if named:
        return _with_kernel(options, given.get("initrd"), has_esp=has_esp), image
    spec = validate(make_spec(options))
    if given.get("kernel") is not None:
        config = _beside(spec.kernel)
        text = _configuration(spec.kernel, config, spec.arch)
        spec = _on_its_bus(spec, text, own_init=False)
        _tell_lacking(spec, text, config, own_init=False)
    return spec, image


def _for_disks_root(options: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """`options` for the root in their first disk, where the initramfs is ours to make: one that
    the recipes' has no driver for is named, and the default kernel comes with its modules, as it
    does for a disk with an EFI system partition; whether it has one."""
    kernel, disks = options.get("kernel"), options.get("disks")
    is_ours = kernel is None or _is_more_than_a_file(options)
    if not disks or not is_ours or options.get("image") is not None or options.get("initrd"):
        return options, False
    from pyvmm.monitor.from_image import image_of
    from pyvmm.monitor.whole_disk import words_before

    if options.get("name") and image_of(options["name"]) is not None:
        return options, False  # whose disk is the first one then

    cmdline = str(options.get("cmdline") or "")
    words, has_esp = words_before(disks, cmdline)
    cmdline = " ".join([*words, cmdline]).strip()
    kinds = values_of(cmdline, "rootfstype")
    if kernel is None and (has_esp or (kinds and not _IN_RECIPES.issuperset(kinds[-1:]))):
        from pyvmm import images

        kernel = f"debian:{images.DEFAULT_KERNEL}"
    if words or kernel:
        options = {**options, "kernel": kernel, "cmdline": cmdline}
    return options, has_esp


def _check_foreign(arch: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError for what there is on machines of the architecture `arch` alone."""
    from pyvmm.images import bootable

    if arch in bootable.FOREIGN:
        return
    of_this_machine = [name for name in ("root", "rw", "image") if options.get(name)]
    if of_this_machine or options.get("kernel") is None or _is_more_than_a_file(options):
        refused = "--modules" if options.get("modules") else _OPTION
        raise ConfigError(
            f"what is asked for is made for this machine, and not for {arch}",
            cure="name files: --kernel, --initrd, --disk",
            option="--arch" if of_this_machine else refused,
        )


def _is_more_than_a_file(options: Mapping[str, Any]) -> bool:
    kernel = options.get("kernel")
    if options.get("modules"):
        return True
    return kernel is not None and (names_kernel(str(kernel)) or os.path.isdir(kernel))


def _needs_an_image(options: Mapping[str, Any]) -> bool:
    """A kernel that comes with its modules has a root disk to boot from."""
    kernel = str(options.get("kernel"))
    return (names_kernel(kernel) or os.path.isdir(kernel)) and not (
        options.get("disks") or options.get("initrd")
    )


def _with_kernel(
    options: Mapping[str, Any], initrd: str | None, *, has_esp: bool = False
) -> VmSpec:
    """The machine, whose kernel is more than a file; `initrd` is the one that the user names,
    `has_esp` tells whether the first disk has an EFI system partition."""
    arch = _foreign(options)
    kernel = _find(str(options["kernel"]), arch)
    modules = options.get("modules")
    options = {**options, "kernel": kernel.path, "initrd": initrd}
    if arch and kernel.initrd is not None:  # a recipe's, which has the drivers of both buses
        from pyvmm.monitor.from_image import choose_transport

        choose_transport(options)
    own_init = initrd is None
    text = _configuration(kernel.path, kernel.config, arch)
    spec = _on_its_bus(validate(make_spec(options)), text, own_init=own_init)
    if own_init:
        made = kernel.initrd
        if modules or made is None or has_esp or not _USUAL.issuperset(_filesystems(spec)):
            from pyvmm.images import fresh_initramfs

            tree = _modules_of(kernel, os.fspath(modules) if modules else "", arch)
            cure = _how_to_switch_on(spec, text, kernel.config, own_init=True)
            kinds = _filesystems(spec)
            made = fresh_initramfs.make(tree, _lists_for(spec), kinds, arch, cure=cure)
            if tree is not None:
                spec = _with_all_modules(spec, tree)
        spec = validate(replace(spec, initrd=made))
    _tell_lacking(spec, text, kernel.config, own_init=own_init)
    return spec


def _with_disks_own(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The options with the kernel that stands in the disk, or in the image, that they name."""
    from pyvmm.monitor.whole_disk import kernel_in

    if options.get("modules"):
        raise ConfigError(
            "the kernel in a disk has an initrd of its own", cure="leave it out", option="--modules"
        )
    disks = options.get("disks")
    if options.get("image") is not None:
        raise ConfigError(
            "an image has no kernel in its disk", cure="name a disk: --disk", option=_OPTION
        )
    kernel, initrd, cmdline = kernel_in(disks)
    # The user has the last word: it stands before what the disk has behind "--", for its init.
    words = split(cmdline)
    end = words.index("--") if "--" in words else len(words)
    words.insert(end, str(options.get("cmdline") or "").strip())
    cmdline = " ".join(filter(None, words))
    return {
        **options,
        "kernel": kernel,
        "initrd": options.get("initrd") or initrd,
        "cmdline": cmdline,
    }


# --- the kernel -----------------------------------------------------------------------------------


def _foreign(options: Mapping[str, Any]) -> str:
    """The architecture that `options` ask for, if it is another than this machine's; else ""."""
    from pyvmm.machine.board.registry import is_foreign

    arch: str = options.get("arch") or ""
    return arch if arch in ARCHITECTURES and is_foreign(arch) else ""


def _find(kernel: str, arch: str) -> _Kernel:
    if kernel.startswith("debian:"):
        from pyvmm.images import debian_kernels

        found = debian_kernels.find(kernel, arch=arch)
        release = os.path.basename(found.modules)  # both are of one package
        return _Kernel(found.kernel, found.config, found.modules, found.initrd, release)
    if os.path.isdir(kernel):
        return _of_tree(kernel, arch)
    return _Kernel(kernel, _beside(kernel))


def _of_tree(tree: str, arch: str) -> _Kernel:
    """The kernel of a build tree, or of the files that its `make tar-pkg` or a package has."""
    from pyvmm.images import modules
    from pyvmm.machine.board.registry import board_of

    files = board_of(arch).kernel_files
    built = [os.path.join(tree, path) for path in files]
    there = [path for path in built if os.path.isfile(path) and not _is_for_others(path, arch)]
    if there:
        plain = [path for path in there if os.path.basename(path) == "Image"]
        # The others of arm64 are packed of it, and so newer, and perhaps in a way that we cannot
        # unpack; those of x86 are built one by one.
        newest = max(plain or there, key=_age)
        return _Kernel(newest, _config_of_build(tree), tree)
    installed = _installed(tree)
    if len(installed) == 1:
        return _Kernel(installed[0], _beside(installed[0]), tree)
    if installed:
        raise ConfigError(
            f"{tree} has {len(installed)} kernels",
            cure=f"name one of them, such as {installed[-1]}",
            option=_OPTION,
        )
    try:
        os.listdir(tree)
    except OSError as error:
        raise ConfigError(
            f"cannot read {tree}: {error.strerror}", cure="check its permissions", option=_OPTION
        ) from None
    looked = " or ".join(files)
    make = f"make -C {quote(tree)}{f' ARCH={arch}' if arch else ''}"
    for other in _kernels_of_others(tree, arch):
        whose = arch or "this machine"
        raise ConfigError(
            f"{tree} has a kernel for another architecture, {other}, and none for {whose}: "
            f"there is no {looked} in it",
            cure=f"build it for {whose}: {make}",
            option=_OPTION,
        )
    if above := _built_above(tree, files):
        raise ConfigError(
            f"{tree} is a directory in the tree that a kernel was built in",
            cure=f"name the tree: --kernel {quote(above)}",
            option=_OPTION,
        )
    if modules.is_build_tree(tree):
        raise ConfigError(
            f"{tree} has no kernel yet: there is no {looked} in it",
            cure=f"build it: {make}; or name the directory of make O=",
            option=_OPTION,
        )
    raise ConfigError(
        f"{tree} is a directory without a kernel: there is no {looked} in it",
        cure="name a kernel's file, or the tree it was built in",
        option=_OPTION,
    )


def _built_above(tree: str, files: Sequence[str]) -> str:
    """The directory around `tree` with the nearest of the kernels in `files`; "" if none has."""
    above = os.path.realpath(tree)
    while above != os.path.dirname(above):
        above = os.path.dirname(above)
        config = os.path.join(above, "include", "config", "kernel.release")
        if os.path.isfile(config) and any(os.path.isfile(f"{above}/{file}") for file in files):
            return above
    return ""


def _kernels_of_others(tree: str, arch: str) -> list[str]:
    """The kernels in a build tree that are for machines of another architecture than `arch`."""
    from pyvmm.machine.board.registry import board_of, uname_of

    others = [one for one in ARCHITECTURES if uname_of(one) != uname_of(arch)]
    paths = [path for one in others for path in board_of(one).kernel_files]
    found = [one for one in paths if one[:5] == "arch/" and os.path.isfile(os.path.join(tree, one))]
    elf = os.path.join(tree, "vmlinux")  # which a build for any architecture makes
    return [*found, "vmlinux"] if _is_for_others(elf, arch) else found


def _is_for_others(path: str, arch: str) -> bool:
    """True if the file at `path` is an ELF for machines of another architecture than `arch`."""
    from pyvmm.boot import file_kinds
    from pyvmm.machine.board.registry import uname_of

    machine = file_kinds.elf_machine(path)
    return machine is not None and machine not in file_kinds.RUN_ON.get(uname_of(arch), ())


def _config_of_build(tree: str) -> str:
    """The path of the configuration that the kernel in the build tree has: `.config`, or what it
    was when make last looked, if it has been changed since; "" if there is none."""
    config = os.path.join(tree, ".config")
    built_by = os.path.join(tree, "include", "config", "auto.conf")
    try:
        is_later = _age(config) > _age(built_by)
    except OSError:
        return config if os.path.isfile(config) else ""
    if not is_later:
        return config
    log.to_stderr(
        f"{config} has been changed since the kernel was built; "
        f"build it again: make -C {quote(tree)}"
    )
    return built_by


def _age(path: str) -> float:
    return os.stat(path).st_mtime


def _installed(tree: str) -> list[str]:
    """Of files that were to be installed: in /boot, or beside their modules."""
    found = []
    with suppress(OSError):
        boot = os.path.join(tree, "boot")
        names = [one for one in os.listdir(boot) if one.startswith("vmlinuz-")]
        # `make install` keeps the one before as such a name.
        found = [os.path.join(boot, one) for one in names if not one.endswith(".old")]
    for below in () if found else ("lib/modules", "usr/lib/modules"):
        with suppress(OSError):
            place = os.path.join(tree, below)
            paths = [os.path.join(place, one, "vmlinuz") for one in os.listdir(place)]
            found = found or [path for path in paths if os.path.isfile(path)]
    return sorted(found)


def _beside(kernel: str) -> str:
    """The path of a configuration that is beside the kernel's file; "" if there is none."""
    folder, name = os.path.split(os.path.realpath(kernel))
    tree = os.path.dirname(os.path.dirname(os.path.dirname(folder)))  # …/arch/*/boot/bzImage
    kind, _, version = name.partition("-")
    places = []
    if kind in ("vmlinuz", "vmlinux", "bzImage", "kernel") and version:
        places.append(os.path.join(folder, f"config-{version}"))
    if name in ("vmlinux", "bzImage", "vmlinuz", "Image", "Image.gz", "vmlinuz.efi"):
        places += [os.path.join(folder, one) for one in (".config", "config")]
    if folder.endswith("/boot") and "/arch/" in folder:
        places.append(os.path.join(tree, ".config"))
    found = next((path for path in places if os.path.isfile(path)), "")
    folder, name = os.path.split(found)
    return _config_of_build(folder) if name == ".config" else found


# --- its modules ----------------------------------------------------------------------------------


def _modules_of(kernel: _Kernel, given: str, arch: str) -> ModuleTree | None:
    """The modules in `given`, or else the kernel's own; None for a kernel that has none."""
    from pyvmm.images import modules
    from pyvmm.machine.board.registry import board_of

    release = kernel.release or board_of(arch).kernel_release(kernel.path)
    place = given or kernel.modules or _modules_beside(kernel.path, release)
    if not place:
        return None
    tree = modules.find(place, release)
    if not tree.release or (modules.is_build_tree(tree.folder) and _is_below(tree.folder, kernel)):
        # What a tree says of itself is what the next build in it will be.
        tree.release = release or tree.release
    if release and tree.release and tree.release != release:
        raise ConfigError(
            f"the modules in {tree.folder} are for Linux {tree.release}, and the kernel "
            f"{kernel.path} is {release}, which does not load them",
            cure="build both of one tree, or name the other ones",
            option="--modules" if given else _OPTION,
        )
    return tree


def _is_below(folder: str, kernel: _Kernel) -> bool:
    inner = os.path.join(os.path.realpath(folder), "")
    return os.path.realpath(kernel.path).startswith(inner)


def _modules_beside(kernel: str, release: str) -> str:
    """The place where a kernel that is a file has its modules: around it, if that is its folder in
    …/lib/modules; …/lib/modules/RELEASE for …/boot/vmlinuz-RELEASE; or the tree it was built in.
    "" if there are none."""
    from pyvmm.images import modules

    folder = os.path.dirname(os.path.realpath(kernel))
    if os.path.basename(folder) == release and modules.is_installed(folder):
        return folder
    installed = os.path.join(os.path.dirname(folder), "lib", "modules", release)
    if release and os.path.isdir(installed):
        return installed
    above = os.path.dirname(os.path.dirname(os.path.dirname(folder)))  # of arch/x86/boot
    for tree in (folder, above):
        if os.path.isfile(os.path.join(tree, "include", "config", "kernel.release")):
            return tree
    return ""


def _with_all_modules(spec: VmSpec, tree: ModuleTree) -> VmSpec:
    """A guest whose root is a directory of this machine has the kernel's modules where modprobe
    looks for them."""
    from pyvmm.images import tree_modules
    from pyvmm.images.modules import UnreadTree
    from pyvmm.kinds import share

    if not any(device.is_root for device in spec.devices if isinstance(device, share.Spec)):
        return spec
    place = f"/lib/modules/{tree.release}"
    folders = [(tree.folder, place, "pyvmm-modules")]
    if isinstance(tree, UnreadTree):
        with suppress(ConfigError):
            _tell_of_another_build(tree)
        try:
            lists, modules = tree_modules.make(tree)
        except ConfigError as error:
            log.to_stderr(f"modprobe in the guest will find no modules: {error}")
            return spec
        folders = [
            (lists, place, "pyvmm-modules"),
            (modules, f"{place}/kernel", "pyvmm-modules-tree"),
        ]
    shares = (
        share.Spec(folder, at, read_only=True, tag=tag, is_part=True) for folder, at, tag in folders
    )
    return replace(spec, devices=(*spec.devices, *shares))


def _tell_of_another_build(tree: UnreadTree) -> None:
    """One line for the user if modprobe in the guest will refuse the modules of `tree`. Raises
    ConfigError for what is no module."""
    from pyvmm.images.modules import OtherRelease

    try:
        tree.check()
    except OtherRelease as error:
        log.to_stderr(
            f"modprobe in the guest will refuse the modules: {error.message}; {error.cure}"
        )


def _lists_for(spec: VmSpec) -> dict[str, str]:
    """The modules that the guest cannot do without, and why, by the names of the initramfs'
    lists."""
    found = {}
    for part in spec.parts:
        if part.kind in _LISTS:
            name, why = _LISTS[part.kind]
            found[name] = why
    if spec.parts:
        found["transport-pci" if spec.transport == "pci" else "transport-mmio"] = "for its devices"
    return found


def _filesystems(spec: VmSpec) -> tuple[str, ...]:
    """Of the root, as far as the command line and the shares say."""
    for device in spec.devices:
        if getattr(device, "is_root", False):
            return ("virtiofs", "overlay") if getattr(device, "read_only", True) else ("virtiofs",)
    found = values_of(spec.cmdline, "rootfstype")
    return (found[-1],) if found and found[-1].isalnum() else ()


# --- its configuration ----------------------------------------------------------------------------


def _tell_lacking(spec: VmSpec, text: str, config: str, *, own_init: bool) -> None:
    """One line for the user where the kernel's configuration `text`, which the file `config` or the
    kernel itself has, lacks what the guest needs."""
    lacking = _lacking(spec, text, own_init=own_init)
    if lacking:
        said = config or f"the configuration in {spec.kernel}"
        other = replace(spec, transport="mmio" if spec.transport == "pci" else "pci")
        is_better = len(_lacking(other, text, own_init=own_init)) < len(lacking)
        cure = f"; use --transport {other.transport}" if is_better else ""
        if not cure and (how := _how_to_switch_on(spec, text, config, own_init=own_init)):
            cure = f"; {how}"
        log.to_stderr(
            f"the kernel will not serve this guest: by {said} it lacks {', '.join(lacking)}{cure}"
        )


def _on_its_bus(spec: VmSpec, text: str, *, own_init: bool) -> VmSpec:
    """`spec` on PCI, if nobody has chosen and by the kernel's configuration `text` it lacks less
    there than on virtio-mmio."""
    if spec.transport != "auto" or not text:
        return spec
    pci = replace(spec, transport="pci")
    on_pci, on_mmio = (_lacking(one, text, own_init=own_init) for one in (pci, spec))
    return pci if len(on_pci) < len(on_mmio) else spec


def _lacking(spec: VmSpec, text: str, *, own_init: bool) -> list[str]:
    if not text:
        return []
    from pyvmm.boot import kernel_config

    return kernel_config.lacking(text, _wants(spec, own_init=own_init))


def _how_to_switch_on(spec: VmSpec, text: str, config: str, *, own_init: bool) -> str:
    """The command that puts what the kernel lacks into the configuration `text` of the tree that it
    was built in, and builds it; "" if it lacks nothing, or `config` is not that tree's."""
    tree = os.path.dirname(config)
    scripts = (os.path.join(tree, *names) for names in (("scripts",), ("source", "scripts")))
    editors = [path for one in scripts if os.path.isfile(path := os.path.join(one, "config"))]
    if not text or not editors or os.path.basename(config) != ".config":
        return ""
    from pyvmm.boot import kernel_config
    from pyvmm.machine.board.registry import is_foreign

    names = kernel_config.to_switch_on(text, _wants(spec, own_init=own_init))
    if not names:
        return ""
    words = [word for name in names for word in ("-e", name)]
    edit = join([editors[0], "--file", config, *words])
    foreign = [f"ARCH={spec.arch}"] if spec.arch and is_foreign(spec.arch) else []
    return f"{edit} && {join(['make', '-C', tree or '.', *foreign, 'olddefconfig', 'all'])}"


def _wants(spec: VmSpec, *, own_init: bool) -> Wants:
    from pyvmm.boot import kernel_config
    from pyvmm.machine.board.registry import board_of

    other_console = bool(values_of(spec.cmdline, "console"))
    kinds = {device.kind for device in spec.devices}
    filesystems = _filesystems(spec) or (("ext4",) if own_init else ())
    return kernel_config.Wants(
        transport="pci" if spec.transport == "pci" else "mmio",
        disks=bool(spec.disks),
        nets="net" in kinds,
        vsock="vsock" in kinds,
        shares="share" in kinds,
        overlay="overlay" in filesystems,
        console="" if other_console else "virtio" if spec.console else "serial",
        initrd=spec.initrd is not None or own_init,
        modules=spec.initrd is not None or own_init,
        own_init=own_init,
        filesystem=filesystems[0] if filesystems else "",
        found_by=board_of(spec.arch).found_by,
    )


def _configuration(kernel: str, config: str, arch: str) -> str:
    """The configuration in the file `config`, or in the kernel itself; "" if nothing tells it."""
    return _read_config(config) if config else _embedded(kernel, arch)


def _read_config(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(4 << 20)
    except OSError:
        return ""


def _embedded(kernel: str, arch: str) -> str:
    """The configuration that is in the kernel's file; "" if it has none. Looking for it takes as
    long as unpacking the kernel, so that what was found is remembered for that very file."""
    try:
        status = os.stat(kernel)
    except OSError:
        return ""  # Whoever opens it says so.
    if status.st_size < _SMALLEST_REAL:
        return ""
    from pyvmm.host import user_cache

    mark = f"{status.st_dev:x}-{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}"
    folder = "kernel-configs"
    known = os.path.join(user_cache.folder(), folder, mark)
    with suppress(OSError), open(known, encoding="utf-8", errors="replace") as file:
        return file.read()
    from pyvmm.images import made_files
    from pyvmm.machine.board.registry import board_of

    try:
        text = board_of(arch).kernel_config(kernel)
    except (ConfigError, OSError):
        return (
            ""  # Nor is that kept: the file may be for another architecture, or not readable yet.
        )
    made_files.keep_as(folder, mark, text.encode())
    return text
