"""docs/adding-a-device.md, followed word by word in a copy of pyvmm: a new kind is at work."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvmm.kinds import reference

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/adding-a-device.md").read_text()
Run = Callable[..., str]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def with_added_lines(text: str, diff: str) -> str:
    """`text` with the lines of `diff` that begin with +, each behind the line that is before it."""
    place = ""
    for line in diff.splitlines():
        if line.startswith("+"):
            assert text.count(f"{place}\n") == 1, f"{place!r} is not there once"
            text = text.replace(f"{place}\n", f"{place}\n{line[1:]}\n")
        place = line[1:]
    return text


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pyvmm in which the page was followed."""
    folder = tmp_path_factory.mktemp("contributor")
    package = folder / "pyvmm"
    shutil.copytree(ROOT / "pyvmm", package, ignore=shutil.ignore_patterns("__pycache__"))
    device, kind, _ = blocks("python")
    [diff] = blocks("diff")
    (package / "virtio/seed").mkdir()
    (package / "virtio/seed/__init__.py").write_text('"""virtio-rng, from a file."""\n')
    (package / "virtio/seed/device.py").write_text(device)
    (package / "kinds/seed.py").write_text(kind)
    registry = package / "kinds/registry.py"
    registry.write_text(with_added_lines(registry.read_text(), diff))
    return folder


@pytest.fixture
def run(copy: Path) -> Run:
    def run(*words: str, code: int = 0) -> str:
        """The output of a Python with that pyvmm."""
        done = subprocess.run(
            [sys.executable, *words],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return run


def test_the_device_serves_a_driver(run: Run) -> None:
    assert run("-c", blocks("python")[2]) == ""


def test_the_command_line_and_files_have_it(run: Run, copy: Path) -> None:
    assert "--seed FILE[,repeat]" in run("-m", "pyvmm", "run", "--help")
    options = ("--kernel", "k", "--seed", "s.bin,repeat,packed")
    printed = run("-m", "pyvmm", "run", *options, "--print-config")
    assert printed.endswith(f'[seed]\npacked = true\npath = "{copy}/s.bin"\nrepeat = true\n')
    (copy / "vm.toml").write_text(printed.replace(f"{copy}/", ""))
    assert run("-m", "pyvmm", "run", "--config", "vm.toml", "--print-config") == printed
    wrong = run("-m", "pyvmm", "run", "--kernel", "k", "--seed", "s.bin,often", code=2)
    assert wrong == "pyvmm: --seed: unknown option 'often'; use FILE[,repeat]\n"


PYTHON = """
import inspect
from contextlib import ExitStack
from pyvmm import VM
from pyvmm.kinds import registry, vm_spec
from pyvmm.kinds.border import Border
from pyvmm.kinds.interface import Running
vm = VM(kernel="k", seed={"path": "s.bin"})
[*_, seed] = vm.spec.devices
assert seed == registry.parse("seed", "s.bin") and "seed" in inspect.signature(VM).parameters
assert vm_spec.from_json(vm_spec.to_json(vm.spec)) == vm.spec
assert registry.cross(seed, Border(ExitStack(), lambda *path: f"/seen/{path[0]}")).spec.path == (
    "/seen/s.bin"
)
class Device:
    position = 7
running = Running(vm.spec, (None,) * (len(vm.spec.devices) - 1) + (Device,), bool, int)
registry.methods(running)["seed.rewind"].run()
assert Device.position == 0
"""


def test_python_emulated_hosts_and_the_control_socket_have_it(run: Run) -> None:
    assert run("-c", PYTHON) == ""


def test_the_reference_has_it(run: Run) -> None:
    page = run("-m", "pyvmm.kinds.reference")
    assert "| `--seed FILE[,repeat]` | `seed` | Add a virtio-rng device whose numbers" in page
    assert "| `seed` | `packed = false`, `path`, `repeat = false` |" in page


LOADED = """
import json, sys
from pyvmm.cli.quick import parse_run
from pyvmm.kinds.interface import Running
from pyvmm.kinds import registry
from pyvmm.spec.vm import VmSpec
parse_run(["run"])
registry.method("disk.resize", Running(VmSpec("k"), (), bool, int))
print(json.dumps(sorted(sys.modules)))
"""


def test_a_start_without_it_does_not_load_it(run: Run) -> None:
    loaded = set(json.loads(run("-c", LOADED)))
    assert "pyvmm.kinds.disk.resize" in loaded
    assert not loaded & {"pyvmm.kinds.seed", "pyvmm.kinds.net", "pyvmm.virtio.seed"}


def test_options_md_is_what_the_rows_say() -> None:
    written = (ROOT / "docs/options.md").read_text()
    assert written == reference.page(), "run: python -m pyvmm.kinds.reference > docs/options.md"
