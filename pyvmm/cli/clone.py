"""`pyvmm clone`: VMs that go on from where another one is, or from a snapshot."""

from __future__ import annotations

import click

from pyvmm.api.clones import clone as make_clones
from pyvmm.cli.run import parameter
from pyvmm.host import log
from pyvmm.spec.names import check_name
from pyvmm.spec.options import own_row
from pyvmm.spec.surroundings import read_surroundings


@click.command()
@click.argument("source", metavar="VM|SNAPSHOT")
@click.option("-n", "count", type=int, default=1, show_default=True, metavar="N", help="How many.")
@parameter(own_row("name")._replace(help="Their name; of several, NAME-1, NAME-2…"))
@parameter(own_row("kvm"))
@parameter(own_row("confine"))
def clone(source: str, count: int, name: str, kvm: str, confine: str) -> int:
    """Start VMs that go on from where VM is, or else from the snapshot of that name.

    They are strangers to each other and run in the background, all of them or none; prints their
    names. What they change on their disks is thrown away when they end. docs/snapshots.md tells
    what each has of its own.
    """
    context = click.get_current_context()
    if context.get_parameter_source("name") is not click.core.ParameterSource.DEFAULT:
        check_name(name)
    surroundings = read_surroundings({"confine": confine})
    for monitor in make_clones(
        source, count, name=name, kvm=kvm, surroundings=surroundings, detached=True
    ):
        for line in monitor.messages:
            log.to_stderr(line)
        click.echo(monitor.name)
    return 0
