"""Numbers and structures against the system's own headers: the C compiler is asked."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest


def needs_headers(headers: Iterable[str]) -> pytest.MarkDecorator:
    """Skips a module's tests where the compiler or a header (below /usr/include) is missing."""
    return pytest.mark.skipif(
        shutil.which("cc") is None
        or not all(Path("/usr/include", header).exists() for header in headers),
        reason="needs a C compiler and the kernel's headers (packages gcc and linux-libc-dev)",
    )


ARM64 = "aarch64-linux-gnu-gcc"

needs_arm64_headers = pytest.mark.skipif(
    shutil.which(ARM64) is None or not Path("/usr/aarch64-linux-gnu/include/linux/kvm.h").exists(),
    reason="needs arm64's compiler and headers (packages gcc-aarch64-linux-gnu and "
    "libc6-dev-arm64-cross)",
)


def fields(ffi: Any, c_type: Any, path: str = "", base: int = 0) -> Iterator[tuple[str, int, int]]:
    """(path, offset, size) of each field, nested and anonymous ones too; the size is -1 for an
    array, whose length shows in the offset of what follows it."""
    for name, field in c_type.fields:
        here = f"{path}.{name}" if path and name else path or name
        offset = base + field.offset
        if name and field.type.kind != "array":
            yield here, offset, ffi.sizeof(field.type)
        elif name:
            yield here, offset, -1
        if field.type.kind in ("struct", "union"):
            yield from fields(ffi, field.type, here, offset)


def assert_in_c(
    tmp_path: Path,
    headers: Iterable[str],
    claims: Iterable[str],
    optional: Collection[str] = (),
    compiler: Sequence[str] = ("cc",),
) -> None:
    """Each claim is a C constant expression that the `compiler` must find true.

    One that begins with a name in `optional` counts only where the headers have that name.
    """
    lines = [f"#include <{header}>" for header in headers]
    for claim in claims:
        name = claim.split()[0]
        text = f'_Static_assert({claim}, "{claim}");'
        lines += [f"#ifdef {name}", text, "#endif"] if name in optional else [text]
    source = tmp_path / "claims.c"
    source.write_text("\n".join(lines) + "\n")
    result = subprocess.run([*compiler, "-fsyntax-only", source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def assembled(tmp_path: Path, text: str) -> bytes:
    """The machine code of `text`, in arm64's assembler."""
    source, made, raw = (tmp_path / name for name in ("code.s", "code.o", "code.bin"))
    source.write_text(text)
    subprocess.run([ARM64, "-c", source, "-o", made], check=True)
    copy = ARM64.replace("gcc", "objcopy")
    subprocess.run([copy, "-O", "binary", "-j", ".text", made, raw], check=True)
    return raw.read_bytes()
