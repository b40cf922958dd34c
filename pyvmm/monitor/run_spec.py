"""Runs a specification to its end: under its name, with its log, here or in an emulated host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from pyvmm.control import registry
from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.host import leaving, log
from pyvmm.host.unix_sockets import Socket
from pyvmm.machine.board.registry import is_foreign
from pyvmm.machine.outcome import Ending
from pyvmm.spec.record import replace
from pyvmm.spec.surroundings import USUAL, Surroundings
from pyvmm.spec.vm import ARCHITECTURES, VmSpec

if TYPE_CHECKING:
    from pyvmm.control.doors import Door
    from pyvmm.control.vm_log import VmLog
    from pyvmm.monitor.cgroup import Group
    from pyvmm.monitor.confine import Confinement

P = ParamSpec("P")


def ended_by_signals(run: Callable[P, int]) -> Callable[P, int]:
    """`run`, which returns an exit code: that of a signal that ends it."""

    @wraps(run)
    def ended(*args: P.args, **options: P.kwargs) -> int:
        try:
            with leaving.leaving_by_signal():
                return run(*args, **options)
        except leaving.Left as left:
            return left.code

    return ended


@ended_by_signals
def run_spec(
    spec: VmSpec,
    kvm: str = "auto",
    *,
    surroundings: Surroundings = USUAL,
    image: str | None = None,
    rm: bool = False,
    default_name: str = registry.DEFAULT_NAME,
    on_name: Callable[[str], None] = lambda name: None,
    wrap: Callable[[VmSpec, Socket | None, Callable[[], int]], tuple[int, bool]] | None = None,
    cut_if_nothing_kept: bool = False,
) -> int:
    """Run `spec`, under the name that it has or the first that is free of `image` (or
    `default_name`), IMAGE-2…, which `on_name` is told; the exit code.

    With `image` its first disk is that image's, and unless `rm` is true what the guest changes on
    it is kept. `wrap` is called in place of the run, with what carries it out; it returns the
    exit code, and whether that is one of a command in the guest and not the VM's own. A signal asks
    the guest to power off first; with `cut_if_nothing_kept` only if it can keep something. One that
    comes before there is a guest leaves nothing of the VM.
    """
    if surroundings.allow_read:
        surroundings.check_files()
    with ExitStack() as closing:
        with leaving.undisturbed():
            registration = closing.enter_context(_registered(spec.name, image or default_name))
        spec = replace(spec, name=registration.name)
        log.set_vm(spec.name)
        if spec.devices or surroundings.sockets:  # some devices have sockets
            from pyvmm.host import named_listener

            named_listener.note_by(registration.note)
        on_name(registration.name)
        with _changes_kept(spec, "" if rm else image or "") as spec:
            if registration.listener is not None:
                from pyvmm.monitor import given

                with suppress(OSError):  # then no snapshot can be taken
                    given.begin(registry.given_at(registration.path), spec)
            vm_log = _log_of(registration)
            cut = cut_if_nothing_kept and not spec.keeps
            patience = 0.0 if cut else surroundings.stop_timeout
            listener = registration.listener

            def run() -> int:
                with _held(spec) as release, _in_group(surroundings.cgroup, spec.name) as group:
                    return _run(
                        spec,
                        kvm,
                        registration,
                        patience,
                        vm_log,
                        release,
                        surroundings,
                        group,
                    )

            try:
                code, of_command = (run(), False) if wrap is None else wrap(spec, listener, run)
            except PyvmmError as error:
                if vm_log is not None and not isinstance(error, ConfigError):
                    vm_log.end(1, message=str(error))
                raise
            except leaving.Left as left:
                if vm_log is not None:
                    _note_end(vm_log, left.code, of_command=False)
                raise
            if vm_log is not None:
                _note_end(vm_log, code, of_command=of_command)
            return code


@contextmanager
def _changes_kept(spec: VmSpec, image: str) -> Iterator[VmSpec]:
    if not image:
        yield spec
        return
    from pyvmm.monitor.from_image import changes_kept

    with changes_kept(spec, image) as kept:
        yield kept


@contextmanager
def _held(spec: VmSpec) -> Iterator[Callable[[], None]]:
    """The snapshot that `spec` goes on from, if it does, is not removed until what is yielded is
    called. Raises ConfigError if it is there no more."""
    if not spec.restored_from:
        yield lambda: None
        return
    from pyvmm.control import snapshot_store

    with snapshot_store.held(spec.restored_from) as release:
        yield release


def _log_of(registration: registry.Registration) -> VmLog | None:
    """The log that keeps the VM's last words: there is a place for them where there is a control
    socket."""
    if registration.listener is None:
        return None
    from pyvmm.control.vm_log import VmLog

    made = VmLog(os.path.dirname(registration.path), registration.name)
    log.copy_to(made.message)
    return made


def _note_end(vm_log: VmLog, code: int, *, of_command: bool) -> None:
    """`code` is the VM's, or a command's in it."""
    log.do_not_copy_to(vm_log.message)
    known = not of_command and code in {ending.value for ending in Ending}
    details = {"ending": Ending(code).name.lower()} if known else {}
    message = vm_log.last_message.decode(errors="replace") if code and not of_command else ""
    if log.is_json() and message:
        import json

        with suppress(ValueError, AttributeError):
            message = json.loads(message).get("message", "")
    message = message.removeprefix("pyvmm: ").removeprefix(f"{vm_log.name}: ")
    if of_command:
        message = f"its command ended with {code}"
    vm_log.end(code, message=message, **details)


def _run(
    spec: VmSpec,
    kvm: str,
    registration: registry.Registration,
    stop_patience: float,
    vm_log: VmLog | None,
    on_open: Callable[[], None],
    surroundings: Surroundings,
    group: Group | None,
) -> int:
    """`on_open` is called once all files of a VM on this machine's KVM are open; an emulated host
    looks for them until its end."""
    kvm, because = which_kvm(spec, kvm)
    if kvm == "host":
        from pyvmm.monitor.phases import run_here

        confinement = _confinement(surroundings, registration, vm_log, group)
        with _doors(surroundings, registration) as doors:
            return run_here(
                spec,
                control=registration.listener,
                on_listening=on_open,
                stop_patience=stop_patience,
                on_output=_nothing if vm_log is None else vm_log.console,
                confinement=confinement,
                doors=doors,
            )
    from pyvmm.monitor.emulated import run_emulated

    with _doors(surroundings, registration) as doors:
        return run_emulated(
            spec,
            because,
            control=registration.listener,
            stop_patience=stop_patience,
            vm_log=vm_log,
            surroundings=surroundings,
            doors=doors,
        )


def refuse_foreign(options: Mapping[str, Any], kvm: str) -> None:
    """Raise the ConfigError that this machine's KVM, if it is asked for, runs no guest of the
    architecture that `options` ask for: before anything is fetched for it."""
    if kvm != "host":
        return
    arch = options.get("arch")
    if not arch and (options.get("image") or options.get("name")):
        from pyvmm.monitor.from_image import architecture

        arch = architecture(options)
    if arch in ARCHITECTURES and is_foreign(arch):
        raise _no_guests_for(arch)


def _no_guests_for(arch: str) -> ConfigError:
    return ConfigError(
        f"this machine's KVM runs no guests for {arch}", cure="leave that out", option="--kvm"
    )


def which_kvm(spec: VmSpec, kvm: str) -> tuple[str, str | None]:
    """`kvm`, or which one "auto" is for `spec`; and why it is the emulated host's, None if the user
    says so. Raises ConfigError."""
    if spec.arch and is_foreign(spec.arch):
        if kvm == "host":
            raise _no_guests_for(spec.arch)
        return "emulated", f"this machine's KVM runs no guests for {spec.arch}"
    if kvm != "auto":
        return kvm, None
    from pyvmm.machine import host_kvm

    if spec.saved_on == "host":
        # What the machine was saved on runs it, whatever a kernel would need.
        host_kvm.check_there("the VM of the snapshot had a machine's own KVM")
        return "host", None
    because = host_kvm.why_unusable()
    if because is None and spec.saved_on == "emulated":
        because = "the VM of the snapshot had an emulated host's KVM"
    return ("host", None) if because is None else ("emulated", because)


@contextmanager
def _in_group(text: str, name: str) -> Iterator[Group | None]:
    """In the group of processes that was asked for, with all that is started. Raises
    ConfigError."""
    if not text:
        yield None
        return
    from pyvmm.host import outside
    from pyvmm.monitor import cgroup

    group = cgroup.Group(cgroup.Wanted.parse(text), name)
    try:
        yield group
    finally:
        outside.run(group.leave)


@contextmanager
def _doors(
    surroundings: Surroundings, registration: registry.Registration
) -> Iterator[Sequence[Door]]:
    """The control sockets that were asked for. Raises ConfigError."""
    if not surroundings.sockets:
        yield ()
        return
    from pyvmm.control.doors import Doors

    with Doors(surroundings.sockets, registration) as doors:
        yield doors.doors


def _confinement(
    surroundings: Surroundings,
    registration: registry.Registration,
    vm_log: VmLog | None,
    group: Group | None,
) -> Confinement:
    from pyvmm.monitor.confine import Confinement

    confinement = Confinement(surroundings)
    confinement.watch_over(registration, vm_log, group)
    return confinement


def _nothing(data: bytes) -> None:
    pass


def _registered(name: str, default: str) -> registry.Registration:
    try:
        return registry.register(name, default)
    except registry.NoPlace as error:
        # The guest does not depend on it.
        log.to_stderr(f"{error}; pyvmm ps, stop and the like will not find this VM")
        return registry.Registration(name or default)
