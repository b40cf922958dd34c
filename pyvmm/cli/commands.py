"""The commands, by click: what explains `--help` and complains about options."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from pyvmm.host import log
from pyvmm.monitor.exit_code import BROKEN_PIPE, explain
from pyvmm.version import __version__

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


# By name: its module, in the order of --help. In there the command has the same name, - being _.
COMMANDS = {
    "run": "pyvmm.cli.run",
    "matrix": "pyvmm.cli.matrix",
    "exec": "pyvmm.cli.guest",
    "cp": "pyvmm.cli.guest",
    "ps": "pyvmm.cli.control",
    "stop": "pyvmm.cli.control",
    "pause": "pyvmm.cli.control",
    "resume": "pyvmm.cli.control",
    "snapshot": "pyvmm.cli.snapshot",
    "clone": "pyvmm.cli.clone",
    "disk": "pyvmm.cli.control",
    "net": "pyvmm.cli.control",
    "rng": "pyvmm.cli.control",
    "share": "pyvmm.cli.control",
    "balloon": "pyvmm.cli.control",
    "console": "pyvmm.cli.console",
    "logs": "pyvmm.cli.logs",
    "events": "pyvmm.cli.console",
    "top": "pyvmm.cli.top",
    "stats": "pyvmm.cli.stats",
    "metrics": "pyvmm.cli.stats",
    "rm": "pyvmm.cli.machines",
    "vhost-user": "pyvmm.cli.vhost_user",
    "vhost-user-blk": "pyvmm.cli.vhost_user",
    "doctor": "pyvmm.cli.doctor",
    "image": "pyvmm.cli.image",
}


class Commands(click.Group):
    """Imports a command only when it is called: each has its own needs, and `run` is in a hurry."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(COMMANDS[cmd_name])
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command


@click.command(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="pyvmm")
def cli() -> None:
    """A KVM microVM monitor in Python.

    `pyvmm run` boots a Linux kernel, `pyvmm exec` and `cp` reach into a guest, `pyvmm ps`, `stop`,
    `pause` and `resume` look after VMs that run, `pyvmm doctor` says what this machine can do, and
    `pyvmm image` builds a kernel and a root disk to try it with.
    """


def run_command(argv: list[str]) -> int:
    """Carry out `argv` by click; the exit code. Errors are one line, with --debug a traceback."""
    try:
        code: Any = cli.main(args=argv, prog_name="pyvmm", standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as wrong:
        _show_usage_error(wrong, argv)
        return wrong.exit_code
    except SystemExit:  # click's, where nobody reads any more
        return BROKEN_PIPE
    except (click.Abort, KeyboardInterrupt):
        return 130
    except Exception as wrong:
        if "--debug" in argv:
            import traceback

            for line in traceback.format_exc().splitlines():
                log.to_stderr(line)
        return explain(wrong)
    return code if isinstance(code, int) else 0


def _show_usage_error(wrong: click.ClickException, argv: list[str]) -> None:
    message = wrong.format_message()
    if "\n" in message:  # the help, for a command without arguments
        wrong.show()
        return
    context = getattr(wrong, "ctx", None)
    if context is not None:
        command = context.command_path
    else:  # an option without its value: click does not say whose
        command = " ".join(["pyvmm", *(word for word in argv[:1] if word in COMMANDS)])
    text = f"{message.removesuffix('.')}; see {command} --help"
    log.to_stderr(log.Line(text, level=log.ERROR, more={"exit_code": wrong.exit_code}))
