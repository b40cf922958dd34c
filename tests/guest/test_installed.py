"""pyvmm installed from its wheel, far from any checkout, builds on its own recipes and boots."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import packaged
import pytest
from guest import HANG_SECONDS


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an empty virtual environment into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("installed")
    wheel = packaged.build_wheel(folder)
    subprocess.run(
        [sys.executable, "-m", "venv", folder / "venv"], check=True, timeout=HANG_SECONDS
    )
    python = folder / "venv/bin/python"
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", wheel],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return python.parent


def run(installed: Path, *arguments: str) -> str:
    unset = ("PYVMM_GUEST_IMAGES", "PYTHONPATH", "VIRTUAL_ENV")
    done = subprocess.run(
        [installed / "pyvmm", *arguments],
        cwd="/",
        env={name: value for name, value in os.environ.items() if name not in unset},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_guest_boots_and_runs_a_command(installed: Path, linux_guests: None) -> None:
    assert run(installed, "run", "--rm", "debian", "--", "uname", "-s") == "Linux\n"


def test_the_doctor_knows_the_recipes_and_their_packages(
    installed: Path, linux_guests: None
) -> None:
    said = run(installed, "doctor")
    assert "packages: all that pyvmm needs" in said
    assert "rootfs-minbase" in said
