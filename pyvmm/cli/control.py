"""`pyvmm ps`, `stop`, `pause`, `resume`: what is asked of VMs that run."""

from __future__ import annotations

from typing import Any

import click

from pyvmm.control import client, registry
from pyvmm.control.client import Client, NoAnswer
from pyvmm.errors import PyvmmError

_LOOK_PATIENCE = 2.0  # seconds that `ps` waits for each VM


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print all that is known, as JSON.")
def ps(as_json: bool) -> None:
    """List the VMs that run."""
    found = [row for name in registry.running() if (row := _look(name)) is not None]
    if as_json:
        import json

        click.echo(json.dumps(found, indent=2))
        return
    lines = [("NAME", "PID", "STATE", "CPUS", "MEMORY", "UPTIME"), *map(_columns, found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = (f"{text:{width}}" for text, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def _look(name: str) -> dict[str, Any] | None:
    try:
        with Client.connect(name) as vm:
            try:
                return {**vm.call("status", patience=_LOOK_PATIENCE), "name": name, "pid": vm.pid}
            except NoAnswer:
                # It starts still, in an emulated host, or it hangs.
                return {"name": name, "pid": vm.pid, "state": "no answer"}
    except PyvmmError:
        return None  # It has just ended.


def _columns(row: dict[str, Any]) -> tuple[str, ...]:
    cpus = str(row.get("cpus", "-"))
    memory = f"{row['memory'] >> 20}M" if "memory" in row else "-"
    uptime = f"{int(row['uptime_seconds'])}s" if "uptime_seconds" in row else "-"
    return row["name"], str(row["pid"]), row["state"], cpus, memory, uptime


@click.command()
@click.argument("vm")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=30.0,
    show_default=True,
    help="How long to wait for its end, in seconds.",
)
@click.option("--kill", is_flag=True, help="Kill the monitor at once (SIGKILL).")
def stop(vm: str, timeout: float, kill: bool) -> None:
    """End VM as SIGTERM would, and wait until it has ended.

    The guest is not asked: what it has not written to its disks yet is lost, as at a power cut.
    """
    client.stop(vm, patience=timeout, kill=kill)


@click.command()
@click.argument("vm")
def pause(vm: str) -> None:
    """Have VM stand still: no vCPU runs, no device works, until `pyvmm resume`."""
    with Client.connect(vm) as found:
        found.call("pause")


@click.command()
@click.argument("vm")
def resume(vm: str) -> None:
    """Have a paused VM go on."""
    with Client.connect(vm) as found:
        found.call("resume")
