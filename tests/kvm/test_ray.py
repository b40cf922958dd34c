"""VMs on a Ray cluster of three nodes, which are three on this machine with files of their own:
real guests on real KVM, and a node that is killed under load.

It needs Ray: `make ray` installs that and runs it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from echo_guest import echo_kernel

from pyvmm import VM
from pyvmm.api.errors import VMError, VMTimeout
from pyvmm.control import snapshot_store as store
from pyvmm.errors import ConfigError
from pyvmm.kvm.system import Kvm

ray = pytest.importorskip("ray", reason="Ray is not installed: make ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")
remote = pytest.importorskip("pyvmm.ray")

SAFETY_TIMEOUT = 240
FOR_EACH = 2  # VMs of one node


class Nodes:
    """The cluster: a head without room for VMs, and three nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # A node that says nothing for so long is dead.
        patience = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
        head = {"num_cpus": 0, "_system_config": patience, "include_dashboard": False}
        self.cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self._node(number) for number in range(3)]
        self.cluster.wait_for_nodes()
        ray.init(address=self.cluster.address, log_to_driver=False)

    def _node(self, number: int) -> Any:
        place = self.folder / f"node-{number}"
        (place / "runtime").mkdir(parents=True, mode=0o700)
        env = {"XDG_STATE_HOME": f"{place}/state", "XDG_RUNTIME_DIR": f"{place}/runtime"}
        tests = str(Path(__file__).resolve().parents[2])
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
        return self.cluster.add_node(
            num_cpus=FOR_EACH, memory=4 << 30, resources={"kvm": FOR_EACH}, env_vars=env
        )

    def snapshots(self, number: int) -> list[str]:
        place = self.folder / f"node-{number}/state/pyvmm/snapshots"
        found = os.listdir(place) if place.exists() else []
        return sorted(name for name in found if not name.startswith("."))

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture
def ready(kvm: Kvm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a snapshot of this process's, whose VM has gone."""
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    disks = [f"{tmp_path}/disk,snapshot"]
    kernel = echo_kernel(tmp_path)
    with VM(kernel=kernel, name="one", kvm="host", memory="64M", vsock=False, disks=disks) as vm:
        vm.console.expect_exact("ready", timeout=SAFETY_TIMEOUT)
        vm.snapshot("ready", stop=True)
        vm.wait(SAFETY_TIMEOUT)
    return "ready"


@pytest.fixture
def nodes(ready: str, tmp_path: Path) -> Iterator[Nodes]:
    found = Nodes(tmp_path)
    yield found
    found.close()


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + SAFETY_TIMEOUT
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def echoes(vm: Any, text: str) -> None:
    vm.console.send(text)
    vm.console.expect_exact(text, timeout=SAFETY_TIMEOUT)


def test_vms_on_three_nodes_one_of_which_is_killed_under_load(nodes: Nodes, ready: str) -> None:
    size = 3
    with remote.RayPool(ready, size, kvm="host", takers=2) as pool:
        # The rest of the room is taken, by VMs that are on all nodes then.
        until(lambda: pool.ready == size, "the pool does not fill")
        taken = [pool.take(SAFETY_TIMEOUT) for _ in range(3 * FOR_EACH - size)]
        until(lambda: pool.ready == size, "the pool does not fill again")
        names = [nodes.snapshots(number) for number in range(3)]
        assert names[0] == names[1] == names[2], names  # it is there once, and kept
        [name] = names[0]
        assert name.startswith("ready-")
        for number, vm in enumerate(taken):
            echoes(vm, f"to number {number}")
            assert "ready" not in vm.console.text, "it has booted"
        with pytest.raises(VMError, match=r"guest|console"):
            taken[0].console.expect_exact("never", timeout=0.1)
        check_back_pressure(pool, size)

        # Load: each is asked until it is lost, or told to stop.
        stopping, heard = threading.Event(), []

        def load(vm: Any) -> None:
            try:
                while not stopping.is_set():
                    echoes(vm, "more")
            except remote.VMLost as error:
                heard.append(str(error))

        threads = [threading.Thread(target=load, args=(vm,)) for vm in taken]
        for thread in threads:
            thread.start()
        nodes.cluster.remove_node(nodes.nodes[1], allow_graceful=False)
        until(lambda: len(pool.lost) == FOR_EACH, "the loss is not told")
        lost_and_taken = [one.name for one in pool.lost if one.taken]
        until(lambda: len(heard) == len(lost_and_taken), "a call hangs")
        stopping.set()
        for thread in threads:
            thread.join(SAFETY_TIMEOUT)
            assert not thread.is_alive(), "a call hangs"
        assert all("is lost: its node or its actor has died" in line for line in heard)

        # What waits is replaced as soon as there is room for it.
        for vm in taken:
            try:
                vm.close()
            except remote.VMLost:
                continue
        until(lambda: pool.ready == size, "what was lost is not replaced")
        with pool.take(SAFETY_TIMEOUT) as vm:
            echoes(vm, "still here")
        [*_, later] = [nodes.snapshots(number) for number in range(3)]
        assert later == [name]
    with pytest.raises(VMError, match="closed"):
        pool.take()


def check_back_pressure(pool: Any, size: int) -> None:
    """Nothing grows: who finds no room hears what there is no room for, or that many wait."""
    more = [pool.take(SAFETY_TIMEOUT) for _ in range(size)]
    try:
        with pytest.raises(VMTimeout, match=r"free are 0 of 6 kvm"):
            pool.take(0.5)
        waiting = [threading.Thread(target=_in_vain, args=(pool,)) for _ in range(2)]
        for thread in waiting:
            thread.start()
        until(lambda: pool._takers == 2, "they do not wait")
        with pytest.raises(remote.Busy, match="2 wait for a VM"):
            pool.take()
    finally:
        for vm in more:
            vm.close()
    for thread in waiting:
        thread.join(SAFETY_TIMEOUT)
        assert not thread.is_alive()
    until(lambda: pool.ready == size, "the pool does not fill again")


def _in_vain(pool: Any) -> None:
    with suppress(VMError):
        pool.take(SAFETY_TIMEOUT).close()


def test_a_vm_that_boots_and_what_is_refused(nodes: Nodes, ready: str, tmp_path: Path) -> None:
    kernel = str(tmp_path / "echo")
    with remote.RemoteVM(kernel=kernel, kvm="host", memory="64M", vsock=False) as vm:
        vm.console.expect_exact("ready", timeout=SAFETY_TIMEOUT)
        assert vm.status()["state"] == "running" and vm.pid > 0
        vm.pause()
        assert vm.status()["state"] == "paused"
        vm.resume()
        vm.console.send("O")
        assert vm.wait(SAFETY_TIMEOUT).exit_code == 0
    with pytest.raises(VMError, match="has been closed"):
        vm.status()
    with pytest.raises(ConfigError, match="no-such-kernel"):
        remote.RemoteVM(kernel="/no-such-kernel", kvm="host", vsock=False)
    with pytest.raises(VMTimeout, match="has not started in time; free are"):
        remote.RemoteVM(kernel=kernel, kvm="host", cpus=3, timeout=0.5)
    with pytest.raises(ConfigError, match="no snapshot 'other'"):
        remote.RayPool("other")
    with pytest.raises(ConfigError, match="1 to 256"):
        remote.RayPool(ready, 0)
    # An image that is another one where it is needed: told once for all, nothing is tried for ever.
    with remote.RayPool(ready, 2, kvm="host") as pool:
        until(lambda: pool.ready == 2, "the pool does not fill")
    spread = remote.Spread(ready)
    (tmp_path / "disk").write_bytes(b"x" * (1 << 20))
    for number in range(3):
        place = tmp_path / f"node-{number}/state"
        if place.exists():
            place.rename(tmp_path / f"gone-{number}")
    told = pytest.raises(ConfigError, match=r"disk is not the same on .* copy it to there")
    with remote.RayPool(spread, 1, kvm="host") as pool, told:
        pool.take(SAFETY_TIMEOUT)
    assert store.names() == [ready]
