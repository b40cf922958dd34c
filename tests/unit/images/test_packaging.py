"""The wheel has all that a checkout has; tests/guest/test_installed.py boots a guest with it."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path

import packaged
import pytest

from pyvmm.images import recipes, tools

ROOT = Path(__file__).resolve().parents[3]


def checked_in(folder: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return {name for name in listed.stdout.decode().split("\0") if (ROOT / name).is_file()}


def test_the_wheel_has_every_file_of_the_package_and_the_recipes(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    recipes_there = {f"pyvmm/{name}" for name in checked_in("guest-images")}
    assert len(recipes_there) > 10
    assert names == checked_in("pyvmm") | recipes_there


def test_the_recipes_of_a_checkout_are_those_at_its_top_level() -> None:
    assert Path(recipes.folder()) == ROOT / "guest-images"


def test_missing_packages_are_named_without_those_of_the_tests(tmp_path: Path) -> None:
    listed = tmp_path / "packages"
    listed.write_text(
        "# why\nno-such-package-a # x\ndpkg\n\n# Only for the tests and more\nno-such-package-b\n"
    )
    assert tools.missing_packages(str(listed)) == ["no-such-package-a"]


def test_the_list_of_packages_has_a_part_for_the_tests() -> None:
    text = (ROOT / "guest-images/system-packages.txt").read_text()
    needed, heading, tests = text.partition("# Only for the tests")
    assert "mmdebstrap" in needed and heading and "strace" in tests


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packaged.build_wheel(tmp_path_factory.mktemp("wheel"))


def test_make_test_runs_every_folder_of_tests() -> None:
    makefile = (ROOT / "Makefile").read_text()
    [units] = re.findall(r"^UNITS := (.*)", makefile, re.MULTILINE)
    recipe = makefile.partition("\ntest: ")[2].partition("\n\n")[0].replace("$(UNITS)", units)
    run = set(re.findall(r"\btests/\w+", recipe))
    tests = (path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))
    assert run == {f"tests/{path.parts[1]}" for path in tests}
