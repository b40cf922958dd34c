"""The mutants of `make mutants`: what they are, that they are run, and the list of survivors."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from mutation import survivors, targets
from mutation.mutate import Mutant, mutants, mutated

ROOT = Path(__file__).parents[3]
FAULTS = {
    "if a < b: c()": ["if a <= b:", "if True:", "pass"],
    "if a is None: c()": ["if a is not None:", "pass"],
    "if a: c()": ["if not a:", "pass"],
    "if not a: c()": ["if a:", "pass"],
    "x = a and b": ["x = a or b", "x = b", "x = a"],
    "x = a + b": ["x = a - b"],
    "x = a << b & c": ["x = a << b | c", "x = a >> b & c"],
    "x = 7": ["x = 8"],
    "x = True": ["x = False"],
    "x = min(a, b)": ["x = max(a, b)"],
    "x = a if b else c": ["x = a", "x = c"],
    "self.x = a": ["pass"],
    "a[b] = c": ["pass"],
    "x += a": ["pass", "x -= a"],
    "del a[b]": ["pass"],
    "return a": ["return"],
    "return": ["pass"],
    "raise E(f'{a + 1}')": ["pass"],
    "with a: b()": ["if True:", "pass"],
    "for a in b: break": ["continue"],
    "while a: continue": ["while not a:", "break"],
    # What says nothing to a test of behaviour.
    "x = a": [],
    "x: a | None = b": [],
    "assert a < b": [],
    "'''words'''": [],
    "x = f'{a + 1}'": [],
    "if TYPE_CHECKING: x = 1": [],
}


def in_a_function(statement: str) -> str:
    return f"class C:\n    def f(self):\n        {statement}\n"


@pytest.mark.parametrize(("statement", "after"), FAULTS.items())
def test_the_faults_of_a_statement(statement: str, after: list[str]) -> None:
    source = in_a_function(statement)
    found = mutants("m.py", source)
    assert [mutant.after for mutant in found] == after
    assert {mutant.function for mutant in found} <= {"C.f"}
    made = [ast.unparse(mutated(source, mutant)) for mutant in found]
    assert len({*made, ast.unparse(ast.parse(source))}) == len(found) + 1
    for text in made:
        compile(text, "m.py", "exec")


def test_a_mutant_is_the_same_one_when_lines_shift_and_are_laid_out_anew() -> None:
    before = in_a_function("if a < b: return c(1)")
    after = "import x\n\n\n" + in_a_function("if (\n            a <\n b): return c(\n1)")
    assert [m.key for m in mutants("m", before)] == [m.key for m in mutants("m", after)]


def test_those_that_look_the_same_are_told_apart() -> None:
    found = mutants("m.py", in_a_function("a(); a()"))
    assert [mutant.again for mutant in found] == [0, 1]
    texts = [ast.unparse(mutated(in_a_function("a(); a()"), one)) for one in found]
    assert [text.split()[4:] for text in texts] == [["pass", "a()"], ["a()", "pass"]]


@pytest.mark.parametrize("file", targets.files(ROOT))
def test_every_module_has_tests_and_its_mutants_can_be_made(file: str) -> None:
    assert targets.tests_of(file)
    source = (ROOT / file).read_text()
    found = mutants(file, source)
    assert len({mutant.key for mutant in found}) == len(found)
    for mutant in found[:: len(found) // 4 + 1]:
        compile(mutated(source, mutant), file, "exec")


def test_every_name_of_a_test_in_the_table_is_one() -> None:
    for target in targets.TARGETS:
        for name in target.tests.split():
            assert list((ROOT / "tests" / "unit").rglob(f"test_{name}.py")), name
        for module in target.modules.split():
            assert list((ROOT / "pyvmm").glob(module)), module


def test_the_whole_core_is_mutated() -> None:
    core = {*(ROOT / "pyvmm/virtio").rglob("*.py"), *(ROOT / "pyvmm/transport").rglob("*.py")}
    left = {str(path.relative_to(ROOT)) for path in core} - set(targets.files(ROOT))
    assert left == set()


def test_every_listed_survivor_is_a_mutant_still() -> None:
    there: set[survivors.Key] = set()
    listed = survivors.load()
    for file in {key[0] for key in listed}:
        there |= {mutant.key for mutant in mutants(file, (ROOT / file).read_text())}
    assert [key for key in listed if key not in there] == []


def test_an_entry_of_the_list_reads_back_as_the_mutant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = mutants("m.py", in_a_function("x('=>', 1); x('=>', 1)"))
    path = tmp_path / "list.toml"
    path.write_text("".join(survivors.as_toml(mutant) for mutant in found))
    monkeypatch.setattr(survivors, "FILE", path)
    assert list(survivors.load()) == [mutant.key for mutant in found]


# Runs mutants of a module against one file of tests: those whose statement has a text in it.
TRY = """
import json, sys
sys.path.insert(0, "tests")
from mutation.mutate import mutants
from mutation.run import ROOT, Runner

file, test, wanted = sys.argv[1:]
runner = Runner(1)
found = [None] + [m for m in mutants(file, (ROOT / file).read_text()) if wanted in m.before]
passed = []
for mutant in found:
    runner.start(mutant, (test,))
    passed.append(runner.next_end()[1])
print(json.dumps(passed))
"""


def test_a_fault_is_noticed_and_the_code_as_it_is_passes() -> None:
    file, wanted = "pyvmm/virtio/status.py", "return status & self.mask == self.value"
    before = (ROOT / file).read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", TRY, file, "tests/unit/virtio/test_status.py", wanted],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [True, False, False, False]
    assert (ROOT / file).read_bytes() == before


REACHED = """
import json, sys
sys.path.insert(0, "tests")
from mutation.mutate import mutants
from mutation.run import ROOT, Runner
from mutation import targets

file, test = sys.argv[1:]
targets.tests_of = lambda _: (test,)
runner = Runner(1)
runner.measure([file])
print(json.dumps({
    f"{m.function} {m.before} {m.after}":
        [t.name.partition("::")[2] for t in runner.tests[test,] if t.reaches(m)]
    for m in mutants(file, (ROOT / file).read_text())
}))
"""


def test_a_mutant_meets_the_tests_that_reach_its_statement(tmp_path: Path) -> None:
    test = tmp_path / "test_reach.py"
    test.write_text(
        "import os, threading\n"
        "from pyvmm.bus.bus import Bus\n"
        "def test_nothing(): pass\n"
        "def test_looks(): Bus('b').find(0)\n"
        "def test_thread():\n"
        "    thread = threading.Thread(target=lambda: Bus('b').find(0))\n"
        "    thread.start(); thread.join()\n"
        "def test_fork():\n"
        "    if not (pid := os.fork()): os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
    )
    file = "pyvmm/bus/bus.py"
    done = subprocess.run(
        [sys.executable, "-c", REACHED, file, str(test)],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["Bus.find if place >= 0: if place > 0:"] == [
        "test_looks", "test_thread", "test_fork",
    ]  # fmt: skip
    assert found["Bus.find return (start, handler) return"] == ["test_fork"]


def test_the_lines_by_which_a_mutant_is_reached() -> None:
    source = (
        "class C:\n    a: int = 7\n    @d\n    def f(\n        self, b=8\n    ): return (\n 9)\n"
    )
    lines = {mutant.before: mutant.lines for mutant in mutants("m.py", source)}
    assert lines == {
        "a: int = 7": range(0),  # done at the import
        "def f(self, b=8):": range(3, 6),
        "return 9": range(6, 8),
    }


def test_a_mutant_that_hangs_is_noticed(tmp_path: Path) -> None:
    test = tmp_path / "test_hang.py"
    test.write_text("import time\ndef test_hang(): time.sleep(1000)\n")
    script = TRY.replace("runner.start(mutant, (test,))", "begin_short(mutant, test)").replace(
        "runner = Runner(1)",
        "runner = Runner(1)\n"
        "from mutation.run import begin\n"
        "def begin_short(mutant, test):\n"
        "    one = begin(mutant, (test,), 1)\n"
        "    runner.running[one.pid] = one\n",
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "pyvmm/virtio/status.py", str(test), "no such text"],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == [False]


def test_mutant_tells_where_it_is() -> None:
    [mutant] = mutants("m.py", in_a_function("x = 7"))
    assert isinstance(mutant, Mutant)
    assert str(mutant) == "m.py:3 C.f\n  - x = 7\n  + x = 8"
