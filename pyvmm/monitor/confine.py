"""A monitor's confinement: the needs of each part of its VM, and who does what it no longer can.

Decision 0410 has the moment, the layers, and all that needs a name after it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from pyvmm.errors import ConfigError, HostError
from pyvmm.host import box, handed, log, named_listener, pausing, unix_sockets
from pyvmm.host.box import NO_BOX, Box, Needs
from pyvmm.host.outside import Outside
from pyvmm.host.unix_sockets import Socket
from pyvmm.kvm.uapi import KVM_RUN, numbers
from pyvmm.monitor import preload
from pyvmm.spec.surroundings import AUTO, EXEC, OFF, STRICT, USUAL, Surroundings
from pyvmm.spec.vm import VmSpec

if TYPE_CHECKING:
    from pyvmm.control.doors import Door
    from pyvmm.control.registry import Registration
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
        is_inside: bool = False,
    ) -> None:
        """`is_inside`: this is an emulated host, where all that there is belongs to the VM."""
        self._surroundings = surroundings
        self._mode = surroundings.confine
        # Or the threads that serve the guest alone, beside one that opens what comes.
        self._whole = self._mode == STRICT or (self._mode == AUTO and not is_inside)
        self._is_inside = is_inside
        self._user: OtherUser | None = None
        self._no_user = ""  # why, where it should be one
        self._starts_with: list[str] = []  # the files that a guest's start reads
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
        self._choose_user(os.path.dirname(registration.path))
        if self._mode == OFF and self._user is None:
            return
        from pyvmm.monitor.keeper import Keeper

        keeper = self._keeper = Keeper(
            os.path.dirname(registration.path),
            registration.name,
            # One that is nobody else's has no files, and no folders for links.
            user=None if self._user is None or self._user.is_own else self._user,
        )
        if self._user is not None and self._user.lock >= 0:
            keeper.hold(self._user.lock)
        for path in registration.files:
            keeper.announce(path)
        if group is not None:
            keeper.leave(group)
        _ask_for_names(keeper)

        def note(path: str) -> None:
            registration.note(path)
            keeper.announce(path)

        named_listener.note_by(note)

    def _choose_user(self, place: str) -> None:
        """Whom the monitor becomes, if anybody. Raises ConfigError."""
        named = self._surroundings.user
        wanted = named or ("" if self._mode == OFF else AUTO)
        if not wanted or (wanted == AUTO and os.geteuid()):
            return
        from pyvmm.host import other_user

        try:
            self._user = other_user.OtherUser.wanted(wanted, place)
        except ConfigError as error:
            if wanted != AUTO:
                raise
            self._no_user = error.message
            return
        other_user.expect()

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
        from pyvmm.control.doors import Door

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

    def enter(self, spec: VmSpec) -> Box:
        """Confine this process, which is about to run `spec`; the layers that are on. Raises
        ConfigError for a layer that is wanted and cannot be had."""
        if self._vm_log is not None:
            self._vm_log.keep_open()
        if self._keeper is not None:
            for device in spec.devices:
                if device.kind == "vhost_user":  # whose back end may be followed by another one
                    self._keeper.announce(getattr(device, "socket", ""), removes=False)
            self._keeper.enter_box()
            if self._vm_log is not None:
                self._vm_log.open_by = self._keeper.open_log
        self._starts_with = [path for path in (spec.kernel, spec.initrd) if path]
        if self._mode == OFF:
            self._become_only()
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
        if self.box.off and not self.box.on and not self._is_inside and not os.geteuid():
            layer, reason = self.box.off[0]
            raise ConfigError(
                f"nothing confines a monitor of root's here: {layer}: {reason}",
                cure="start it as another user, or with --confine off",
                option="--confine",
            )
        self._say_what_is_on()
        return self.box

    def _enter(self, spec: VmSpec) -> None:
        box.begin()
        if not self._whole:
            self._outside = Outside(box.stay_outside)
        self._hear_refusals(spec.name)
        for path in self._starts_with:
            with suppress(OSError):
                if os.stat(path).st_nlink:  # or else it has no name, as a memfd has not
                    self._of_start.append(path)
        cards = [device for device in spec.devices if device.kind == "net"]
        needs = Needs(
            ioctls=(KVM_RUN, *sorted(numbers.made() - {KVM_RUN})),  # it is looked for first
            read=(*preload.code(), *_files(spec), *self._surroundings.allow_read),
            uses_network=bool(cards),
            # Or else from outside; passt has none.
            hears_of_interfaces=self._whole and any(getattr(card, "tap", "") for card in cards),
            outside=not self._whole,
            tells=self._refusals is not None,
            answers=None if self._refusals is None else self._refusals.answer,
            change_user=self._become if self._user is not None or self._no_user else None,
        )
        self.box = box.enter(needs)
        self._check_user(dict(self.box.off).get(box.USER, ""))

    def _become_only(self) -> None:
        """Become the other user, if there is one, without a box. Raises ConfigError."""
        if self._user is None and not self._no_user:
            return
        try:
            self._become()
        except ConfigError as error:
            self._check_user(error.message)
            self.box = Box((), ((box.USER, error.message),))
        else:
            self.box = Box((box.USER,))

    def _check_user(self, reason: str) -> None:
        """Raise ConfigError if there is a `reason` why this is not the user that was asked for."""
        if reason and self._surroundings.user not in ("", AUTO):
            raise ConfigError(
                reason,
                cure="give it CAP_SETUID and CAP_SETGID, or start it as that user",
                option="--user",
            )

    def _become(self) -> None:
        """Become the other user. Raises ConfigError, and nothing has changed."""
        from pyvmm.boot import image_file
        from pyvmm.host import confinement, output
        from pyvmm.memory import pages

        user = self._user
        if user is None:
            raise ConfigError(self._no_user)
        for path in self._starts_with:
            image_file.keep_open(path)
        output.open_streams()
        with confinement.without(confinement.CAP_SYS_ADMIN):  # or it tells where pages really are
            pages.keep_open()
        try:
            preload.for_user(user)
            if user.is_own and self._surroundings.allow_read and (path := user.can(self._lacks)):
                raise ConfigError(f"{path} is for root alone (--allow-read)")
            box.let_no_program_have(None)  # which he could not give up any more
            user.become()
        except OSError as error:
            raise ConfigError(
                f"this process cannot become user {user.uid}: {error.strerror}"
            ) from None
        unix_sockets.belong_to(0)

    def _lacks(self) -> str:
        """What this user cannot read of that which stays to be read; "" for nothing."""
        from pyvmm.host.other_user import unreadable

        return next(filter(None, map(unreadable, self._surroundings.allow_read)), "")

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
            user = "" if box.USER not in self.box.on else f"; as user {os.geteuid()}"
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
