"""The documents' Python runs, and what they point at is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def python_blocks() -> list[tuple[str, str]]:
    found = []
    for document in DOCUMENTS:
        for number, block in enumerate(
            re.findall(r"^```python\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)
        ):
            found.append((f"{document.relative_to(ROOT)}#{number}", block))
    return found


@pytest.mark.parametrize(("where", "code"), python_blocks(), ids=lambda value: str(value)[:40])
def test_python_runs(where: str, code: str) -> None:
    if where.startswith("docs/tutorial/01"):
        pytest.skip("run by tests/kvm/test_tutorial.py, which needs /dev/kvm")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"


def test_readme_has_a_device_in_thirty_lines() -> None:
    [block] = [code for where, code in python_blocks() if where == "README.md#0"]
    assert len([line for line in block.splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing, f"{document.relative_to(ROOT)} points at {missing}"


def test_readme_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
