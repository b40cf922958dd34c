"""examples/kselftest.py, with a tree as small as one can be: what builds and runs selftests has the
names and the output that Linux' own has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from guest import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("linux_guests")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/kselftest.py"
MAKEFILE = """\
install:
\tcp run_kselftest.sh $(INSTALL_PATH)
\techo $(TARGETS) > $(INSTALL_PATH)/targets
"""
RUN = """\
#!/bin/sh
cd "${0%/*}"
echo TAP version 13
echo 1..4
modprobe dummy || exit  # a module of Debian's kernel, where modprobe looks for it
echo "# the kernel is $(uname -r)"
n=0
for one in $(cat targets); do
    n=$((n + 1))
    echo "ok $n selftests: $one: works"
done
echo "not ok 3 selftests: kernel: $(uname -r)"
echo "ok 4 selftests: odd: needs a lot # SKIP no hardware"
touch left-behind
"""


def test_selftests_run_in_a_guest_and_leave_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "tools/testing/selftests"
    folder.mkdir(parents=True)
    (folder / "Makefile").write_text(MAKEFILE)
    (folder / "run_kselftest.sh").write_text(RUN)
    (folder / "run_kselftest.sh").chmod(0o755)
    words = [str(tmp_path), "size", "timers", "--kernel", "debian:6.12", "--memory", "256M"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *words],
        capture_output=True,
        text=True,
        timeout=2 * HANG_SECONDS,
    )
    first, second, kernel, odd = done.stdout.splitlines() or [done.stderr] * 4
    assert first == "selftests: size: works: passed", done.stderr
    assert second == "selftests: timers: works: passed"
    assert kernel.startswith("selftests: kernel: 6.12.") and kernel.endswith(": failed")
    assert odd == "selftests: odd: needs a lot: SKIP no hardware"
    assert done.returncode == 1
