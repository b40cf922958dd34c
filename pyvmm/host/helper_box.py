"""A box for a large program that may read what its user may, and write next to nothing.

It is for programs whose system calls nobody has listed, such as QEMU: no privileges come back, only
the capabilities that working on files takes are kept, nothing is opened for writing but what is
named, there is no TCP of its own, no signal or abstract socket to others, no core file, and none of
the calls that no program of ours ever needs (`pyvmm.host.box`). What was opened before stays open.

As a program this enters the box and becomes another program: `command` makes the line.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Sequence

from pyvmm.errors import ConfigError
from pyvmm.host import box
from pyvmm.host import confinement as c

# <linux/capability.h>: CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID, MKNOD
_OF_FILES = frozenset({0, 1, 2, 3, 4, 6, 7, 27})
_ALL = frozenset(range(64))


def command(program: Sequence[str], write: Sequence[str] = (), memory: int = 0) -> list[str]:
    """The command line that runs `program`, which begins with an absolute path, where it can write
    what is in the folders `write` only, and map `memory` bytes at the most; 0 is any number. Where
    the kernel can do nothing, `program` itself."""
    if not c.available():
        return list(program)
    return c.python(__name__, str(memory), str(len(write)), *write, *program)


def main(arguments: list[str]) -> int:
    """Run the program that `command` has put into a line. Returns only with a failure's exit code,
    after a line on standard error."""
    memory, count, *rest = arguments
    write, program = rest[: int(count)], rest[int(count) :]
    try:
        c.lower(resource.RLIMIT_CORE, 0)
        box.drop_capabilities(_ALL - _OF_FILES)
        c.no_new_privileges()
        rules: list[c.FileRule] = [
            (("/",), c.READ_FILE | c.READ_DIR | c.EXECUTE),
            (("/dev/null", "/dev/zero", "/dev/tty"), c.READ_FILE | c.WRITE_FILE | c.IOCTL_DEV),
            (write, c.EVERYTHING),
        ]
        c.restrict_files(rules, c.landlock_version())
        box.never_call()
        if int(memory):
            c.lower(resource.RLIMIT_AS, int(memory))
        os.execv(program[0], program)
    except ConfigError as error:
        print(error, file=sys.stderr)
    except OSError as error:
        print(f"cannot run {program[0]}: {error.strerror}", file=sys.stderr)
    return 1
