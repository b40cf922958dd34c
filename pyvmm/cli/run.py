"""`pyvmm run`: from options to a running guest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from pyvmm.cli.parameter_types import Seconds
from pyvmm.cli.quick import split_command
from pyvmm.kinds import registry
from pyvmm.monitor.start import start
from pyvmm.spec.names import check_name
from pyvmm.spec.options import ARGUMENT, FLAG, OPTIONAL, Option

EXAMPLES = """\b
Examples:
  pyvmm run                       Debian, built at the first use; ends by poweroff
  pyvmm run --rm debian-systemd   another image; what the guest changes is thrown away
  pyvmm run --rm -- uname -r      boots, runs a command, exits with its code
  pyvmm run --kernel vmlinuz --initrd initrd.img --disk debian.img
  pyvmm run --kernel vmlinux --disk root.img --disk data.img,readonly,id=data,bps=20M,iops=500
  pyvmm run --kernel vmlinux --disk base.img,snapshot --disk big.qcow2
  pyvmm run --kernel vmlinuz --disk root.img --cpus 4 --memory 2G --cmdline "loglevel=7"
"""
KEYS_AND_CODES = """\b
Keys, where standard input is a terminal:
  Ctrl-A x quits, Ctrl-A h shows help, Ctrl-A Ctrl-A sends Ctrl-A to the guest.

\b
Exit codes:
  0 the guest powered off     10 it rebooted (--on-reboot end, or it got nowhere three times)
  11 its kernel panicked
  12 it triple-faulted        13 KVM could not run it    14 Ctrl-A x
  15 a disk with on-error=stop failed
  1 the host failed           2 wrong options            128+N ended by signal N
"""


def _epilog() -> str:
    """The end of --help; click leaves the lines behind \\b as they are."""
    notes = (f"\b\n{note}" for note in registry.notes())
    return "\n".join((EXAMPLES, *notes, KEYS_AND_CODES))


class _RunCommand(click.Command):
    """With everything behind ``--``, which click would drop, as the parameter `command`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options, ctx.params["command"] = split_command(args)
        return super().parse_args(ctx, options)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- CMD [ARG]...]"]


def _parameters(command: Callable[..., int]) -> Callable[..., int]:
    """`command` with all options, from their rows."""
    for row in reversed(registry.in_order_of_help()):
        command = parameter(row)(command)
    return command


def parameter(row: Option) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """The arguments from which click makes an option, by its row."""
    if row.shape == ARGUMENT:
        return click.argument(row.name, required=False)
    more: dict[str, Any] = {}
    if row.shape == FLAG:
        more["is_flag"] = True
    elif row.shape == OPTIONAL:
        more |= {"is_flag": False, "flag_value": ""}
    elif row.repeats:
        more["multiple"] = True
    else:
        more["default"] = row.typed_default
        more["type"] = _type(row)
    names = (row.name, row.flag, *filter(None, (row.also,)))
    return click.option(
        *names, metavar=row.metavar, help=row.help, show_default=row.shows_default, **more
    )


def _type(row: Option) -> Any:
    if row.choices:
        return click.Choice(row.choices)
    return Seconds() if row.type is float else row.type


@click.command(cls=_RunCommand, epilog=_epilog())
@_parameters
def run(
    config: str | None,
    allow_code: bool,
    print_config: bool,
    detach: bool,
    log_format: str,
    debug: bool,
    command: tuple[str, ...],
    **options: Any,
) -> int:
    """Boot a Linux guest and join its serial console to this terminal.

    IMAGE is one that `pyvmm image list` shows; with neither it nor --kernel it is debian. The disk
    of an image is /dev/vda, --disk adds others; where only disks are named, the kernel of debian
    boots from the first.

    With CMD that runs in the guest, by its agent, with the standard streams of this command; then
    the guest powers off. The console is shown only if the guest does not come that far (or with
    --debug), Ctrl-C reaches CMD, and the exit code is CMD's.

    Ends when the guest powers off. Where this machine's KVM cannot run Linux (a container, a CI
    runner), the whole monitor runs in an emulated KVM host instead and says so.
    """
    values = _given(options)
    if config is not None:
        from pyvmm.api.config_file import load

        values = {**load(config, allow_code=allow_code), **values}
    _stand_in(values)
    if print_config:
        from pyvmm.api.config_file import describe

        click.echo(describe(values), nl=False)
        return 0
    return start(**values, detach=detach, command=command, debug=debug)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The values on the command line, by the names of the options."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is not default
    }
    if "name" in given:  # an empty one is refused: it does not mean that one is chosen
        check_name(given["name"])
    return given


def _stand_in(values: dict[str, Any]) -> None:
    """Replace options that stand for others by those."""
    for row in registry.options():
        if row.stands_for and row.name in values:
            value = values.pop(row.name)
            if row.shape != FLAG:
                values[row.stands_for] = value
            elif value and values.get(row.stands_for) in (None, False):
                values[row.stands_for] = ""  # one that was described has more
