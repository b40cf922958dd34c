"""The documents' Python, pytest and commands, and the examples, run on Linux guests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import commands, run_commands
from guest import HANG_SECONDS

from pyvmm import images
from pyvmm.control import client, registry
from pyvmm.errors import ConfigError

pytestmark = pytest.mark.usefixtures("linux_guests")

ROOT = Path(__file__).resolve().parents[2]


def python_blocks(document: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_readmes_vm_which_is_also_the_first_of_the_page_on_python(tmp_path):
    [block] = [code for code in python_blocks("README.md") if "import VM\n" in code]
    assert block == python_blocks("docs/python-api.md")[0]
    assert re.fullmatch(r"0 6\.1\.\S+\n\n", run(tmp_path, "-c", block))


def test_the_page_on_python_from_its_second_block_on(tmp_path):
    (tmp_path / "README.md").write_text("for the guest")
    _, *blocks = python_blocks("docs/python-api.md")
    said = run(tmp_path, "-c", "from pyvmm import VM\n" + "\n".join(blocks)).splitlines()
    assert said[0].startswith("42 ")  # the console's match
    assert (tmp_path / "who").read_text() == "me\n"
    assert any(line.startswith("started ") for line in said)
    assert said[-1].startswith("[b'")  # of the load average


def test_the_page_on_the_devices(tmp_path):
    said = run(tmp_path, "-c", "\n".join(python_blocks("docs/devices.md"))).splitlines()
    assert said[0].startswith("virtio_balloon/virtio")
    names = ["disk0", "scratch", "net-user", "console", "ports", "rng", "pmem0", "balloon", "vsock"]
    assert [line.split()[0] for line in said[-len(names) :]] == names


def test_the_page_on_devices_that_come_and_go(tmp_path):
    said = run(tmp_path, "-c", "\n".join(python_blocks("docs/hotplug.md"))).splitlines()
    assert said == [
        "disk1 ['disk0', 'disk1', 'vsock']",
        "['started', 'device_added', 'device_removed']",
    ]


def test_the_page_on_snapshots(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    said = run(tmp_path, "-c", "\n".join(python_blocks("docs/snapshots.md"))).splitlines()
    assert re.fullmatch(r"it stood still for [\d.]+ s", said[0])
    prepared = "b'prepared\\n'"
    assert said[1:] == [prepared, "b'/run/prepared\\n'", prepared, prepared]


def test_the_commands_of_the_page_on_snapshots(tmp_path, monkeypatch):
    """Those of what has changed are run by tests/kvm/test_diff_snapshots.py. Many rounds take
    hours, and in an emulated host a snapshot cannot be removed while its VMs run."""
    (tmp_path / "runtime").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    first, _, ahead, many = commands("docs/snapshots.md")
    assert all("linux_snapshots.py" in line for line in many.splitlines())
    *but_one, remove = first.splitlines()
    assert remove == "pyvmm snapshot rm ready"
    try:
        said = run_commands("\n".join(but_one), tmp_path, 2 * HANG_SECONDS)
        assert re.search(r"^warm stood still for \d+ ms$", said, re.MULTILINE), said
        assert "\n/tmp/prepared\n" in said and re.search("^ready +warm ", said, re.MULTILINE), said
        names = ["first", "first-1", "first-2", "first-3", "second"]
        assert registry.running() == names, said
        assert '"name": "warm"' in said
        said = run_commands(ahead, tmp_path, 2 * HANG_SECONDS)
        assert re.search(r"^probe has used \d+ MiB$", said, re.MULTILINE), said
        assert registry.running() == sorted([*names, "probe"])
    finally:
        for name in registry.running():
            client.stop(name, patience=0.0)


def test_the_readmes_pool_is_the_one_of_the_page_on_snapshots():
    [block] = [code for code in python_blocks("README.md") if "import Pool\n" in code]
    assert block in python_blocks("docs/snapshots.md") and len(block.splitlines()) <= 6


def test_the_page_on_pytest(tmp_path):
    (tmp_path / "test_it.py").write_text("\n".join(python_blocks("docs/pytest.md")))
    said = run(tmp_path, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "-q")
    assert "2 passed, 2 skipped" in said


def test_an_example_for_asyncio(tmp_path):
    [line] = run(tmp_path, str(ROOT / "examples/boot_matrix.py"), "6.1").splitlines()
    assert re.match(r"6\.1: 6\.1\.\S+ #1 SMP .* up for [\d.]+ s$", line)


def test_the_module_of_the_page_on_kernels(tmp_path):
    """Built against the headers of two kernels of Debian's, loaded in each, and tested."""
    try:
        for kernel in ("debian:6.1", "debian:6.12"):
            images.kernel_headers(kernel)
    except ConfigError as error:
        pytest.skip(f"a mirror keeps a kernel's headers no longer than the kernel: {error}")
    text = (ROOT / "docs/kernels.md").read_text()
    [source] = re.findall(r"^```c\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    [test] = python_blocks("docs/kernels.md")
    (tmp_path / "greeting.c").write_text(source)
    (tmp_path / "Makefile").write_text("obj-m := greeting.o\n")
    (tmp_path / "test_greeting.py").write_text(test)
    said = run(tmp_path, "-m", "pytest", "-p", "no:cacheprovider", "--strict-markers", "-q")
    assert "2 passed" in said
