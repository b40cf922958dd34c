"""An arm64 guest's boot, on any machine: the Image in all its wrappings, hostile ones too, and the
device tree, which dtc(1) reads and writes again, byte by byte."""

from __future__ import annotations

import gzip
import itertools
import os
import re
import shutil
import struct
import subprocess
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import zstandard
from boot_images import arm64_image as kernel_bytes
from boot_images import zboot

from pyvmm.boot import arm64 as boot
from pyvmm.boot.arm64 import fdt, image, layout
from pyvmm.boot.arm64.kernel_file import config_of, release_of, unpack_image
from pyvmm.boot.image_file import ImageFile
from pyvmm.bus import Bus
from pyvmm.errors import ConfigError
from pyvmm.kvm.arm64 import vgic
from pyvmm.machine.board.arm64 import Arm64Board
from pyvmm.machine.board.arm64 import layout as board_layout
from pyvmm.memory import GuestMemory

MIB = 1 << 20
RAM = layout.RAM

needs_dtc = pytest.mark.skipif(
    shutil.which("dtc") is None, reason="needs dtc (package device-tree-compiler)"
)


def put(tmp_path: Path, data: bytes, name: str = "Image") -> str:
    path = tmp_path / name
    path.write_bytes(data)
    return str(path)


def load(kernel: str, *, memory: int = 64 * MIB, initrd: str | None = None, cpus: int = 1, **more):
    board = Arm64Board()
    ram = GuestMemory(board.ram_ranges(memory))
    settings = {"cmdline": "console=ttyS0", "slots": board.virtio_slots(2), "discovery": "auto"}
    return ram, board.load(ram, kernel=kernel, initrd=initrd, cpus=cpus, **(settings | more))


PLAIN = kernel_bytes(b"\1" * (MIB + 5))
WRAPPED = {
    "plain": PLAIN,
    "gzip": gzip.compress(PLAIN),
    "zstd": zstandard.compress(PLAIN),
    "zboot with gzip": zboot(gzip.compress(PLAIN)),
    "zboot with zstd and the size after it": zboot(zstandard.compress(PLAIN) + b"\5\0\x10\0"),
}


@pytest.mark.parametrize("wrapping", WRAPPED)
def test_the_image_lies_at_the_start_of_the_ram(tmp_path: Path, wrapping: str) -> None:
    ram, entry = load(put(tmp_path, WRAPPED[wrapping]))
    assert entry.pc == RAM
    assert ram.read(RAM, len(PLAIN)) == PLAIN
    assert ram.read(RAM + len(PLAIN), 16) == bytes(16)
    unpack_image(put(tmp_path, WRAPPED[wrapping]), str(tmp_path / "unpacked"))
    assert (tmp_path / "unpacked").read_bytes() == PLAIN


def test_the_text_offset_is_kept(tmp_path: Path) -> None:
    ram, entry = load(put(tmp_path, kernel_bytes(text_offset=0x8_0000)))
    assert entry.pc == RAM + 0x8_0000
    assert ram.read(entry.pc + image.HEADER_SIZE, 4) == b"body"


HOSTILE = {
    "nothing": (b"\0" * 4096, "is not an Image for arm64"),
    "short": (b"ARM\x64", "is not an Image for arm64"),
    "cut off in the header": (kernel_bytes()[:60], "is not an Image for arm64"),
    "big-endian": (kernel_bytes(flags=1), "big-endian"),
    "without a size": (kernel_bytes(size=0), "Linux 3.17"),
    "a wild offset": (kernel_bytes(text_offset=2 * MIB), "text_offset is 0x200000"),
    "an offset within a page": (kernel_bytes(text_offset=0x8_0010), "text_offset is 0x80010"),
    "a huge offset": (kernel_bytes(text_offset=1 << 63), "text_offset"),
    "more memory than there is": (kernel_bytes(size=256 * MIB), "give it --memory 256M"),
    "all the memory in the world": (kernel_bytes(size=(1 << 64) - 1), "is the file damaged?"),
    "larger than it says": (kernel_bytes(b"x" * 9000, size=4096), "more than the 4096 bytes"),
    "packed, larger than it says": (
        gzip.compress(kernel_bytes(bytes(64 * MIB), size=4 * MIB)),
        "more than the 4194304 bytes",
    ),
    "packed in nothing": (gzip.compress(b""), "not an Image for arm64"),
    "something else in gzip": (gzip.compress(b"hello" * 100), "not an Image for arm64"),
    "damaged gzip": (gzip.compress(PLAIN)[:100] + b"\xff" * 500, "damaged"),
    "damaged zstd": (zstandard.compress(PLAIN)[:50] + b"\xff" * 500, "damaged"),
    "an empty payload": (zboot(b""), "truncated"),
    "a payload past the end": (zboot(b"x", offset=1 << 31), "truncated"),
    "a payload that is too long": (zboot(b"x", size=0xFFFF_FFFF), "truncated"),
    "zboot in xz": (zboot(b"\xfd7zXZ\0" * 9, b"xz"), "compressed by xz"),
    "zboot in \\x1b": (zboot(b"\0" * 99, b"\x1b[31m"), "compressed by something unknown"),
    "zboot in nothing": (zboot(b"\0" * 99, b""), "compressed by something unknown"),
    "zboot in gzip that is none": (
        zboot(b"\0" * 99, b"gzip"),
        "damaged: its payload is not in the gzip that it says; copy or build it again",
    ),
    "zboot in zstd that is none": (zboot(b"\0" * 99, b"zstd22"), "not in the zstd22 that it says"),
    "an initrd": (b"070701" + b"0" * 200, "give it to --initrd"),
    "a disk": (b"QFI\xfb" + bytes(600), "--disk"),
    "a bzImage": (bytes(0x202) + b"HdrS" + bytes(600), "a kernel for x86; use --arch x86_64"),
    "vmlinux of x86": (
        b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<2H", 2, 62) + bytes(100),
        "an ELF kernel for x86; use --arch x86_64",
    ),
    "an Image of RISC-V": (kernel_bytes(magic=b"RSC\x05"), "a kernel for RISC-V"),
    "zboot of RISC-V": (
        zboot(gzip.compress(kernel_bytes(magic=b"RSC\x05"))),
        "a kernel for RISC-V; use one for arm64",
    ),
    "vmlinux of RISC-V": (
        b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<2H", 2, 243) + bytes(100),
        "an ELF file for RISC-V; use one for arm64",
    ),
    "vmlinux of s390": (
        b"\x7fELF\2\2\1" + bytes(9) + struct.pack(">2H", 2, 22) + bytes(100),
        "an ELF file for s390; use one for arm64",
    ),
    "vmlinux of arm64": (
        b"\x7fELF\2\1\1" + bytes(9) + struct.pack("<2H", 2, 183) + bytes(100),
        "use the Image that is built beside vmlinux",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_row55_what_is_no_image_is_said_in_a_line(tmp_path: Path, what: str) -> None:
    data, said = HOSTILE[what]
    with pytest.raises(ConfigError) as caught:
        load(put(tmp_path, data))
    text = str(caught.value)
    assert said in text
    assert text.startswith("--kernel: ") and text.isprintable()


@pytest.mark.parametrize("length", [*range(1, 99, 7), 200, 1000])
@pytest.mark.parametrize("wrapping", ["plain", "gzip", "zboot with gzip"])
def test_row53_a_file_that_was_cut_off_never_crashes(
    tmp_path: Path, wrapping: str, length: int
) -> None:
    path = put(tmp_path, WRAPPED[wrapping][:length])
    try:
        load(path)
    except ConfigError:
        return
    # An Image has no length of its own: a whole header is all that can be asked for.
    assert wrapping == "plain" and length >= image.HEADER_SIZE


def test_the_release_and_the_configuration(tmp_path: Path) -> None:
    body = b"x" * 70_000 + b"Linux version 6.1.0-9-arm64 (debian" + bytes(100)
    packed = b"IKCFG_ST" + gzip.compress(b"CONFIG_VIRTIO_MMIO=m\n") + b"IKCFG_ED"
    for data in (kernel_bytes(body + packed), gzip.compress(kernel_bytes(body + packed))):
        path = put(tmp_path, data)
        assert release_of(path) == "6.1.0-9-arm64"
        assert config_of(path) == "CONFIG_VIRTIO_MMIO=m\n"
    assert release_of(put(tmp_path, kernel_bytes())) == ""


@pytest.mark.parametrize("wrapping", ["zstd", "sparse"])
def test_a_kernel_without_end_is_not_read_to_its_end(tmp_path: Path, wrapping: str) -> None:
    head = kernel_bytes(bytes(MIB), size=1 << 62)
    if wrapping == "zstd":
        packer = zstandard.ZstdCompressor(level=1).compressobj()
        zeros = (packer.compress(bytes(64 * MIB)) for _ in range(17))
        path = put(tmp_path, b"".join([packer.compress(head), *zeros, packer.flush()]))
    else:
        path = put(tmp_path, head)
        os.truncate(path, 1 << 40)
    for read in (release_of, config_of):
        with pytest.raises(ConfigError, match="more than the 1073741824 bytes that a kernel may"):
            read(path)


def test_nothing_is_left_of_a_kernel_that_cannot_be_unpacked(tmp_path: Path) -> None:
    path = put(tmp_path, gzip.compress(kernel_bytes(bytes(8 * MIB), size=MIB)))
    with pytest.raises(ConfigError, match="more than"):
        unpack_image(path, str(tmp_path / "unpacked"))
    assert [one.name for one in tmp_path.iterdir()] == ["Image"]


# --- initrd and memory ----------------------------------------------------------------------------


def test_an_initrd_lies_below_the_trees(tmp_path: Path) -> None:
    initrd = put(tmp_path, b"i" * 10_000, "initrd")
    ram, entry = load(put(tmp_path, PLAIN), initrd=initrd)
    trees = sorted(entry.trees.values())
    assert len(trees) == layout.TREES and all(at % 8 == 0 for at in trees)
    blob = tree_of(ram, entry, 3)
    start, end = (number(blob, "/chosen", f"linux,initrd-{what}") for what in ("start", "end"))
    assert ram.read(start, end - start) == b"i" * 10_000
    assert RAM + 4 * MIB <= start < end <= trees[0]
    assert trees[-1] + layout.TREE_SIZE <= RAM + 64 * MIB


@pytest.mark.parametrize(
    ("initrd", "said"),
    [
        (b"i" * (64 * MIB), "give it --memory"),
        (kernel_bytes(), "is a kernel; give it to --kernel"),
        (b"\x7fELF" + bytes(100), "is a kernel; give it to --kernel"),
        (bytes(0x202) + b"HdrS", "is a kernel; give it to --kernel"),
        (b"070701" + b"i" * 200, "is a damaged initrd: its cpio archive breaks off at byte 0"),
    ],
)
def test_row56_an_initrd_that_cannot_be_one(tmp_path: Path, initrd: bytes, said: str) -> None:
    with pytest.raises(ConfigError, match="--initrd") as caught:
        load(put(tmp_path, PLAIN), initrd=put(tmp_path, initrd, "initrd"))
    assert said in str(caught.value)


def test_row56_the_memory_that_is_asked_for_is_enough(tmp_path: Path) -> None:
    kernel, initrd = put(tmp_path, PLAIN), put(tmp_path, b"i" * (64 * MIB), "initrd")
    with pytest.raises(ConfigError) as caught:
        load(kernel, initrd=initrd)
    wanted = int(str(caught.value).partition("--memory ")[2].partition("M")[0])
    load(kernel, initrd=initrd, memory=wanted * MIB)


def test_row56_no_room_for_the_trees(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no room for the kernel and the device tree"):
        load(put(tmp_path, kernel_bytes(size=31 * MIB)), memory=32 * MIB)


def test_a_device_tree_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest that there is has a hundredth of the room: with less it is told, and not cut."""
    most = {"cpus": board_layout.MAX_CPUS, "cmdline": "a" * layout.CMDLINE_MAX}
    slots = Arm64Board().virtio_slots(board_layout.VIRTIO_SLOTS)
    ram, entry = load(put(tmp_path, PLAIN), slots=slots, **most)  # type: ignore[arg-type]
    sizes = [len(tree_of(ram, entry, version)) for version in (3, 2)]
    assert max(sizes) < layout.TREE_MAX // 50
    monkeypatch.setattr(layout, "TREE_MAX", min(sizes) - 1)
    with pytest.raises(ConfigError, match=r"device tree has \d+ bytes, \d+ is the most") as caught:
        load(put(tmp_path, PLAIN), slots=slots, **most)  # type: ignore[arg-type]
    assert "--cmdline" in str(caught.value)


def test_more_vcpus_than_the_gic_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GICv2 tells each processor by a bit. That KVM has no other shows when the VM is there."""

    class OldGic:
        version = 2

        def close(self) -> None:
            pass

    board = Arm64Board()
    monkeypatch.setattr(vgic, "Vgic", lambda *rest: OldGic())
    vm = SimpleNamespace(check_extension=lambda number: 0)
    arguments = {"ports": Bus("port"), "mmio": Bus("mmio"), "sink": len}
    with (
        ExitStack() as closing,
        pytest.raises(ConfigError, match=r"--cpus: .*a GICv2, which serves 8 vCPUs; ask for fewer"),
    ):
        board.build(None, vm, entry=None, cpus=9, closing=closing, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "most"), [(36, 63), (40, 1023), (0, 1023)])
def test_more_memory_than_a_guest_has_addresses_for(bits: int, most: int) -> None:
    """All of it is behind the devices. A KVM that does not say has 40 bits."""

    class Kvm:
        def check_extension(self, number: int) -> int:
            return bits

        def create_vm(self, kind: int) -> int:
            return kind

    def create(gibibytes: int) -> object:
        end = RAM + (gibibytes << 30)
        memory = SimpleNamespace(regions=[SimpleNamespace(guest_addr=RAM, end=end)])
        return Arm64Board().create_vm(Kvm(), memory)  # type: ignore[arg-type]

    assert create(most) == bits
    with pytest.raises(ConfigError, match=f"--memory: .*; give it --memory {most}G or less"):
        create(most + 1)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"discovery": "acpi"}, "--discovery: arm64 guests are told"),
        ({"cpus": 65}, "--cpus: an arm64 guest has 64 vCPUs at most"),
    ],
)
def test_what_the_machine_cannot_do(tmp_path: Path, more: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(put(tmp_path, PLAIN), **more)  # type: ignore[arg-type]
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"cmdline": "a" * 3000}, "at most 2047"),
        ({"cmdline": "a\0b"}, "a NUL"),
        ({"cmdline": "a\nb"}, "a newline"),
    ],
)
def test_row57_a_command_line_is_never_cut(
    tmp_path: Path, more: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(put(tmp_path, PLAIN), **more)  # type: ignore[arg-type]
    assert said in str(caught.value)


# --- the device tree ------------------------------------------------------------------------------


def tree_of(ram: GuestMemory, entry, version: int) -> bytes:
    at = entry.trees[version]
    [size] = struct.unpack(">I", ram.read(at + 4, 4))
    return ram.read(at, size)


def dtc(data: bytes, came: str, goes: str) -> bytes:
    done = subprocess.run(
        ["dtc", "-q", "-I", came, "-O", goes], input=data, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def get(blob: bytes, node: str, name: str, kind: str = "x") -> list[str]:
    done = subprocess.run(
        ["fdtget", "-t", kind, "/dev/stdin", node, name], input=blob, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().split()


def number(blob: bytes, node: str, name: str) -> int:
    high, low = (int(word, 16) for word in get(blob, node, name))
    return high << 32 | low


@needs_dtc
@pytest.mark.parametrize(("version", "cpus"), list(itertools.product((3, 2), (1, 4, 64))))
def test_dtc_reads_the_tree_and_writes_the_same(tmp_path: Path, version: int, cpus: int) -> None:
    ram, entry = load(put(tmp_path, PLAIN), cpus=cpus)
    blob = tree_of(ram, entry, version)
    assert dtc(dtc(blob, "dtb", "dts"), "dts", "dtb") == blob


@needs_dtc
def test_dtc_has_nothing_to_warn_of(tmp_path: Path) -> None:
    ram, entry = load(put(tmp_path, PLAIN), cpus=2)
    for version in (2, 3):
        done = subprocess.run(
            ["dtc", "-I", "dtb", "-O", "dtb", "-o", "/dev/null"],
            input=tree_of(ram, entry, version),
            capture_output=True,
        )
        assert done.returncode == 0
        assert done.stderr.decode() == ""


@needs_dtc
def test_the_tree_tells_what_the_board_has(tmp_path: Path) -> None:
    ram, entry = load(put(tmp_path, PLAIN), cpus=20, cmdline='a="b c" root=/dev/vda')
    blob = tree_of(ram, entry, 3)
    assert get(blob, "/chosen", "bootargs", "s") == ['a="b', 'c"', "root=/dev/vda"]
    assert get(blob, "/cpus/cpu@103", "reg") == ["103"]
    assert get(blob, "/cpus/cpu@103", "enable-method", "s") == ["psci"]
    assert get(blob, f"/memory@{RAM:x}", "reg") == ["0", "40000000", "0", "4000000"]
    assert get(blob, "/virtio_mmio@a001000", "interrupts") == ["0", "11", "1"]
    assert get(blob, "/timer", "interrupts")[:3] == ["1", "d", "8"]
    assert get(blob, "/interrupt-controller@8000000", "compatible", "s") == ["arm,gic-v3"]
    pcie = f"/pcie@{board_layout.PCI_ECAM:x}"
    assert get(blob, pcie, "compatible", "s") == ["pci-host-ecam-generic"]
    window = ["10000000", "0", "10000000"]  # there, here, and its size
    assert get(blob, pcie, "ranges") == ["2000000", "0", window[0], "0", *window]
    its = f"/interrupt-controller@8000000/msi-controller@{board_layout.GIC_ITS:x}"
    assert get(blob, pcie, "msi-map")[1] == get(blob, its, "phandle")[0]
    generation = boot.generation_id(ram)
    place = [f"{generation:x}", "0", "1000"]
    assert get(blob, f"/rng@{generation:x}", "reg")[1:] == place
    assert get(blob, f"/reserved-memory/generation@{generation:x}", "reg")[1:] == place
    assert get(blob, f"/reserved-memory/generation@{generation:x}", "no-map") == []
    before = ram.read(generation, 16)
    boot.tell_of_copy(ram)
    assert before != bytes(16) and ram.read(generation, 16) not in (bytes(16), before)
    assert generation >= max(entry.trees.values()) + layout.TREE_MAX
    old = tree_of(ram, entry, 2)
    frame = f"/interrupt-controller@8000000/msi-controller@{board_layout.GIC_FRAME:x}"
    assert get(old, frame, "compatible", "s") == ["arm,gic-v2m-frame"]
    assert get(old, frame, "reg") == ["0", f"{board_layout.GIC_FRAME:x}", "0", "1000"]
    assert get(old, pcie, "msi-map")[1] == get(old, frame, "phandle")[0]
    assert get(old, "/interrupt-controller@8000000", "compatible", "s") == ["arm,cortex-a15-gic"]
    assert get(old, "/timer", "interrupts")[:3] == ["1", "d", "ff08"]  # all eight CPUs'
    again = tree_of(*load(put(tmp_path, PLAIN)), 3)
    assert get(again, "/chosen", "rng-seed") != get(blob, "/chosen", "rng-seed")


@needs_dtc
def test_names_that_end_alike_and_values_of_any_length() -> None:
    root = fdt.Node("", {"compatible": b"a\0", "bytes": b"\1\2\3", "reg": b""})
    child = root.child("child", {"long-bytes": b"\0" * 7, "bytes": fdt.cells(1, 2)})
    child.child("a" * 29, {"reg": fdt.places((1 << 40, 5))})
    blob = fdt.flatten(root)
    assert blob.count(b"bytes\0") == 2  # "bytes" came before "long-bytes"
    assert dtc(dtc(blob, "dtb", "dts"), "dts", "dtb") == blob


def test_a_tree_that_cannot_be_is_refused() -> None:
    root = fdt.Node("")
    root.child("twice")
    root.child("twice")
    with pytest.raises(ValueError, match="have one name"):
        fdt.flatten(root)
    with pytest.raises(ValueError, match="NUL"):
        fdt.words("a\0b")


def test_the_header_is_parsed_alone(tmp_path: Path) -> None:
    with ImageFile(put(tmp_path, PLAIN), "--kernel") as file:
        assert image.parse(file, PLAIN[:64]) == image.Image(0, 4 * MIB)


def test_the_places_of_the_document_are_the_boards() -> None:
    text = (Path(__file__).parents[3] / "docs/arm64.md").read_text()
    rows = re.findall(r"^\| ([A-Z_]+) \| (0x[0-9A-F_]+) \|", text, re.MULTILINE)
    assert len(rows) == 11
    for name, address in rows:
        assert getattr(board_layout, name) == int(address, 0)
