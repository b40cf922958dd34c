"""The documents' Python runs, and what they point at is there."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from documents import commands
from markdown_it import MarkdownIt

from pyvmm.cli.commands import Commands
from pyvmm.cli.run import run
from pyvmm.kinds.vm_spec import make_spec
from pyvmm.machine.board.registry import board_for
from pyvmm.machine.cmdline import command_line
from pyvmm.machine.outcome import Ending
from pyvmm.spec.vm import DiskSpec, VmSpec

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "guest-images/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

# Their Python is run by tests/guest/test_api_docs.py.
IN_GUESTS = ("docs/python-api.md", "docs/pytest.md", "docs/devices.md", "docs/kernels.md")


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
    if where.startswith("docs/tutorial/04"):
        pytest.skip("run by tests/guest/test_whole_vmm.py, which needs a Linux guest")
    if where.startswith("docs/ray.md"):
        pytest.skip("make ray runs the like, and the one with a sandbox")
    if where.startswith("docs/adding-a-device.md"):
        pytest.skip("run by tests/unit/project/test_adding_a_device.py, in a copy of pyvmm")
    if where.startswith(IN_GUESTS) or re.search("import (VM|Pool|AsyncPool)\n", code):
        pytest.skip("run by tests/guest/test_api_docs.py, which needs a Linux guest")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"{where}\n{done.stdout}\n{done.stderr}"


def documented_commands() -> list[tuple[str, list[str]]]:
    """The documents' calls of pyvmm, as a shell would split them; … stands for options left out."""
    found = []
    for document in DOCUMENTS:
        where = str(document.relative_to(ROOT))
        for block in commands(where):
            for line in re.findall(r"^pyvmm .*", block.replace("\\\n", " "), re.MULTILINE):
                line = re.sub(r" \d?>\S+", "", line)
                lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
                lexer.whitespace_split = True
                words = [word for word in lexer if word != "…"]
                ends = [place for place, word in enumerate(words) if word in ("|", "&", "&&", ";")]
                found.append((where, words[1 : min(ends, default=len(words))]))
    return found


@pytest.mark.parametrize(("where", "words"), documented_commands(), ids=lambda one: str(one)[:60])
def test_commands_have_options_that_there_are(where: str, words: list[str]) -> None:
    """Each is read to its end, but not carried out. With whole guests they are run elsewhere."""
    command: click.Command = Commands("pyvmm")
    context = command.make_context("pyvmm", words)
    path: list[str] = []
    while isinstance(command, click.Group):
        name, inner, words = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert name and inner, where
        path.append(name)
        command, context = inner, inner.make_context(name, words, parent=context)
    if path == ["matrix"]:
        words = [*context.params["others"], "--", "true"]
        path, context = ["run"], run.make_context("run", words)
    if path == ["run"]:
        make_spec({"kernel": "vmlinuz"} | {k: v for k, v in context.params.items() if v})


def test_readme_has_a_device_in_thirty_lines() -> None:
    [block] = [
        code
        for where, code in python_blocks()
        if where.startswith("README.md#") and "QueueDevice" in code
    ]
    assert len([line for line in block.splitlines() if line.strip()]) <= 30


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert not missing, f"{document.relative_to(ROOT)} points at {missing}"


DECISIONS = ROOT / "docs/decisions"
ROW = re.compile(r"^\| \[(\d{4})\]\(([^)]+)\) \| (.+?) \| (.+) \|$", re.MULTILINE)


def wrong_in_index(text: str, titles: dict[str, str]) -> list[str]:
    """What an index of decisions has wrong; `titles` are those of their files, by name."""
    rows = ROW.findall(text)
    names = [name for _, name, _, _ in rows]
    found = [f"{name} is not in the index" for name in titles if name not in names]
    found += [f"{name} is there twice" for name in set(names) if names.count(name) > 1]
    for number, name, title, clause in rows:
        if not name.startswith(f"{number}-"):
            found.append(f"{name} is not {number}")
        elif name in titles and title != titles[name]:
            found.append(f"{name} is called {titles[name]!r}, and {title!r} in the index")
        elif clause.strip() in ("", title):
            found.append(f"{name} has no clause")
    return found


def test_the_index_of_decisions_is_whole() -> None:
    titles = {}
    for path in sorted(DECISIONS.glob("[0-9]*.md")):
        heading = path.read_text().partition("\n")[0]
        titles[path.name] = re.sub(r"^# (\d{4}:? )?", "", heading)
    wrong = wrong_in_index((DECISIONS / "README.md").read_text(), titles)
    assert not wrong, f"docs/decisions/README.md: {wrong}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("| [0001](0001-a.md) | A | it is so |\n", []),
        ("", ["0001-a.md is not in the index"]),
        ("| [0001](0001-a.md) | A | it is so |\n" * 2, ["0001-a.md is there twice"]),
        ("| [0002](0001-a.md) | A | it is so |\n", ["0001-a.md is not 0002"]),
        ("| [0001](0001-a.md) | B | it |\n", ["0001-a.md is called 'A', and 'B' in the index"]),
        ("| [0001](0001-a.md) | A |   |\n", ["0001-a.md has no clause"]),
    ],
)
def test_what_is_wrong_in_an_index(text: str, found: list[str]) -> None:
    assert wrong_in_index(text, {"0001-a.md": "A"}) == found


WIDTH = 100
KEPT = ("fence", "code_block", "table_open", "html_block")  # lines that nobody can break
DRAWN = re.compile("[\u2190-\u21ff\u2500-\u257f]")  # arrows, and lines of boxes
ONE_LINK = re.compile(r"\s*(?:[-*+] |\d+\. )?(?:\S+|!?\[[^]]*\]\([^)]*\))[.,;:]?")


def too_wide(text: str) -> list[int]:
    """The numbers of lines of a document that could be shorter than they are."""
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    kept = {
        line
        for token in tokens
        if token.type in KEPT and token.map is not None
        for line in range(*token.map)
    }
    drawn = {
        line
        for token in tokens
        if token.type == "fence" and token.map is not None and DRAWN.search(token.content)
        for line in range(*token.map)
    }
    return [
        number + 1
        for number, line in enumerate(text.split("\n"))
        if len(line) > WIDTH and number not in kept - drawn and not ONE_LINK.fullmatch(line)
    ]


@pytest.mark.parametrize(
    "document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_lines_have_at_most_100_columns(document: Path) -> None:
    lines = too_wide(document.read_text())
    assert not lines, f"{document.relative_to(ROOT)}: lines {lines} are wider"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("short\n\n" + "a " * 50 + "b\n", [3]),
        ("a " * 50 + "\n", []),
        ("- " + "a " * 50 + "b\n", [1]),
        ("# " + "a " * 50 + "b\n", [1]),
        ("text\n    " + "a " * 50 + "b\n", [2]),
        ("```\n" + "a " * 60 + "\n```\n" + "a " * 60 + "\n", [4]),
        ("```\n" + "a " * 60 + "\n│\n```\n", [2]),
        ("text\n\n    " + "a " * 60 + "\n", []),
        ("| a | b |\n|---|---|\n| " + "a " * 60 + "| b |\n\n" + "a " * 60 + "\n", [5]),
        ("- [a link](" + "x" * 100 + ").\n", []),
        ("- see [a link](" + "x" * 100 + ")\n", [1]),
        ("x" * 101 + "\n", []),
    ],
)  # fmt: skip
def test_what_is_too_wide(text: str, found: list[int]) -> None:
    assert too_wide(text) == found


def test_documents_name_targets_that_make_has() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = {
        (str(document.relative_to(ROOT)), target)
        for document in DOCUMENTS
        if document.name != "kernels.md"  # the kernel's own make
        for target in re.findall(r"(?:`|^ {4})make ([a-z]+)", document.read_text(), re.MULTILINE)
    }
    assert {target for _, target in named} >= {"demo", "test", "fuzz"}
    assert not [one for one in sorted(named) if one[1] not in targets]


# What a reader makes by following the page.
MADE = {
    "docs/adding-a-device.md": {"pyvmm/kinds/seed.py", "pyvmm/virtio/seed/device.py"},
    "docs/kernels.md": {"greeting.c", "test_greeting.py"},
}
PLACES = ("", "pyvmm", "guest-images")  # where a path in a document may begin
MODULES = re.compile(r"(?<![\w./-])((?:[\w-]+/)*[\w-]+\.(?:py|sh|toml|c))\b")
METHODS = re.compile(r"\b([A-Z]\w*[a-z]\w*)\.([a-z_]+)\b")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_that_are_named_exist(document: Path) -> None:
    named = set(MODULES.findall(document.read_text()))
    named -= {"FILE.py"} | MADE.get(str(document.relative_to(ROOT)), set())
    known = {path.name for path in (ROOT / "pyvmm").rglob("*.py")}
    missing = [
        name
        for name in named
        if not any(
            (base / name).exists() for base in (document.parent, *map(ROOT.joinpath, PLACES))
        )
        and name not in known
    ]
    assert not missing, f"{document.relative_to(ROOT)} names {missing}"


def test_methods_that_are_named_exist() -> None:
    known: dict[str, set[str]] = {"Struct": {"unpack_from"}}  # Python's own
    for path in (ROOT / "pyvmm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                known.setdefault(node.name, set()).update(members(node))
    for document in DOCUMENTS:
        for owner, member in METHODS.findall(document.read_text()):
            assert member in known.get(owner, ()), f"{document.name} names {owner}.{member}"


def members(node: ast.ClassDef) -> set[str]:
    """Methods, fields and what __init__ and others assign to self."""
    found = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    for item in ast.walk(node):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found.add(item.target.id)
        elif isinstance(item, ast.Attribute) and isinstance(item.ctx, ast.Store):
            found.add(item.attr)
    return found


def test_a_cloud_image_that_is_named_and_not_there_is_not_made(tmp_path: Path) -> None:
    make = ["make", "--no-print-directory", "-o", ".stamps/dev", "-o", ".stamps/system"]
    make += ["cloud", f"IMAGE={tmp_path}/no"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (
        2,
        f"there is no {tmp_path}/no; without IMAGE one is made\n",
    )


def test_readme_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_documents_have_every_exit_code() -> None:
    rows = re.findall(r"^\| ([\d, ]+) \|", (ROOT / "docs/running.md").read_text(), re.MULTILINE)
    documented = {int(code) for row in rows for code in row.split(",")}
    assert documented == {ending.value for ending in Ending} | {2, 70}


def test_the_documents_have_the_default_command_line() -> None:
    spec = VmSpec(kernel="vmlinuz", disks=(DiskSpec("debian.img"),))
    default = command_line(spec, board_for("x86_64"))
    assert f"`{default}`" in (ROOT / "docs/running.md").read_text()


def test_tests_that_are_named_exist() -> None:
    """`test_…` by itself is a whole name; what pytest's -k takes may be the beginning of one."""
    text = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^ *def (test_\w+)", text, re.MULTILINE))
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/robustness.md").read_text()))
    assert len(named) > 20
    assert not named - there
