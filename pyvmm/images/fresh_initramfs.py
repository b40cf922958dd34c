"""The initramfs for a kernel that no recipe made: built at the start, of the modules at hand.

It is the recipes' own, without modules (initramfs.base), and behind it an archive of those that the
guest needs; to the kernel two archives in one file are one (Linux
Documentation/driver-api/early-userspace/buffer-format.rst).

$XDG_CACHE_HOME/pyvmm/made/HASH.cpio    named after its content; old ones go when new ones come
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence

from pyvmm.errors import ConfigError
from pyvmm.host import cpio
from pyvmm.images import initramfs, made_files
from pyvmm.images.modules import ModuleTree, OtherRelease
from pyvmm.images.recipes import FILE_SYSTEM

_USUAL_FILE_SYSTEM = "ext4"
# What /etc/fstab of a whole disk mounts, with the names that Linux takes by default.
_ESP = {f"{FILE_SYSTEM}vfat": ("vfat", "nls_cp437", "nls_ascii")}
_MOST = 1 << 30  # bytes


def make(
    modules: ModuleTree | None,
    needed: Mapping[str, str],
    filesystems: Sequence[str] = (),
    arch: str = "",
    *,
    cure: str = "",
) -> str:
    """The path of an initramfs for the kernel that `modules` are of. `needed` tells which lists of
    the recipes the guest cannot do without, and what each is for; of the others it gets those that
    can be had. `filesystems` are those of the root, if they are known. `arch` is the guest's, one
    of bootable.FOREIGN or "". `cure` is what to do about modules that are missing, where somebody
    knows better than they do.

    Raises ConfigError that names the modules that are missing.
    """
    base, lists = _recipe(arch)
    kinds = dict.fromkeys((*filesystems, _USUAL_FILE_SYSTEM))
    lists = {**lists, **_ESP, **{f"{FILE_SYSTEM}{kind}": (kind,) for kind in kinds}}
    parts: Iterable[bytes] = [base]
    if modules is not None:
        roots = dict.fromkeys(map(FILE_SYSTEM.__add__, filesystems), "for its root file system")
        needed = {**needed, **roots}
        chosen = _choose(modules, lists, needed, cure)
        # Piece by piece: a stranger's modules may be large.
        parts = itertools.chain(
            parts, cpio.chunks(initramfs.module_entries(chosen, modules, tuple(_ESP)))
        )
    return made_files.keep(parts, ".cpio", _MOST)


def _recipe(arch: str) -> tuple[bytes, dict[str, tuple[str, ...]]]:
    """The beginning of every initramfs, and the lists of modules that init knows."""
    from pyvmm.images import built, found_before, recipes

    name = initramfs.base(arch)
    folders = found_before.find(name)
    if folders is None:
        folders = built.folders([name], make=True)
        found_before.remember(name, folders)
    with open(os.path.join(folders[0], initramfs.FILE), "rb") as file:
        return file.read(), recipes.load().initramfs.modules


def _choose(
    modules: ModuleTree, lists: Mapping[str, Sequence[str]], needed: Mapping[str, str], cure: str
) -> dict[str, Sequence[str]]:
    chosen = {}
    missing: dict[str, list[str]] = {}  # what each is for
    for name, wanted in lists.items():
        try:
            modules.load_order(wanted)
        except ConfigError as error:
            if name in needed:
                if isinstance(error, OtherRelease):
                    raise
                gone = [module for module in wanted if not modules.has(module)]
                what = ", ".join(gone) or error.message
                missing.setdefault(what, []).append(needed[name])
            continue
        chosen[name] = wanted
    if missing and modules.knows_builtin:
        listed = ", ".join(f"{what} ({', '.join(why)})" for what, why in missing.items())
        raise ConfigError(
            f"the kernel {modules.release} has neither built in nor in {modules.folder}: {listed}",
            cure=cure or modules.cure,
            option="--modules",
        )
    return chosen
