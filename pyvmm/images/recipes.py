"""The recipes: guest-images/recipes.toml as values, and where that folder is."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pyvmm.errors import ConfigError

FOLDER_VARIABLE = "PYVMM_GUEST_IMAGES"
FILE_SYSTEM = "fs-"
"""The beginning of the name of a list of a file system's modules: fs-ext4."""


@dataclass(frozen=True)
class Patch:
    """Mends one fault of one `version` of a `package`: at `offset` bytes in `file`, a path below
    the image's root, the bytes `new` take the place of `old`; both are hexadecimal and equally
    long. `without` says what to expect of other versions."""

    package: str
    version: str
    file: str
    offset: int
    old: str
    new: str
    without: str

    def stated(self) -> dict[str, Any]:
        """What decides what is made."""
        return {name: value for name, value in asdict(self).items() if name != "without"}


@dataclass(frozen=True)
class KernelRecipe:
    """Debian's kernel metapackage, and the suite it is taken from.

    `suites` are where apt looks, those of the recipes if there are none. A kernel for another
    `architecture` has the busybox of the first of them; its initramfs is without the
    lists of modules that it `lacks`, and has one for each of `filesystems`, which a root disk may
    have and the kernel has as modules. One that is `optional` may fail when all images are built;
    so does one of another `series` than the start of its version, if that is told.
    """

    package: str
    suite: str
    suites: tuple[str, ...] = ()
    architecture: str = "amd64"
    lacks: tuple[str, ...] = ()
    filesystems: tuple[str, ...] = ()
    optional: bool = False
    series: str = ""
    patches: tuple[Patch, ...] = ()

    @property
    def is_foreign(self) -> bool:
        return self.architecture != "amd64"

    def stated(self) -> dict[str, Any]:
        """The settings that differ from the usual ones, by name."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        stated = {name: value for name, (value, usual) in values.items() if value != usual}
        return stated | ({"patches": _stated(self.patches)} if self.patches else {})


@dataclass(frozen=True)
class InitramfsRecipe:
    """`modules`: for each list the guest's init may load, the modules it wants loaded. What only
    those named in `compressed` need is compressed."""

    busybox: str
    applets: tuple[str, ...]
    modules: dict[str, tuple[str, ...]]
    compressed: tuple[str, ...] = ()

    def for_kernel(self, kernel: KernelRecipe | None) -> InitramfsRecipe:
        """The same with the lists that `kernel` has modules for; without any for None."""
        if kernel is None:
            return replace(self, modules={})
        modules = {name: row for name, row in self.modules.items() if name not in kernel.lacks}
        modules |= {f"{FILE_SYSTEM}{one}": (one,) for one in kernel.filesystems}
        return replace(self, modules=modules)


@dataclass(frozen=True)
class RootfsRecipe:
    """`size` of the file system in MiB; `packages` on top of Debian's minbase, of `architecture`.
    One that is made `only_by_name` is not among all images that are built at once."""

    size: int
    packages: tuple[str, ...]
    architecture: str = "amd64"
    only_by_name: bool = False

    @property
    def is_foreign(self) -> bool:
        return self.architecture != "amd64"

    def stated(self) -> dict[str, Any]:
        """What decides what is made, where it differs from the usual."""
        values: dict[str, Any] = {"size": self.size, "packages": self.packages}
        return {**values, "architecture": self.architecture} if self.is_foreign else values


@dataclass(frozen=True)
class ProgramsRecipe:
    """`packages` of the Debian `suites`; what they depend on comes along, unless they are taken
    `alone`. Those for another `architecture` run in an emulated machine. `optional` is as for
    kernels, `only_by_name` as for root disks."""

    suites: tuple[str, ...]
    packages: tuple[str, ...]
    patches: tuple[Patch, ...] = ()
    architecture: str = "amd64"
    optional: bool = False
    alone: bool = False
    only_by_name: bool = False

    def stated(self) -> dict[str, Any]:
        """The settings that differ from the usual ones, by name."""
        values: dict[str, Any] = {"suites": self.suites, "packages": self.packages}
        if self.patches:
            values["patches"] = _stated(self.patches)
        if self.architecture != "amd64":
            values["architecture"] = self.architecture
        if self.alone:
            values["alone"] = True
        return values


@dataclass(frozen=True)
class Recipes:
    """Everything in recipes.toml, and the folder that has the files they use."""

    folder: str
    release: str
    suites: tuple[str, ...]
    kernels: dict[str, KernelRecipe]
    programs: dict[str, ProgramsRecipe]
    initramfs: InitramfsRecipe
    rootfs: dict[str, RootfsRecipe]

    def file(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    @property
    def lock_file(self) -> str:
        return self.file("amd64.lock")

    @property
    def agents(self) -> list[str]:
        """The other architectures that the guest's agent is compiled for: those with a musl."""
        names = (one for one in self.programs if one.startswith("musl-"))
        return [self.programs[name].architecture for name in names]

    @property
    def guest_kernels(self) -> list[str]:
        """The kernels that `pyvmm run` can run."""
        return [name for name in self.booted_kernels if not self.kernels[name].is_foreign]

    @property
    def booted_kernels(self) -> list[str]:
        """The kernels that are run as guests of any monitor, so that have an initramfs."""
        return [name for name in self.kernels if name != "host"]


def folder() -> str:
    """guest-images/ in the package; $PYVMM_GUEST_IMAGES where that is set.

    In a checkout it is a link to the top level's guest-images/, in a wheel a copy of it.
    Raises ConfigError where there is none, as in a checkout whose tools made no link.
    """
    chosen = os.environ.get(FOLDER_VARIABLE)
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = os.path.realpath(chosen or os.path.join(package, "guest-images"))
    if os.path.isfile(os.path.join(found, "recipes.toml")):
        return found
    raise ConfigError(
        f"there are no image recipes in {found}",
        cure=f"set {FOLDER_VARIABLE} to the guest-images folder of pyvmm's sources",
    )


def load(where: str | None = None) -> Recipes:
    """Read recipes.toml in `where` (default: `folder()`). Raises ConfigError with what is wrong."""
    import tomllib

    where = where or folder()
    path = os.path.join(where, "recipes.toml")
    try:
        with open(path, "rb") as file:
            return _parse(where, tomllib.load(file))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: {type(error).__name__} {error}") from None


def _parse(where: str, table: dict[str, Any]) -> Recipes:
    initramfs = table["initramfs"]
    return Recipes(
        folder=where,
        release=table["release"],
        suites=tuple(table["suites"]),
        kernels={
            name: KernelRecipe(**{**_with_tuples(row), "patches": _patches(row)})
            for name, row in table["kernel"].items()
        },
        programs={
            name: ProgramsRecipe(
                suites=tuple(row["suites"]),
                packages=tuple(row["packages"]),
                patches=_patches(row),
                architecture=row.get("architecture", "amd64"),
                optional=row.get("optional", False),
                alone=row.get("alone", False),
                only_by_name=row.get("only_by_name", False),
            )
            for name, row in table["programs"].items()
        },
        initramfs=InitramfsRecipe(
            busybox=initramfs["busybox"],
            applets=tuple(initramfs["applets"]),
            modules={name: tuple(row) for name, row in initramfs["modules"].items()},
            compressed=tuple(initramfs["compressed"]),
        ),
        rootfs={name: RootfsRecipe(**_with_tuples(row)) for name, row in table["rootfs"].items()},
    )


def _patches(row: dict[str, Any]) -> tuple[Patch, ...]:
    return tuple(Patch(**patch) for patch in row.get("patches", ()))


def _stated(patches: tuple[Patch, ...]) -> list[dict[str, Any]]:
    return [patch.stated() for patch in patches]


def _with_tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
