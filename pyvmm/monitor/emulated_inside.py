"""The monitor inside the emulated KVM host: a checked specification, straight to the machine.

The outer `pyvmm run` has read the options and checked the files; importing the command line again
would cost the emulated processor half a second.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from pyvmm import monitor
from pyvmm.relay import VARIABLE

if TYPE_CHECKING:
    from pyvmm.control.doors import Door
    from pyvmm.monitor.confine import Confinement
    from pyvmm.spec.surroundings import Surroundings

CONTROL_PATH = "/run/pyvmm-control"  # where the relay of sockets finds the monitor


def door_path(number: int) -> str:
    """The path at which the relay finds the control socket of that number, beside the first."""
    return f"{CONTROL_PATH}-{number}"


def main() -> int:
    """Run the specification in argv[2], a JSON text; the guest's exit code. argv[1] is the same as
    the machine outside knows it, argv[3] are the seconds that a guest has to power off when a
    signal asks it to, argv[4] says how this is confined, as the values of options in JSON."""
    import json

    monitor.collect_garbage_rarely()
    from pyvmm.host import log
    from pyvmm.kinds.vm_spec import from_json
    from pyvmm.monitor.confine import Confinement
    from pyvmm.monitor.phases import run_here
    from pyvmm.spec.surroundings import read_surroundings

    try:
        spec = from_json(sys.argv[2])
        stop_patience = float(sys.argv[3])
        surroundings = read_surroundings(json.loads(sys.argv[4]))
        confinement = Confinement(surroundings, is_inside=True)
        log.set_vm(spec.name)
        if VARIABLE not in os.environ:
            return run_here(spec, quiet=True, stop_patience=stop_patience, confinement=confinement)
        from pyvmm.host import unix_sockets
        from pyvmm.relay import inside

        places = [door_path(number) for number in range(len(surroundings.sockets))]
        confinement.watch_over_inside((CONTROL_PATH, *places))
        inside.start()
        control = unix_sockets.listen(CONTROL_PATH)
        code = run_here(
            spec,
            quiet=True,
            stop_patience=stop_patience,
            control=control,
            on_listening=inside.admit,
            resize_outside=lambda *args: confinement.run(
                partial(_resize_outside, confinement, *args)
            ),
            described=from_json(sys.argv[1]),
            confinement=confinement,
            doors=_doors(surroundings) if surroundings.sockets else [],
        )
        control.close()
        inside.finish()
        return code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        from pyvmm.monitor.exit_code import explain

        return explain(error)


def _doors(surroundings: Surroundings) -> list[Door]:
    from pyvmm.control.doors import MAX_AT_DOOR, Door
    from pyvmm.host import unix_sockets

    return [
        Door(unix_sockets.listen(door_path(number)), one.rights, most=MAX_AT_DOOR)
        for number, one in enumerate(surroundings.sockets)
    ]


def _resize_outside(confinement: Confinement, path: str, size: int | None) -> None:
    from pyvmm.kinds.disk.outside import resize_outside

    resize_outside(path, size, confinement.open_device)


if __name__ == "__main__":
    code = main()
    from pyvmm.host.log import flush

    flush()
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
