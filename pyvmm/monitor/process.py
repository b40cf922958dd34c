"""A monitor that belongs to a Python program: `pyvmm.VM` starts one, in a process of its own.

It takes what to run from a file descriptor, tells its name on another, and ends with its parent.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from threading import Thread

from pyvmm.machine.outcome import STOP_SECONDS

_GRACE = (
    STOP_SECONDS + 15.0
)  # seconds between asking a monitor whose parent is gone to end, and ending it


def main() -> int:
    """Run the request that sys.argv names; the exit code is as `pyvmm run`'s.

    argv[1] is a descriptor with a JSON object: `spec` (as `to_json` has it), `kvm`, `image`, `rm`
    (as `run_spec` has them) and `parent` (a process, or null); argv[2] is one that the VM's name is
    written to.
    """
    from pyvmm.monitor.exit_code import explain

    try:
        return _run(int(sys.argv[1]), int(sys.argv[2]))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return explain(error)


def _run(request_fd: int, name_fd: int) -> int:
    import json

    from pyvmm.kinds.vm_spec import from_json
    from pyvmm.monitor.start import run_spec

    with open(request_fd, "rb") as file:
        request = json.loads(file.read())
    if request["parent"] is not None:
        Thread(target=_end_with, args=(request["parent"],), name="parent", daemon=True).start()

    def tell(name: str) -> None:
        os.write(name_fd, name.encode() + b"\n")
        os.close(name_fd)

    return run_spec(
        from_json(request["spec"]),
        request["kvm"],
        image=request["image"],
        rm=request["rm"],
        on_name=tell,
        cut_if_nothing_kept=True,
    )


def _end_with(parent: int) -> None:
    """Wait until the process `parent`, which has started this one, is gone; then end as by SIGTERM,
    or else by SIGKILL. (PR_SET_PDEATHSIG looks at the thread that started us only.)"""
    try:
        fd = os.pidfd_open(parent)
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while os.getppid() == parent:
            poll.poll()
    except OSError:
        pass  # It was gone before we looked.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from pyvmm.monitor.exit_code import flush_or_drop

    os._exit(flush_or_drop(main()))
