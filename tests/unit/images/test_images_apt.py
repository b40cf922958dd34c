"""apt's answers against the pins; a local archive stands in for the mirror."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.images import apt, builder, kernel, rootfs, tools
from pyvmm.images.lock import Pin
from pyvmm.images.progress import Progress

SUM = hashlib.sha256(b"package").hexdigest()
PIN = Pin("busybox-static", "1:1.35.0-4", SUM)


class Mirror(apt.Apt):
    """A mirror's packages, without apt."""

    def __init__(self, *packages: Pin) -> None:
        self.packages = packages

    def lookup(self, wanted):  # type: ignore[no-untyped-def]
        return {pin.package: pin for pin in self.packages if pin[:2] in set(wanted)}

    def newest(self, package: str, suite: str) -> Pin:
        return next(pin for pin in self.packages if pin.package == package)


def test_a_pinned_version_that_is_there_is_used() -> None:
    assert apt.usable(Mirror(PIN), "initramfs", [PIN], locked=True)


def test_a_pinned_version_that_is_gone_is_not_used() -> None:
    assert not apt.usable(Mirror(), "initramfs", [PIN], locked=False)


def test_locked_makes_a_gone_version_an_error() -> None:
    with pytest.raises(ConfigError, match=r"busybox-static 1:1\.35\.0-4 is not on the mirror"):
        apt.usable(Mirror(), "initramfs", [PIN], locked=True)
    with pytest.raises(ConfigError, match="no pins"):
        apt.usable(Mirror(), "initramfs", [], locked=True)


@pytest.mark.parametrize("locked", [True, False])
def test_another_checksum_of_the_pinned_version_is_always_an_error(locked: bool) -> None:
    other = PIN._replace(sha256="0" * 64)
    with pytest.raises(ConfigError, match="do not use that mirror"):
        apt.usable(Mirror(other), "initramfs", [PIN], locked=locked)


def test_a_file_with_another_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "package.deb"
    path.write_bytes(b"package")
    apt.check_sum(str(path), PIN)
    path.write_bytes(b"tampered")
    with pytest.raises(ConfigError, match="instead of"):
        apt.check_sum(str(path), PIN)


def test_the_substitute_for_a_gone_version_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    catalogue = builder.Catalogue()
    newer = PIN._replace(version="1:1.36-1")
    catalogue.lock["initramfs"] = [PIN]
    monkeypatch.setattr(apt.Apt, "update", lambda self: None)
    maker = builder.Builder(catalogue, Progress())
    maker._apt = Mirror(newer)
    capsys.readouterr()
    assert maker._choose("initramfs-6.1") == [newer]
    assert capsys.readouterr().err == (
        "pyvmm: initramfs-6.1: the pinned busybox-static 1:1.35.0-4 is no longer on the mirror; "
        "using busybox-static 1:1.36-1\n"
    )


def test_root_disks_are_pinned_by_apts_preferences() -> None:
    assert rootfs.apt_preferences([PIN]) == (
        "Package: busybox-static\nPin: version 1:1.35.0-4\nPin-Priority: 1001\n"
    )


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "_search_path", lambda: "/none")
    with pytest.raises(
        ConfigError, match="mke2fs is missing; install it: apt-get install e2fsprogs"
    ):
        tools.require("mke2fs")


def test_a_program_s_first_error_is_what_is_said() -> None:
    stderr = "W: slow\nE: Unable to locate package x\nE: more\n"
    assert tools.complaint(stderr, 100) == "Unable to locate package x"
    assert tools.complaint("", 3) == "exit status 3"


@pytest.mark.parametrize(
    ("said", "cure"),
    [
        ("E: Failed to fetch http://x/InRelease  Temporary failure resolving 'x'", "the network"),
        ("E: Unable to locate package nosuch", "check the name"),
        ("write: No space left on device", "free 3 GiB"),
    ],
)
def test_what_programs_often_complain_about_has_a_cure(said: str, cure: str) -> None:
    with pytest.raises(ConfigError, match=cure):
        tools.run(["sh", "-c", f'echo "{said}" >&2; exit 100'], "apt")
    with pytest.raises(ConfigError, match=r"^making: b$"):
        tools.run(["sh", "-c", "echo a >&2; echo b >&2; exit 1"], "making")


def test_a_program_that_fills_the_disk_comes_with_a_cure() -> None:
    with pytest.raises(ConfigError, match="No space left on device; free 3 GiB"):
        tools.run(["sh", "-c", "echo 'tar: x: No space left on device' >&2; exit 2"], "unpacking")


def test_apt_writes_only_in_its_own_folder(tmp_path: Path) -> None:
    text = apt._private_folders(str(tmp_path), "amd64")
    written = [line for line in text.splitlines() if line.startswith(("Dir::State", "Dir::Cache"))]
    assert len(written) == 4
    assert all(os.fspath(tmp_path) in line for line in written)


def test_what_a_program_says_is_fit_for_a_terminal() -> None:
    """mke2fs quotes names out of archives."""
    said = 'mke2fs: while writing file "\x1b]0;x\x07\x1b[2J\r\u202e\udcff ü"\n'
    shown = tools.complaint(said, 1)
    assert shown.isprintable() and "ü" in shown and "\\x1b]0;x\\x07" in shown
    assert len(tools.complaint("x" * 100_000, 1)) < 1000


class Shows(apt.Apt):
    """The output of `apt-cache show` for packages, without apt."""

    def __init__(self, depends: dict[str, str]) -> None:
        self.depends = depends

    def _run(self, command, what, **_):  # type: ignore[no-untyped-def]
        assert command[:2] == ["apt-cache", "show"]
        rows = [argument.partition("=") for argument in command[2:]]
        return "\n".join(
            f"Package: {package}\nVersion: {version}\nDepends: {self.depends[package]}\n"
            f"SHA256: {SUM}\n"
            for package, _, version in rows
        )


def test_a_kernel_is_one_package_or_those_that_it_was_split_into() -> None:
    meta = Pin("linux-image-cloud-amd64", "7.2-1", SUM)
    split = Shows(
        {
            "linux-image-cloud-amd64": "linux-base-cloud (= 7.2-1), linux-image-7.2 (= 7.2-1)",
            "linux-image-7.2": "dracut | initramfs-tools (>= 0.120), linux-base (>= 4.17~), "
            "linux-base-7.2 (= 7.2-1), linux-binary-7.2 (= 7.2-1), linux-modules-7.2 (= 7.2-1)",
            **dict.fromkeys(("linux-base-7.2", "linux-binary-7.2", "linux-modules-7.2"), "kmod"),
        }
    )
    assert [pin[:2] for pin in split.kernel(meta)] == [
        (f"linux-{part}-7.2", "7.2-1") for part in ("base", "binary", "modules")
    ]
    whole = Shows(
        {
            "linux-image-cloud-amd64": "linux-image-6.1 (= 6.1-1)",
            "linux-image-6.1": "kmod, linux-base (>= 4.3~), initramfs-tools | linux-initramfs-tool",
        }
    )
    assert [pin.package for pin in whole.kernel(meta)] == ["linux-image-6.1"]
    with pytest.raises(ConfigError, match="depends on no kernel, but on: kmod"):
        Shows({"linux-image-cloud-amd64": "kmod"}).kernel(meta)


def test_a_kernel_of_another_series_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = builder.Builder(builder.Catalogue(), Progress())
    mirror = Mirror(Pin("linux-image-cloud-amd64", "8.0.1-1", SUM))
    monkeypatch.setattr(maker, "client", lambda suites, architecture: mirror)
    with pytest.raises(ConfigError, match=r"kernel-7: sid has Linux 8\.0\.1-1 by now"):
        maker._newest("kernel-7")


def package(folder: Path, name: str, files: dict[str, bytes]) -> str:
    """A Debian package with these files in it."""
    tree = folder / name
    for path, content in {
        "DEBIAN/control": CONTROL.replace("NAME", name).encode(),
        **files,
    }.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    target = folder / f"{name}.deb"
    tools.run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(target)], "dpkg-deb")
    return str(target)


CONTROL = "Package: NAME\nVersion: 1\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
IN_ONE = {"boot/vmlinuz-9": b"kernel", "boot/config-9": b"config", "lib/modules/9.1/a.ko": b""}
IN_PARTS = [
    {"usr/lib/modules/9.1/vmlinuz": b"kernel"},
    {"usr/lib/modules/9.1/config": b"config"},
    {"usr/lib/modules/9.1/kernel/a.ko": b""},
]
SINCE_TRIXIE = {**IN_ONE, "usr/lib/modules/9.1/a.ko": b""}
del SINCE_TRIXIE["lib/modules/9.1/a.ko"]


@pytest.mark.parametrize("parts", [[IN_ONE], [SINCE_TRIXIE], IN_PARTS], ids=["6.1", "6.12", "7"])
def test_a_kernel_is_found_wherever_its_packages_have_it(tmp_path: Path, parts) -> None:
    debs = [package(tmp_path, f"part{number}", files) for number, files in enumerate(parts)]
    tmp_path = tmp_path / "the [cache]"  # no pattern of file names
    into = tmp_path / "image"
    into.mkdir(parents=True)
    kernel._unpack(debs, str(tmp_path / "tree"), str(into))
    assert (into / "bzImage").read_bytes() == b"kernel"
    assert (into / "config").read_bytes() == b"config"
    assert (into / "lib/modules/9.1/modules.dep").exists()
    assert kernel.modules_folder(str(into)) == str(into / "lib/modules/9.1")
    assert list(into.rglob("vmlinuz*")) == []


def test_a_package_without_a_kernel_is_an_error(tmp_path: Path) -> None:
    deb = package(tmp_path, "none", {"usr/lib/modules/9.1/config": b""})
    with pytest.raises(ConfigError, match=r"has 0 files vmlinuz-\*"):
        kernel._unpack([deb], str(tmp_path / "tree"), str(tmp_path))


@pytest.mark.parametrize("there", [[], ["lib"], ["lib/modules/9.1", "lib/modules/9.2"]])
def test_a_damaged_kernel_in_the_cache_is_one_line(tmp_path: Path, there: list[str]) -> None:
    image = tmp_path / "my cache"
    for folder in there:
        (image / folder).mkdir(parents=True)
    with pytest.raises(ConfigError) as raised:
        kernel.modules_folder(str(image))
    count = sum("modules/" in one for one in there)
    assert str(raised.value) == (
        f"the cached kernel in {image} is damaged: it has modules of {count} releases; it is made "
        f"again after: rm -r '{image}'"
    )
