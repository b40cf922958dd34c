"""`pyvmm snapshot`: taken of a VM that runs; shown, listed, removed."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from pyvmm.cli.answers import show_table
from pyvmm.control import snapshot_store as store
from pyvmm.monitor import snapshots

_TAKE = "take"


class _Snapshot(click.Group):
    """A group that takes a word which is not one of its commands for the name of a VM."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = [_TAKE, *args]
        return super().resolve_command(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [
            "VM NAME [OPTIONS] | list | show NAME | learn VM NAME | merge NAME NEW | rm NAME..."
        ]


@click.group(cls=_Snapshot)
def snapshot() -> None:
    """Take a snapshot of VM: its memory, its state, and what it has changed on its disks.

    `pyvmm run --restore NAME` goes on from there, as often as you like. A VM whose name is one of
    the commands below is `pyvmm snapshot take VM NAME`, whose --help has the options (--stop,
    --track, --diff-of).
    """


@snapshot.command()
@click.argument("vm")
@click.argument("name")
@click.option("--stop", is_flag=True, help="End the VM then, its disks as they are.")
@click.option("--track", is_flag=True, help="Keep note of what changes then, for --diff-of NAME.")
@click.option(
    "--diff-of", metavar="BASE", help="Store only what has changed since the snapshot BASE."
)
def take(vm: str, name: str, stop: bool, track: bool, diff_of: str | None) -> None:
    """Take the snapshot NAME of VM, and say for how long it stood still.

    BASE is one that was taken with --track or --diff-of, or the one that VM began with.
    """
    taken = snapshots.take(vm, name, stop=stop, track=track, diff_of=diff_of)
    click.echo(f"{vm} stood still for {1000 * taken.paused:.0f} ms")


@snapshot.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print all that is known, as JSON.")
def list_(as_json: bool) -> None:
    """List the snapshots."""
    found = [_row(name) for name in store.names()]
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    lines = [("NAME", "OF", "CPUS", "MEMORY", "STORED", "BASE", "TAKEN"), *map(_columns, found)]
    show_table(lines)


@snapshot.command()
@click.argument("name")
def show(name: str) -> None:
    """Show what the snapshot NAME is of, as JSON."""
    with store.reading(name) as found:
        rest = {
            key: value
            for key, value in found.state.items()
            if key not in ("machine", "pages", "below")
        }
        click.echo(json.dumps({**rest, "stored": store.size_of(found.path)}, indent=2))


@snapshot.command()
@click.argument("vm")
@click.argument("name")
def learn(vm: str, name: str) -> None:
    """Note beside the snapshot NAME what VM, which was restored from it, has used of its memory.

    The next restores have that read ahead, where it is not in memory any more.
    """
    from pyvmm.monitor import working_set

    click.echo(f"{vm} has used {working_set.learn(vm, name) >> 20} MiB")


@snapshot.command()
@click.argument("name")
@click.argument("new")
def merge(name: str, new: str) -> None:
    """Make the snapshot NEW of NAME, with all of its memory in one file."""
    snapshots.merge(name, new)


@snapshot.command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def rm(names: tuple[str, ...]) -> None:
    """Remove snapshots. VMs that were restored from them go on."""
    for name in names:
        store.remove(name)


def _row(name: str) -> dict[str, Any]:
    from pyvmm.errors import ConfigError

    try:
        with store.reading(name) as found:
            spec = found.state.get("spec")
            values = spec if isinstance(spec, dict) else {}
            return {
                "name": name,
                "vm": values.get("name"),
                "cpus": values.get("cpus"),
                "memory": values.get("memory"),
                "stored": store.size_of(found.path),
                "made": found.state.get("made"),
                "base": _name_of(found.state.get("base")),
            }
    except ConfigError as error:
        return {"name": name, "error": str(error)}


def _name_of(base: object) -> object:
    return base.get("name") if isinstance(base, dict) else None


def _columns(row: dict[str, Any]) -> tuple[str, ...]:
    memory, made = row.get("memory"), row.get("made")
    return (
        str(row["name"]),
        _shown(row.get("vm") or "-"),
        _shown(row.get("cpus") or "-"),
        f"{memory >> 20}M" if type(memory) is int else "-",
        f"{row['stored'] >> 20}M" if "stored" in row else "-",
        _shown(row.get("base") or "-"),
        time.strftime("%Y-%m-%d %H:%M", time.localtime(made))
        if isinstance(made, int | float) and 0 <= made < 1 << 34
        else "damaged",
    )


def _shown(value: object) -> str:
    return "".join(char if char.isprintable() else "?" for char in str(value)[:40])
