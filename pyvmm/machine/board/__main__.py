"""``python -m pyvmm.machine.board KERNEL TARGET`` unpacks a kernel as distributions have it."""

from __future__ import annotations

import sys

from pyvmm.errors import ConfigError
from pyvmm.machine.board.registry import board_of_host


def main(arguments: list[str]) -> int:
    """The command line of this module; the exit code."""
    if len(arguments) != 2:
        print("usage: python -m pyvmm.machine.board KERNEL TARGET", file=sys.stderr)
        return 2
    try:
        board_of_host().unpack_kernel(*arguments)
    except ConfigError as error:
        print(f"pyvmm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
