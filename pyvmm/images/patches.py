"""Faults of one version of a package that are mended in its file, as it is unpacked."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pyvmm.errors import ConfigError
from pyvmm.images.lock import Pin
from pyvmm.images.progress import Progress
from pyvmm.images.recipes import Patch


def mend(root: str, patches: Sequence[Patch], pins: Sequence[Pin], progress: Progress) -> None:
    """Apply `patches` to the packages `pins` that were unpacked into the folder `root`.

    A patch for another version than the one that is there is left out, and that is said. Raises
    ConfigError where a file of the right version is not what the patch expects.
    """
    versions = {pin.package: pin.version for pin in pins}
    for patch in patches:
        if versions.get(patch.package) != patch.version:
            there = versions.get(patch.package, "not there")
            progress.notice(
                f"{patch.package} is {there}; a fault is mended in {patch.version} only, "
                f"so {patch.without}"
            )
            continue
        old, new = bytes.fromhex(patch.old), bytes.fromhex(patch.new)
        with open(os.path.join(root, patch.file), "r+b") as file:
            if os.pread(file.fileno(), len(old), patch.offset) != old or len(old) != len(new):
                raise ConfigError(
                    f"the patch of {patch.package} {patch.version} does not fit {patch.file}",
                    cure="remove the patch from recipes.toml, or mend it",
                )
            os.pwrite(file.fileno(), new, patch.offset)
