"""The command line: `pyvmm run`, `pyvmm doctor`, `pyvmm image`."""

from pyvmm.cli.main import main

__all__ = ["main"]
