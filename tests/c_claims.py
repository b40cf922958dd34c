"""Numbers and structures against the system's own headers: the C compiler is asked."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest


def needs_headers(headers: Iterable[str]) -> pytest.MarkDecorator:
    """Skips a module's tests where the compiler or a header (below /usr/include) is missing."""
    return pytest.mark.skipif(
        shutil.which("cc") is None
        or not all(Path("/usr/include", header).exists() for header in headers),
        reason="needs a C compiler and the kernel's headers (packages gcc and linux-libc-dev)",
    )


def assert_in_c(
    tmp_path: Path, headers: Iterable[str], claims: Iterable[str], optional: Collection[str] = ()
) -> None:
    """Each claim is a C constant expression that the compiler must find true.

    One that begins with a name in `optional` counts only where the headers have that name.
    """
    lines = [f"#include <{header}>" for header in headers]
    for claim in claims:
        name = claim.split()[0]
        text = f'_Static_assert({claim}, "{claim}");'
        lines += [f"#ifdef {name}", text, "#endif"] if name in optional else [text]
    source = tmp_path / "claims.c"
    source.write_text("\n".join(lines) + "\n")
    result = subprocess.run(["cc", "-fsyntax-only", source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
