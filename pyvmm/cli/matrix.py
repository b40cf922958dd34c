"""`pyvmm matrix`: one command on several kernels, and a table of how each went."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import click

from pyvmm.cli.answers import show_table
from pyvmm.cli.parameter_types import Seconds
from pyvmm.cli.quick import split_command
from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.monitor.exit_code import explain, flush_or_drop

EPILOG = """\b
Examples:
  pyvmm matrix --kernel debian:6.1 --kernel debian:6.12 --kernel ./linux -- uname -r
  pyvmm matrix --kernel debian:6.1 --kernel debian:sid my-image --memory 1G -- /root/selftest
"""
_END_SECONDS = 120.0  # for a run that was asked to end
# What one kernel's run has, and a matrix has for all of them.
_NOT_PASSED_ON = ("-d", "--detach", "--name", "--print-config", "--help")


class Row(NamedTuple):
    """The result of a command on one kernel: the exit code of its run, None if it took too long."""

    kernel: str
    code: int | None
    seconds: float

    @property
    def result(self) -> str:
        if self.code is None:
            return "timed out"
        return "passed" if self.code == 0 else f"failed ({self.code})"


class _Matrix(click.Command):
    """A command whose words after ``--`` are the guest's command, as for `pyvmm run`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options, ctx.params["command"] = split_command(args)
        return super().parse_args(ctx, options)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["--kernel KERNEL [--kernel KERNEL]... [RUN-OPTIONS] [IMAGE] -- CMD [ARG]..."]


@click.command(cls=_Matrix, epilog=EPILOG, context_settings={"ignore_unknown_options": True})
@click.option(
    "--kernel",
    "kernels",
    metavar="KERNEL",
    multiple=True,
    help="A kernel as `pyvmm run` takes it: a file, a build tree, debian:6.12, debian:sid…",
)
@click.option(
    "--timeout",
    type=Seconds(min=0, min_open=True),
    metavar="SECONDS",
    help="End the guest, and count its kernel as failed, after so long.",
)
@click.option("--fail-fast", is_flag=True, help="Stop at the first kernel that fails.")
@click.argument("others", metavar="[RUN-OPTIONS]", nargs=-1, type=click.UNPROCESSED)
def matrix(
    kernels: tuple[str, ...],
    timeout: float | None,
    fail_fast: bool,
    others: tuple[str, ...],
    command: tuple[str, ...],
) -> int:
    """Run CMD in a guest on each KERNEL, one after another, and print a table of how it went.

    All other options and IMAGE are those of `pyvmm run`: a build tree or one of Debian's kernels
    boots debian where no image is named. What the guests change is thrown away. The exit code is 0
    if CMD ended with 0 on every kernel, else 1.
    """
    if not kernels:
        raise ConfigError("there is no kernel", cure="name one or more", option="--kernel")
    if not command:
        raise ConfigError("there is no command to run", cure="add: -- CMD", option="--")
    for word in others:
        if word.partition("=")[0] in _NOT_PASSED_ON:
            raise ConfigError(
                "is for one VM, not for a matrix",
                cure="leave it out",
                option=word.partition("=")[0],
            )
    rows = []
    for kernel in kernels:
        log.to_stderr(f"--- {kernel}")
        words = ["--rm", "--kernel", kernel, *others, "--", *command]
        rows.append(_run(kernel, words, timeout))
        if fail_fast and rows[-1].code != 0:
            break
    _print(rows, left_out=kernels[len(rows) :])
    return 0 if all(row.code == 0 for row in rows) and len(rows) == len(kernels) else 1


def _run(kernel: str, words: Sequence[str], timeout: float | None) -> Row:
    """Have a child of ours be `pyvmm run`."""
    root = click.get_current_context().find_root().command
    began = time.monotonic()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            code = _carry_out(root, ["run", *words])
        finally:
            os._exit(flush_or_drop(code) & 0xFF)
    process = os.pidfd_open(child)
    try:
        in_time = _wait(process, timeout)
        if not in_time:
            signal.pidfd_send_signal(process, signal.SIGTERM)
    finally:  # also after Ctrl-C, which it has got as well
        if not _wait(process, _END_SECONDS):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Row(kernel, code if in_time else None, time.monotonic() - began)


def _carry_out(root: click.Command, words: list[str]) -> int:
    try:
        return int(root.main(args=words, prog_name="pyvmm", standalone_mode=False) or 0)
    except click.ClickException as wrong:
        wrong.show()
        return wrong.exit_code
    except click.exceptions.Exit as done:
        return done.exit_code
    except BaseException as wrong:
        return explain(wrong) if isinstance(wrong, Exception) else 130


def _wait(process: int, timeout: float | None) -> bool:
    """True if it has ended within `timeout` seconds."""
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(None if timeout is None else timeout * 1000))


def _print(rows: Sequence[Row], left_out: Sequence[str]) -> None:
    lines = [("KERNEL", "RESULT", "SECONDS")]
    lines += [(row.kernel, row.result, f"{row.seconds:.1f}") for row in rows]
    lines += [(kernel, "not run", "-") for kernel in left_out]
    show_table(lines)
