"""Generates structures.py, here and for each architecture, from the .h files beside it:
``python -m pyvmm.kvm.uapi.build``.

cffi's out-of-line ABI mode: parsing C takes pycparser and some 50 ms, which a user would pay at
every start; the generated module needs `_cffi_backend` alone and imports in well under one. A test
regenerates it and compares.
"""

from __future__ import annotations

from pathlib import Path

KVM = Path(__file__).parents[1]

TYPES = """
typedef uint8_t __u8;
typedef uint16_t __u16;
typedef uint32_t __u32;
typedef uint64_t __u64;
typedef int32_t __s32;
typedef int64_t __s64;
"""


def architectures() -> list[str]:
    """Those that have structures of their own."""
    return sorted(path.parents[1].name for path in KVM.glob("*/uapi/asm_kvm.h"))


def generate(folder: Path) -> None:
    """Write the generated modules below `folder`, as they lie below pyvmm/kvm.

    Each stands for itself: with ffi.include, cffi takes unnamed unions of one for those of another.
    """
    _generate(folder, "uapi", "linux_kvm.h")
    for name in architectures():
        _generate(folder, f"{name}/uapi", "asm_kvm.h")


def _generate(folder: Path, place: str, header: str) -> None:
    import cffi

    builder = cffi.FFI()
    builder.cdef(TYPES + (KVM / place / header).read_text())
    builder.set_source(f"pyvmm.kvm.{place.replace('/', '.')}.structures", None)
    target = folder / place / "structures.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    builder.emit_python_code(str(target))
    # Kept out of the linter's and the formatter's hands, so that regenerating gives the same bytes.
    target.write_text("# ruff: noqa\n# fmt: off\n" + target.read_text())


if __name__ == "__main__":
    generate(KVM)
