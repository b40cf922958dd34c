"""Imports go downward only: the layers of docs/architecture.md, read from the code itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
VIRTIO_DEVICES = {p.parent.name for p in (ROOT / "pyvmm/virtio").glob("*/__init__.py")} - {"queue"}

# What each layer may import besides itself.
BASE = {"errors", "host"}
CORE = BASE | {"memory", "bus", "virtio"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "host": {"errors"},
    "memory": BASE,
    "kvm": BASE,
    "bus": BASE | {"memory"},
    "virtio": BASE | {"memory"},
    "boot": CORE,
    "transport": CORE,
    "platform": CORE,
    "device": CORE,
    "relay": BASE,
    "control": BASE,
    "agent": BASE,
    "emulated_host": BASE | {"relay", "images"},
    "images": BASE,
    "testing": BASE | {"memory", "bench"},
    "bench": CORE | {"transport", "testing"},
    "spec": BASE | {"control", "memory", "virtio", "kinds"},
    "machine": CORE | {"spec", "kinds", "agent", "kvm", "boot", "transport", "platform", "device"},
    "kinds": CORE | {"spec", "machine", "agent", "control", "device", "platform"},
    "monitor": CORE
    | {"kvm", "boot", "transport", "platform", "device", "spec", "kinds", "machine"}
    | {"agent", "control", "images", "emulated_host", "relay", "api", "cli"},
    "api": CORE
    | {"spec", "kinds", "machine", "monitor", "control", "agent", "images"}
    | {"emulated_host"},
    "pytest_plugin": BASE | {"api", "pytest_vms", "cli"},
    "pytest_vms": BASE | {"api"},
    "cli": CORE
    | {"api", "monitor", "spec", "kinds"}
    | {"kvm", "boot", "transport", "platform", "device", "machine", "emulated_host", "images"}
    | {"control", "agent", "relay"},
}


def layer_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1 or parts[1] in ("__main__",):
        return "cli" if parts[-1] == "__main__" else "api"
    if module.startswith("pyvmm.testing.attached"):  # alone joins the driver's side to the device's
        return "bench"
    if parts[1] == "virtio" and len(parts) > 2 and parts[2] in VIRTIO_DEVICES:
        return f"device:{parts[2]}"
    return parts[1]


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                target = ROOT / node.module.replace(".", "/") / f"{alias.name}.py"
                folder = ROOT / node.module.replace(".", "/") / alias.name / "__init__.py"
                deeper = target.exists() or folder.exists()
                yield node.lineno, f"{node.module}.{alias.name}" if deeper else node.module


def modules() -> list[Path]:
    return sorted((ROOT / "pyvmm").rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    module = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    own = layer_of(module)
    allowed = ALLOWED[own.split(":")[0] if ":" not in own else "device"]
    wrong = []
    for line, name in imports_of(path):
        if not name.startswith("pyvmm."):
            continue
        other = layer_of(name)
        kind = "device" if ":" in other else other
        if other != own and kind not in allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


# Their packages have an x86 part and choose it; everything else is the same on every architecture.
MAY_CHOOSE_X86 = ("cli", "machine", "monitor", "spec", "boot", "kvm", "platform", "emulated_host")


def test_x86_stays_in_modules_that_say_so() -> None:
    """arm64 comes next: the core knows no x86, and other packages only their own x86 part."""
    wrong = []
    for path in modules():
        relative = path.relative_to(ROOT / "pyvmm")
        if "x86" in str(relative) or relative.parts[0] in (
            "cli",
            "machine",
            "boot",
            "monitor",
            "spec",
            "kinds",
        ):
            continue
        own = f"pyvmm.{relative.parts[0]}."
        for line, name in imports_of(path):
            chosen = relative.parts[0] in MAY_CHOOSE_X86 and name.startswith(own)
            if "x86" in name and not chosen:
                wrong.append(f"{relative}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_nothing_outside_testing_imports_testing() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules()
        if "testing" not in path.parts
        for line, name in imports_of(path)
        if name.startswith("pyvmm.testing")
    ]
    assert not wrong, "\n".join(wrong)


CHOOSES_TRANSPORT = "machine/attach.py"


def test_one_module_chooses_the_transport() -> None:
    """Machine, monitor and kinds see `pyvmm.transport.base`: no feature is for one transport."""
    # vhost-user is a command of its own, without a machine.
    interface = ("pyvmm.transport.base", "pyvmm.transport.events", "pyvmm.transport.vhost_user")
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules()
        for line, name in imports_of(path)
        if name.startswith("pyvmm.transport") and name not in interface
        if layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        not in ("transport", "testing", "bench")
        if str(path.relative_to(ROOT / "pyvmm")) != CHOOSES_TRANSPORT
    ]
    assert not wrong, "\n".join(wrong)
