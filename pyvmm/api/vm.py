"""A VM that you can hold: started, talked to and ended from Python."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from socket import SHUT_RDWR
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from pyvmm.api import config_file
from pyvmm.api.cancellation import woken_by
from pyvmm.api.errors import TAIL_LINES, Outcome, VMError, VMTimeout, add_console, check_owner
from pyvmm.api.events import Event, events_of
from pyvmm.api.in_guest import InGuest, Path
from pyvmm.api.in_monitor import PATIENCE, InMonitor
from pyvmm.api.monitor import START_SECONDS, Monitor, OwnMonitor
from pyvmm.api.signatures import OfAllOptions
from pyvmm.control.client import CUT_SECONDS, Client, NoAnswer, NotRunning, open_events, patiently
from pyvmm.errors import ConfigError, HostError, PyvmmError
from pyvmm.kinds import registry
from pyvmm.kinds.vm_spec import make_spec, validate
from pyvmm.spec.surroundings import STOP_SECONDS, read_surroundings
from pyvmm.spec.vm import DeviceSpec, DiskSpec, VmSpec

if TYPE_CHECKING:
    from typing import Unpack

    from pyvmm.api.console import Console
    from pyvmm.api.template import ForkedMonitor
    from pyvmm.kinds.registry import Keywords

_DEFAULTS: dict[str, Any] = {"vsock": True}
_FOR_EVER = 1e9
_ASK_SECONDS = 5.0  # for a monitor to answer
_KILL_SECONDS = 10.0


class VM(InGuest, InMonitor):
    """A virtual machine.

        with VM(kernel="vmlinuz", initrd="initrd.img", disks=["root.img,snapshot"]) as vm:
            vm.wait_ready()
            print(vm.run(["uname", "-r"]).stdout)

    It is started by `start` or by entering a `with` block, at whose end it is stopped. It runs in a
    process of its own, which ends when this one does. Methods raise VMError or one of its kinds,
    with the end of the guest's console, and can be called from any thread.

    It belongs to the process that has started it. In one forked from that, the end of a `with`
    block, `stop`, `kill` and `detach` do nothing, and what needs the guest's console, or its end,
    raises VMError; what asks the guest or its monitor (`run`, `status`) works.
    """

    __signature__ = OfAllOptions(**_DEFAULTS)

    def __init__(
        self,
        image: str | None = None,
        *,
        kernel: Path | None = None,
        initrd: Path | None = None,
        modules: Path | None = None,
        root: Path | None = None,
        rw: Path | Iterable[Path] = (),
        arch: str | None = None,
        cpus: int = 1,
        memory: int | str = "512M",
        cmdline: str = "",
        trace: str | Iterable[str] = (),
        trace_file: Path | None = None,
        discovery: str = "auto",
        transport: str = "auto",
        on_reboot: str = "restart",
        stop_timeout: float | None = None,
        name: str = "",
        rm: bool = True,
        kvm: str = "auto",
        confine: str = "auto",
        allow_read: Path | Iterable[Path] = (),
        user: str = "",
        cgroup: str = "",
        control_socket: str | Mapping[str, str] | Iterable[str | Mapping[str, str]] = (),
        **kinds: Unpack[Keywords],
    ) -> None:
        """The options are those of `pyvmm run` (docs/options.md). With neither an image nor a
        kernel it is the default image, debian, built if it is not there. Unlike there, `rm` is the
        default (what the guest changes on an image's disk is thrown away), and `vsock`, which leads
        to its agent.

        Sizes are in bytes, or texts such as "2G"; what is structured is a specification
        (`Disk(…)`), a mapping with its fields, or a text as on the command line. Raises ConfigError
        for what can be seen to be wrong without opening a file.
        """
        for keyword in kinds:
            if keyword not in registry.keywords():
                raise TypeError(f"VM.__init__() got an unexpected keyword argument {keyword!r}")
        own = {key: value for key, value in locals().items() if key not in ("self", "kinds")}
        values = {**own, **_DEFAULTS, **kinds}
        self._values = {
            key: list(value) if _is_list(value) else value for key, value in values.items()
        }
        self.spec: VmSpec = validate(make_spec({**self._values, "kernel": kernel or "/"}))
        read_surroundings(self._values)
        self._monitor: Monitor | None = None
        self._attached = self._restored = self._is_copy = False
        self._console: Console | None = None

    @classmethod
    def from_config(cls, path: Path, *, allow_code: bool = False, **options: Any) -> Self:
        """The VM that a configuration file describes (docs/python-api.md); `options`, by the names
        above, replace what the file says. Python files that it names for disks or devices are run
        with `allow_code`, and refused without. Raises ConfigError."""
        values = config_file.load(os.fspath(path), allow_code=allow_code)
        # In a file it means what it means to `pyvmm run`.
        return cls(**{"rm": False, **values, **options})

    def to_config(self) -> str:
        """The text of a configuration file that describes this VM."""
        return config_file.describe(self._values)

    @classmethod
    def attach(cls, name: str) -> Self:
        """The VM called `name`, which runs already, in whatever process. It is not ended at the end
        of a `with` block. Raises ConfigError if there is none."""
        from pyvmm.api.attached import AttachedMonitor

        # Only its monitor knows the specification; `status` tells.
        vm = cls(kernel="/", name=name, vsock=False)
        vm._monitor = AttachedMonitor(name)
        vm._attached = True
        return vm

    @classmethod
    def restore(cls, snapshot: str, *, name: str = "", kvm: str = "auto") -> Self:
        """A VM that goes on from the snapshot of that name once it is started, as often as you
        like; what it changes on its disks is thrown away at its end. Raises ConfigError if there is
        none, or its disks have changed since."""
        from pyvmm.monitor import snapshots

        vm = cls(kernel="/", name=name, kvm=kvm, vsock=False)
        vm.spec = snapshots.restored(snapshot, {"name": name})
        vm._restored = True
        return vm

    @classmethod
    def _copy(cls, monitor: ForkedMonitor) -> Self:
        """The VM, a copy, whose `monitor` has begun already."""
        vm = cls(kernel="/", vsock=False)
        vm.spec, vm._monitor, vm._is_copy = monitor.spec, monitor, True
        return vm

    def clone(self, *, name: str = "") -> Self:
        """A VM that goes on from where this one is now, in a process of its own; this one stands
        still meanwhile for a moment. It runs already, and ends with its `with` block, or by `stop`.

        The two are strangers: docs/snapshots.md tells what is another one. Raises ConfigError for
        what cannot be saved, or has a disk that two VMs cannot share; VMError if it does not start.
        """
        return self.clones(1, name=name)[0]

    def clones(self, count: int, *, name: str = "") -> list[Self]:
        """So many, of one moment; with `name` they are called NAME-1, NAME-2… Raises as `clone`
        does, and then none of them runs."""
        from pyvmm.api.clones import clone

        made = clone(
            *(self.name, count),
            name=name,
            kvm=str(self._values["kvm"]),
            surroundings=replace(read_surroundings(self._values), sockets=()),
        )
        return [self._copy(monitor) for monitor in made]

    # --- its life ---------------------------------------------------------------------------------

    def start(self, timeout: float = START_SECONDS, *, detached: bool = False) -> Self:
        """Start it; returns when its vCPUs run. With `detached` it goes on when this process ends.

        Raises ConfigError for what is wrong with its options, VMError if it cannot be started
        otherwise, and ends it after `timeout` seconds."""
        if self._monitor is not None:
            raise VMError(f"{self.name} has been started before")
        image = self._resolve()
        kvm, rm = str(self._values["kvm"]), bool(self._values["rm"])
        monitor = self._monitor = OwnMonitor(
            self.spec,
            kvm,
            surroundings=read_surroundings(self._values),
            image=image,
            rm=rm,
            outlives_us=detached,
        )
        monitor.await_start(timeout)
        return self

    def _resolve(self) -> str | None:
        """Fill in what an image gives, building it if need be; its name if the disk is its own."""
        if self._restored:
            return None
        from pyvmm.monitor.kernel_choice import specify
        from pyvmm.monitor.run_spec import refuse_foreign

        refuse_foreign(self._values, str(self._values["kvm"]))
        self.spec, image = specify(self._values)
        return image

    def __enter__(self) -> Self:
        return self if self._attached or self._is_copy else self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._attached:
            self.detach()
        else:
            self.close()

    def detach(self) -> None:
        """Let go of a VM that was attached to; it runs on."""
        from pyvmm.api.attached import AttachedMonitor

        if isinstance(self._monitor, AttachedMonitor) and not self.is_elsewhere:
            self._monitor.detach()

    def stop(
        self, timeout: float = STOP_SECONDS, *, escalate: bool = True, now: bool = False
    ) -> Outcome:
        """Have the guest power off, and wait until it has ended; how it did.

        The guest is asked by its agent, or else by its power button, as by `pyvmm stop`. After
        `timeout` seconds its power is cut with `escalate`, and VMTimeout is raised without. The
        power is cut at once with `now`, and if there is nobody in the guest to be asked. A VM that
        has ended, or has never been started, is left alone.
        """
        if self._monitor is None or self.is_elsewhere:
            return Outcome(None)
        monitor = self._monitor
        patience = 0.0 if now else timeout if escalate else _FOR_EVER
        if monitor.outcome is None:
            try:
                self._request_end(patience)
            except PyvmmError:  # it does not answer, or takes no more requests
                monitor.signal(signal.SIGTERM)
        try:
            return monitor.wait(timeout + CUT_SECONDS if escalate else timeout)
        except VMTimeout:
            if not escalate:
                raise
        return self.kill()

    def _request_end(self, patience: float) -> None:
        with (
            Client.connect(self.name) as client,
            woken_by(partial(client.connection.shutdown, SHUT_RDWR)),
        ):
            client.call("stop", patience=_ASK_SECONDS, timeout_ms=round(1000 * patience))

    def close(self) -> Outcome:
        """End as a `with` block does: `stop`, and with `now` where nothing that the guest
        has written is kept: a program that has what it wanted shall not wait for that."""
        return self.stop(now=not self._keeps_something())

    def _keeps_something(self) -> bool:
        image_kept = self._values["image"] is not None and not self._values["rm"]
        return (
            self._attached
            or image_kept
            or any(part.keeps for part in self.spec.parts if part.kind in ("disk", "share"))
        )

    def kill(self) -> Outcome:
        """End its process at once (SIGKILL), and wait until it has ended."""
        return Outcome(None) if self.is_elsewhere else self._running().end()

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait until it ends by itself; how it did. Raises VMTimeout after `timeout` seconds."""
        return self._ours().wait(timeout)

    @property
    def outcome(self) -> Outcome | None:
        """Its end; None before that."""
        return None if self._monitor is None else self._monitor.outcome

    def _running(self) -> Monitor:
        if self._monitor is None:
            raise VMError("the VM has not been started")
        return self._monitor

    @property
    def is_elsewhere(self) -> bool:
        """True if it belongs to the process that this one was forked from."""
        return self._monitor is not None and self._monitor.is_elsewhere

    def _ours(self) -> Monitor:
        monitor = self._running()
        check_owner(monitor.owner, monitor.name)
        return monitor

    def _ends_soon(self) -> bool:
        return not self.is_elsewhere and self._running().ends_soon()

    # --- what it is -------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """Its name, by which `pyvmm ps`, `stop` and so on know it; "" until one was chosen."""
        return self.spec.name if self._monitor is None else self._monitor.name

    @property
    def pid(self) -> int:
        """The process of its monitor."""
        return self._running().pid

    @property
    def messages(self) -> list[str]:
        """The monitor's own lines so far: hints, diagnoses, warnings."""
        return list(self._ours().messages)

    @property
    def console(self) -> Console:
        """The guest's console."""
        monitor = self._ours()
        if self._console is None:
            from pyvmm.api.console import Console

            self._console = Console(monitor.transcript, monitor.type, monitor.why_ended)
        return self._console

    # --- what is asked of its monitor -------------------------------------------------------------

    def events(self, *, history: bool = True) -> Iterator[Event]:
        """The events of it, one after another, until it has ended; with `history` what has
        happened already comes first."""
        with self._explained():
            stream = open_events(self.name, history=history)
        return events_of(stream)

    def _ask(self, method: str, *, patience: float = PATIENCE, **params: Any) -> dict[str, Any]:
        def ask(client: Client) -> dict[str, Any]:
            with woken_by(partial(client.connection.shutdown, SHUT_RDWR)):
                answer: dict[str, Any] = client.call(method, patience=patience, **params)
                return answer

        with self._explained():
            return patiently(self.name, ask)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of what is done inside become those of a VM that has ended, if it has; others get
        the end of its console."""
        try:
            yield
        except VMError:
            raise
        except (PyvmmError, OSError) as error:
            if self._running().outcome is not None or (
                _may_be_its_end(error) and self._ends_soon()
            ):
                raise self._running().why_ended() from error
            if isinstance(error, ConfigError) or not isinstance(error, PyvmmError):
                raise
            if self.is_elsewhere:
                raise
            add_console(error, self._running().transcript.tail(TAIL_LINES))
            raise


def _may_be_its_end(error: Exception) -> bool:
    """True if `error` is what a VM's end looks like to who has asked it for something."""
    from pyvmm.agent import AgentGone

    return isinstance(error, (NoAnswer, NotRunning, AgentGone, HostError, OSError))


def _is_list(value: object) -> bool:
    """True if it stands for several values: a generator, say, but not a text, table or path."""
    single = (str, Mapping, os.PathLike, DeviceSpec, DiskSpec)
    return isinstance(value, Iterable) and not isinstance(value, single)
