"""python -m pyvmm.images: build, list and find guest images; `pyvmm image` is the same."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pyvmm import images
from pyvmm.errors import PyvmmError
from pyvmm.images import builder, cache
from pyvmm.images.progress import Progress

_FOR_DEMO = ["kernel-6.1", "initramfs-6.1", "rootfs-minbase", "kernel-host"]


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 1 after one line on standard error."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except PyvmmError as error:
        sys.stderr.write(f"pyvmm: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("pyvmm: interrupted; what was finished is kept\n")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pyvmm.images", description=__doc__)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("build", help="make what is missing in the cache")
    command.add_argument("names", nargs="*", metavar="NAME", help="images (default: for a demo)")
    command.add_argument("--kernel", action="append", default=[], help="a guest kernel: 6.1, 6.12")
    command.add_argument("--variant", action="append", default=[], help="a root disk: minbase …")
    command.add_argument("--all", "--for-tests", action="store_true", help="every image")
    command.add_argument("--locked", action="store_true", help="only the pinned versions will do")
    command.set_defaults(run=_build)

    command = commands.add_parser("list", help="the images, and which are in the cache")
    command.set_defaults(run=_list)

    command = commands.add_parser("path", help="the folder of an image")
    command.add_argument("name", metavar="NAME")
    command.set_defaults(run=_path)

    command = commands.add_parser("lock", help="pin the versions the mirror has now")
    command.set_defaults(run=_lock)

    command = commands.add_parser("prune", help="remove images no current recipe makes")
    command.set_defaults(run=_prune)
    return parser


def _build(options: argparse.Namespace) -> None:
    wanted = list(options.names)
    for kernel in options.kernel:
        wanted += [f"kernel-{kernel}", f"initramfs-{kernel}"]
    wanted += [f"rootfs-{variant}" for variant in options.variant]
    images.build(None if options.all else wanted or _FOR_DEMO, locked=options.locked)


def _list(options: argparse.Namespace) -> None:
    catalogue = builder.Catalogue()
    for name in catalogue.names():
        folder = catalogue.path(name)
        state = folder if os.path.isdir(folder) else "not built"
        print(f"{name:18} {state}")


def _path(options: argparse.Namespace) -> None:
    print(images.path(options.name))


def _lock(options: argparse.Namespace) -> None:
    builder.refresh_lock(builder.Catalogue(), Progress())


def _prune(options: argparse.Namespace) -> None:
    catalogue = builder.Catalogue()
    with cache.building(lambda: print("another build is running; waiting for it")):
        for folder in cache.prune({catalogue.path(name) for name in catalogue.names()}):
            print(f"removed {folder}")


if __name__ == "__main__":
    sys.exit(main())
