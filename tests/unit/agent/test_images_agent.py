"""The agent as an image: a program that needs no other file."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.images import agent, recipes, tools
from pyvmm.images.builder import Catalogue
from pyvmm.images.progress import Progress

PT_INTERP, PT_GNU_STACK, PF_X = 3, 0x6474E551, 1  # <elf.h>
EM_AARCH64 = 183


def program_headers(path: Path) -> list[tuple[int, int]]:
    """(p_type, p_flags) of each."""
    data = path.read_bytes()
    offset = struct.unpack_from("<Q", data, 32)[0]
    size, count = struct.unpack_from("<HH", data, 54)
    return [struct.unpack_from("<II", data, offset + index * size) for index in range(count)]


@pytest.mark.skipif(shutil.which("musl-gcc") is None, reason="needs musl-gcc (musl-tools)")
def test_it_is_small_static_and_has_no_executable_stack(tmp_path: Path) -> None:
    agent.build("agent", recipes.load(), str(tmp_path), Progress(quiet=True))
    program = tmp_path / agent.FILE
    headers = program_headers(program)
    assert PT_INTERP not in [kind for kind, _ in headers]
    assert [flags & PF_X for kind, flags in headers if kind == PT_GNU_STACK] == [0]
    assert program.stat().st_size < 200_000
    assert os.access(program, os.X_OK)
    done = subprocess.run([program, "--nonsense"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert agent.read(str(tmp_path)) == program.read_bytes()


def test_a_machine_without_the_compiler_is_told_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "_ADMIN_PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"musl-gcc is missing.*apt-get install musl-tools"):
        agent.build("agent", recipes.load(), str(tmp_path), Progress(quiet=True))
    cross = agent.Toolchain("arm64", "/musl")
    with pytest.raises(ConfigError, match=r"aarch64.*is missing.*install gcc-aarch64-linux-gnu"):
        agent.build("agent-arm64", recipes.load(), str(tmp_path), Progress(quiet=True), cross)


def test_the_one_for_arm64_is_as_small_and_static(tmp_path: Path) -> None:
    toolchain = Catalogue().toolchain("arm64")
    assert toolchain is not None
    if not os.path.isdir(toolchain.musl) or shutil.which(toolchain.name) is None:
        pytest.skip("needs gcc-aarch64-linux-gnu, and: pyvmm image build programs-musl-arm64")
    agent.build("agent-arm64", recipes.load(), str(tmp_path), Progress(quiet=True), toolchain)
    program = tmp_path / agent.FILE
    headers = program_headers(program)
    assert struct.unpack_from("<H", program.read_bytes(), 18)[0] == EM_AARCH64
    assert PT_INTERP not in [kind for kind, _ in headers]
    assert [flags & PF_X for kind, flags in headers if kind == PT_GNU_STACK] == [0]
    assert program.stat().st_size < 200_000


def test_every_source_file_is_compiled() -> None:
    folder = Path(recipes.load().file(agent.FOLDER))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        (*agent.SOURCES, *agent.HEADERS)
    )
