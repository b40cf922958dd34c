"""The command line: `pyvmm run`, `pyvmm doctor`, `pyvmm image`."""

from __future__ import annotations

from pyvmm import monitor

monitor.collect_garbage_rarely()


def main(args: list[str] | None = None) -> None:
    """See `pyvmm.cli.main.main`."""
    from pyvmm.cli import interrupts

    interrupts.die_of_them()
    from pyvmm.host import own_python

    own_python.leave_current_directory()
    from pyvmm.cli.main import main as run

    run(args)
