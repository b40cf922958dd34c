"""The console device's numbers and structures against the system's own headers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pyvmm.virtio.console import uapi

HEADERS = ("linux/virtio_console.h", "linux/virtio_ids.h")
pytestmark = pytest.mark.skipif(
    shutil.which("cc") is None
    or not all(Path("/usr/include", header).exists() for header in HEADERS),
    reason="needs a C compiler and the kernel's headers (packages gcc and linux-libc-dev)",
)


def assert_in_c(tmp_path: Path, claims: list[str]) -> None:
    """Each claim is a C constant expression that the compiler must find true."""
    lines = [f"#include <{header}>" for header in HEADERS]
    lines += [f'_Static_assert({claim}, "{claim}");' for claim in claims]
    source = tmp_path / "claims.c"
    source.write_text("\n".join(lines) + "\n")
    result = subprocess.run(["cc", "-fsyntax-only", source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_number_is_the_headers(tmp_path: Path) -> None:
    names = {name for name in vars(uapi) if name.startswith("VIRTIO_")}
    assert len(names) >= 11
    assert_in_c(tmp_path, [f"{name} == {getattr(uapi, name)}" for name in sorted(names)])


def test_every_feature_has_its_name() -> None:
    names = {n: bit for n, bit in vars(uapi).items() if n.startswith("VIRTIO_CONSOLE_F_")}
    assert {bit: name for name, bit in names.items()} == uapi.FEATURE_NAMES


def test_structures_lie_as_the_kernels(tmp_path: Path) -> None:
    config, control = "struct virtio_console_config", "struct virtio_console_control"
    offset = f"__builtin_offsetof({config}, emerg_wr)"
    assert_in_c(
        tmp_path,
        [
            f"sizeof({config}) == {uapi.CONFIG.size}",
            f"{offset} == {uapi.EMERG_WR_OFFSET}",
            f"__builtin_offsetof({config}, max_nr_ports) == 4",
            f"sizeof({control}) == {uapi.CONTROL.size}",
            f"__builtin_offsetof({control}, event) == 4",
            f"__builtin_offsetof({control}, value) == 6",
        ],
    )


def test_queues_of_ports() -> None:
    assert [uapi.receive_queue(port) for port in range(4)] == [0, 4, 6, 8]
