"""Sandboxes of Ray's that are VMs, with Ray's own classes and a real guest.

It needs Ray: `make ray` installs that and runs it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvmm import VM, Pool
from pyvmm.control import snapshot_store
from pyvmm.errors import ConfigError

sandbox = pytest.importorskip("ray.experimental.sandbox", reason="Ray is not installed: make ray")
of_ray = pytest.importorskip("pyvmm.ray_sandbox")

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600.0  # seconds; an emulated host is slow


def config(image: str = "debian", **more: Any) -> Any:
    return of_ray.SandboxConfig(image, timeout_seconds=PATIENCE, **more)


@pytest.fixture(scope="module")
def backend() -> Iterator[Any]:
    made = of_ray.SandboxBackend()
    yield made
    for name in list(made._boxes):
        made.delete_sandbox(name)


def test_a_vm_is_a_sandbox(backend: Any) -> None:
    """All six methods, and what a configuration says."""
    assert isinstance(backend, sandbox.BaseSandboxBackend)
    assert backend.image_manager.pull_image("debian", timeout_seconds=1) == "debian"
    box = backend.create_sandbox(
        config(cpu=1.5, memory="384Mi", env={"WHO": "me"}, workdir="/work", ttl_seconds=3600)
    )
    assert backend.get_status(box) is sandbox.SandboxStatus.RUNNING

    def run(command: Any, **options: Any) -> Any:
        return backend.exec_command(box, command, **options)

    done = run('echo "$WHO $OTHER"; pwd; nproc; echo no >&2; exit 3', env={"OTHER": "you"})
    assert (done.exit_code, done.stdout, done.stderr) == (3, "me you\n/work\n2\n", "no\n")
    assert 0 < done.duration_seconds < PATIENCE
    assert run(["printf", "%s", "$WHO"], cwd="/").stdout == "$WHO"
    assert run("id -un; id -gn", shell="/bin/sh", user="nobody:daemon").stdout == "nobody\ndaemon\n"
    assert run("kill -9 $$").exit_code == 137
    assert "eth0" not in run("ls /sys/class/net").stdout

    backend.write_file(box, "deep/er/file", b"\x00\xff")
    backend.write_file(box, "/work/deep/er/file", "é", append=True)
    assert backend.read_file(box, "deep/er/file") == b"\x00\xff\xc3\xa9"
    backend.write_file(box, "/tmp/also", "x")
    with pytest.raises(sandbox.SandboxError, match="Read-only file system"):
        backend.write_file(box, "/root/file", "x")
    with pytest.raises(sandbox.SandboxError, match="No such file"):
        backend.read_file(box, "/nothing")
    with pytest.raises(sandbox.SandboxTimeoutError):
        run("sleep 1000", timeout=2)
    with pytest.raises(sandbox.SandboxExecError, match="no-such"):
        run(["/no-such"])

    pid = backend._boxes[box].vm.pid
    backend.delete_sandbox(box)
    backend.delete_sandbox(box)
    assert backend.get_status(box) is sandbox.SandboxStatus.TERMINATED
    assert not os.path.exists(f"/proc/{pid}")
    for gone in (lambda: run("true"), lambda: backend.read_file(box, "/x")):
        with pytest.raises(sandbox.SandboxNotFoundError, match=box):
            gone()


def test_one_of_a_pool_goes_on_from_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it has what is asked for."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with VM("debian") as vm:
        vm.wait_ready(PATIENCE)
        vm.run(["sh", "-c", "echo prepared > /root/mark"], check=True)
        vm.snapshot("ready")
    with Pool("ready", 1) as pool:
        backend = of_ray.SandboxBackend({"warm": pool})
        assert backend.pull_image("warm") == "warm"
        with pytest.raises(sandbox.SandboxCreationError, match="each has no network"):
            backend.create_sandbox(config("warm", network="public"))
        box = backend.create_sandbox(config("warm", cpu=1, memory="512Mi"))
        try:
            assert backend.read_file(box, "/root/mark") == b"prepared\n"
        finally:
            backend.delete_sandbox(box)
    snapshot_store.remove("ready")


def test_one_whose_time_is_over_has_ended(backend: Any) -> None:
    box = backend.create_sandbox(config(readonly=False, ttl_seconds=1))
    end = time.monotonic() + PATIENCE
    while backend.get_status(box) is sandbox.SandboxStatus.RUNNING and time.monotonic() < end:
        time.sleep(0.1)
    assert backend.get_status(box) is sandbox.SandboxStatus.TERMINATED
    assert box not in backend._boxes


def test_the_actor_of_the_documentation_runs() -> None:
    [code] = [
        block
        for block in re.findall(r"^```python\n(.*?)^```", _text("ray.md"), re.DOTALL | re.MULTILINE)
        if "SandboxBackend" in block
    ]
    begin = "import ray\nray.init(num_cpus=2, resources={'kvm': 1}, include_dashboard=False)\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + code],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))},
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\d+\.\d+\.\S+$", done.stdout, re.MULTILINE), done.stdout


def _text(document: str) -> str:
    return (ROOT / "docs" / document).read_text()


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"capabilities": ["CAP_CHOWN"]}, "a VM has no capabilities"),
        ({"network": "host"}, "a VM has no network 'host'"),
        ({"image": "/no/such/image"}, "/no/such/image"),
        ({"_oci_spec_transform_fn": print}, "a VM has no _oci_spec_transform_fn"),
    ],
)
def test_what_no_vm_has_is_refused(backend: Any, more: dict[str, Any], why: str) -> None:
    with pytest.raises(sandbox.SandboxCreationError, match=why) as caught:
        backend.create_sandbox(config(**more))
    assert "\n" not in str(caught.value)


def test_options_that_cannot_be_are_refused_at_once() -> None:
    with pytest.raises(ConfigError):
        of_ray.SandboxBackend(memory="none")
