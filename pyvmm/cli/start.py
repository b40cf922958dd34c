"""What `pyvmm run` does once its options are read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyvmm.control import registry
from pyvmm.host import log
from pyvmm.host.unix_sockets import Socket
from pyvmm.machine.options import make_spec
from pyvmm.machine.spec import VmSpec, validate


def start(*, kvm: str = "auto", **options: Any) -> int:
    """Run the machine that the options describe; the exit code. They have the names, and their
    values the forms, that pyvmm.machine.options tells.

    Raises PyvmmError for what is wrong with them.
    """
    return run_spec(validate(make_spec(options)), kvm)


def run_spec(spec: VmSpec, kvm: str = "auto") -> int:
    """Run `spec`, under the name that it has or the first that is free; the exit code."""
    with _registered(spec.name) as registration:
        spec = replace(spec, name=registration.name)
        return _run(spec, kvm, registration.listener)


def _run(spec: VmSpec, kvm: str, control: Socket | None) -> int:
    because = None
    if kvm == "auto":
        from pyvmm.cli.choose import why_not_host

        because = why_not_host()
    if kvm == "host" or (kvm == "auto" and because is None):
        from pyvmm.machine.launch import run_here

        return run_here(spec, control=control)
    from pyvmm.cli.emulated import run_emulated

    return run_emulated(spec, because, control=control)


def _registered(name: str) -> registry.Registration:
    try:
        return registry.register(name)
    except registry.NoPlace as error:
        # The guest does not depend on it.
        log.to_stderr(f"{error}; pyvmm ps, stop and the like will not find this VM")
        return registry.Registration(name or registry.DEFAULT_NAME)
