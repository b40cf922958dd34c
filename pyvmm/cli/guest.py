"""`pyvmm exec`, `pyvmm cp`: commands and files of a VM that runs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import click

from pyvmm.agent import Agent, Copied
from pyvmm.agent.errors import AgentGone, TimeLimit
from pyvmm.cli.parameter_types import Seconds
from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.host.leaving import Left, leaving_by_signal
from pyvmm.monitor.attached import (
    TIMED_OUT,
    agent_of,
    attach,
    terminal_size,
)
from pyvmm.platform.console import standard_fds
from pyvmm.platform.terminal import is_terminal

_SHOW_EVERY = 0.1  # seconds


def _ready(vm: str, wait: float) -> Agent:
    agent = agent_of(vm)
    if wait:
        agent.wait_ready(wait)
    return agent


_wait_option = click.option(
    "--wait",
    type=Seconds(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait so long for a guest that is still starting.",
)


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Give CMD this command's standard input.")
@click.option("-t", "--tty", is_flag=True, help="Give CMD a terminal; with -i, this one.")
@click.option("-e", "--env", "env", metavar="NAME=VALUE", multiple=True, help="Set a variable.")
@click.option("-w", "--workdir", metavar="DIR", help="Where CMD starts.  [default: /]")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="As whom, by name or number.")
@click.option(
    "--timeout",
    type=Seconds(min=0, min_open=True),
    metavar="SECONDS",
    help="Kill CMD, and all it has started, after so long; the exit code is 124 then.",
)
@_wait_option
@click.argument("vm")
@click.argument("command", metavar="-- CMD [ARG]...", nargs=-1, type=click.UNPROCESSED)
def exec(
    vm: str,
    command: tuple[str, ...],
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    timeout: float | None,
    wait: float,
) -> int:
    """Run CMD in the guest of VM, with its output here; exits with its code.

    That is 128+N if signal N ended it, 126 or 127 if it could not be started. Ctrl-C reaches it; a
    second one ends this command, and if this command ends before it, so does CMD. The VM needs a
    vsock device (`pyvmm run --agent`) and pyvmm's agent in its image: docs/guest-agent.md.
    """
    argv = command[1:] if command[:1] == ("--",) else command
    if not argv:
        raise ConfigError("no command", cure=f"pyvmm exec {vm} -- uname -r")
    stdin, stdout = standard_fds()
    variables = dict(map(_variable, env))
    if tty and "TERM" in os.environ:
        variables.setdefault("TERM", os.environ["TERM"])
    try:
        process = _ready(vm, wait).open(
            argv,
            env=variables,
            cwd=workdir,
            user=user,
            stdin=interactive,
            tty=terminal_size(stdout, stdin) if tty else None,
            timeout=timeout,
        )
        with process:
            try:
                return attach(
                    process,
                    stdin if interactive else None,
                    stdout,
                    tty=tty,
                    user_option="--user",
                )
            except AgentGone:
                # The guest took the agent with it, as it was told to.
                if process.pid is None or not _ends_the_guest(argv):
                    raise
                return 0
    except TimeLimit as error:
        log.to_stderr(str(error))
        return TIMED_OUT
    except Left as left:
        return left.code


def _ends_the_guest(argv: tuple[str, ...]) -> bool:
    """True if it is in the nature of the command that the guest ends, or begins anew."""
    words = [os.path.basename(word) for word in argv]
    if words[0] in ("systemctl", "busybox"):
        words = [word for word in words[1:] if not word.startswith("-")]
    return words[:1] != [] and words[0] in ("reboot", "poweroff", "halt", "shutdown")


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name:
        raise ConfigError(f"{text!r} is not a variable", cure="use NAME=VALUE", option="-e")
    return name, value if equals else os.environ.get(name, "")


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@_wait_option
def cp(source: str, target: str, wait: float) -> int:
    """Copy a file or a directory into a guest, or out of one: one of SRC and DST is VM:PATH.

    Into DST if that is a directory, under the last name of SRC, else to that name. Modes (out of a
    guest: less the umask and set-user-ID bits) and times stay; links below SRC are copied as links,
    hard links as files; owners and extended attributes do not stay. docs/guest-agent.md shows how
    tar keeps all that.
    """
    source_vm, source_path = _split(source)
    target_vm, target_path = _split(target)
    if (source_vm is None) == (target_vm is None):
        raise ConfigError(
            "one of the two, and one only, has to be in a guest",
            cure="write VM:PATH for that one, and ./a:b for a file of that name",
        )
    if not (source_path or source_vm is None):
        raise ConfigError(f"{source} names no file", cure=f"write {source}/ for all of it")
    try:
        with leaving_by_signal():
            copied = _copy(source_vm, source_path, target_vm, target_path, wait)
    except Left as left:
        return left.code
    _tell_skipped(copied)
    return 0


def _copy(
    source_vm: str | None, source: str, target_vm: str | None, target: str, wait: float
) -> Copied:
    progress, finish = _progress()
    try:
        if target_vm is not None:
            return _ready(target_vm, wait).push(source, target or "/", progress=progress)
        assert source_vm is not None
        return _ready(source_vm, wait).pull(source, target, progress=progress)
    finally:
        finish()


def _split(text: str) -> tuple[str | None, str]:
    """The VM's name and the path of VM:PATH; no name for a path of this machine."""
    name, colon, path = text.partition(":")
    if not colon or not name or "/" in name or name.startswith("."):
        return None, text
    return name, path


def _progress() -> tuple[Callable[[int], None] | None, Callable[[], None]]:
    """A function that hears of the bytes that are copied, and one that ends the line; a terminal
    gets to see it once it takes some time."""
    if sys.stderr is None or not is_terminal(2):
        return None, lambda: None
    start = time.monotonic()
    shown = [start + _SHOW_EVERY, False]

    def show(size: int) -> None:
        now = time.monotonic()
        if now >= shown[0]:
            rate = size / (now - start)
            sys.stderr.write(f"\r\x1b[K{size / 2**20:.1f} MiB, {rate / 2**20:.1f} MiB/s")
            sys.stderr.flush()
            shown[:] = [now + _SHOW_EVERY, True]

    def finish() -> None:
        if shown[1]:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    return show, finish


def _tell_skipped(copied: Copied) -> None:
    if copied.skipped:
        some = ", ".join(copied.skipped[:3]) + (", …" if len(copied.skipped) > 3 else "")
        log.to_stderr(
            f"{len(copied.skipped)} not copied, being neither files, directories nor links, or on "
            f"other file systems: {some}"
        )
