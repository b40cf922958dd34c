"""What runs inside the emulated KVM host: a checked specification, straight to the machine.

The outer `pyvmm run` has read the options and checked the files; importing the command line again
would cost the emulated processor half a second.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress

from pyvmm.relay import VARIABLE


def main() -> int:
    """Run the specification in argv[1], a JSON text; the guest's exit code."""
    from pyvmm.machine.launch import run_here
    from pyvmm.machine.spec import from_json

    try:
        return run_here(from_json(sys.argv[1]), quiet=True, on_listening=_join_relay())
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from pyvmm.cli.ending import explain

        return explain(error)


def _join_relay() -> Callable[[], None]:
    """Make the machine's sockets reachable; what to call when ours listen."""
    if VARIABLE not in os.environ:
        return lambda: None
    from pyvmm.relay import inside

    inside.start()
    return inside.admit


if __name__ == "__main__":
    code = main()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
