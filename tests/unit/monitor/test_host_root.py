"""`--root DIR`: what it makes of the other options, what runs in it, and what it refuses."""

from __future__ import annotations

import base64
import os
import re
import shlex
import struct
from pathlib import Path
from typing import Any

import boot_images
import pytest

from pyvmm.api import config_file
from pyvmm.cli import quick
from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.images import debian_kernels, fresh_initramfs
from pyvmm.kinds.share import Spec
from pyvmm.machine.board.registry import board_of_host
from pyvmm.machine.cmdline import command_line as kernel_command_line
from pyvmm.monitor.host_root import command_line
from pyvmm.monitor.kernel_choice import specify
from pyvmm.monitor.start import _command_line, start

RELEASE = "6.9.1-mine"
MODULES = ("virtio_pci", "virtiofs", "overlay", "vmw_vsock_virtio_transport", "virtio_mmio")
LISTS = {
    "virtio-19": ("vmw_vsock_virtio_transport",),
    "virtio-26": ("virtiofs",),
    "transport-pci": ("virtio_pci",),
    "transport-mmio": ("virtio_mmio",),
}


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A cache of its own, a kernel of Debian's with its modules; what the user is told."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fresh_initramfs, "_recipe", lambda arch: (b"BASE", LISTS))
    (tmp_path / "vmlinuz").write_bytes(boot_images.bzimage(banner=f"{RELEASE} (me) #1".encode()))
    (tmp_path / "config").write_text("")
    folder = tmp_path / "lib/modules" / RELEASE
    folder.mkdir(parents=True)
    (folder / "modules.dep").write_text("")
    (folder / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in MODULES))
    found = debian_kernels.Found(
        str(tmp_path / "vmlinuz"), str(tmp_path / "config"), str(folder), "/made/before"
    )
    monkeypatch.setattr(debian_kernels, "find", lambda name, arch="": found)
    lines: list[str] = []
    monkeypatch.setattr(log, "to_stderr", lambda line: lines.append(str(line)))
    return lines


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a shell, which is a link, and a part of it."""
    place = tmp_path / "root"
    (place / "usr/bin").mkdir(parents=True)
    (place / "work/deep").mkdir(parents=True)
    (place / "usr/bin/dash").write_text("#!")
    (place / "usr/bin/dash").chmod(0o755)
    (place / "bin").symlink_to("/usr/bin")  # as the root has it
    (place / "usr/bin/sh").symlink_to("dash")
    return place


def shares(**options: Any) -> list[Spec]:
    spec, image = specify(options)
    assert image is None
    return [device for device in spec.devices if isinstance(device, Spec)]


def test_the_root_is_a_share_that_stays_as_it_is(root: Path) -> None:
    spec, image = specify({"root": str(root), "transport": "auto"})
    assert image is None and not spec.disks and not spec.keeps
    assert [device.kind for device in spec.devices] == ["vsock", "share", "share"]
    assert spec.transport == "pci"
    assert spec.initrd and Path(spec.initrd).read_bytes().startswith(b"BASE0707")
    first, modules = shares(root=str(root))
    assert first == Spec(str(root), "", True, "pyvmm-root", is_root=True)
    assert modules.mountpoint == f"/lib/modules/{RELEASE}" and modules.read_only
    text = kernel_command_line(spec, board_of_host())
    assert "pyvmm.root=pyvmm-root:ro" in text.split() and " root=" not in text


def test_all_that_the_guest_needs_must_be_there(root: Path, tmp_path: Path) -> None:
    builtin = tmp_path / "lib/modules" / RELEASE / "modules.builtin"
    builtin.write_text("kernel/virtiofs.ko\n")
    with pytest.raises(ConfigError, match=r"overlay \(for its root file system\)"):
        specify({"root": str(root)})


def test_a_kernel_that_is_a_file_has_an_initramfs_all_the_same(
    root: Path, tmp_path: Path, said: list[str]
) -> None:
    """With the modules that are installed beside it, or none; its configuration is looked at."""
    boot = tmp_path / "boot"
    boot.mkdir()
    kernel = boot / f"vmlinuz-{RELEASE}"
    (tmp_path / "vmlinuz").rename(kernel)
    spec, _ = specify({"root": str(root), "kernel": str(kernel)})
    assert spec.initrd and len([one for one in spec.devices if one.kind == "share"]) == 2
    alone = tmp_path / "alone"
    kernel.rename(alone)
    (tmp_path / "config").unlink()
    spec, _ = specify({"root": str(root), "kernel": str(alone)})
    assert spec.initrd and Path(spec.initrd).read_bytes() == b"BASE"
    alone.rename(tmp_path / "vmlinux")
    (tmp_path / ".config").write_text("CONFIG_VIRTIO_FS=y\nCONFIG_TMPFS=y\n")
    assert said == []
    specify({"root": str(root), "kernel": str(tmp_path / "vmlinux")})
    assert "CONFIG_OVERLAY_FS (to keep its root as it is)" in said[0]
    assert "CONFIG_VIRTIO_FS" not in said[0] and "CONFIG_EXT4_FS" not in said[0]


def test_parts_of_it_are_the_guests_to_change(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root / "work")
    (root / "link").symlink_to("work")
    _, deep, *_ = found = shares(root=str(root), rw=("deep", "/work/deep", "/link/deep"))
    assert len(found) == 3 and deep.keeps
    assert (deep.path, deep.mountpoint) == (str(root / "work/deep"), "/work/deep")
    place = base64.b64encode(b"/work/deep").decode()
    assert deep.kernel_parameters == (f"pyvmm.share={deep.tag}:rw:{place}",)
    whole, *_ = shares(root="..", rw="/")
    assert whole.is_root and whole.kernel_parameters == ("pyvmm.root=pyvmm-root:rw",)


def test_a_temporary_folder_is_no_place_of_the_guests_own(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "tmp/mine").mkdir(parents=True)
    assert shares(root=str(root), rw="/tmp/mine")[1].mountpoint == "/tmp/mine"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"root": "/nowhere"}, "--root: there is no /nowhere; check the path"),
        ({"root": ""}, "--root: no directory is named"),
        ({"root": "FILE"}, "is not a directory"),
        ({"root": "ROOT", "image": "debian"}, "leave one out"),
        ({"root": "ROOT", "initrd": "/x"}, "leave one out"),
        ({"root": "ROOT", "kernel": "disk"}, "an initrd of its own"),
        ({"root": "ROOT", "cmdline": "root=/dev/vda"}, "the root is a directory"),
        ({"root": "ROOT", "rw": "/nothing"}, "--rw: there is no /nothing"),
        ({"root": "ROOT", "rw": "/usr/bin/dash"}, "--rw: /usr/bin/dash is not a directory"),
        ({"root": "ROOT", "rw": "/../elsewhere"}, "is not in"),
        ({"root": "ROOT", "rw": "/out"}, "is not in"),
        ({"root": "ROOT", "rw": "/run/x"}, "init mounts over /run/x"),
        ({"root": "/", "rw": "/"}, "all of this machine's files would be the guest's to change"),
        ({"rw": "/work"}, "--rw: there is no --root"),
    ],
)
def test_what_it_refuses(root: Path, tmp_path: Path, options: dict[str, str], why: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root / "out").symlink_to(tmp_path / "elsewhere")
    (root / "run/x").mkdir(parents=True)
    places = {"ROOT": str(root), "FILE": str(root / "usr/bin/dash")}
    given = {name: places.get(value, value) for name, value in options.items()}
    with pytest.raises(ConfigError) as caught:
        specify(given)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def elf(machine: int, order: int = 1) -> bytes:
    """The beginning of a program: little-endian for an `order` of 1, big-endian for 2."""
    number = machine.to_bytes(2, "little" if order == 1 else "big")
    return b"\x7fELF" + bytes((2, order, 1)) + bytes(11) + number + bytes(44)


def arm64_kernel() -> bytes:
    """An Image (Linux Documentation/arch/arm64/booting.rst)."""
    head = struct.pack("<2I3Q24x4sI", 0x1400_0010, 0, 0, 1 << 20, 0xA, b"ARM\x64", 0)
    return head + f"Linux version {RELEASE} (me)".encode()


@pytest.mark.parametrize(
    ("arch", "machine", "why"),
    [
        (
            "",
            "aarch64",
            "are for arm64, by its /bin/sh, and the guest is not; use --arch arm64, or",
        ),
        ("arm64", "x86_64", "are for 64-bit x86, by its /bin/sh, and the guest is not; use --arch"),
        ("arm64", 243, "are for RISC-V, by its /bin/sh, and the guest is not; name a directory"),
        ("", 0x8FFF, "are for machine 36863, by its /bin/sh"),
        ("", "x86_64", ""),
        ("", 3, ""),
        ("arm64", "aarch64", ""),
        ("arm64", 40, ""),
    ],
)
def test_programs_of_another_architecture(
    root: Path, tmp_path: Path, arch: str, machine: str | int, why: str
) -> None:
    """Told by the header of the shell, through its links; "x86_64" is this machine's where tests
    run."""
    if os.uname().machine != "x86_64":
        pytest.skip("written for a machine that is x86-64")
    number = {"x86_64": 62, "aarch64": 183}.get(str(machine), machine)
    assert isinstance(number, int)
    (root / "usr/bin/dash").write_bytes(elf(number))
    options = {"root": str(root), **({"arch": arch} if arch else {})}
    if not why:
        if arch:
            (tmp_path / "vmlinuz").write_bytes(arm64_kernel())
        spec, _ = specify(options)
        assert (spec.arch, spec.transport) == (arch, "pci")
        assert [one.path for one in spec.devices if isinstance(one, Spec) and one.is_root] == [
            str(root)
        ]
        return
    with pytest.raises(ConfigError) as caught:
        specify(options)
    said = str(caught.value)
    assert said.startswith(f"--root: the programs in {root} {why}") and "\n" not in said


@pytest.mark.parametrize("head", [b"", b"#!/bin/rc", b"\x7fELF", elf(22, order=2)[:19]])
def test_a_shell_that_does_not_tell_is_no_hindrance(root: Path, head: bytes) -> None:
    """The next of the programs that most have may."""
    (root / "usr/bin/dash").write_bytes(head)
    specify({"root": str(root)})
    (root / "usr/bin/env").write_bytes(elf(22, order=2))
    (root / "usr/bin/env").chmod(0o755)
    with pytest.raises(ConfigError, match="are for s390, by its /usr/bin/env"):
        specify({"root": str(root)})


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="nothing else has another one's guests")
def test_this_machines_own_files_are_not_for_another() -> None:
    line = (
        r"--root: the programs in / are for 64-bit x86, by its /bin/sh, .*; use --arch x86_64, or"
    )
    with pytest.raises(ConfigError, match=line):
        specify({"root": "/", "arch": "arm64"})


def test_somebody_elses_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "part").mkdir()
    for mine in (False, True):
        monkeypatch.setattr(os, "access", lambda path, mode, mine=mine: mine and path == str(root))
        line = f"--{'rw' if mine else 'root'}: {root}{'/part' if mine else ''} is not yours to read"
        with pytest.raises(ConfigError, match=line):
            specify({"root": str(root), "rw": "/part"})


def test_a_configuration_file_has_it(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text('root = "root"\nrw = ["root/work"]\n')
    values = config_file.load(str(file))
    assert values == {"root": str(root), "rw": [str(root / "work")]}
    assert config_file.describe(values).splitlines()[0] == f'root = "{root}"'


def test_the_page_on_it_shows_command_lines_that_are_taken() -> None:
    page = Path(__file__).resolve().parents[3] / "docs/host-files.md"
    lines = re.findall(r"^    pyvmm (run .*)$", page.read_text(), re.MULTILINE)
    found = [quick.parse_run(shlex.split(line, comments=True)) for line in lines]
    assert len(found) == 5 and all(values and values["root"] for values in found)
    assert found[0] and found[0]["command"] == ("uname", "-r")


# --- what runs in it ------------------------------------------------------------------------------


def test_a_command_runs_as_here(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.chdir(root / "work")
    for name, value in {"LC_TIME": "C", "TZ": "Asia/Tokyo", "SECRET": "x", "EDITOR": "vi"}.items():
        monkeypatch.setenv(name, value)
    line = command_line("/", ("a", "b c"))
    assert (line.argv, line.cwd) == (("a", "b c"), str(root / "work"))
    assert line.user and line.user.startswith(f"{os.geteuid()}:{os.getegid()}:")
    assert {"LC_TIME=C", "TZ=Asia/Tokyo", "EDITOR=vi", f"PATH={os.environ['PATH']}"} <= {*line.env}
    assert not any("SECRET" in variable for variable in line.env)
    # Of another root the paths of this machine say nothing.
    line = command_line(str(root), ("a",))
    assert line.cwd == "/work" and "TZ=Asia/Tokyo" in line.env
    assert not any(variable.startswith(("PATH=", "HOME=", "EDITOR=")) for variable in line.env)
    assert command_line(str(root / "usr"), ("a",)).cwd == "/"


def test_a_command_runs_as_another_user_of_the_guest(
    monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """Whose home, name and search path are for the guest to say."""
    for name in ("HOME", "USER", "LOGNAME", "PATH", "EDITOR", "TZ"):
        monkeypatch.setenv(name, "/mine")
    line = command_line("/", ("modprobe", "one"), "root")
    assert (line.argv, line.user) == (("modprobe", "one"), "root")
    names = {variable.partition("=")[0] for variable in line.env}
    assert {"EDITOR", "TZ"} <= names and names.isdisjoint({"HOME", "USER", "LOGNAME", "PATH"})
    line = command_line(str(root), ("a",), "1:2")
    assert line.user == "1:2" and "EDITOR=/mine" not in line.env


def test_a_user_without_a_command(root: Path) -> None:
    for options, cure in (
        ({"root": str(root), "detach": True}, "use pyvmm exec --user"),
        ({"restore": "ready"}, "use pyvmm exec --user"),
        ({"kernel": "/bin/true"}, "add one: -- CMD"),
    ):
        with pytest.raises(ConfigError, match=f"--guest-user: there is no command .*; {cure}"):
            start(guest_user="root", **options)


@pytest.mark.parametrize("user", ["", ":", ":100"])
def test_a_user_without_a_name_is_not_root(root: Path, user: str) -> None:
    """A script's variable may be empty."""
    with pytest.raises(ConfigError, match=f"--guest-user: '{user}' names no user; name one"):
        start(guest_user=user, root=str(root), command=("true",))


def test_a_command_knows_the_option_that_has_named_its_user(root: Path) -> None:
    for given in ({"root": str(root), "image": None}, {"root": None, "image": None}):
        for user, option in (("bob", "--guest-user"), (None, "")):
            line = _command_line(("true",), user=user, **given)
            assert line is not None and line.user_option == option


def test_a_shell_where_no_command_is_named(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    monkeypatch.setenv("SHELL", "/usr/bin/dash")
    assert command_line(str(root), ()).argv == ("/usr/bin/dash",)
    monkeypatch.setenv("SHELL", "/usr/bin/zsh")
    assert command_line(str(root), ()).argv == ("/bin/sh",)  # by two links, one from the root
    (root / "usr/bin/sh").unlink()
    (root / "usr/bin/sh").symlink_to("sh")
    with pytest.raises(ConfigError, match=f"there is no shell in {root}; name a command"):
        command_line(str(root), ())


def test_a_directory_that_the_guest_has_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc")
    with pytest.raises(ConfigError, match=r"is in /proc, and the guest has one of its own; cd to"):
        command_line("/", ("true",))


def test_a_directory_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="the current directory is gone"):
        command_line("/", ("true",))
