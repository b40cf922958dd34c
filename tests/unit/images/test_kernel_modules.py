"""Modules of any kernel: found, read, and put behind the initramfs."""

from __future__ import annotations

import gzip
import lzma
import os
import random
import re
import struct
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from boot_images import elf_object, module

from pyvmm.errors import ConfigError
from pyvmm.host import confinement
from pyvmm.images import fresh_initramfs, made_files, module_file, modules, tree_modules
from pyvmm.images.modules import UnreadTree

RELEASE = "6.9.1-mine"


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    ".zst": zstandard.compress,
    ".gz": gzip.compress,
}


def build_tree(folder: Path, suffix: str = ".o") -> Path:
    (folder / "include/config").mkdir(parents=True)
    (folder / "include/config/kernel.release").write_text(f"{RELEASE}\n")
    files = {
        "drivers/virtio/virtio_mmio": module(),
        "drivers/block/virtio_blk": module(),
        "fs/jbd2/jbd2": module(),
        "fs/mbcache": module(),
        "fs/ext4/ext4": module("mbcache,jbd2", "pre: crc32c"),
        "crypto/crc32c_generic": module(),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.ko").write_bytes(content)
    (folder / "modules.order").write_text("".join(f"{name}{suffix}\n" for name in files))
    (folder / "modules.builtin").write_text("kernel/drivers/virtio/virtio.ko\n")
    return folder


@pytest.mark.parametrize("suffix", [".o", ".ko"])
def test_a_build_tree_says_what_its_modules_need(tmp_path: Path, suffix: str) -> None:
    tree = modules.find(str(build_tree(tmp_path, suffix)), RELEASE)
    assert tree.release == RELEASE
    assert tree.load_order(["ext4"]) == ["crc32c_generic", "jbd2", "mbcache", "ext4"]
    assert tree.load_order(["virtio"]) == []
    with pytest.raises(ConfigError, match=r"6\.9\.1-mine has no module 'xfs'"):
        tree.load_order(["xfs"])


@pytest.mark.parametrize("packer", PACKERS)
def test_modules_that_depmod_has_not_seen_packed_in_any_way(tmp_path: Path, packer: str) -> None:
    place = tmp_path / "usr/lib/modules" / RELEASE
    for name, content in {"a/one": module("two"), "two": module()}.items():
        path = place / f"kernel/{name}.ko{packer}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PACKERS[packer](content))
    (place / "modules.builtin").write_text("")
    for given in (tmp_path, tmp_path / "usr/lib/modules", place):
        tree = modules.find(str(given), RELEASE)
        assert tree.load_order(["one"]) == ["two", "one"]
        assert tree.contents("one") == module("two")


@pytest.mark.parametrize("packer", [".xz", ".zst", ".gz"])
def test_a_packed_module_that_is_damaged_or_without_end(
    tmp_path: Path, packer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules, "_MOST_MODULE", 1 << 20)
    whole = PACKERS[packer](module() + bytes(9000))
    for bad in (whole[: len(whole) // 2], b"junk", PACKERS[packer](bytes(2 << 20))):
        (tmp_path / f"bad.ko{packer}").write_bytes(bad)
        tree = UnreadTree(str(tmp_path), {"bad": f"bad.ko{packer}"}, RELEASE)
        with pytest.raises(ConfigError, match=rf"bad\.ko{packer}: a kernel module is"):
            tree.load_order(["bad"])


@pytest.mark.parametrize("packer", [".xz", ".zst", ".gz"])
def test_a_packed_module_that_lacks_its_end(tmp_path: Path, packer: str) -> None:
    for pack in (PACKERS[packer], zstd_in_pieces, zstd_with_sum)[: 1 + 2 * (packer == ".zst")]:
        whole = pack(module() + random.Random(1).randbytes(9000))
        for less in (1, 2, 5):
            (tmp_path / f"bad.ko{packer}").write_bytes(whole[:-less])
            tree = UnreadTree(str(tmp_path), {"bad": f"bad.ko{packer}"}, RELEASE)
            with pytest.raises(ConfigError, match=r"a kernel module is (cut short|damaged)"):
                tree.load_order(["bad"])


def zstd_in_pieces(data: bytes) -> bytes:
    """As zstd(1) makes of what comes by a pipe: it does not say how much there is."""
    one = zstandard.ZstdCompressor().compressobj()
    return one.compress(data) + one.flush()


def zstd_with_sum(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\x7fELF",
        b"text",
        module()[:80],
        b"\x7fELF\2\1" + bytes(99),
        module()[:40] + b"\xff" * 8 + module()[48:],  # where its section headers are
    ],
)
def test_what_is_no_module_is_named(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "bad.ko").write_bytes(bad)
    tree = UnreadTree(str(tmp_path), {"bad": "bad.ko"}, RELEASE)
    with pytest.raises(ConfigError, match=r"bad\.ko is not a kernel module"):
        tree.load_order(["bad"])


def test_modules_that_need_each_other_end(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.ko").write_bytes(module(other))
    tree = UnreadTree(str(tmp_path), {"a": "a.ko", "b": "b.ko"}, "")
    assert tree.load_order(["a"]) == ["b", "a"]
    assert tree.release == RELEASE  # by what the modules say


def test_of_several_kernels_the_right_one(tmp_path: Path) -> None:
    for release in ("5.1", "6.9"):
        (tmp_path / "lib/modules" / release / "kernel").mkdir(parents=True)
        (tmp_path / "lib/modules" / release / "modules.order").write_text("")
    assert modules.find(str(tmp_path), "6.9").release == "6.9"
    with pytest.raises(ConfigError, match=r"has the modules of 5\.1, 6\.9, and none of .* 7"):
        modules.find(str(tmp_path), "7")


def test_a_folder_without_modules(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--modules: there are no kernel modules in .*; name …"):
        modules.find(str(tmp_path), "")
    with pytest.raises(ConfigError, match="is not a directory"):
        modules.find(str(tmp_path / "missing"), "")


# --- the initramfs --------------------------------------------------------------------------------

LISTS = {
    "transport-mmio": ("virtio_mmio",),
    "virtio-2": ("virtio_blk",),
    "virtio-1": ("virtio_net",),
}


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fresh_initramfs, "_recipe", lambda arch: (b"BASE", LISTS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_archive_has_what_can_be_had(tmp_path: Path, recipe: None) -> None:
    tree = modules.find(str(build_tree(tmp_path)), RELEASE)
    path = Path(fresh_initramfs.make(tree, {"virtio-2": "for its disks"}))
    content = path.read_bytes()
    assert content.startswith(b"BASE070701")
    for name in (b"modules/virtio-2\0", b"modules/virtio_blk.ko\0", b"modules/fs-ext4\0"):
        assert name in content
    assert b"crc32c_generic\njbd2\nmbcache\next4\n" in content
    assert b"virtio-1" not in content  # this kernel has no virtio_net, and nobody asked for it
    assert fresh_initramfs.make(tree, {}) == str(path)  # equal content is one file


def test_what_only_a_debugger_reads_is_left_out(tmp_path: Path, recipe: None) -> None:
    """A kernel with CONFIG_DEBUG_INFO has modules of which it is nineteen twentieths."""
    folder = build_tree(tmp_path)
    content = {
        ".text": b"code" * 9,
        ".debug_info": b"TYPES" * 9000,
        ".modinfo": f"vermagic={RELEASE}\0".encode(),
        ".rela.debug_info": b"PLACES" * 9000,
        ".data": b"data" * 5,
    }
    debuggable = elf_object(content, alignment=16)
    (folder / "drivers/block/virtio_blk.ko").write_bytes(debuggable)
    loaded = module_file.for_loading(debuggable)
    assert len(loaded) < 1000
    # As readelf(1), which we did not write, sees it: the same numbers, and the same content.
    (tmp_path / "loaded.ko").write_bytes(loaded)
    for name in (".text", ".modinfo", ".data"):
        command = ["objcopy", "-O", "binary", f"--only-section={name}", "--set-section-flags"]
        files = (tmp_path / "loaded.ko", tmp_path / "section")
        subprocess.run([*command, f"{name}=alloc", *files], check=True)
        assert (tmp_path / "section").read_bytes() == content[name]
    shown = subprocess.run(
        ["readelf", "-SW", tmp_path / "loaded.ko"], check=True, capture_output=True, text=True
    )
    assert shown.stderr == ""
    rows = re.findall(r"\[ ?(\d)\] (\S+) +(\w+) +\w+ (\w+)", shown.stdout)
    dropped = [(number, kind) for number, name, kind, _ in rows if "debug" in name]
    assert dropped == [("2", "NULL"), ("4", "NULL")]
    assert all(int(offset, 16) % 16 == 0 for _, _, _, offset in rows)
    tree = modules.find(str(folder), RELEASE)
    archive = Path(fresh_initramfs.make(tree, {"virtio-2": "for its disks"})).read_bytes()
    assert loaded in archive and b"TYPES" not in archive


def test_modules_that_are_not_made_smaller() -> None:
    debuggable = elf_object({".debug_info": bytes(9000), ".text": b"code"})
    signed = debuggable + b"~Module signature appended~\n"
    cut, far = debuggable[:-70], bytearray(debuggable)
    start = struct.unpack_from("<Q", far, 40)[0]
    struct.pack_into("<Q", far, start + 2 * 64 + 32, 1 << 62)  # the size of .text
    wide = bytearray(debuggable)
    struct.pack_into("<Q", wide, start + 2 * 64 + 48, 1 << 62)  # its alignment
    past = bytearray(debuggable)
    struct.pack_into("<Q", past, 40, (1 << 64) - 1)  # where the section headers are
    fewer = bytearray(debuggable)
    struct.pack_into("<H", fewer, 60, struct.unpack_from("<H", fewer, 62)[0])  # none has the names
    damaged = (cut, bytes(far), bytes(wide), bytes(past), bytes(fewer), b"", b"text")
    for data in (module(), signed, *damaged):
        assert module_file.for_loading(data) == data


def test_sections_that_are_all_of_the_file_take_no_more_than_it() -> None:
    content = {f".{number}": b"" for number in range(500)}
    module = bytearray(elf_object({".debug_info": b"", **content}))
    start = struct.unpack_from("<Q", module, 40)[0]
    for section in range(2, 502):
        struct.pack_into("<QQ", module, start + section * 64 + 24, 0, len(module))
    data = bytes(module)
    tracemalloc.start()
    try:
        assert module_file.for_loading(data) == data
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data)
    finally:
        tracemalloc.stop()


def test_a_module_of_an_earlier_build_is_told(tmp_path: Path, recipe: None) -> None:
    """Whoever commits a change, and builds the kernel alone, has a new release and old modules."""
    folder = build_tree(tmp_path)
    path = folder / "drivers/block/virtio_blk.ko"
    path.write_bytes(module(release="6.9.1-g0123"))
    with pytest.raises(ConfigError) as caught:
        fresh_initramfs.make(modules.find(str(folder), RELEASE), {"virtio-2": "for its disks"})
    assert str(caught.value) == (
        f"--modules: {path} was built for Linux 6.9.1-g0123, and the kernel is {RELEASE}; "
        f"build it again: make -C {folder} modules"
    )
    # One that nobody needs is left out, and with versions of symbols the release does not count.
    for content, is_there in (
        (path.read_bytes(), False),
        (module("", "", "6.9", "modversions"), True),
    ):
        path.write_bytes(content)
        archive = fresh_initramfs.make(modules.find(str(folder), RELEASE), {})
        assert (b"virtio_blk.ko" in Path(archive).read_bytes()) == is_there


def test_an_installed_module_of_an_earlier_build_is_told(tmp_path: Path) -> None:
    place = tmp_path / "lib/modules" / RELEASE
    (place / "kernel").mkdir(parents=True)
    (place / "kernel/virtio_blk.ko").write_bytes(module(release="6.9.1-g0123"))
    (place / "modules.builtin").write_text("")
    with pytest.raises(ConfigError, match="; build and install it again: make modules modules_i"):
        modules.find(str(tmp_path), RELEASE).load_order(["virtio_blk"])


def test_all_that_is_missing_is_named_at_once(tmp_path: Path, recipe: None) -> None:
    tree = modules.find(str(build_tree(tmp_path)), RELEASE)
    needed = {"virtio-1": "for its network", "virtio-2": "for its disks"}
    with pytest.raises(ConfigError) as caught:
        fresh_initramfs.make(tree, needed, ["xfs"])
    text = str(caught.value)
    assert "virtio_net (for its network), xfs (for its root file system)" in text
    assert "virtio_blk" not in text and "6.9.1-mine has neither built in nor in" in text


def test_a_file_that_grows_too_large_leaves_nothing(tmp_path: Path, recipe: None) -> None:
    with pytest.raises(ConfigError, match="too large"):
        made_files.keep((bytes(1 << 20) for _ in range(9)), ".x", most=4 << 20)
    assert list((tmp_path / "cache/pyvmm/made").iterdir()) == []


# --- hostile trees --------------------------------------------------------------------------------


def installed(folder: Path, dep: bytes, **files: bytes) -> Path:
    """The modules that depmod has seen, by its list `dep`."""
    place = folder / "lib/modules" / RELEASE
    (place / "kernel").mkdir(parents=True)
    (place / "modules.dep").write_bytes(dep)
    (place / "modules.builtin").write_text("")
    for name, content in files.items():
        (place / f"kernel/{name}.ko").write_bytes(content)
    return place


def test_a_tree_of_deep_directories_is_no_deeper_for_us(tmp_path: Path) -> None:
    place = tmp_path / RELEASE
    (place / "kernel").mkdir(parents=True)
    (place / "modules.builtin").write_text("")
    (place / "kernel/z.ko").write_bytes(module())
    (place / "kernel/loop").symlink_to(".")
    depth = 1100  # beyond what Python's own functions call themselves
    folder = os.open(place / "kernel", os.O_RDONLY)
    for number in range(depth):
        os.mkdir("d", dir_fd=folder)
        below = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
        if number == 5:
            os.close(os.open("a.ko", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    try:
        tree = modules.find(str(tmp_path), RELEASE)
        assert isinstance(tree, UnreadTree)
        assert tree.paths == [f"kernel/{'d/' * 6}a.ko", "kernel/z.ko"]
    finally:
        subprocess.run(["rm", "-r", place / "kernel/d"], check=True)


@pytest.mark.parametrize(
    ("limit", "what"), [("_MOST_FILES", "files"), ("_MOST_MODULES", "modules")]
)
def test_a_tree_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, what: str
) -> None:
    place = tmp_path / RELEASE
    (place / "kernel").mkdir(parents=True)
    (place / "modules.order").write_text("")
    for name in "abc":
        (place / f"kernel/{name}.ko").write_bytes(module())
    monkeypatch.setattr(modules, limit, 5 if what == "files" else 3)
    assert modules.find(str(place), RELEASE).has("c")
    monkeypatch.setattr(modules, limit, 4 if what == "files" else 2)
    with pytest.raises(ConfigError, match=f"has more than . {what}"):
        modules.find(str(place), RELEASE)


@pytest.mark.parametrize("name", ["modules.order", "modules.builtin"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_list_that_is_no_file_is_not_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    path = build_tree(tmp_path) / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    tree = modules.find(str(tmp_path), RELEASE)
    assert tree.has("virtio_blk") == (name == "modules.builtin")


def test_a_list_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules, "_MOST_LIST", 1 << 20)
    place = installed(tmp_path, b"kernel/a.ko:\n" * (1 << 20 >> 3))
    with pytest.raises(ConfigError, match=r"modules\.dep: more than 1 MiB"):
        modules.find(str(place), RELEASE)


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../../../../../../../etc/passwd"])
def test_no_other_file_gets_into_a_guest(tmp_path: Path, recipe: None, path: str) -> None:
    """Neither by a path in the list nor by a link."""
    line = f"kernel/virtio_blk.ko: {path}\n{path}:\n"
    place = installed(tmp_path, line.encode(), virtio_blk=module())
    with pytest.raises(ConfigError, match="passwd is not a kernel module"):
        fresh_initramfs.make(modules.find(str(place), RELEASE), {"virtio-2": "for its disks"})
    (place / "kernel/virtio_blk.ko").unlink()
    (place / "kernel/virtio_blk.ko").symlink_to("/etc/passwd")
    (place / "modules.dep").write_text("kernel/virtio_blk.ko:\n")
    with pytest.raises(ConfigError, match=r"virtio_blk\.ko is not a kernel module"):
        fresh_initramfs.make(modules.find(str(place), RELEASE), {"virtio-2": "for its disks"})
    assert list((tmp_path / "cache/pyvmm/made").iterdir()) == []


@pytest.mark.parametrize("name", [b"a\0b", b"x" * 8192, b"\xff", b"a;b", b"-\x1b[m"])
def test_names_that_no_module_has(tmp_path: Path, name: bytes) -> None:
    dep = b"kernel/one.ko: kernel/%s.ko\nkernel/%s.ko:\n" % (name, name)
    tree = modules.find(str(installed(tmp_path, dep, one=module())), RELEASE)
    with pytest.raises(ConfigError, match="has no module") as caught:
        tree.load_order(["one"])
    assert len(str(caught.value)) < 200 and str(caught.value).isprintable()


def test_chains_of_any_length(tmp_path: Path) -> None:
    def dep(count: int) -> bytes:
        lines = [f"kernel/m{one}.ko: kernel/m{one + 1}.ko\n" for one in range(count - 1)]
        return "".join([*lines, f"kernel/m{count - 1}.ko:\n"]).encode()

    tree = modules.find(str(installed(tmp_path / "a", dep(1000))), RELEASE)
    assert tree.load_order(["m0"]) == [f"m{one}" for one in reversed(range(1000))]
    tree = modules.find(str(installed(tmp_path / "b", dep(9000))), RELEASE)
    with pytest.raises(ConfigError, match="needs too many modules"):
        tree.load_order(["m0"])


def test_modules_that_are_too_large_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: None
) -> None:
    monkeypatch.setattr(modules, "_MOST_UNPACKED", 3 * len(module()))
    tree = modules.find(str(build_tree(tmp_path)), RELEASE)
    with pytest.raises(ConfigError, match="have more than 0 GiB together"):
        fresh_initramfs.make(tree, {})
    assert list((tmp_path / "cache/pyvmm/made").iterdir()) == []


def test_sections_without_end(tmp_path: Path) -> None:
    """Headers of no size, a section past the end, and one that would be millions of texts."""
    endless = bytearray(module())
    struct.pack_into("<HH", endless, 58, 0, 0xFFFF)
    far = bytearray(module())
    start = struct.unpack_from("<Q", far, 40)[0]
    struct.pack_into("<Q", far, start + 64 + 24, 1 << 63)
    large = bytearray(module()) + b"a=\0" * (3 << 20)
    struct.pack_into("<QQ", large, start + 64 + 24, 64, len(large) - 64)
    for bad in (endless, far, large):
        with pytest.raises(ConfigError, match="is not a kernel module"):
            module_file.read_info("bad", bytes(bad))


def test_a_release_that_no_kernel_has(tmp_path: Path) -> None:
    tree = build_tree(tmp_path)
    for text in ("\x1b]0;title\x07\n", "6.1 and more\n", "x" * 100):
        (tree / "include/config/kernel.release").write_text(text)
        assert modules.build_release(str(tree)) == ""


def test_file_names_that_no_module_has(tmp_path: Path) -> None:
    place = tmp_path / "lib/modules" / RELEASE
    (place / "kernel").mkdir(parents=True)
    (place / "modules.order").write_text("")
    for name in (b"a\nvirtio_net", b"\xff", b"-f", b"x" * 200):
        (place / "kernel" / os.fsdecode(name + b".ko")).write_bytes(module())
    (place / "kernel/virtio_blk.ko").write_bytes(module("a\nvirtio_net"))
    tree = modules.find(str(place), RELEASE)
    with pytest.raises(ConfigError, match=r"has no module 'a\\nvirtio_net'"):
        tree.load_order(["virtio_blk"])


@pytest.mark.parametrize("prefix", ["", "kernel/"])  # Linux 5.3 has no prefix any more
def test_modules_in_the_trees_own_folder_kernel(tmp_path: Path, prefix: str) -> None:
    folder = build_tree(tmp_path)
    names = ("kernel/rcu/rcutorture", "kernel/torture", "drivers/block/virtio_blk")
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.ko").write_bytes(module())
    (folder / "modules.order").write_text("".join(f"{prefix}{name}.o\n" for name in names))
    assert unread(folder).paths == sorted(f"{name}.ko" for name in names)


@pytest.mark.parametrize("path", ["/etc/hosts.ko", "../outside.ko", "drivers/../../outside.ko"])
def test_files_that_are_not_in_the_tree(tmp_path: Path, path: str) -> None:
    (tmp_path / "outside.ko").write_bytes(module())
    folder = build_tree(tmp_path / "linux")
    with open(folder / "modules.order", "a") as file:
        file.write(f"{path}\n")
    tree = modules.find(str(folder), RELEASE)
    assert not tree.has("outside") and not tree.has("hosts")


# --- for the guest's modprobe ---------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where depmod's lists are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/pyvmm/tree-modules"


def unread(folder: Path) -> UnreadTree:
    tree = modules.find(str(folder), RELEASE)
    assert isinstance(tree, UnreadTree)
    return tree


def state_of(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_depmod_sees_a_build_tree_and_writes_nothing_there(tmp_path: Path, cache: Path) -> None:
    folder = build_tree(tmp_path / "linux")
    before = state_of(folder)
    lists, place = tree_modules.make(unread(folder))
    assert place == str(folder) and state_of(folder) == before
    paths = {line.partition(":")[0] for line in Path(lists, "modules.dep").read_text().split("\n")}
    assert {"kernel/drivers/block/virtio_blk.ko", "kernel/fs/ext4/ext4.ko"} <= paths
    assert Path(lists, "modules.dep.bin").is_file()
    assert "virtio.ko" in Path(lists, "modules.builtin").read_text()
    assert list(Path(lists, "kernel").iterdir()) == []  # where the tree is mounted
    assert os.readlink(Path(lists, "build")) == "kernel"
    assert list(cache.iterdir()) == [Path(lists)]


def test_depmod_runs_again_when_a_module_was_built_again(tmp_path: Path, cache: Path) -> None:
    folder = build_tree(tmp_path)
    first = tree_modules.make(unread(folder))
    assert tree_modules.make(unread(folder)) == first
    (folder / "drivers/block/virtio_blk.ko").write_bytes(module("virtio_mmio"))
    os.utime(folder / "drivers/block/virtio_blk.ko", (1, 1))
    assert tree_modules.make(unread(folder)) != first


def test_depmod_sees_no_module_that_is_far_down(tmp_path: Path, cache: Path) -> None:
    folder = build_tree(tmp_path)
    at, path = os.open(folder, os.O_RDONLY), "d/" * 1100 + "deep.ko"
    for _ in range(1100):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(os.open("deep.ko", os.O_CREAT | os.O_WRONLY, dir_fd=at))
    os.close(at)
    assert (folder / path).is_file()
    with open(folder / "modules.order", "a") as order:
        order.write(f"{path}\n")
    try:
        lists, _ = tree_modules.make(unread(folder))
        found = Path(lists, "modules.dep").read_text()
        assert "virtio_blk.ko" in found and "deep.ko" not in found
    finally:
        subprocess.run(["rm", "-r", folder / "d"], check=True)


def test_depmod_sees_installed_modules(tmp_path: Path, cache: Path) -> None:
    place = tmp_path / "lib/modules" / RELEASE
    (place / "kernel/a").mkdir(parents=True)
    (place / "kernel/a/one.ko.xz").write_bytes(lzma.compress(module()))
    (place / "modules.builtin").write_text("")
    lists, served = tree_modules.make(unread(place))
    assert served == str(place / "kernel") and not Path(lists, "build").exists()
    assert "kernel/a/one.ko.xz:" in Path(lists, "modules.dep").read_text()


def test_a_link_to_somewhere_else_is_not_served(tmp_path: Path, cache: Path) -> None:
    place = tmp_path / "lib/modules" / RELEASE
    place.mkdir(parents=True)
    (place / "kernel").symlink_to("/etc")
    (place / "modules.builtin").write_text("")
    with pytest.raises(ConfigError, match="kernel is a link"):
        tree_modules.make(unread(place))


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("exec sleep 1000", "depmod: not done after 1 s"),
        ("echo 'cannot read it' >&2; exit 1", "depmod: cannot read it"),
        ("exit 0", "depmod has written nothing"),
        (': > "$HOME/written"', "depmod: .*written: Permission denied"),
    ],
)
def test_depmod_that_fails_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, does: str, said: str
) -> None:
    program = tmp_path / "bin/depmod"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    if "sleep" in does:
        monkeypatch.setattr(tree_modules, "_PATIENCE", 1)
    if "written:" in said and not confinement.available():
        pytest.skip("this kernel has no Landlock")
    with pytest.raises(ConfigError, match=said):
        tree_modules.make(unread(build_tree(tmp_path / "linux")))
    assert list(cache.iterdir()) == [] and not (tmp_path / "written").exists()


def test_depmod_has_so_much_memory(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compressed module of a few KiB may unpack to any size."""
    if not confinement.available():
        pytest.skip("this kernel can confine nothing")
    program = tmp_path / "bin/depmod"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nulimit -v >&2; exit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    with pytest.raises(ConfigError, match=f"depmod: {2 << 20}$"):
        tree_modules.make(unread(build_tree(tmp_path / "linux")))
