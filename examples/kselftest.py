"""Builds selftests of a Linux tree, runs them in a guest, and shows how each went:

python examples/kselftest.py ~/linux size timers                        on the tree's own kernel
python examples/kselftest.py ~/linux size --kernel debian:6.12          on another one

The guest's root is this machine's, so what the tests need is there, and nothing they do here stays.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from pyvmm import VM, PyvmmError

# Linux Documentation/dev-tools/ktap.rst; what is deeper, or a comment, is a test's own business.
_RESULT = re.compile(r"^(?P<bad>not )?ok \d+ (?:- )?(?P<name>[^#]*?)\s*(?:#\s*(?P<why>SKIP.*))?$")


def build(tree: str, targets: list[str], into: str) -> None:
    """The selftests `targets` and what runs them, in `into`."""
    folder = f"{tree}/tools/testing/selftests"
    words = [f"TARGETS={' '.join(targets)}", f"INSTALL_PATH={into}", "install"]
    subprocess.run(["make", "-s", "-C", folder, *words], check=True)


def results(said: str) -> Iterator[tuple[str, str]]:
    """The name of each test, and how it went."""
    for line in said.splitlines():
        if found := _RESULT.match(line):
            went = "failed" if found["bad"] else found["why"] or "passed"
            yield found["name"], went


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("tree")
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--kernel", help="what pyvmm run takes; the tree's own unless given")
    parser.add_argument("--memory", default="1G")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as built:
        build(given.tree, given.targets, built)
        with VM(root="/", kernel=given.kernel or given.tree, memory=given.memory) as vm:
            vm.wait_ready()
            done = vm.run([f"{built}/run_kselftest.sh"])
    said = done.stdout.decode(errors="replace")
    found = list(results(said))
    for name, went in found:
        print(f"{name}: {went}")
    if not found:
        print(said, done.stderr.decode(errors="replace"), sep="\n", file=sys.stderr)
    return 0 if found and all(went != "failed" for _, went in found) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (PyvmmError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
