"""The top of the command line: where an error becomes one line and an exit code."""

from __future__ import annotations

import sys
from typing import Any

import click

from pyvmm import __version__
from pyvmm.errors import ConfigError, PyvmmError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Commands(click.Group):
    """Imports a command only when it is called: each has its own needs, and `run` is in a hurry."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["run", "doctor", "image"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "run":
            from pyvmm.cli.run import run

            return run
        if cmd_name == "doctor":
            from pyvmm.cli.doctor import doctor

            return doctor
        if cmd_name == "image":
            from pyvmm.cli.image import image

            return image
        return None


@click.command(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="pyvmm")
def cli() -> None:
    """A KVM microVM monitor in Python.

    `pyvmm run` boots a Linux kernel, `pyvmm doctor` says what this machine can do, and
    `pyvmm image` builds a kernel and a root disk to try it with.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with its code; errors are one line unless --debug is given."""
    argv = sys.argv[1:] if args is None else args
    try:
        code: Any = cli.main(args=argv, prog_name="pyvmm", standalone_mode=False)
    except click.exceptions.Exit as done:
        code = done.exit_code
    except click.ClickException as wrong:
        wrong.show()
        code = wrong.exit_code
    except click.Abort:
        code = 130
    except PyvmmError as wrong:
        if "--debug" in argv:
            raise
        print(f"pyvmm: {wrong}", file=sys.stderr)
        code = 2 if isinstance(wrong, ConfigError) else 1
    except KeyboardInterrupt:
        code = 130
    except Exception as wrong:
        if "--debug" in argv:
            raise
        print(
            f"pyvmm: a defect in pyvmm: {type(wrong).__name__}: {wrong}; "
            "run again with --debug and report what it prints",
            file=sys.stderr,
        )
        code = 70  # EX_SOFTWARE
    sys.exit(code if isinstance(code, int) else 0)
