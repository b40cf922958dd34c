"""The command line: `pyvmm run`, `pyvmm doctor`, `pyvmm image`."""

from __future__ import annotations

import gc

# Starting makes some ten thousand objects that stay, and searching them for garbage again and again
# would take a tenth of the time until the guest runs.
gc.set_threshold(100_000)


def main(args: list[str] | None = None) -> None:
    """See `pyvmm.cli.main.main`."""
    # Imported only now, as `pyvmm.monitor.inside` is in this package too, and click would cost an
    # emulated processor a second.
    from pyvmm.cli.main import main as run

    run(args)
