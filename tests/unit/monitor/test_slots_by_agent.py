"""Devices that come to and go from a guest that is told of them by its agent: the test is both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hotplug_rig import PLACES, Rig, image, machine, until

from pyvmm import Disk
from pyvmm.errors import ConfigError, HostError
from pyvmm.monitor import slots_by_agent
from pyvmm.spec.vm import VmSpec

RESCAN = ("echo 1 > /sys/bus/pci/rescan", "0000:00:02.0")


class Agent:
    """The guest's agent: what it was asked to run, and whether it does."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.is_there, self.code = True, 0
        self.meanwhile: Callable[[], object] = lambda: None

    def run(self, argv: list[str], *, timeout: float, most: int) -> Any:
        assert argv[:2] == ["/bin/sh", "-c"] and argv[3] == "sh"
        self.asked.append((argv[2], argv[4]))
        self.meanwhile()
        if not self.is_there:
            raise HostError(0, "the agent")
        return SimpleNamespace(returncode=self.code)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent:
    made = Agent()
    monkeypatch.setattr(slots_by_agent, "vsock_of", lambda machine: object())
    monkeypatch.setattr(slots_by_agent, "agent_at", lambda vsock, seconds: made)
    return made


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """A VM with a root disk in slot 1, on a bus without slots that tell."""
    places = PLACES._replace(slots_port=None)
    root = Disk(str(image(tmp_path, "root")), id="root")
    with machine(VmSpec("kernel", disks=(root,)), places) as made:
        yield made


def test_the_guest_looks_for_what_has_come(rig: Rig, agent: Agent) -> None:
    assert rig.add("rng", "") == {"kind": "rng", "id": "rng", "slot": 2}
    until(lambda: not rig.hotplug._by_agent._is_telling)
    assert agent.asked == [RESCAN]
    rig.hotplug.look()
    assert agent.asked == [RESCAN], "it has been told"


def test_it_is_asked_until_it_answers(rig: Rig, agent: Agent) -> None:
    agent.is_there = False
    rig.add("rng", "")
    until(lambda: not rig.hotplug._by_agent._is_telling)
    agent.is_there, agent.code = True, 1
    for _ in range(2):
        rig.hotplug.look()
        until(lambda: not rig.hotplug._by_agent._is_telling)
        agent.code = 0
    assert agent.asked == [RESCAN] * 3


def test_what_the_guest_gives_up_is_gone(rig: Rig, agent: Agent) -> None:
    before = rig.footprint()
    rig.add("rng", "")
    until(lambda: not rig.hotplug._by_agent._is_telling)
    assert rig.remove("rng", "rng") == {"kind": "rng", "id": "rng"}
    [_, (script, function)] = agent.asked
    assert script.endswith("echo 1 > remove") and function == "0000:00:02.0"
    assert rig.events[-1] == ("device_removed", {"kind": "rng", "id": "rng", "by": "host"})
    rig.is_as(before)


def test_what_it_does_not_give_up_stays(rig: Rig, agent: Agent) -> None:
    rig.add("rng", "")
    until(lambda: not rig.hotplug._by_agent._is_telling)
    agent.code = 1
    with pytest.raises(ConfigError, match=r"the guest has not given up rng within 0\.05 s"):
        rig.remove("rng", "rng", timeout=0.05)
    until(lambda: not rig.hotplug._by_agent._is_telling)
    agent.code = 0
    asked = len(agent.asked)
    rig.hotplug.look()
    assert (rig.ids, len(agent.asked)) == (["root", "rng"], asked), "nobody wants it any more"


def test_a_device_that_comes_meanwhile_is_not_taken_for_the_one_before(
    rig: Rig, agent: Agent
) -> None:
    """The guest has let the one before go, and the agent's word of it comes late."""
    rig.add("rng", "")
    until(lambda: not rig.hotplug._by_agent._is_telling)
    slots = rig.hotplug._by_agent

    def another_one() -> None:
        agent.meanwhile = lambda: None
        slots.tell(slots_by_agent.ARRIVED, 2)

    agent.meanwhile = another_one
    slots.tell(slots_by_agent.LEAVING, 2)
    until(lambda: not slots._is_telling)
    assert rig.is_there(2) and rig.ids == ["root", "rng"]


def test_by_force_it_goes_without_an_agent(rig: Rig, agent: Agent) -> None:
    rig.add("rng", "")
    until(lambda: not rig.hotplug._by_agent._is_telling)
    agent.is_there = False
    rig.remove("rng", "rng", timeout=0, force=True)
    assert rig.ids == ["root"] and not rig.is_there(2)


def test_a_guest_that_starts_anew_looks_by_itself(rig: Rig, agent: Agent) -> None:
    agent.is_there = False
    rig.add("rng", "")
    until(lambda: not rig.hotplug._by_agent._is_telling)
    asked = len(agent.asked)
    rig.hotplug.guest_restarts()
    rig.hotplug.look()
    assert len(agent.asked) == asked


def test_without_an_agent_nothing_comes(rig: Rig) -> None:
    line = "nothing tells this guest of devices that come and go but its agent"
    with pytest.raises(ConfigError, match=f"{line}.*; run it with --agent"):
        rig.add("rng", "")
    with pytest.raises(ConfigError, match=line):
        rig.remove("disk", "root")
    assert rig.ids == ["root"]
