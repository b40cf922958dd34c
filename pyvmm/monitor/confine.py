"""A monitor's confinement: the needs of each part of its VM, and who does what it no longer can.

Decision 0410 has the moment, the layers, and all that needs a name after it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import box, confinement, handed, log, named_listener, pausing, unix_sockets
from pyvmm.host.box import NO_BOX, Box, Needs
from pyvmm.host.outside import Outside
from pyvmm.host.unix_sockets import Socket
from pyvmm.kvm.uapi import KVM_RUN, numbers
from pyvmm.spec.surroundings import AUTO, EXEC, OFF, STRICT, USUAL, Surroundings
from pyvmm.spec.vm import VmSpec

if TYPE_CHECKING:
    from pyvmm.control.registry import Registration
    from pyvmm.control.server import Door
    from pyvmm.control.vm_log import VmLog
    from pyvmm.host.other_user import OtherUser
    from pyvmm.host.refusals import Refusals
    from pyvmm.monitor.cgroup import Group
    from pyvmm.monitor.keeper import Keeper

T = TypeVar("T")


class Confinement:
    """The confinement of one VM's monitor: made while nothing is open yet, entered when all is."""

    def __init__(
        self,
        surroundings: Surroundings = USUAL,
        *,
        passes_signals: bool = False,
        is_inside: bool = False,
    ) -> None:
        """`passes_signals`: to another process, by its descriptor. `is_inside`: this is an emulated
        host, where all that there is belongs to the VM."""
        self._surroundings = surroundings
        self._mode = surroundings.confine
        # Or the threads that serve the guest alone, beside one that opens what comes.
        self._whole = self._mode == STRICT or (self._mode == AUTO and not is_inside)
        self._user: OtherUser | None = None
        if surroundings.user:
            from pyvmm.host.other_user import OtherUser

            self._user = OtherUser.named(surroundings.user)
            self._user.check_reads(_code())
        self._passes_signals = passes_signals
        self._outside: Outside | None = None
        self._keeper: Keeper | None = None
        self._vm_log: VmLog | None = None
        self._has_name = False  # on this machine
        self._refusals: Refusals | None = None
        self._warn: log.RateLimited | None = None
        self._of_start: list[str] = []
        self.box = NO_BOX

    def watch_over(
        self, registration: Registration, vm_log: VmLog | None, group: Group | None = None
    ) -> None:
        """The files of this VM are opened, made and removed for it once it is confined; so is its
        `group` of processes."""
        self._vm_log = vm_log
        self._has_name = True
        if self._mode == OFF and self._user is None:
            return
        if self._whole or self._user is not None:  # whose files these are not
            from pyvmm.monitor.keeper import Keeper

            keeper = self._keeper = Keeper(
                os.path.dirname(registration.path),
                registration.name,
                user=self._user,
            )
            for path in registration.files:
                keeper.announce(path)
            if group is not None:
                keeper.leave(group)
            _ask_for_names(keeper)
        else:
            named_listener.remove_by(
                lambda path, identity: self.run(partial(named_listener.remove_here, path, identity))
            )
            unix_sockets.connect_by(lambda path: self.run(partial(unix_sockets.connect_here, path)))

        def note(path: str) -> None:
            registration.note(path)
            if self._keeper is not None:
                self._keeper.announce(path)

        named_listener.note_by(note)
        if vm_log is not None:
            self._watch_over_log(vm_log)

    def watch_over_inside(self, paths: Iterable[str]) -> None:
        """The same in an emulated host, before there is a thread; at `paths` this process is going
        to listen."""
        if not self._whole:
            return
        from pyvmm.monitor import plugged_inside
        from pyvmm.monitor.keeper import Keeper

        keeper = self._keeper = plugged_inside.keeper = Keeper("", "", is_inside=True)
        for path in paths:
            keeper.announce(path)
        _ask_for_names(keeper)
        named_listener.note_by(keeper.announce)

    def hear_clients(
        self, listener: Socket, doors: Sequence[Door]
    ) -> tuple[Socket | Door, Sequence[Door]]:
        """The control sockets with what brings the connections that our keeper has heard first, if
        it does. To be called before `enter`. Raises OSError."""
        keeper = self._keeper
        if keeper is None or not self._whole or not self._has_name:
            return listener, doors
        from pyvmm.control.server import Door

        first, *others = [
            door._replace(passes=keeper.listen(door.socket, owner_only=door.owner_only))
            if door.rights == EXEC
            else door
            for door in (Door(listener), *doors)
        ]
        return first, others

    def open_device(self, path: str) -> int:
        """A block device of the emulated host that this is, opened. Raises OSError."""
        if self._keeper is not None and self.opens_nothing:
            return self._keeper.open_device(path)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def _watch_over_log(self, vm_log: VmLog) -> None:
        if self._keeper is not None:
            vm_log.open_by, vm_log.note_end_by = self._keeper.open_log, self._keeper.note_end
            return
        open_log, note_end = vm_log.open_by, vm_log.note_end_by
        vm_log.open_by = lambda rotate: self.run(partial(open_log, rotate))
        vm_log.note_end_by = lambda *args, **details: self.run(partial(note_end, *args, **details))

    def enter(self, spec: VmSpec) -> Box:
        """Confine this process, which is about to run `spec`; the layers that are on. Raises
        ConfigError for a layer that is wanted and cannot be had."""
        if self._keeper is not None:
            for device in spec.devices:
                if device.kind == "vhost_user":  # whose back end may be followed by another one
                    self._keeper.announce(getattr(device, "socket", ""), removes=False)
            self._keeper.enter_box()
        if self._mode == OFF:
            self._become()
            self._say_what_is_on()
            return self.box
        # A thread that runs already keeps its files, namespaces and capabilities.
        with pausing.paused() if self._whole else nullcontext():
            self._enter(spec)
        if self._mode == STRICT and self.box.off:
            layer, reason = self.box.off[0]
            raise ConfigError(
                f"the monitor cannot be confined: {layer}: {reason}",
                cure="use --confine auto, which does without",
                option="--confine",
            )
        self._say_what_is_on()
        return self.box

    def _enter(self, spec: VmSpec) -> None:
        box.begin()
        if not self._whole:
            self._outside = Outside(box.stay_outside)
        self._hear_refusals(spec.name)
        for path in filter(None, (spec.kernel, spec.initrd)):
            with suppress(OSError):
                if os.stat(path).st_nlink:  # or else it has no name, as a memfd has not
                    self._of_start.append(path)
        cards = [device for device in spec.devices if device.kind == "net"]
        needs = Needs(
            ioctls=(KVM_RUN, *sorted(numbers.made() - {KVM_RUN})),  # it is looked for first
            read=(*_code(), *_files(spec), *self._surroundings.allow_read),
            uses_network=bool(cards),
            # Or else from outside; passt has none.
            hears_of_interfaces=self._whole and any(getattr(card, "tap", "") for card in cards),
            passes_signals=self._passes_signals,
            outside=not self._whole,
            tells=self._refusals is not None,
            answers=None if self._refusals is None else self._refusals.answer,
        )
        self.box = box.enter(needs, self._become)

    def _become(self) -> None:
        """Become the other user, if there is one. Raises ConfigError."""
        user = self._user
        if user is None:
            return
        if box.signals_others() or self._passes_signals:
            raise ConfigError(
                "what serves qcow2 disks, --share or CMD stays root's, and cannot be ended by "
                "another user",
                cure="use raw disks (qemu-img convert -O raw), and pyvmm exec",
                option="--user",
            )
        unix_sockets.belong_to(os.geteuid())
        try:
            user.become()
        except OSError as error:
            raise ConfigError(
                f"this process cannot become user {user.uid}: {error.strerror}",
                cure="give it CAP_SETUID and CAP_SETGID, or start it as that user",
                option="--user",
            ) from None

    def _hear_refusals(self, name: str) -> None:
        if box.filters_calls():
            from pyvmm.host.refusals import Refusals

            with suppress(OSError):  # then a call fails without a line
                self._refusals = Refusals()
                self._warn = log.RateLimited(log.of_vm(name))

    def _say_what_is_on(self) -> None:
        """The first line of the VM's log."""
        if self._vm_log is not None:
            off = "".join(f"; not {layer}: {reason}" for layer, reason in self.box.off)
            layers = ", ".join(self.box.on) or "by nothing"
            user = "" if self._user is None else f"; as user {self._user.uid}"
            self._vm_log.note(f"confined ({self._mode}): {layers}{off}{user}")

    def described(self) -> dict[str, Any]:
        """The confinement of this process, as plain data."""
        refused = 0 if self._refusals is None else self._refusals.count
        box = {"on": list(self.box.on), "off": dict(self.box.off)}
        return {"mode": self._mode, "user": os.geteuid(), **box, "refused_calls": refused}

    def check_files(self) -> None:
        """Raise ConfigError for a file of the guest's start that was removed, or replaced: a root
        of our own has it still."""
        for path in self._of_start:
            with suppress(OSError):  # whoever opens it tells
                if not os.stat(path).st_nlink:
                    raise ConfigError(f"cannot open {path}: it was removed")

    def started(self) -> None:
        """The vCPUs run."""
        if self._refusals is not None:
            self._refusals.meet_threads()

    def look(self) -> None:
        """Tell of calls that were refused since the last look."""
        if self._refusals is not None and self._warn is not None:
            for line in self._refusals.take():
                self._warn(line)

    @property
    def opens_nothing(self) -> bool:
        """True if nothing is opened by name any more."""
        return self._whole and bool(self.box.on)

    def run(self, job: Callable[[], T]) -> T:
        """Do what the user has asked for by name, where that is possible still, or with files that
        were handed to us. Raises what `job` raises, ConfigError."""
        if self._outside is not None and not handed.present():
            return self._outside.run(job)
        try:
            return job()
        except (ConfigError, HostError, OSError) as error:
            # Of what was handed over, errors of ours say what is wrong with it.
            is_told = handed.present() and not isinstance(error, OSError)
            if not self.opens_nothing or is_told:
                raise
            message = error.message if isinstance(error, ConfigError) else str(error)
            raise ConfigError(
                f"a confined monitor opens nothing by name: {message}",
                cure="start the VM with --confine off",
            ) from None


def _ask_for_names(keeper: Keeper) -> None:
    named_listener.remove_by(keeper.remove)
    unix_sockets.connect_by(keeper.reach)


def _code() -> Iterator[str]:
    """The folders of Python's own modules and those of packages, which are loaded when they are
    wanted."""
    yield os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    yield os.path.dirname(os.path.abspath(os.__file__))
    yield from confinement.package_folders()


def _files(spec: VmSpec) -> Iterator[str]:
    """The files that a restart of the guest reads again, and those that a traceback shows."""
    yield spec.kernel
    if spec.initrd is not None:
        yield spec.initrd
    for disk in spec.disks:
        if disk.storage == "python":
            yield disk.path.rpartition(":")[0]
    for device in spec.devices:
        if device.kind == "user":  # which few load
            yield getattr(device, "path", "")
