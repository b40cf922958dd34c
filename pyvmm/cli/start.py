"""What `pyvmm run` does once its options are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from pyvmm.control import registry
from pyvmm.host import log
from pyvmm.host.unix_sockets import Socket
from pyvmm.machine.spec import DeviceSpec, VmSpec, parse_disk, parse_memory, parse_trace, validate


def start(
    *,
    kernel: str,
    disks: Sequence[str],
    initrd: str | None,
    cpus: int,
    memory: str,
    cmdline: str,
    trace: str,
    trace_file: str | None,
    kvm: str,
    discovery: str,
    name: str,
    devices: Sequence[tuple[str, str]] = (),
) -> int:
    """Run the machine that the options describe; the exit code. They are as `pyvmm run` has them;
    `devices` are (kind, text) for each --KIND TEXT.

    Raises PyvmmError for what is wrong with them.
    """
    spec = validate(
        VmSpec(
            kernel=kernel,
            initrd=initrd,
            disks=tuple(parse_disk(disk) for disk in disks),
            devices=tuple(_parse_device(kind, text) for kind, text in devices),
            cpus=cpus,
            memory=parse_memory(memory),
            cmdline=cmdline,
            name=name,
            trace=parse_trace(trace) if trace else (),
            trace_file=trace_file,
            discovery=discovery,
        )
    )
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


def _parse_device(kind: str, text: str) -> DeviceSpec:
    from pyvmm.machine import devices

    return devices.parse(kind, text)
