"""`pyvmm rm`: a stopped VM's changes are thrown away."""

from __future__ import annotations

import click

from pyvmm.control import registry
from pyvmm.errors import ConfigError
from pyvmm.images import machines


@click.command()
@click.argument("vms", metavar="VM...", nargs=-1, required=True)
def rm(vms: tuple[str, ...]) -> None:
    """Throw away what stopped VMs have changed on the disks of their images."""
    for name in vms:
        if not name:
            raise ConfigError("a VM has a name", cure="pyvmm rm NAME")
        with registry.register(name):  # so it does not run, nor start meanwhile
            machines.remove(name)
