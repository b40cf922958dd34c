"""Every number and structure of pyvmm.kvm.uapi against the system's own headers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from c_claims import fields

from pyvmm.kvm import uapi as common
from pyvmm.kvm.uapi import build
from pyvmm.kvm.x86 import uapi

# What headers of Linux 6.1, the oldest ones supported, do not have yet.
NEWER = {
    "KVM_CAP_GUEST_MEMFD",
    "KVM_CAP_MEMORY_FAULT_INFO",
    "KVM_CAP_USER_MEMORY2",
    "KVM_EXIT_ARM_SEA",
    "KVM_EXIT_LOONGARCH_IOCSR",
    "KVM_EXIT_MEMORY_FAULT",
    "KVM_EXIT_TDX",
    "KVM_MEMORY_EXIT_FLAG_PRIVATE",
}
# The macro that says whether the header has a field.
FIELD_NEEDS = {"memory_fault": "KVM_EXIT_MEMORY_FAULT"}

NUMBERS = {
    name: value
    for name, value in vars(uapi).items()
    if isinstance(value, int) and (name.startswith("KVM") or name.endswith("_VECTOR"))
}
STRUCTURES = {
    name: types
    for types in (common.ffi, uapi.ffi)
    for name in types.list_types()[1]
    if name.startswith("kvm_")
}


def _run_c(tmp_path: Path, body: list[str]) -> list[str]:
    """The output of a C program whose main is `body`."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler: apt install gcc")
    if not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("needs <linux/kvm.h>: apt install linux-libc-dev")
    source = tmp_path / "check.c"
    head = [
        "#include <stddef.h>",
        "#include <stdio.h>",
        "#include <linux/kvm.h>",
        "int main(void) {",
    ]
    source.write_text("\n".join([*head, *body, "return 0; }", ""]))
    program = tmp_path / "check"
    subprocess.run([compiler, "-w", "-o", program, source], check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


def test_every_number_is_the_headers(tmp_path: Path) -> None:
    body = []
    for name in NUMBERS:
        body += [f"#ifdef {name}", f'printf("{name} %lld\\n", (long long)({name}));', "#endif"]
    found = {line.split()[0]: int(line.split()[1]) for line in _run_c(tmp_path, body)}
    wrong = {name: value for name, value in found.items() if NUMBERS[name] != value}
    assert not wrong, "the header says so"
    assert set(NUMBERS) - set(found) <= NEWER
    assert len(found) > 200


def test_every_structure_and_field_lies_where_the_headers_say(tmp_path: Path) -> None:
    body, expected = [], {}
    for name, ffi in STRUCTURES.items():
        c_type = ffi.typeof(f"struct {name}")
        body.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
        expected[name] = ffi.sizeof(c_type)
        for path, offset, size in fields(ffi, c_type):
            guard = FIELD_NEEDS.get(path.split(".")[0])
            what = f"((struct {name} *)0)->{path}"
            # An array's size shows in the offset of what follows it.
            c_size = f"sizeof({what})" if size >= 0 else "(size_t)0"
            place = f"offsetof(struct {name}, {path}) * 65536 + {c_size}"
            line = f'printf("{name}.{path} %zu\\n", {place});'
            body += [f"#ifdef {guard}", line, "#endif"] if guard else [line]
            expected[f"{name}.{path}"] = offset * 65536 + max(size, 0)
    found = {line.split()[0]: int(line.split()[1]) for line in _run_c(tmp_path, body)}
    wrong = {key: (expected[key], value) for key, value in found.items() if expected[key] != value}
    assert not wrong, "(ours, the header's), offset * 65536 + size"
    missing = set(expected) - set(found)
    assert all(key.split(".")[1] in FIELD_NEEDS for key in missing)
    assert len(found) > 300


def test_the_generated_modules_are_what_the_generator_makes(tmp_path: Path) -> None:
    pytest.importorskip("cffi", reason="needs cffi's parser to regenerate")
    build.generate(tmp_path)
    fresh = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.py")}
    assert len(fresh) == 1 + len(build.architectures()) == 3
    for path in fresh:
        committed = (build.KVM / path).read_text()
        assert (tmp_path / path).read_text() == committed, "run: python -m pyvmm.kvm.uapi.build"


def test_running_needs_no_c_parser() -> None:
    code = (
        "import sys, pyvmm.kvm.system, pyvmm.kvm.loop, pyvmm.kvm.x86.boot_vcpu;"
        "sys.exit(bool({'cffi', 'pycparser', 'asyncio', 'subprocess'} & set(sys.modules)))"
    )
    import sys

    subprocess.run([sys.executable, "-c", code], check=True)
