"""Devices that come and go, up to where KVM would come in: the test plays the guest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hotplug_rig import MIB, SAFETY_TIMEOUT, Asking, Rig, image, machine, until

from pyvmm import Disk, images
from pyvmm.control.protocol import FAILED, PAUSED, ControlError
from pyvmm.errors import ConfigError
from pyvmm.host.files import open_image
from pyvmm.kinds import balloon
from pyvmm.kinds.vm_spec import validate
from pyvmm.machine.pci_host import PciHost
from pyvmm.monitor.arrivals import TAKES_WITHIN
from pyvmm.monitor.control import MachineControl
from pyvmm.monitor.hotplug_methods import methods
from pyvmm.pci import slots
from pyvmm.spec.vm import VmSpec
from pyvmm.testing.blk_driver import IN, IOERR, OK, BlockDriver, header
from pyvmm.testing.mock_driver import Buffer
from pyvmm.virtio.blk.backend import FileBackend
from pyvmm.virtio.status import ACKNOWLEDGE
from pyvmm.virtio.status import FAILED as FAILED_STATUS


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A VM with a root disk and a balloon, in slots 1 and 2."""
    root = Disk(str(image(tmp_path, "root")), id="root")
    with machine(VmSpec("kernel", disks=(root,), devices=(balloon.Spec(),))) as made:
        yield made


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return image(tmp_path)


def disk_of(rig: Rig, slot: int) -> BlockDriver:
    """The guest's driver for a disk, up and running."""
    driver = rig.driver(slot)
    driver.program_vectors()
    driver.start()
    return BlockDriver(driver)


def give_up(rig: Rig, asking: Asking, slot: int) -> None:
    """The steps of a guest that agrees."""
    assert rig.asked(slots.LEAVING) == 1 << slot
    rig.eject(slot)
    asking.result()


def test_a_snapshot_has_devices_as_the_users_machine_knows_them(rig: Rig, data: Path) -> None:
    """In an emulated host the monitor inside has other paths."""
    outside = validate(
        VmSpec("kernel", disks=(Disk("/root", id="root"),), devices=(balloon.Spec(),))
    )
    control = MachineControl(rig.machine, None, lambda: rig.hotplug, None, outside)  # type: ignore[arg-type]
    assert control._as_user_knows() is outside
    rig.add("rng", "bps=1M")  # which has nothing of the machine
    named = [Disk("/data", read_only=True), Disk("/more", read_only=True)]
    for described in named:
        rig.hotplug.add("disk", Disk(str(data), read_only=True), described)
    known = control._as_user_knows()
    assert [(disk.path, disk.id) for disk in known.disks] == [
        ("/root", "root"),
        ("/data", "disk0"),
        ("/more", "disk1"),
    ]
    assert [device.kind for device in known.devices] == ["rng", "balloon"]
    assert [part.kind for part in known.parts] == [part.kind for part in validate(known).parts], (
        "a restored VM has them in another order"
    )
    give_up(rig, rig.removing("disk", "disk0"), 4)
    give_up(rig, rig.removing("disk", "root"), 1)
    assert [(disk.path, disk.id) for disk in control._as_user_knows().disks] == [("/more", "disk1")]
    assert len(rig.hotplug.described) == 1


# --- a device that no driver takes ----------------------------------------------------------------


def look(rig: Rig, times: int) -> None:
    for _ in range(times):
        rig.hotplug.look()


def test_a_device_that_no_driver_takes_is_told_of_once(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.add("disk", "ram:1M,id=data")
    # Linux acknowledges each device that it finds, also one that it has no driver for.
    rig.driver(3).set_field((0x14, 1), ACKNOWLEDGE)
    look(rig, 10 * TAKES_WITHIN)
    assert capsys.readouterr().err == "", "no driver is at work: the guest starts still"
    disk_of(rig, 1)
    look(rig, TAKES_WITHIN - 1)
    rig.machine.pauser.paused = True
    look(rig, TAKES_WITHIN)
    rig.machine.pauser.paused = False
    assert capsys.readouterr().err == "", "its time is not over, and a paused guest has none"
    look(rig, TAKES_WITHIN)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no driver in the guest has taken data for 60 s" in said


@pytest.mark.parametrize("what", ["taken", "removed", "restarted"])
def test_one_that_is_taken_or_gone_is_not_told_of(
    rig: Rig, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    disk_of(rig, 1)
    rig.add("disk", "ram:1M,id=data")
    if what == "taken":
        disk_of(rig, 3)
    elif what == "removed":
        rig.remove("disk", "data", timeout=0, force=True)
    else:
        rig.hotplug.guest_restarts()
    look(rig, 3 * TAKES_WITHIN)
    assert capsys.readouterr().err == ""
    assert not rig.hotplug._arrivals._waiting


def test_pci_off_is_told_of_at_once(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    rig.prepared.entry.cmdline = "console=ttyS0 pci=off"  # type: ignore[misc]
    rig.add("disk", "ram:1M,id=data")
    assert "does not find data: pci=off on its command line" in capsys.readouterr().err
    look(rig, 3 * TAKES_WITHIN)
    assert capsys.readouterr().err == ""


class Waiting(Asking):
    """Somebody who waits for a driver."""

    def __init__(self, rig: Rig, id: str, wake: threading.Event) -> None:
        wait = rig.hotplug.wait_for_driver
        super().__init__(lambda: wait("disk", id, SAFETY_TIMEOUT, wake))


def taken(rig: Rig, timeout: float = 0, kind: str = "disk", id: str = "data") -> tuple[bool, str]:
    told = rig.hotplug.wait_for_driver(kind, id, timeout)
    assert told["kind"] == kind and told["id"] == id
    return told["taken"], told.get("why", "")


def test_whoever_waits_for_a_driver_hears_when_it_is_there(rig: Rig) -> None:
    disk_of(rig, 1)
    rig.add("disk", "ram:1M,id=data")
    waiting = Waiting(rig, "data", threading.Event())
    driver = rig.driver(3)
    driver.set_field((0x14, 1), ACKNOWLEDGE)
    assert taken(rig) == (False, ""), "it is up, and has only acknowledged it"
    driver.program_vectors()
    driver.start()
    assert waiting.result() == {"kind": "disk", "id": "data", "taken": True}
    assert taken(rig) == (True, "")


def test_whoever_waits_for_a_driver_hears_why_there_is_none(rig: Rig) -> None:
    rig.add("disk", "ram:1M,id=data")
    assert taken(rig, SAFETY_TIMEOUT) == (False, "no driver of it is at work yet")
    disk_of(rig, 1)
    rig.machine.pauser.pause()
    assert taken(rig, SAFETY_TIMEOUT) == (False, "it is paused")
    rig.machine.pauser.resume()
    for status in (ACKNOWLEDGE, ACKNOWLEDGE | FAILED_STATUS):
        rig.driver(3).set_field((0x14, 1), status)
    assert taken(rig, SAFETY_TIMEOUT) == (False, "its driver has failed")
    rig.driver(3).set_field((0x14, 1), 0)
    rig.prepared.entry.cmdline = "pci=off"  # type: ignore[misc]
    assert taken(rig, SAFETY_TIMEOUT) == (False, "its kernel runs with pci=off")
    with pytest.raises(ConfigError, match="there is no rng 'data'"):
        taken(rig, kind="rng")


def test_whoever_waits_for_a_driver_may_leave_and_the_device_may_go(rig: Rig) -> None:
    disk_of(rig, 1)
    rig.add("disk", "ram:1M,id=data")
    wake = threading.Event()
    waiting = Waiting(rig, "data", wake)
    wake.set()
    assert waiting.result() == {"kind": "disk", "id": "data", "taken": False, "why": ""}
    waiting = Waiting(rig, "data", threading.Event())
    rig.remove("disk", "data", timeout=0, force=True)
    with pytest.raises(ConfigError, match="there is no disk 'data'"):
        waiting.result()


# --- coming and going -----------------------------------------------------------------------------


def test_a_disk_comes_serves_and_goes_and_nothing_is_left(rig: Rig, data: Path) -> None:
    before = rig.footprint()
    for _ in range(3):
        told = rig.add("disk", {"path": str(data), "id": "data"})
        assert told == {"kind": "disk", "id": "data", "slot": 3}
        assert rig.asked(slots.ARRIVED) == 1 << 3
        assert rig.ids == ["root", "data", "balloon"]  # disks are first, as the specification is
        disk = disk_of(rig, 3)
        assert disk.read(0, 4096).data == data.read_bytes()[:4096]
        with pytest.raises(ConfigError, match="in use"):
            open_image(str(data), read_only=False)
        asking = rig.removing("disk", "data")
        give_up(rig, asking, 3)
        assert asking.result() == {"kind": "disk", "id": "data"}
        assert not rig.is_there(3)
        rig.is_as(before)
        open_image(str(data), read_only=False).close()  # no lock is left either
    assert [kind for kind, _ in rig.events] == ["device_added", "device_removed"] * 3
    assert rig.events[-1][1] == {"kind": "disk", "id": "data", "by": "host"}
    assert rig.vm.pulses == 6


def test_a_generator_comes_and_goes_and_there_is_one(rig: Rig) -> None:
    before = rig.footprint()
    rig.add("rng", "")
    with pytest.raises(ConfigError, match="has a device of the kind rng already; remove"):
        rig.add("rng", "bps=1M")
    asking = rig.removing("rng", "rng")
    rig.asked(slots.ARRIVED)
    give_up(rig, asking, 3)
    rig.is_as(before)


def test_a_shared_directory_comes_and_goes_with_its_virtiofsd(rig: Rig, tmp_path: Path) -> None:
    try:
        images.virtiofsd_command()
    except ConfigError as error:
        pytest.skip(str(error))
    for number in (3, 4):
        told = rig.add("share", str(tmp_path))
        assert told == {"kind": "share", "id": f"share-share{number - 3}", "slot": number}
    assert [f"share-share{n}" for n in (0, 1)] == rig.ids[-2:]  # never twice the same tag
    rig.asked(slots.ARRIVED)
    asking = rig.removing("share", "share-share0")
    give_up(rig, asking, 3)
    assert not rig.is_there(3) and rig.is_there(4)
    with pytest.raises(ConfigError, match="there is no /nowhere"):
        rig.add("share", "/nowhere")


def test_a_share_that_nobody_in_the_guest_mounts_is_there_all_the_same(
    rig: Rig, tmp_path: Path
) -> None:
    try:
        images.virtiofsd_command()
    except ConfigError as error:
        pytest.skip(str(error))
    with pytest.raises(ConfigError, match="is plugged in, but the guest has not mounted it") as no:
        rig.add("share", {"path": str(tmp_path), "mountpoint": "/mnt", "tag": "t"})
    assert "it has no agent" in str(no.value) and "mount -t virtiofs t /mnt" in str(no.value)
    assert rig.ids[-1] == "share-t"


def test_a_disk_that_was_there_from_the_start_goes_and_its_slot_is_taken_again(
    rig: Rig, data: Path
) -> None:
    asking = rig.removing("disk", "root")
    give_up(rig, asking, 1)
    assert rig.ids == ["balloon"]
    assert rig.add("disk", str(data)) == {"kind": "disk", "id": "disk0", "slot": 1}
    other = image(data.parent, "other")
    assert rig.add("disk", str(other))["id"] == "disk1"


def test_names_are_never_two_devices(rig: Rig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two disks are called 'root'"):
        rig.add("disk", f"{image(tmp_path)},id=root")
    ids = [rig.add("disk", "ram:1M")["id"] for _ in range(3)]
    assert ids == ["disk0", "disk1", "disk2"]
    asking = rig.removing("disk", "disk1")
    rig.asked(slots.ARRIVED)
    give_up(rig, asking, 4)
    assert rig.add("disk", "ram:1M")["id"] == "disk1"


def test_every_slot_can_be_taken_and_no_more(rig: Rig) -> None:
    before = rig.footprint()
    for _ in range(29):
        rig.add("disk", "ram:1M")
    full = rig.footprint()
    with pytest.raises(ConfigError, match="31 devices at most"):
        rig.add("disk", "ram:1M")
    assert rig.footprint() == full
    for slot in range(3, 32):
        rig.eject(slot)
    until(lambda: len(rig.ids) == 2)
    rig.set_port(slots.ARRIVED, 0xFFFF_FFFF)
    rig.is_as(before)


@pytest.mark.parametrize(
    ("kind", "value", "why"),
    [
        ("disk", "/nowhere/at/all", "No such file|not there|cannot"),
        ("disk", "", "no path"),
        ("disk", {"path": "ram:1M", "colour": "red"}, "unknown key 'colour'"),
        ("disk", {"path": 7}, "is to be a text"),
        ("disk", "ram:1M,queues=7", "7 queues"),
        ("net", "cable", "neither user nor tap"),
        ("net", "tap=a/b", "not a name of an interface"),
        ("rng", "bps=none", "bps"),
        ("rng", "bsp=3", "did you mean bps"),
    ],
)
def test_what_cannot_be_added_is_one_line_and_leaves_nothing(
    rig: Rig, kind: str, value: object, why: str
) -> None:
    before = rig.footprint()
    with pytest.raises(ConfigError, match=why) as caught:
        rig.add(kind, value)
    assert "\n" not in str(caught.value) and f"--{kind}" not in str(caught.value)
    assert rig.footprint() == before
    assert rig.events == [] and rig.vm.pulses == 0


def test_what_kvm_refuses_leaves_nothing(
    rig: Rig, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rig.footprint()
    lines = rig.messages.line
    made = []

    def third(sender: int) -> object:
        made.append(lines(sender))
        if len(made) == 2:
            made.pop().close()
            raise ConfigError("no more")
        return made[-1]

    monkeypatch.setattr(rig.messages, "line", third)
    with pytest.raises(ConfigError, match="no more"):
        rig.add("disk", str(data))
    made.clear()
    assert rig.footprint() == before
    open_image(str(data), read_only=False).close()


@pytest.mark.parametrize("id", ["data", "", "balloon", "root\n", "x" * 1000])
def test_what_is_not_there_cannot_be_removed(rig: Rig, id: str) -> None:
    with pytest.raises(ConfigError, match="there is no disk") as caught:
        rig.remove("disk", id)
    assert len(str(caught.value)) < 200 and "there are: root" in str(caught.value)
    with pytest.raises(ConfigError, match="there is no rng 'x', nor any other rng"):
        rig.remove("rng", "x")


def test_a_paused_guest_gives_nothing_up_and_mounts_nothing(rig: Rig, tmp_path: Path) -> None:
    rig.machine.pauser.pause()
    for force in (False, True):
        with pytest.raises(ControlError, match="paused; resume it first") as caught:
            rig.remove("disk", "root", force=force)
        assert caught.value.code == PAUSED
    before = rig.footprint()
    share = {"path": str(tmp_path), "mountpoint": "/mnt", "tag": "t"}
    with pytest.raises(ControlError, match=r"is paused, and its agent is to mount /mnt") as caught:
        rig.add("share", share)
    assert caught.value.code == PAUSED and rig.footprint() == before
    rig.add("disk", "ram:1M")  # which it will find
    rig.machine.pauser.resume()
    assert rig.asked(slots.ARRIVED) == 1 << 3


def test_without_a_pci_bus_nothing_comes_or_goes(rig: Rig, data: Path) -> None:
    rig.machine.exchange(rig.machine.parts._replace(pci=None))
    for call in (lambda: rig.add("disk", str(data)), lambda: rig.remove("disk", "root")):
        with pytest.raises(ConfigError, match="a PCI bus, which this machine has not"):
            call()


# --- guests that do as they like ------------------------------------------------------------------


def test_a_guest_that_refuses_keeps_the_disk(rig: Rig) -> None:
    disk = disk_of(rig, 1)
    before = rig.footprint()
    with pytest.raises(ConfigError, match=r"has not given up root within 0 s; add --force"):
        rig.remove("disk", "root", timeout=0)
    assert rig.port(slots.LEAVING) == 0  # it is not asked any more
    assert disk.read(0, 512).status == OK
    assert rig.footprint() == before and rig.events == []


def test_a_guest_that_ejects_after_all_has_given_it_up(rig: Rig) -> None:
    with pytest.raises(ConfigError):
        rig.remove("disk", "root", timeout=0)
    rig.eject(1)
    until(lambda: rig.ids == ["balloon"])
    until(lambda: rig.events == [("device_removed", {"kind": "disk", "id": "root", "by": "guest"})])


def test_a_guest_that_refuses_loses_it_by_force(rig: Rig) -> None:
    disk = disk_of(rig, 1)
    rig.remove("disk", "root", timeout=0, force=True)
    assert not rig.is_there(1)
    assert disk.driver.field((0x14, 1)) == 0  # a driver that resets it sees that it has
    assert rig.asked(slots.LEAVING) == 1 << 1  # it is to remove what is not there any more
    assert rig.vm.doorbells == set() and rig.vm.irqfds == set()
    rig.eject(1)  # what a guest does that has looked
    assert rig.ids == ["balloon"] and len(rig.events) == 1


def test_what_comes_after_one_that_was_pulled_out_is_elsewhere(rig: Rig, data: Path) -> None:
    """The guest may not have looked yet: it would take the new one for the old one."""
    rig.add("disk", f"{data},id=data")
    disk = disk_of(rig, 3)
    at = rig.host.bus.where(rig.host.transport_at(3).bar)  # type: ignore[union-attr]
    rig.remove("disk", "data", timeout=0, force=True)
    assert rig.add("disk", f"{data},id=data")["slot"] == 4
    other = disk_of(rig, 4)
    assert rig.host.bus.where(rig.host.transport_at(4).bar) != at  # type: ignore[union-attr]
    disk.driver.set_field((0x14, 1), 0)
    assert other.read(0, 4096).data == data.read_bytes()[:4096], "the old one's reset is not its"
    assert rig.port(slots.LEAVING) == 1 << 3
    # When all others are taken, the place is as good as any.
    slots_taken = {rig.add("disk", "ram:1M")["slot"] for _ in range(28)}
    assert slots_taken == {3, *range(5, 32)}
    assert rig.port(slots.LEAVING) == 0, "the guest would eject the new one"


def test_a_guest_that_ejects_on_its_own_has_nothing_left_either(rig: Rig, data: Path) -> None:
    before = rig.footprint()
    rig.add("disk", f"{data},id=data")
    rig.asked(slots.ARRIVED)
    disk_of(rig, 3)
    rig.eject(3)
    assert not rig.is_there(3)  # at once, before anybody else has done a thing
    rig.is_as(before)
    assert rig.events[-1] == ("device_removed", {"kind": "disk", "id": "data", "by": "guest"})


def test_a_guest_that_ejects_twice_does_no_harm(rig: Rig, data: Path) -> None:
    rig.add("disk", f"{data},id=data")
    rig.asked(slots.ARRIVED)
    before = rig.ids
    for _ in range(2):
        rig.eject(3)
    until(lambda: "unplug" not in rig.footprint()["threads"])
    assert "data" not in rig.ids
    rig.eject(3)
    assert [kind for kind, _ in rig.events].count("device_removed") == 1
    assert rig.add("disk", f"{data},id=data")["slot"] == 3
    assert rig.ids == before
    assert disk_of(rig, 3).read(0, 512).status == OK


def test_a_guest_that_ejects_all_and_nothing_does_no_harm(rig: Rig) -> None:
    for value in (0, 1, 1 << 31, 0xFFFF_FFFF & ~(1 << 1)):
        rig.set_port(slots.EJECT, value)
    for size, offset in ((1, 8), (2, 8), (4, 9), (8, 4), (4, 12)):
        rig.machine.parts.ports.write(0x620 + offset, size, 0xFFFF_FFFF)
    assert rig.ids == ["root", "balloon"] and rig.events == []  # a balloon stays
    assert rig.is_there(0x1) and rig.is_there(2) and 0 in rig.host.bus.functions


class Held(FileBackend):
    """Storage that answers a read when it may."""

    busy = threading.Event()
    may_go_on = threading.Event()

    def readv(self, buffers, size, offset):
        self.busy.set()
        assert self.may_go_on.wait(SAFETY_TIMEOUT)
        return super().readv(buffers, size, offset)


@pytest.mark.parametrize("force", [False, True])
def test_a_device_pulled_with_io_in_flight_does_no_harm(
    rig: Rig, data: Path, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.kinds.disk.storage.FileBackend", Held)
    Held.busy.clear()
    Held.may_go_on.clear()
    before = rig.footprint()
    rig.add("disk", f"{data},id=data")
    rig.asked(slots.ARRIVED)
    disk = disk_of(rig, 3)
    written = bytes(rig.memory.read(0, 2 * MIB))
    disk.driver.submit(0, [header(IN, 0)], [512, 1])
    assert Held.busy.wait(SAFETY_TIMEOUT)
    if force:
        pulling = rig.removing("disk", "data", timeout=0, force=True)
    else:
        # Its driver is still bound: this waits for what is in flight, as a reset would.
        pulling = Asking(lambda: rig.eject(3))
    until(lambda: not rig.is_there(3))
    assert "data" in rig.ids  # until that is done
    Held.may_go_on.set()
    pulling.result()
    until(lambda: "data" not in rig.ids)
    rig.set_port(slots.ARRIVED, 0xFFFF_FFFF)
    rig.is_as(before)
    assert len(written) == 2 * MIB
    after = bytes(rig.memory.read(0, 2 * MIB))
    threading.Event().wait(0.02)
    assert bytes(rig.memory.read(0, 2 * MIB)) == after  # nobody writes any more


def test_by_force_requests_get_an_answer_before_the_disk_goes(rig: Rig, data: Path) -> None:
    """Linux waits for ever for those that do not, in del_gendisk."""
    rig.add("disk", f"{data},id=data,iops=1")
    rig.asked(slots.ARRIVED)
    disk = disk_of(rig, 3)
    disk.read(0, 512)  # the next one would have to wait
    driver, memory = disk.driver, rig.memory
    places = [Buffer(driver.arena.alloc(513), 513) for _ in range(64)]
    for place in places:
        memory.write(place.addr, b"\xee" * place.length)
    chains = [driver.submit(0, [header(IN, 8)], [place]) for place in places]
    rig.remove("disk", "data", timeout=0, force=True)
    assert not rig.is_there(3)
    statuses = [memory.read(place.addr + 512, 1)[0] for place in places]
    assert set(statuses) <= {OK, IOERR} and IOERR in statuses
    for chain in chains:
        driver.wait_used(0, chain)
    assert open_image(str(data), read_only=False).close() is None


def test_by_force_a_guest_that_lets_go_meanwhile_is_not_pulled(
    rig: Rig, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.monitor.hotplug._FAILS_FOR", SAFETY_TIMEOUT)
    monkeypatch.setattr("pyvmm.monitor.hotplug._QUIET_FOR", SAFETY_TIMEOUT)
    rig.add("disk", f"{data},id=data,iops=1")
    rig.asked(slots.ARRIVED)
    disk = disk_of(rig, 3)
    removing = rig.removing("disk", "data", timeout=0, force=True)
    assert rig.asked(slots.LEAVING) == 1 << 3
    while disk.read(0, 512).status != IOERR:
        pass  # its time is not over yet
    rig.eject(3)
    removing.result()
    assert rig.port(slots.LEAVING) == 0, "it is not asked again"
    assert rig.events[-1] == ("device_removed", {"kind": "disk", "id": "data", "by": "host"})


# --- several at once, restarts, ends --------------------------------------------------------------


def test_two_who_ask_get_the_same_answer(rig: Rig) -> None:
    first, second = (rig.removing("disk", "root") for _ in range(2))
    until(lambda: sum(one.waiting for one in rig.hotplug._leaving.values()) == 2)
    rig.eject(1)
    assert first.result() == second.result() == {"kind": "disk", "id": "root"}
    assert len(rig.events) == 1


def test_one_who_gives_up_leaves_the_other_waiting(rig: Rig) -> None:
    patient = rig.removing("disk", "root")
    until(lambda: len(rig.hotplug._leaving) == 1)
    with pytest.raises(ConfigError, match="not given up"):
        rig.remove("disk", "root", timeout=0)
    rig.eject(1)
    assert patient.result()["id"] == "root"
    assert rig.events[0][1]["by"] == "host"


def test_a_guest_that_starts_anew_has_given_up_what_it_was_asked_for(rig: Rig, data: Path) -> None:
    rig.add("disk", f"{data},id=data")
    asking = rig.removing("disk", "root")
    until(lambda: len(rig.hotplug._leaving) == 1)
    with rig.machine.steady:  # as the monitor does it
        rig.boot.close()
        rig.hotplug.guest_restarts()
        prepared = rig.machine.parts.prepared
        rig.machine._take(rig.assemble(prepared))
    assert asking.result()["id"] == "root"
    assert rig.ids == ["data", "balloon"]
    assert disk_of(rig, 1).read(0, 4096).data == data.read_bytes()[:4096]
    assert rig.port(slots.ARRIVED) == rig.port(slots.LEAVING) == 0  # a guest looks by itself


def test_the_end_of_the_run_ends_the_waiting(rig: Rig, data: Path) -> None:
    asking = rig.removing("disk", "root")
    until(lambda: len(rig.hotplug._leaving) == 1)
    rig.hotplug.close()
    with pytest.raises(ControlError, match="about to end") as caught:
        asking.result()
    assert caught.value.code == FAILED
    for call in (lambda: rig.add("disk", str(data)), lambda: rig.remove("disk", "root")):
        with pytest.raises(ControlError, match="about to end"):
            call()
    open_image(str(data), read_only=False).close()


def test_the_end_of_the_run_waits_for_what_is_taken_by_force(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever closes the machine next must find nobody at work on the device."""
    rig.add("disk", "ram:1M,id=data")
    inside, go_on = threading.Event(), threading.Event()

    def settle() -> None:
        inside.set()
        assert go_on.wait(SAFETY_TIMEOUT)

    monkeypatch.setattr(rig.machine, "settle", settle)
    asking = rig.removing("disk", "data", timeout=0, force=True)
    assert inside.wait(SAFETY_TIMEOUT)
    closing = Asking(rig.hotplug.close)
    closing.join(0.3)
    waits = closing.is_alive()
    go_on.set()
    asking.result()
    closing.result()
    assert waits and "data" not in rig.ids


def test_who_gives_up_waiting_is_not_remembered(rig: Rig) -> None:
    rig.add("disk", "ram:1M,id=data")
    patient = rig.removing("disk", "data")
    until(lambda: bool(rig.hotplug._leaving))
    for _ in range(3):
        with pytest.raises(ConfigError, match="has not given up"):
            rig.remove("disk", "data", timeout=0)
    [leaving] = rig.hotplug._leaving.values()
    assert len(leaving.wakes) == 1
    give_up(rig, patient, 3)


def test_a_guest_without_the_driver_yet_is_told_again(rig: Rig) -> None:
    rig.add("rng", "")
    assert rig.vm.pulses == 1
    rig.hotplug.look()
    assert rig.vm.pulses == 2
    rig.asked(slots.ARRIVED)
    rig.hotplug.look()
    assert rig.vm.pulses == 2


def test_a_bar_that_was_moved_is_not_overlaid(rig: Rig) -> None:
    """A newcomer is put where nobody is, whatever a driver has done with the window."""
    assert isinstance(rig.host, PciHost)
    first = rig.driver(1)
    bar = rig.host.bus.functions[1].bars[0]
    was = first.address
    behind = max(
        function.address_of(function.bars[0]) + function.bars[0].size
        for number, function in rig.host.bus.functions.items()
        if number
    )
    behind = -(-behind // bar.size) * bar.size
    first.place(behind)  # where the next one would have come
    rig.add("disk", "ram:1M")
    added = rig.host.bus.functions[3]
    assert added.address_of(added.bars[0]) not in (was, behind)
    assert disk_of(rig, 3).read(0, 512).status == OK
    assert first.field((0x14, 1)) == 0


# --- races, and those who change their mind -------------------------------------------------------


def test_an_eject_that_comes_late_takes_out_nothing_that_has_come_since(rig: Rig) -> None:
    """A vCPU has found a device in its slot when others take it out and put the next one there."""
    looked = rig.host.transport_at(1)
    asking = rig.removing("disk", "root")
    give_up(rig, asking, 1)
    assert rig.add("disk", "ram:1M,id=next")["slot"] == 1
    rig.asked(slots.ARRIVED)
    rig.host.detach(1, looked)
    assert rig.is_there(1) and disk_of(rig, 1).read(0, 512).status == OK


def test_a_device_goes_once_however_many_vcpus_eject_it(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one has looked at the machine's parts before the first has changed them."""
    before = rig.machine.parts
    rig.eject(1)
    until(lambda: rig.ids == ["balloon"] and "unplug" not in rig.footprint()["threads"])
    now, late = rig.machine.parts, rig.footprint()
    monkeypatch.setattr(type(rig.host), "transport_at", lambda host, number: before.transports[0])
    rig.machine.parts = before
    start = rig.hotplug._start_finishing

    def begin(leaving: object) -> None:
        rig.machine.parts = now
        start(leaving)  # type: ignore[arg-type]

    monkeypatch.setattr(rig.hotplug, "_start_finishing", begin)
    rig.eject(1)
    rig.is_as(late)
    assert [kind for kind, _ in rig.events] == ["device_removed"]


def test_it_is_looked_up_while_others_come_and_go(rig: Rig, monkeypatch) -> None:
    """A search for a slot holds no lock, and sees the bus as it was or is."""
    seen = iter(rig.host._plugged.items())
    next(seen)
    rig.add("disk", "ram:1M")
    rig.remove("disk", "disk0", timeout=0, force=True)
    assert [number for number, _ in seen] == [2]


@pytest.mark.parametrize("force", [False, True])
def test_one_who_hangs_up_leaves_the_device_and_no_thread(rig: Rig, force: bool) -> None:
    disk = disk_of(rig, 1)
    before = rig.footprint()
    asked = methods(lambda: rig.hotplug)["disk.remove"].run(
        id="root", timeout_ms=3_600_000, force=force
    )
    asking = Asking(asked.run)
    until(lambda: rig.port(slots.LEAVING) == 1 << 1)
    asked.cancel()
    with pytest.raises(ConfigError, match="has not given up root"):
        asking.result()
    assert rig.port(slots.LEAVING) == 0 and disk.read(0, 512).status == OK
    rig.is_as(before)


def test_one_who_hangs_up_leaves_the_other_waiting(rig: Rig) -> None:
    wake = threading.Event()
    leaving = Asking(lambda: rig.hotplug.remove("disk", "root", SAFETY_TIMEOUT, False, wake))
    patient = rig.removing("disk", "root")
    until(lambda: sum(one.waiting for one in rig.hotplug._leaving.values()) == 2)
    wake.set()
    with pytest.raises(ConfigError):
        leaving.result()
    assert rig.port(slots.LEAVING) == 0 or patient.is_alive()
    rig.eject(1)
    assert patient.result() == {"kind": "disk", "id": "root"}


def test_what_there_was_no_thread_for_is_done_later(
    rig: Rig, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.add("disk", f"{data},id=data")
    rig.asked(slots.ARRIVED)
    asking = rig.removing("disk", "data")
    rig.asked(slots.LEAVING)

    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("pyvmm.monitor.hotplug.Thread", NoThread)
        rig.eject(3)
        rig.hotplug.look()
    assert not rig.is_there(3) and asking.is_alive()
    rig.hotplug.look()
    assert asking.result()["id"] == "data"
    open_image(str(data), read_only=False).close()


def test_a_defect_while_a_device_goes_leaves_nobody_waiting(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*of: object) -> None:
        raise ValueError("oops")

    monkeypatch.setattr(rig.host, "unplug", fail)
    asking = rig.removing("disk", "root")
    rig.asked(slots.LEAVING)
    rig.eject(1)
    with pytest.raises(ControlError, match="oops"):
        asking.result()
    monkeypatch.undo()
