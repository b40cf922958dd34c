"""What runs inside the emulated KVM host: a checked specification, straight to the machine.

The outer `pyvmm run` has read the options and checked the files; importing the command line again
would cost the emulated processor half a second.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial

from pyvmm import monitor
from pyvmm.relay import VARIABLE

CONTROL_PATH = "/run/pyvmm-control"  # where the relay of sockets finds the monitor


def main() -> int:
    """Run the specification in argv[2], a JSON text; the guest's exit code. argv[1] is the same as
    the machine outside knows it, argv[3] are the seconds that a guest has to power off when a
    signal asks it to, argv[4] says how this is confined."""
    monitor.collect_garbage_rarely()
    from pyvmm.host import log
    from pyvmm.kinds.vm_spec import from_json
    from pyvmm.monitor.confine import Confinement
    from pyvmm.monitor.phases import run_here

    try:
        spec = from_json(sys.argv[2])
        stop_patience = float(sys.argv[3])
        confinement = Confinement(sys.argv[4])
        log.set_vm(spec.name)
        if VARIABLE not in os.environ:
            return run_here(spec, quiet=True, stop_patience=stop_patience, confinement=confinement)
        from pyvmm.host import unix_sockets
        from pyvmm.relay import inside

        inside.start()
        control = unix_sockets.listen(CONTROL_PATH)
        code = run_here(
            spec,
            quiet=True,
            stop_patience=stop_patience,
            control=control,
            on_listening=inside.admit,
            resize_outside=lambda *args: confinement.run(partial(_resize_outside, *args)),
            described=from_json(sys.argv[1]),
            confinement=confinement,
        )
        control.close()
        inside.finish()
        return code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from pyvmm.monitor.exit_code import explain

        return explain(error)


def _resize_outside(path: str, size: int | None) -> None:
    from pyvmm.kinds.disk.outside import resize_outside

    resize_outside(path, size)


if __name__ == "__main__":
    code = main()
    from pyvmm.host.log import flush

    flush()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
