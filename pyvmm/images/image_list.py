"""`pyvmm image list`: what there is to boot."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.images import bootable, user_image
from pyvmm.images.builder import Catalogue
from pyvmm.images.built import DEFAULT_KERNEL


class Row(NamedTuple):
    """One image that can be booted by its name. `size` in bytes, as on this machine's disk; `made`
    an ISO 8601 date; both None for one that has not been built. `kernel` is the series, and the
    architecture if that is not this machine's: "6.1 arm64"."""

    name: str
    size: int | None
    made_from: str
    made_at: str | None
    kernel: str
    details: dict[str, str]


def rows() -> list[Row]:
    """See pyvmm.images.machine_images."""
    return [*_built_in(), *map(_own, user_image.names())]


def _built_in() -> Iterator[Row]:
    variants = bootable.built_in()
    if not variants:
        return
    catalogue = Catalogue()
    for name, variant in variants.items():
        recipe = catalogue.recipes.rootfs[variant]
        folder = catalogue.path(f"rootfs-{variant}")
        made = None
        if os.path.isdir(folder):
            made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(os.stat(folder).st_mtime))
        made_from = f"debian:{catalogue.recipes.release}"
        details = {"packages": ",".join(recipe.packages)}
        kernel = recipe.architecture if recipe.is_foreign else DEFAULT_KERNEL
        yield Row(name, _size(folder), made_from, made, _shown(kernel), details)


def _shown(kernel: str) -> str:
    series, arch = bootable.series_of_kernel(kernel), bootable.arch_of_kernel(kernel)
    return f"{series} {arch}".rstrip()


def _own(name: str) -> Row:
    size = _size(user_image.path(name))
    try:
        found = user_image.find(name)
    except ConfigError as error:
        return Row(name, size, f"unknown: {error.message}", None, "", {})
    if found is None:
        return Row(name, size, "unknown: it has no record", None, "", {})
    return Row(
        name, size, found.made_from, found.made_at, _shown(found.kernel), dict(found.details)
    )


def _size(folder: str) -> int | None:
    """Bytes that the folder's files take on the disk; None if there is none."""
    try:
        return sum(entry.stat().st_blocks * 512 for entry in os.scandir(folder))
    except OSError:
        return None
