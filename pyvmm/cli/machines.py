"""`pyvmm rm`: a stopped VM's changes are thrown away, and what it has said."""

from __future__ import annotations

import click

from pyvmm.control import registry, vm_log
from pyvmm.errors import ConfigError
from pyvmm.images import machines


@click.command()
@click.argument("vms", metavar="VM...", nargs=-1, required=True)
def rm(vms: tuple[str, ...]) -> None:
    """Throw away what stopped VMs have changed on the disks of their images, and their logs."""
    for name in vms:
        if not name:
            raise ConfigError("a VM has a name", cure="pyvmm rm NAME")
        if name in registry.running():
            raise ConfigError(f"the VM {name} is running", cure=f"end it first: pyvmm stop {name}")
        with registry.register(name):  # so it does not run, nor start meanwhile
            had_log = vm_log.remove(registry.folder(), name)
            if machines.has(name) or not had_log:
                machines.remove(name)
