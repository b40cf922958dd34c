"""The vmlinux in a bzImage, for each way a kernel can be compressed."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import resource
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from boot_images import CODE, Elf, Load, bzimage

from pyvmm.boot.image_file import ImageFile, write_whole
from pyvmm.boot.unpack import unpack
from pyvmm.boot.x86.payload import unpack_vmlinux
from pyvmm.errors import ConfigError

VMLINUX = Elf(loads=[Load(data=CODE * 40)]).build() + b"relocations"
SIZE = len(VMLINUX).to_bytes(4, "little")
WAYS = ["gzip", "xz", "lzma", "bzip2", "lz4", "lzop", "zstd"]
MIB = 1 << 20
X86_XZ = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]


def through(*command: str, data: bytes = VMLINUX) -> bytes:
    if not shutil.which(command[0]):
        pytest.skip(f"no {command[0]}: apt install {command[0]}")
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def compressed(way: str) -> bytes:
    if way == "gzip":
        return gzip.compress(VMLINUX)
    if way == "xz":
        return lzma.compress(VMLINUX, check=lzma.CHECK_CRC32, filters=X86_XZ) + SIZE
    if way == "lzma":
        return lzma.compress(VMLINUX, format=lzma.FORMAT_ALONE) + SIZE
    if way == "bzip2":
        return bz2.compress(VMLINUX) + SIZE
    if way == "lz4":
        return through("lz4", "-l", "-c") + SIZE
    if way == "lzop":
        return through("lzop", "-c") + SIZE
    return zstandard.ZstdCompressor(write_checksum=True).compress(VMLINUX) + SIZE


def image(payload: bytes, *, offset: int = 0x300, length: int | None = None) -> bytes:
    code = bytes(offset) + payload + bytes(100)
    return bzimage(code=code, payload=(offset, len(payload) if length is None else length))


def unpacked(directory: Path, kernel: bytes) -> bytes:
    (directory / "vmlinuz").write_bytes(kernel)
    unpack_vmlinux(str(directory / "vmlinuz"), str(directory / "vmlinux"))
    return (directory / "vmlinux").read_bytes()


def refused(directory: Path, kernel: bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        unpacked(directory, kernel)
    assert not list(directory.glob("vmlinux*")), "nothing half-written stays"
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("way", WAYS)
def test_every_compression(tmp_path: Path, way: str) -> None:
    assert unpacked(tmp_path, image(compressed(way))) == VMLINUX


@pytest.mark.parametrize("way", WAYS)
def test_damaged_payload(tmp_path: Path, way: str) -> None:
    payload = bytearray(compressed(way))
    for offset in range(20, min(len(payload) - 8, 120)):
        payload[offset] ^= 0x5A
    text = refused(tmp_path, image(bytes(payload)))
    assert "damaged" in text or "not an ELF" in text


@pytest.mark.parametrize("way", ["gzip", "xz", "lzma", "bzip2"])
def test_a_payload_that_ends_with_a_whole_piece_is_cut_off_all_the_same(
    tmp_path: Path, way: str
) -> None:
    """Without its last bytes it has given all that it unpacks to: 1 MiB, one piece."""
    pack = {"gzip": gzip.compress, "bzip2": bz2.compress}.get(way)
    forms = {"xz": lzma.FORMAT_XZ, "lzma": lzma.FORMAT_ALONE}
    payload = pack(bytes(MIB)) if pack else lzma.compress(bytes(MIB), format=forms[way])
    (tmp_path / "kernel").write_bytes(payload)
    with ImageFile(str(tmp_path / "kernel"), "--kernel") as kernel:
        assert sum(map(len, unpack(kernel, payload))) == MIB
        for cut in (1, 4, 8):
            with pytest.raises(ConfigError, match="is cut off"):
                list(unpack(kernel, payload[:-cut]))


def test_payload_outside_the_file(tmp_path: Path) -> None:
    payload = compressed("gzip")
    for length in (0, 1 << 30, 0xFFFF_FFFF):
        assert "payload does not lie within" in refused(tmp_path, image(payload, length=length))


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    text = refused(tmp_path, image(compressed("xz")[:-4] + b"\xff\xff\xff\xff"))
    assert "damaged" in text
    assert "does not unpack to" in refused(tmp_path, image(compressed("xz")[:-4] + b"\x10\0\0\0"))


def pieces(size: int) -> Iterator[bytes]:
    """An ELF's magic, and zeros."""
    yield b"\x7fELF".ljust(MIB, b"\0")
    for _ in range(size // MIB - 1):
        yield bytes(MIB)


def bomb(way: str, size: int) -> bytes:
    """`size` bytes that compress well, without the field that says how many."""
    if way in ("lz4", "lzop"):
        options = ("-l",) if way == "lz4" else ()
        return through(way, *options, "-c", data=b"".join(pieces(size)))
    packers = {
        "gzip": lambda: zlib.compressobj(1, wbits=31),
        "xz": lambda: lzma.LZMACompressor(check=lzma.CHECK_CRC32, filters=X86_XZ),
        "lzma": lambda: lzma.LZMACompressor(format=lzma.FORMAT_ALONE, preset=1),
        "bzip2": bz2.BZ2Compressor,
        "zstd": lambda: zstandard.ZstdCompressor().compressobj(),
    }
    one = packers[way]()
    return b"".join([*map(one.compress, pieces(size)), one.flush()])


# Unpacks sys.argv[1] to sys.argv[2]; says what it had of memory, and its programs.
MEASURE = """
import re, resource, sys
from pyvmm.machine.board.__main__ import main
code = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(peak, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)
"""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("says", [128, 16])
def test_what_a_bomb_costs(tmp_path: Path, way: str, says: int) -> None:
    """Of 128 MiB, said or not said: no more in memory than a window, no more on the disk than is
    said."""
    stored = bomb(way, 128 * MIB)
    size = (says * MIB).to_bytes(4, "little")
    payload = stored[:-4] + size if way == "gzip" else stored + size
    (tmp_path / "vmlinuz").write_bytes(image(payload))
    output = tmp_path / "vmlinux"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path / "vmlinuz", output],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (says * MIB, says * MIB)),
    )
    peak, programs = map(int, done.stdout.split())
    assert peak < 100 << 10 and programs < 100 << 10, done.stdout
    if says == 128:
        assert done.returncode == 0 and output.stat().st_size == 128 * MIB
    else:
        assert done.returncode == 1 and f"not unpack to the {16 * MIB} bytes" in done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["vmlinuz"]


def test_a_window_that_wants_all_memory(tmp_path: Path) -> None:
    # A zstd frame with a window of 1 GiB (RFC 8878, 3.1.1.1.2), of which the first block is raw.
    frame = b"\x28\xb5\x2f\xfd" + b"\x00\xa0" + (1 | 512 << 3).to_bytes(3, "little") + bytes(512)
    assert "too much memory" in refused(tmp_path, image(frame + SIZE))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 512 << 20}]
    stored = lzma.compress(VMLINUX, filters=filters)
    assert "Memory usage limit" in refused(tmp_path, image(stored + SIZE))


def test_unknown_compression_and_what_is_no_elf(tmp_path: Path) -> None:
    assert "unknown kind" in refused(tmp_path, image(b"whatever this is"))
    assert "not an ELF" in refused(tmp_path, image(gzip.compress(b"no kernel")))


def test_an_elf_and_other_files(tmp_path: Path) -> None:
    (tmp_path / "elf").write_bytes(VMLINUX)
    with pytest.raises(ConfigError, match="is an ELF already"):
        unpack_vmlinux(str(tmp_path / "elf"), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="No such file"):
        unpack_vmlinux(str(tmp_path / "absent"), str(tmp_path / "out"))


def test_missing_program_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = image(compressed("lz4"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "apt install lz4" in refused(tmp_path, kernel)


def test_the_command(tmp_path: Path) -> None:
    kernel, output = tmp_path / "vmlinuz", tmp_path / "vmlinux"
    kernel.write_bytes(image(compressed("gzip")))
    module = [sys.executable, "-m", "pyvmm.machine.board"]
    assert subprocess.run([*module, str(kernel), str(output)], check=False).returncode == 0
    assert output.read_bytes() == VMLINUX
    failed = subprocess.run(
        [*module, str(tmp_path), str(output)], check=False, capture_output=True, text=True
    )
    assert failed.returncode == 1 and "a directory" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert subprocess.run(module, check=False, capture_output=True).returncode == 2


# A piece of 1 MiB out of a few bytes must not cost what is left of the payload each time.
def test_a_piece_costs_no_copy_of_the_rest(tmp_path: Path) -> None:
    stored = gzip.compress(bytes(8 * MIB)) + bytes(64 * MIB)
    (tmp_path / "vmlinuz").write_bytes(b"x")
    with ImageFile(str(tmp_path / "vmlinuz"), "--kernel") as kernel:
        tracemalloc.start()
        try:
            assert sum(map(len, unpack(kernel, stored))) == 8 * MIB
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert most < 8 * MIB, most


def test_a_link_in_the_place_of_a_part_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"mine")
    (tmp_path / f"out.{os.getpid()}.part").symlink_to(other)  # which can be guessed
    write_whole(str(tmp_path / "out"), [b"kernel"])
    assert (tmp_path / "out").read_bytes() == b"kernel" and other.read_bytes() == b"mine"
    assert not (tmp_path / "out").is_symlink()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
