"""Boards: what every one of them promises, and that a second one needs nothing of x86."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_board

from pyvmm.emulated_host.architecture import MACHINES, emulated_machine
from pyvmm.errors import ConfigError
from pyvmm.machine.board import registry
from pyvmm.pci.bus import ECAM_SIZE
from pyvmm.spec.vm import MAX_DEVICES, MIN_MEMORY

GIB = 1 << 30


@pytest.fixture(params=sorted(registry.BOARDS))
def board(request: pytest.FixtureRequest):
    return registry.board_for(request.param)


@pytest.mark.parametrize("memory", [MIN_MEMORY, GIB, 3 * GIB, 5 * GIB, 1 << 40])
def test_ram_devices_and_files_do_not_overlap(board, memory: int) -> None:
    places = [*board.ram_ranges(memory)]
    assert sum(size for _, size in places) == memory
    slots = board.virtio_slots(MAX_DEVICES)
    assert len({slot.gsi for slot in slots}) == MAX_DEVICES
    places += [(slot.base, slot.size) for slot in slots]
    pci = board.pci_places
    if pci is not None:
        places += [(pci.ecam, ECAM_SIZE), (pci.window, pci.window_size)]
    files = board.mapped_files(memory)
    assert files.start % GIB == 0 and len(files) >= GIB
    places.append((files.start, len(files)))
    end = 0
    for start, size in sorted(places):
        assert start >= end and size > 0
        end = start + size


def test_devices_past_the_last_place_are_refused(board) -> None:
    with pytest.raises(ValueError, match="1000 virtio devices"):
        board.virtio_slots(1000)


def test_a_host_without_a_board_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="vax"))
    with pytest.raises(ConfigError, match="no machine for the architecture vax") as caught:
        registry.board_of_host()
    assert "x86_64" in caught.value.cure
    with pytest.raises(ConfigError, match="no emulated KVM host for the architecture vax"):
        emulated_machine("vax")


def test_what_has_a_board_has_an_emulated_machine() -> None:
    assert set(registry.BOARDS) == set(MACHINES)


@pytest.mark.parametrize("architecture", sorted(registry.BOARDS))
def test_an_emulated_machine_has_what_differs(architecture: str) -> None:
    machine = emulated_machine(architecture)
    assert machine.KVM_MODULES and machine.machine_arguments(1, 512)


ROOT = Path(__file__).parents[3]
OF_ONE = re.compile(r"pyvmm/(kvm|boot|platform|machine/board|emulated_host)/(arm64|x86)/")


def test_the_page_names_every_file_that_tells_architectures_apart() -> None:
    """A third one is what docs/arm64.md says. A file counts that has one's name in its code."""
    text = (ROOT / "docs/arm64.md").read_text()
    page = text.partition("## A third architecture")[2]
    named = set(re.findall(r"`(pyvmm/[\w/]+\.py)`", page))
    assert all((ROOT / path).is_file() for path in named)
    found = set()
    for path in sorted((ROOT / "pyvmm").rglob("*.py")):
        name = str(path.relative_to(ROOT))
        if not OF_ONE.match(name) and any(map(tells_one, code_strings(path))):
            found.add(name)
    assert len(found) > 10
    assert found - named == set(), "docs/arm64.md does not name them"


def tells_one(word: str) -> bool:
    return bool(re.search("aarch64|arm64", word.replace("docs/arm64.md", ""), re.IGNORECASE))


def code_strings(path: Path) -> Iterator[str]:
    """The strings and names in a module's code, without its docstrings."""
    tree = ast.parse(path.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):  # a string that is a statement is read by people alone
            node.body = [  # type: ignore[attr-defined]
                one
                for one in body
                if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))
            ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Name | ast.alias):
            yield node.id if isinstance(node, ast.Name) else node.name


def test_another_board_needs_nothing_of_x86(tmp_path: Path) -> None:
    """Up to where KVM would come in; tests/kvm/test_another_board.py runs it."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"kernel" + bytes(4090))
    program = [sys.executable, tiny_board.__file__, "prepare", str(kernel)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "--transport: machines of this architecture have no PCI bus; use --transport mmio",
        "0x100000+0x3ff0000 0xffff0000+0x10000",
        "kernel TinyEntry(cmdline='console=ttyTINY0 panic=-1 tiny=1 quiet', discovery='auto')",
        "ttyTINY0 VirtioSlot(base=3758096384, size=512, gsi=16)",
        "0x200000000",
    ]
