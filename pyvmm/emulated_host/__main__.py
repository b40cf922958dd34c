"""`python -m pyvmm.emulated_host [options] -- COMMAND [ARGS…]`: any command on an emulated host."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace

from pyvmm.emulated_host import EmulatedHostSpec, HostDisk, foreign, run
from pyvmm.emulated_host.find import find_image
from pyvmm.errors import PyvmmError


def main() -> int:
    """Run the command that the arguments name; its exit code, or 1 or 2 for an error of ours."""
    parser = argparse.ArgumentParser(prog="python -m pyvmm.emulated_host", description=__doc__)
    parser.add_argument("--memory", type=int, default=2048, metavar="MIB", help="RAM, in MiB")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument(
        "--arch", default="", metavar="NAME", help="another one, as uname -m says it"
    )
    parser.add_argument("--disk", action="append", default=[], metavar="PATH[,readonly]")
    parser.add_argument("--kernel", help="bzImage or vmlinux (default: the one of pyvmm.images)")
    parser.add_argument("--modules", metavar="DIR", help="the kernel's modules, with modules.dep")
    parser.add_argument("--busybox", help="a statically linked busybox")
    parser.add_argument("--qemu", metavar="PROGRAM", help="QEMU (default: that of pyvmm.images)")
    parser.add_argument("--console", action="store_true", help="show the emulated kernel's console")
    parser.add_argument("--boot", action="store_true", help="not from a saved state")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND [ARGS…]")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("there is no command")
    try:
        image = find_image(make=True, architecture=options.arch)
        spec = EmulatedHostSpec(
            replace(
                image,
                kernel=options.kernel or image.kernel,
                modules_dir=options.modules or image.modules_dir,
                busybox=options.busybox or image.busybox,
                qemu=(options.qemu,) if options.qemu else image.qemu,
            ),
            memory_mib=options.memory,
            cpus=options.cpus,
            boots=options.boot,
            disks=tuple(_disk(text) for text in options.disk),
            env=foreign.environment(os.environ, image),
        )
        return run(spec, command, console=sys.stderr.fileno() if options.console else None)
    except PyvmmError as error:
        print(f"pyvmm: {error}", file=sys.stderr)
        return 1


def _disk(text: str) -> HostDisk:
    path, _, rest = text.partition(",")
    return HostDisk(os.path.abspath(path), read_only=rest == "readonly")


if __name__ == "__main__":
    sys.exit(main())
