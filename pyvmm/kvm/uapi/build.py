"""Generates x86_structures.py from the two .h files here: ``python -m pyvmm.kvm.uapi.build``.

cffi's out-of-line ABI mode: parsing C takes pycparser and some 50 ms, which a user would pay at
every start; the generated module needs `_cffi_backend` alone and imports in well under one. A test
regenerates it and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
MODULE = "pyvmm.kvm.uapi.x86_structures"
GENERATED = HERE / "x86_structures.py"
HEADERS = ("asm_kvm_x86.h", "linux_kvm.h")  # <linux/kvm.h> includes <asm/kvm.h> first

TYPES = """
typedef uint8_t __u8;
typedef uint16_t __u16;
typedef uint32_t __u32;
typedef uint64_t __u64;
typedef int32_t __s32;
typedef int64_t __s64;
"""


def generate(target: Path) -> None:
    """Write the generated module to `target`."""
    import cffi

    builder = cffi.FFI()
    builder.cdef(TYPES + "".join((HERE / name).read_text() for name in HEADERS))
    builder.set_source(MODULE, None)
    builder.emit_python_code(str(target))
    # Kept out of the linter's and the formatter's hands, so that regenerating gives the same bytes.
    target.write_text("# ruff: noqa\n# fmt: off\n" + target.read_text())


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else GENERATED)
