"""`pyvmm ps`, `stop`, `pause`, `resume`, `disk`, `net`, `rng`, `share`, `balloon`: what is asked of
VMs that run."""

from __future__ import annotations

import time
from typing import Any

import click

from pyvmm.api.in_monitor import GIVE_UP_SECONDS, ByName
from pyvmm.cli.answers import of_monitor, show_table
from pyvmm.cli.parameter_types import Seconds
from pyvmm.control import client, registry, vm_log
from pyvmm.control.client import Client, HasEnded, NoAnswer
from pyvmm.errors import PyvmmError
from pyvmm.host import log

_LOOK_PATIENCE = 2.0  # seconds that `ps` waits for each VM
_END_PATIENCE = 1.0  # and for one to end that takes no requests any more


@click.command()
@click.option("-a", "--all", "and_ended", is_flag=True, help="Those that have ended, too.")
@click.option("--json", "as_json", is_flag=True, help="Print all that is known, as JSON.")
def ps(and_ended: bool, as_json: bool) -> None:
    """List the VMs that run; with -a also how the others ended, of which pyvmm logs tells more."""
    found = [row for name in registry.running() if (row := _look(name)) is not None]
    if and_ended:
        ended = {row["name"]: {**row, "state": "ended"} for row in vm_log.ended(registry.folder())}
        # One that is about to end has said already how, as the last thing.
        found = [row for row in found if row["state"] != "ending" or row["name"] not in ended]
        running = {row["name"] for row in found}
        found += [row for name, row in ended.items() if name not in running]
    if as_json:
        import json

        click.echo(json.dumps(found, indent=2))
        return
    lines = [("NAME", "PID", "STATE", "CPUS", "MEMORY", "UPTIME"), *map(_columns, found)]
    if and_ended:
        why = [("EXIT", "ENDED", "WHY"), *map(_how_ended, found)]
        lines = [(*line, *more) for line, more in zip(lines, why, strict=True)]
    show_table(lines)


def _look(name: str) -> dict[str, Any] | None:
    try:
        with Client.connect(name) as vm:
            try:
                status = vm.call("status", patience=_LOOK_PATIENCE)
                with of_monitor(name):
                    row = {**status, "name": name, "pid": vm.pid}
                    _columns(row)
                    if row["state"] == "ended":  # which only those are that do not run
                        raise ValueError
                    return row
            except NoAnswer as error:
                if vm.has_ended(_END_PATIENCE if isinstance(error, HasEnded) else 0):
                    return None
                # Without an answer it starts still, in an emulated host, or it hangs.
                state = "ending" if isinstance(error, HasEnded) else "no answer"
                return {"name": name, "pid": vm.pid, "state": state}
    except PyvmmError:
        return None  # It has just ended.


def _columns(row: dict[str, Any]) -> tuple[str, ...]:
    cpus = str(row.get("cpus", "-"))
    memory = f"{row['memory'] >> 20}M" if "memory" in row else "-"
    uptime = f"{int(row['uptime_seconds'])}s" if "uptime_seconds" in row else "-"
    return row["name"], str(row.get("pid", "-")), str(row["state"]), cpus, memory, uptime


def _how_ended(row: dict[str, Any]) -> tuple[str, ...]:
    if row["state"] != "ended":
        return "-", "-", ""
    code = row.get("exit_code")
    seconds = max(0, int(time.time() - row.get("ended", 0)))
    ago = next(
        f"{seconds // size}{unit} ago"
        for size, unit in ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
        if seconds >= size or size == 1
    )
    why = str(row.get("message") or row.get("ending") or "")
    return "-" if code is None else str(code), ago, why


@click.command()
@click.argument("vm")
@click.option(
    "--timeout",
    type=Seconds(min=0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long the guest may take to power off; then its power is cut.",
)
@click.option("--now", is_flag=True, help="Cut its power at once.")
@click.option("--kill", is_flag=True, help="Kill the monitor at once (SIGKILL).")
def stop(vm: str, timeout: float, now: bool, kill: bool) -> None:
    """Have the guest of VM power off, and wait until it has.

    It is asked by its agent, or else by its power button. Its power is cut if it does not, or if
    there is nobody in it to be asked, or when pyvmm stop is called once more: what it has not
    written to its disks is lost then. SIGTERM to the monitor does the same, and the second one
    cuts. A paused VM is resumed for it.
    """
    if now and kill:
        raise click.UsageError("--now and --kill exclude each other")
    ended = client.stop(vm, patience=0.0 if now else timeout, kill=kill)
    if ended is not None and ended.get("exit_code") and not now:
        log.to_stderr(f"{vm}: {ended.get('message') or ended.get('ending')}")


@click.command()
@click.argument("vm")
def pause(vm: str) -> None:
    """Have VM stand still: no vCPU runs, no device works, until `pyvmm resume`."""
    ByName(vm).pause()


@click.command()
@click.argument("vm")
def resume(vm: str) -> None:
    """Have a paused VM go on."""
    ByName(vm).resume()


@click.group()
def disk() -> None:
    """Change the disks of a running VM."""


@click.group()
def net() -> None:
    """Change the network cards of a running VM."""


@click.group()
def rng() -> None:
    """Change the random number generator of a running VM."""


@click.group()
def share() -> None:
    """Change the shared directories of a running VM."""


_timeout = click.option(
    "--timeout",
    type=Seconds(min=0),
    default=GIVE_UP_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long the guest may take.",
)
_force = click.option(
    "--force", is_flag=True, help="Ask nobody what it is used for; it goes when the time is over."
)


def _added(vm: str, kind: str, id: str, timeout: float) -> None:
    """Print the id of what has come, and what there is to say if no driver takes it."""
    click.echo(id)
    why = ByName(vm).wait_for_driver(kind, id, timeout=timeout)
    if why is not None:
        because = f": {why}" if why else "; docs/hotplug.md says which drivers that takes"
        log.to_stderr(f"the guest has not taken {id} yet{because}")


@disk.command("add")
@click.argument("vm")
@click.argument("disk")
@_timeout
def add_disk(vm: str, disk: str, timeout: float) -> None:
    """Plug DISK, as after --disk of pyvmm run, into VM; prints its id. The guest finds it.

    If no driver there has taken it when the time is over, a line says so.
    """
    _added(vm, "disk", ByName(vm).add_disk(disk), timeout)


@disk.command("rm")
@click.argument("vm")
@click.argument("id")
@_timeout
@_force
def remove_disk(vm: str, id: str, timeout: float, force: bool) -> None:
    """Have the guest of VM give up the disk ID, and take it out.

    Where the guest has pyvmm's agent it is asked first, and a disk that it uses (a file system that
    is mounted, say) stays.
    """
    ByName(vm).remove_disk(id, timeout=timeout, force=force)


@net.command("add")
@click.argument("vm")
@click.argument("net", default="user")
@_timeout
def add_net(vm: str, net: str, timeout: float) -> None:
    """Plug a network card, NET as after --net of pyvmm run, into VM; prints its id.

    Without NET it is user: the guest reaches what this machine reaches.
    """
    _added(vm, "net", ByName(vm).add_net(net), timeout)


@net.command("rm")
@click.argument("vm")
@click.argument("id")
@_timeout
@_force
def remove_net(vm: str, id: str, timeout: float, force: bool) -> None:
    """Have the guest of VM give up the network card ID, and take it out."""
    ByName(vm).remove_net(id, timeout=timeout, force=force)


@rng.command("add")
@click.argument("vm")
@click.argument("limits", default="")
@_timeout
def add_rng(vm: str, limits: str, timeout: float) -> None:
    """Plug a random number generator, with LIMITS as after --rng-limit, into VM; prints its id.

    Without LIMITS it gives all that the guest asks for. A VM has one at most.
    """
    _added(vm, "rng", ByName(vm).add_rng(limits), timeout)


@rng.command("rm")
@click.argument("vm")
@click.argument("id")
@_timeout
@_force
def remove_rng(vm: str, id: str, timeout: float, force: bool) -> None:
    """Have the guest of VM give up the random number generator ID, and take it out."""
    ByName(vm).remove_rng(id, timeout=timeout, force=force)


@share.command("add")
@click.argument("vm")
@click.argument("directory", metavar="DIR[:MOUNTPOINT]")
@_timeout
def add_share(vm: str, directory: str, timeout: float) -> None:
    """Share a directory, as after --share of pyvmm run, with the guest of VM; prints its id.

    With MOUNTPOINT the guest's agent mounts it there.
    """
    _added(vm, "share", ByName(vm).share(directory), timeout)


@share.command("rm")
@click.argument("vm")
@click.argument("id")
@_timeout
@_force
def remove_share(vm: str, id: str, timeout: float, force: bool) -> None:
    """Have the guest of VM give up the shared directory ID; one that is mounted stays."""
    ByName(vm).unshare(id, timeout=timeout, force=force)


@disk.command()
@click.argument("vm")
@click.argument("id")
@click.argument("size", required=False)
@click.option("--shrink", is_flag=True, help="Allow a smaller size; what lies behind it is lost.")
def resize(vm: str, id: str, size: str | None, shrink: bool) -> None:
    """Give the disk ID of VM another SIZE, such as 20G; the guest is told.

    Its image file becomes as large. Without SIZE, the disk takes over the size that its image, or
    the block device behind it, has by now. In the guest, a file system that is mounted can then be
    grown: resize2fs /dev/vda.
    """
    click.echo(f"{id} has {ByName(vm).resize_disk(id, size, shrink=shrink)} bytes")


@click.command()
@click.argument("vm")
@click.argument("size", required=False)
def balloon(vm: str, size: str | None) -> None:
    """Have the balloon of VM take SIZE (256M, 0) of the guest's memory, or show how it is.

    The guest gives what it can spare, and takes a while.
    """
    found = ByName(vm).balloon
    if size is not None:
        found.set(size)
        return
    stats = found.stats()
    memory = stats.pop("memory")
    for name, count in (*stats.items(), *memory.items()):
        counted = name.endswith(("_faults", "_allocations", "_failures"))
        shown = str(count) if counted else f"{count >> 20}M"
        click.echo(f"{name.replace('_', ' '):22} {shown:>10}")
