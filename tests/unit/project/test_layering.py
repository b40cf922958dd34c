"""Imports go downward only: the layers of docs/architecture.md, read from the code itself."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
VIRTIO_DEVICES = {p.parent.name for p in (ROOT / "pyvmm/virtio").glob("*/__init__.py")} - {"queue"}

# What each layer may import besides itself, from the top to the bottom.
BASE = {"errors", "host"}
CORE = BASE | {"memory", "bus", "virtio", "pci", "vhost_user"}
PARTS = CORE | {"boot", "transport", "platform", "device"}
BESIDE = {"control", "agent", "relay", "images", "emulated_host"}  # above nothing but what they say
ALLOWED: dict[str, set[str]] = {
    "pyvmm": BASE | {"api", "kinds", "spec", "agent", "control", "version"},  # the public names
    "pytest_plugin": BASE | {"api", "pytest_vms", "cli"},
    "pytest_vms": BASE | {"api"},
    "ray": BASE | {"api", "monitor", "spec", "control", "agent"},
    "ray_sandbox": BASE | {"api", "agent"},
    "cli": PARTS | BESIDE | {"api", "monitor", "kinds", "machine", "spec", "kvm", "version"},
    "api": BASE | {"monitor", "kinds", "machine", "spec", "control", "agent", "images"},
    "monitor": PARTS | BESIDE | {"kinds", "machine", "spec", "kvm", "version"},
    "kinds": CORE
    | {"machine", "spec", "device", "platform", "control", "images", "emulated_host", "relay"},
    "machine": CORE | {"spec", "kvm", "boot", "transport", "platform"},
    "spec": {"errors"},
    "emulated_host": BASE | {"relay", "images"},
    "images": BASE | {"machine"},
    "boot": CORE,
    "transport": CORE,
    "platform": CORE,
    "device": CORE,
    "virtio": BASE | {"memory"},
    "vhost_user": BASE | {"memory", "virtio"},
    "pci": BASE | {"bus"},
    "bus": BASE | {"memory"},
    "memory": BASE,
    "kvm": BASE,
    "relay": BASE,
    "control": BASE | {"spec"},
    "agent": BASE,
    "host": {"errors"},
    "errors": set(),
    "version": set(),
    "testing": BASE | {"memory"},
    "bench": CORE | {"transport", "testing"},
}

# They import a module whose name they are given, or have in a table of strings: see `named_in`.
IMPORT_BY_NAME = {
    *("pyvmm", "pyvmm.cli.commands", "pyvmm.kinds.registry"),
    "pyvmm.host.confinement",  # what its callers pass: `module.__name__`, of an import
    *("pyvmm.emulated_host.collected", "pyvmm.monitor.preload"),  # they load what others import
}


def layer_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1:
        return "pyvmm"
    if parts[1] == "__main__":
        return "cli"
    if module in ("pyvmm.testing", "pyvmm.testing.attached"):  # they join the driver's side to ours
        return "bench"
    if parts[1] == "virtio" and len(parts) > 2 and parts[2] in VIRTIO_DEVICES:
        return f"device:{parts[2]}"
    return parts[1]


def name_of(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    return str(relative).replace("/", ".").removesuffix(".__init__")


def modules() -> list[Path]:
    return sorted((ROOT / "pyvmm").rglob("*.py"))


MODULES = {name_of(path) for path in modules()}


def known(name: str) -> str | None:
    """The module or package that `name` is, or is in; None for what is not ours."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def named_in(text: str) -> Iterator[str]:
    """Modules named in a string of the code, which somebody will import or run."""
    for name in re.findall(r"\bpyvmm(?:\.\w+)+", text):
        found = known(name)
        if found not in (None, "pyvmm"):
            yield found


def imports_in(source: str) -> Iterator[tuple[int, str]]:
    """(line, module) for all imports, at the top or within functions, for type checkers or not; and
    for the modules that are named in strings, other than docstrings."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    } | {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (found := known(alias.name)) is not None:
                    yield node.lineno, found
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import"
            for alias in node.names:
                if (found := known(f"{node.module}.{alias.name}")) is not None:
                    yield node.lineno, found
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                for found in named_in(node.value):
                    yield node.lineno, found
        elif isinstance(node, (ast.List, ast.Tuple, ast.Call)):
            words = node.args if isinstance(node, ast.Call) else node.elts
            texts = [word.value if isinstance(word, ast.Constant) else None for word in words]
            if ("-m", "pyvmm") in pairwise(texts):
                yield node.lineno, "pyvmm.__main__"


@cache
def imports_of(path: Path) -> list[tuple[int, str]]:
    own = name_of(path)
    return [(line, name) for line, name in imports_in(path.read_text()) if name != own]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downward(path: Path) -> None:
    own = layer_of(name_of(path))
    allowed = ALLOWED[own.split(":")[0]]
    wrong = []
    for line, name in imports_of(path):
        other = layer_of(name)
        if other != own and other.split(":")[0] not in allowed:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
        elif other != own and ":" in own and ":" in other:
            wrong.append(f"{path.relative_to(ROOT)}:{line} imports another device: {name}")
    assert not wrong, "\n".join(wrong)


def test_layers_are_in_an_order() -> None:
    """A package is not imported by one that it may import, however many layers are between."""
    for layer in ALLOWED:
        seen, left = set(), list(ALLOWED[layer])
        while left:
            below = left.pop()
            if below not in seen:
                seen.add(below)
                left += ALLOWED[below]
        assert layer not in seen


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import themselves by way of others: the strongly connected parts (Tarjan)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        path.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
            if other in path:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == index[module]:
            part = path[path.index(module) :]
            del path[-len(part) :]
            if len(part) > 1:
                found.append(sorted(part))

    for module in graph:
        if module not in index:
            visit(module)
    return found


def import_graph() -> dict[str, set[str]]:
    return {name_of(path): {name for _, name in imports_of(path)} for path in modules()}


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(import_graph()) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"a"}}
    assert circles(graph) == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pyvmm.bus", "pyvmm.bus"),
        ("def f():\n    from pyvmm.host import log", "pyvmm.host.log"),
        ("if TYPE_CHECKING:\n    from pyvmm.bus import Bus", "pyvmm.bus"),
        ("run(['-m', 'pyvmm.monitor.process'])", "pyvmm.monitor.process"),
        ("run('python -P -m pyvmm.boot.x86.payload a b', shell=True)", "pyvmm.boot.x86.payload"),
        ("run(['-m', 'pyvmm', 'ps'])", "pyvmm.__main__"),
        ("entry = f'pyvmm.cli.run:{name}'", "pyvmm.cli.run"),
        ("TABLE = {'net': 'pyvmm.kinds.net'}", "pyvmm.kinds.net"),
        ("TABLE = {'net': 'pyvmm.kinds.net.Spec'}", "pyvmm.kinds.net"),
    ],
)
def test_modules_are_seen_however_they_are_named(source: str, found: str) -> None:
    assert [name for _, name in imports_in(source)] == [found]


def test_docstrings_may_name_modules() -> None:
    assert not list(imports_in('"""See pyvmm.bus."""\ndef f():\n    """And pyvmm.cli."""'))


def test_no_module_is_imported_by_a_name_that_no_test_sees() -> None:
    hidden = re.compile(r"\b(import_module|__import__|run_module|find_spec)\(")
    using = {name_of(path) for path in modules() if hidden.search(path.read_text())}
    assert using == IMPORT_BY_NAME


ARCHITECTURES = ("x86", "arm64")
GENERATED = {
    "pyvmm.kvm.uapi.structures",
    *(f"pyvmm.kvm.{one}.uapi.structures" for one in ARCHITECTURES),
}


def test_modules_say_what_they_are() -> None:
    wrong = {}
    for path in modules():
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
        if len(said.split()) < 3 or "TODO" in said:
            wrong[name_of(path)] = said
    assert set(wrong) <= GENERATED, wrong


# The modules that name an architecture and are not of one: each chooses, and nothing else does.
CHOOSES_ARCHITECTURE = {"machine/board/registry.py", "emulated_host/architecture.py"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_stays_in_modules_that_say_so(architecture: str) -> None:
    """The others are folders beside these, and rows of the registry."""
    wrong = []
    for path in modules():
        relative = str(path.relative_to(ROOT / "pyvmm"))
        if f"/{architecture}/" in relative or relative in CHOOSES_ARCHITECTURE:
            continue
        wrong += [
            f"{relative}:{line} imports {name}"
            for line, name in imports_of(path)
            if architecture in name
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_is_in_as_many_places_as_there_are(architecture: str) -> None:
    found = {path.relative_to(ROOT / "pyvmm") for path in (ROOT / "pyvmm").rglob(architecture)}
    places = ("machine/board", "kvm", "boot", "platform", "emulated_host")
    assert {str(place) for place in found} == {f"{one}/{architecture}" for one in places}


def test_nothing_outside_testing_imports_testing() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules()
        if "testing" not in path.parts
        for line, name in imports_of(path)
        if name.startswith("pyvmm.testing")
    ]
    assert not wrong, "\n".join(wrong)


# The one chooses, and plugs virtio-mmio in; the other plugs virtio-pci in.
CHOOSE_TRANSPORT = ("machine/attach.py", "machine/pci_host.py")


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
        if str(path.relative_to(ROOT / "pyvmm")) not in CHOOSE_TRANSPORT
    ]
    assert not wrong, "\n".join(wrong)


def test_no_two_files_of_tests_share_a_name() -> None:
    """Folders of tests are not packages: pytest would take the second for the first, and collects
    nothing of either when both are asked for."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []
