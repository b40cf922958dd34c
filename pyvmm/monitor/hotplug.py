"""Devices that come to a running machine and go: asked for on the control socket
(hotplug_methods), or given up by the guest. Whether a driver takes one is for arrivals to see.

A guest gives a device up by the _EJ0 of its slot. From then on the slot is empty, and a thread
does the rest: it waits until vCPUs and the device have ended their work there, and gives back all
that the device had. The client that has asked for the removal waits for that. See decision 0365.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Event, Lock, Thread, current_thread
from typing import TYPE_CHECKING, Any, NamedTuple

from pyvmm.control.protocol import FAILED, NEEDS_FILES, PAUSED, ControlError
from pyvmm.errors import ConfigError, DriverError, PyvmmError
from pyvmm.host import handed, log
from pyvmm.host.handed import Descriptors
from pyvmm.host.syscalls import Closable
from pyvmm.kinds import registry
from pyvmm.kinds.interface import unknown_id
from pyvmm.machine.attach import virtio_hook
from pyvmm.machine.builder import Parts, check_lending
from pyvmm.machine.machine import Machine
from pyvmm.machine.trace import Trace
from pyvmm.monitor import devices_by_agent
from pyvmm.monitor.arrivals import Arrivals
from pyvmm.monitor.open_devices import OpenDevices
from pyvmm.monitor.slots_by_agent import SlotsByAgent
from pyvmm.pci import slots
from pyvmm.spec.vm import DeviceSpec, DiskSpec

if TYPE_CHECKING:
    from pyvmm.kinds.interface import Spec
    from pyvmm.machine.pci_host import PciHost
    from pyvmm.transport.base import Transport
    from pyvmm.virtio.device import VirtioDevice

_LOOKS_EACH = 0.05  # seconds, at a device that is taken by force
# Seconds for which a device that is taken by force answers a driver that goes on, and after which
# one that has nothing to ask has let go, as far as anybody knows.
_FAILS_FOR = 5.0
_QUIET_FOR = 0.2

HOST, GUEST = "host", "guest"  # who has wanted a device to go


class _Part(NamedTuple):
    """One device of the machine."""

    spec: Spec
    device: VirtioDevice
    transport: Transport


class _Leaving:
    """A device that is to go, or goes."""

    def __init__(self, part: _Part, number: int) -> None:
        self.part = part
        self.number = number
        self.waiting = 0  # how many wait for it
        self.wakes: set[Event] = set()  # theirs
        self.by = HOST
        self.ejected = False
        self.lacks_thread = False
        self.gone = Event()
        self.failure = ""

    def end(self, failure: str = "") -> None:
        """Tell all who wait that it has gone, or why it has not."""
        self.failure = failure
        self.gone.set()
        for wake in list(self.wakes):
            wake.set()


class Hotplug(Closable):
    """Adds and removes devices of `machine`. Any thread may call it."""

    def __init__(
        self,
        machine: Machine,
        devices: OpenDevices,
        trace: Trace,
        *,
        tell: Callable[..., None],
        changed: Callable[[Parts], None],
        is_inside: bool = False,
    ) -> None:
        """`tell` hears of events, `changed` of the machine's parts each time they are others.
        `is_inside`: this is an emulated host, which files of the machine only get into if the
        monitor outside sees the request first (emulated_plug)."""
        self._machine = machine
        self._devices = devices
        self._trace = trace
        self._tell = tell
        self._changed = changed
        self._is_inside = is_inside
        self._name = machine.parts.prepared.spec.name
        self._say = log.of_vm(self._name)
        self._warn = log.RateLimited(self._say)
        self._one_at_a_time = Lock()  # of those that add
        self._lock = Lock()  # a leaf: of `_leaving` and what it holds
        self._leaving: dict[Transport, _Leaving] = {}
        self._finishing: set[Thread] = set()
        self._arrivals = Arrivals(machine, self._say)
        self._by_agent = SlotsByAgent(machine, self.ejected)  # where no slots tell the guest
        self._ended = False  # changes with `machine.steady` held
        # Devices as the user's machine knows them, where that is another one.
        self.described: dict[VirtioDevice, Spec] = {}

    # --- a device comes ---------------------------------------------------------------------------

    def run_outside(self, job: Callable[[], Any]) -> Any:
        """Do what needs names, outside of the box that this may be in; what `job` returns."""
        return self._devices.run_by(job)

    def add(
        self, kind: str, value: str | dict[str, Any] | Spec, described: Spec | None = None
    ) -> dict[str, Any]:
        """Open the device that `value` describes, as its option would, and plug it in; its `id`,
        and the PCI `slot` that it is in. `described` is the device as the user's machine knows it,
        where that is another one. Raises ConfigError, HostError, ControlError (NEEDS_FILES where
        nothing is opened by name)."""
        self._bus()
        try:
            spec, device, slot = self._open_and_plug(kind, value, described)
        except ConfigError as error:
            raise registry.untyped(kind, error) from None
        if self._bus().slots is None:
            self._by_agent.tell(slots.ARRIVED, slot)
        pci = self._machine.parts.pci
        there = None if pci is None else pci.transport_at(slot)
        is_its = there is not None and there.device is device
        self._arrivals.watch(there if is_its else None, device.name)
        told = {"kind": kind, "id": device.name, "slot": slot}
        self._tell("device_added", **told)
        if getattr(spec, "mountpoint", ""):
            wait = partial(self.wait_for_driver, kind, device.name)
            devices_by_agent.mount(self._machine, spec, device.name, wait)
        return told

    @property
    def opens_nothing(self) -> bool:
        """True if nothing is opened by name."""
        return self._devices.opens_nothing()

    def add_handed(
        self,
        kind: str,
        value: Any,
        names: dict[str, int],
        owner: Descriptors,
        described: Spec | None = None,
    ) -> dict[str, Any]:
        """The same with descriptors, by name, of what would have to be opened."""
        with handed.files(names, owner):
            return self.add(kind, value, described)

    def wait_for_driver(
        self, kind: str, id: str, timeout: float, wake: Event | None = None
    ) -> dict[str, Any]:
        """Wait until a driver of the guest serves the device `id`, for `timeout` seconds at most:
        whether one does by then is `taken`, and if not, `why` says what is known of the reason.
        This does not wait for a guest that is paused, or that starts still, nor after a caller has
        set `wake`. Raises ConfigError if there is no such device."""
        why = self._arrivals.wait(lambda: self._part(kind, id).transport, timeout, wake or Event())
        found: dict[str, Any] = {"kind": kind, "id": id, "taken": why is None}
        return found if why is None else {**found, "why": why}

    def _open_and_plug(
        self, kind: str, value: str | dict[str, Any] | Spec, described: Spec | None
    ) -> tuple[Spec, VirtioDevice, int]:
        [spec] = self._read(kind, value)
        if getattr(spec, "mountpoint", "") and self._machine.pauser.paused:
            raise ControlError(
                PAUSED,
                f"{self._name} is paused, and its agent is to mount {spec.mountpoint}; resume it "
                "first, or share the directory without a mountpoint",
            )
        if self._is_inside and isinstance(value, (str, dict)):
            _check_crossing(kind, spec)
        if self._devices.opens_nothing() and not (handed.present() and registry.hands_over(kind)):
            self._check_names(kind, spec)
        with self._one_at_a_time:
            spec = self._checked(kind, spec)
            device = self._devices.open(spec)
            if not (self._is_inside or self._devices.opens_nothing()):
                from pyvmm.monitor import given

                given.add_to(self._name, spec)
            if described is not None:
                named = isinstance(described, DiskSpec) and isinstance(spec, DiskSpec)
                self.described[device] = replace(described, id=spec.id) if named else described
            try:
                return spec, device, self._plug(spec, device)
            except BaseException:
                self.described.pop(device, None)
                self._devices.close_one(device)
                raise

    def _check_names(self, kind: str, spec: Any) -> None:
        """Raise ConfigError, or ControlError where descriptors would do, if it has to be opened by
        name."""
        if not registry.opens_by_name(spec):
            return
        opens_nothing = "a confined monitor opens nothing by name"
        if registry.hands_over(kind) and not self._is_inside:  # where no descriptor gets
            cure = f"make {kind}.add the first request of its connection, or send descriptors"
            raise ControlError(NEEDS_FILES, f"{opens_nothing}; {cure}")
        raise ConfigError(opens_nothing, cure="start the VM with --confine off")

    def _bus(self) -> PciHost:
        pci = self._machine.parts.pci
        if pci is None:
            raise ConfigError("devices come to and go from a PCI bus, which this machine has not")
        if pci.slots is None and not self._by_agent.has_agent():
            raise ConfigError(
                "nothing tells this guest of devices that come and go but its agent, for which it "
                "has no vsock",
                cure="run it with --agent",
            )
        return pci

    def _tell_guest(self, what: int, number: int) -> None:
        pci = self._bus()
        if pci.slots is None:
            self._by_agent.tell(what, number)
        else:
            pci.tell(what, number)

    def _read(self, kind: str, value: Any) -> list[Any]:
        specs = registry.read(kind, value)
        if len(specs) != 1:
            raise ConfigError(f"{len(specs)} devices at once", cure="add one after the other")
        if isinstance(specs[0], DeviceSpec) and specs[0].console:
            raise ConfigError("a console is there from the start, or not at all")
        return specs

    def _checked(self, kind: str, spec: Any) -> Any:
        whole = self._machine.parts.prepared.spec
        others = [part for part in whole.parts if part.kind == kind]
        if others and not registry.option_of(kind).many:
            raise ConfigError(
                f"the VM has a device of the kind {kind} already", cure="remove that one first"
            )
        # A check may look at files, which have no names in the root of the box.
        return self.run_outside(partial(registry.check_one_more, kind, spec, others, whole))

    def _plug(self, spec: Spec, device: VirtioDevice) -> int:
        machine = self._machine
        with machine.steady:
            if self._ended:
                raise ControlError(FAILED, f"{self._name} is about to end")
            pci, parts = self._bus(), machine.parts
            check_lending(device, parts.prepared.memory)
            number, transport = pci.arrive(
                device,
                memory=parts.prepared.memory,
                log=log.of_vm(self._name),
                trace=virtio_hook(self._trace),
            )
            found = _parts_of(parts)
            # As in a specification that has all of them: a snapshot is restored from one.
            ranks = [_rank(one.spec) for one in found]
            place = sum(rank <= _rank(spec) for rank in ranks)
            found.insert(place, _Part(spec, device, transport))
            self._exchange(found, parts.prepared.late | {device})
        return number

    def _exchange(self, found: list[_Part], late: frozenset[VirtioDevice]) -> None:
        """`found` is what the machine has from now on, and `late` what came after its start. The
        machine is steady."""
        parts = self._machine.parts
        prepared = parts.prepared
        spec = replace(
            prepared.spec,
            disks=tuple(one.spec for one in found if isinstance(one.spec, DiskSpec)),
            devices=tuple(one.spec for one in found if isinstance(one.spec, DeviceSpec)),
        )
        devices = tuple(one.device for one in found)
        parts = parts._replace(
            prepared=prepared._replace(spec=spec, devices=devices, late=late),
            transports=tuple(one.transport for one in found),
        )
        self._machine.exchange(parts)
        self._changed(parts)

    # --- a device is to go ------------------------------------------------------------------------

    def remove(
        self, kind: str, id: str, timeout: float, force: bool, wake: Event | None = None
    ) -> dict[str, Any]:
        """Have the guest give up the device `id`, and return when all of it is gone.

        With `force` this does not ask what it is used for, and after `timeout` seconds it takes it
        away without the guest's consent. A caller that sets `wake` withdraws the request: the
        device stays then, unless the guest has given it up already. Raises ConfigError if the guest
        uses it or does not give it up, ControlError for a paused VM.
        """
        wake = wake or Event()
        part, number = self._find(kind, id)
        if not force and (
            use := devices_by_agent.use_of(self._machine, number, getattr(part.spec, "tag", ""))
        ):
            raise ConfigError(
                f"the guest uses {id}: {use}", cure="have it let go, or add --force to remove it"
            )
        with self._machine.steady:
            if self._ended:
                raise ControlError(FAILED, f"{self._name} is about to end")
            if wake.is_set():
                raise ControlError(FAILED, "nobody wants that any more")
            part, number = self._find(kind, id)  # which may have gone meanwhile
            with self._lock:
                leaving = self._leaving.setdefault(part.transport, _Leaving(part, number))
                leaving.waiting += 1
                leaving.wakes.add(wake)
            self._tell_guest(slots.LEAVING, number)
        told = wake.wait(timeout)
        with self._lock:
            leaving.wakes.discard(wake)
        if force and not told and not leaving.ejected:
            self._let_requests_end(leaving)
        if not leaving.gone.is_set() and not self._give_up(leaving, force and not told):
            raise ConfigError(
                f"the guest has not given up {id} within {timeout:g} s",
                cure="add --force to take it away",
            )
        leaving.gone.wait()
        if leaving.failure:
            raise ControlError(FAILED, leaving.failure)
        return {"kind": kind, "id": id}

    def _find(self, kind: str, id: str) -> tuple[_Part, int]:
        """A device that may go, and its slot."""
        pci = self._bus()
        part = self._part(kind, id)
        number = pci.number_of(part.transport)
        if number is None:
            raise ConfigError(
                f"{id} is on virtio-mmio, and stays", cure="run the VM with --transport pci"
            )
        if self._machine.pauser.paused:
            raise ControlError(PAUSED, f"{self._name} is paused; resume it first")
        return part, number

    def _part(self, kind: str, id: str) -> _Part:
        found = [part for part in _parts_of(self._machine.parts) if part.spec.kind == kind]
        for part in found:
            if part.device.name == id:
                return part
        raise unknown_id(kind, id, [part.device.name for part in found])

    def _let_requests_end(self, leaving: _Leaving) -> None:
        """Have the device answer its driver's requests, with errors, and give the guest a while to
        let go: Linux waits for ever for requests to a disk that is gone."""
        part = leaving.part
        if not part.device.fail_requests():
            return
        give_up_at = time.monotonic() + _FAILS_FOR
        quiet_since, before = time.monotonic(), -1
        while (now := time.monotonic()) < give_up_at and not leaving.ejected:
            count, is_idle = _requests_of(part.transport)
            if count != before or not is_idle:
                quiet_since, before = now, count
            elif now - quiet_since >= _QUIET_FOR:
                return
            leaving.gone.wait(_LOOKS_EACH)

    def _give_up(self, leaving: _Leaving, force: bool) -> bool:
        """The guest has had its time. Whether the device goes all the same, or does already."""
        with self._machine.steady:
            pci = self._machine.parts.pci
            assert pci is not None
            with self._lock:
                leaving.waiting -= 1
                if leaving.ejected or leaving.gone.is_set():
                    return True
                if not force and leaving.waiting:
                    return False  # others wait for longer
                leaving.ejected = force
                if not force:
                    self._leaving.pop(leaving.part.transport, None)
            pci.withdraw(leaving.number)
            self._by_agent.withdraw(leaving.number)
            if force:
                pci.detach(leaving.number, leaving.part.transport, pulled=True)
                with self._lock:
                    self._finishing.add(current_thread())  # whoever ends the run waits for us
        if force:
            self._finish(leaving)
            # A guest that has not read the request yet is still to remove what has gone. A device
            # check would not do: Linux then looks for new devices only.
            with self._machine.steady:
                pci = self._machine.parts.pci
                if pci is not None and not self._ended and pci.transport_at(leaving.number) is None:
                    self._tell_guest(slots.LEAVING, leaving.number)
        return force

    # --- a device goes ----------------------------------------------------------------------------

    def ejected(self, number: int) -> None:
        """The guest has given up what is in slot `number`. Called in a vCPU's thread."""
        parts = self._machine.parts
        pci = parts.pci
        transport = None if pci is None else pci.transport_at(number)
        part = next((one for one in _parts_of(parts) if one.transport is transport), None)
        if pci is None or transport is None or part is None:
            return  # it has been ejected before, or nothing was there
        if part.spec.kind not in registry.come_and_go():
            self._warn(f"the guest ejects {part.device.name}, which stays")
            return
        with self._lock:
            leaving = self._leaving.get(transport)
            if leaving is None:
                leaving = self._leaving[transport] = _Leaving(part, number)
                leaving.by = GUEST
            if leaving.ejected:
                return
            leaving.ejected = True
        pci.detach(number, transport)
        self._start_finishing(leaving)

    def _start_finishing(self, leaving: _Leaving) -> None:
        thread = Thread(target=self._finish, args=(leaving,), name="unplug", daemon=True)
        with self._lock:
            self._finishing.add(thread)
        try:
            thread.start()
        except RuntimeError:  # no more threads: `look` tries again
            with self._lock:
                self._finishing.discard(thread)
                leaving.lacks_thread = True
            self._warn(f"the host has no thread to take {leaving.part.device.name} out")

    def _finish(self, leaving: _Leaving) -> None:
        """Give back all that the device had; it has left the bus."""
        transport = leaving.part.transport
        try:
            if transport not in self._machine.parts.transports:
                # The guest has ejected it once more, from a vCPU that had found it there still.
                with self._lock:
                    self._leaving.pop(transport, None)
                leaving.end()
                return
            # A vCPU may have found the device a moment before it left the bus.
            self._machine.settle()
            # The reset waits for requests under way; a guest that starts anew waits for them too.
            with suppress(PyvmmError, OSError), transport.negotiation.lock:
                transport.negotiation.reset()
            with self._machine.steady:
                if leaving.gone.is_set():
                    return  # the guest has been started anew meanwhile
                pci = self._machine.parts.pci
                assert pci is not None
                pci.unplug(leaving.number, transport)
                self._forget(leaving)
        except Exception as error:
            log.to_stderr(f"a defect in pyvmm, met by a device that goes: {error!r}")
            leaving.end(f"a defect in pyvmm: {error!r}")
        finally:
            with self._lock:
                self._finishing.discard(current_thread())

    def _forget(self, leaving: _Leaving) -> None:
        """The device is not a part of the machine any more. The machine is steady."""
        part = leaving.part
        others = [one for one in _parts_of(self._machine.parts) if one.device is not part.device]
        self._exchange(others, self._machine.parts.prepared.late - {part.device})
        with self._lock:
            self._leaving.pop(part.transport, None)
        self.described.pop(part.device, None)
        try:
            self._devices.close_one(part.device)
        except Exception as error:
            log.to_stderr(f"{part.device.name} was not taken out cleanly: {error}")
        self._tell("device_removed", kind=part.spec.kind, id=part.device.name, by=leaving.by)
        leaving.end()

    # --- the machine's life -----------------------------------------------------------------------

    def look(self) -> None:
        """Remind the guest of what it has not looked at, and finish what there was no thread for:
        called about every second."""
        with self._lock:
            stranded = [one for one in self._leaving.values() if one.lacks_thread]
            for one in stranded:
                one.lacks_thread = False
        for one in stranded:
            self._start_finishing(one)
        pci = self._machine.parts.pci
        if pci is not None and pci.slots is not None:
            pci.slots.remind()
        self._by_agent.remind()
        self._arrivals.look()

    def guest_restarts(self) -> None:
        """The guest has ended and starts anew, without the devices that it was asked to give up,
        as it uses them no more. The machine is steady, and its transports are closed."""
        with self._lock:
            leaving = list(self._leaving.values())
        self._arrivals.forget()
        self._by_agent.forget()
        for one in leaving:
            self._forget(one)

    def close(self) -> None:
        """The run is over: add no more devices, and tell the clients that wait."""
        with self._machine.steady:
            self._ended = True
        with self._lock:
            leaving, finishing = list(self._leaving.values()), list(self._finishing)
        for one in leaving:
            if not one.ejected or one.lacks_thread:
                one.end(f"{self._name} is about to end")
        for thread in finishing:
            thread.join()
        with self._one_at_a_time:
            pass  # one that has begun to add gives back what it has opened


def _check_crossing(kind: str, spec: Spec) -> None:
    if kind != "rng":
        raise ConfigError(
            "this machine's files and network do not get into the emulated KVM host so",
            cure=f"make {kind}.add the first request of its connection",
        )


def _rank(spec: Spec) -> int:
    return list(registry.KINDS).index(spec.kind)


def _requests_of(transport: Transport) -> tuple[int, bool]:
    """How many requests its device has answered, and whether none waits or is under way."""
    count, is_idle = 0, True
    for queue in transport.negotiation.active_queues:
        count += queue.stats.requests
        if not queue.lock.acquire(timeout=0):
            return count, False
        try:
            is_idle &= queue.is_drained()
        except DriverError:
            pass  # nobody serves it any more
        finally:
            queue.lock.release()
    return count, is_idle


def _parts_of(parts: Parts) -> list[_Part]:
    prepared = parts.prepared
    found = zip(prepared.spec.parts, prepared.devices, parts.transports, strict=True)
    return [_Part(*one) for one in found]
