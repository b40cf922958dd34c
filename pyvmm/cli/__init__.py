"""The command line: `pyvmm run`, `pyvmm doctor`, `pyvmm image`."""

from __future__ import annotations


def main(args: list[str] | None = None) -> None:
    """See `pyvmm.cli.main.main`."""
    # Imported only now, as `pyvmm.cli.inside` is in this package too, and click would cost an
    # emulated processor a second.
    from pyvmm.cli.main import main as run

    run(args)
