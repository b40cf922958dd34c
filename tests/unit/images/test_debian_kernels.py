"""The kernel of Debian that a name stands for. The mirror is a table; apt's own part has tests of
its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from pyvmm.errors import ConfigError
from pyvmm.images import cache, debian_kernels
from pyvmm.images.apt import Apt
from pyvmm.images.lock import Pin

RELEASES = {
    "bookworm": ["6.1.176-1"],
    "trixie": ["6.12.117-1", "6.12.57-1"],
    "sid": ["7.2.13-1"],
}


class Client:
    """apt for one release, whose kernels are `versions`, the newest first."""

    def __init__(self, versions: list[str], architecture: str = "amd64") -> None:
        self.versions = versions
        self.architecture = architecture

    def newest(self, package: str, release: str) -> Pin:
        assert package.endswith(f"-{self.architecture}")
        return Pin(package, self.versions[0], "0" * 64)

    def lookup(self, wanted: Iterable[tuple[str, str]]) -> dict[str, Pin]:
        return {name: Pin(name, one, "") for name, one in wanted if one in self.versions}

    def kernel(self, pin: Pin) -> list[Pin]:
        return [Pin("linux-image-of-it", pin.version, "")]


class Work:
    """The maker of images, of which the clients are wanted."""

    suites = ("bookworm",)

    def client(self, suites: tuple[str, ...], architecture: str) -> Client:
        return Client(RELEASES[suites[0]], architecture)


@pytest.fixture(autouse=True)
def mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian_kernels, "_SUITES", {name: (name,) for name in RELEASES})


def search(wanted: str, version: str = "", arch: str = "") -> str:
    work: Any = Work()
    _, pins = debian_kernels._search(f"debian:{wanted}", wanted, version, work, arch)
    return pins[0].version


@pytest.mark.parametrize("arch", ["", "arm64"])
@pytest.mark.parametrize(
    ("wanted", "version", "found"),
    [
        ("trixie", "", "6.12.117-1"),
        ("sid", "", "7.2.13-1"),
        ("6.12", "", "6.12.117-1"),
        ("6", "", "6.1.176-1"),
        ("7.2.13", "", "7.2.13-1"),
        ("trixie", "6.12.57-1", "6.12.57-1"),
        ("6.12", "6.12.57-1", "6.12.57-1"),
    ],
)
def test_a_name_is_one_kernel(wanted: str, version: str, found: str, arch: str) -> None:
    assert search(wanted, version, arch) == found


@pytest.mark.parametrize(
    ("wanted", "version", "why"),
    [
        ("4.19", "", "there are bookworm 6.1.176-1, trixie 6.12.117-1, sid 7.2.13-1"),
        ("6.11", "", "the mirror has no kernel 6.11"),  # which 6.1 and 6.117 only look like
        ("sid", "6.12.57-1", "the mirror has no kernel sid"),
    ],
)
def test_one_that_is_not_there(wanted: str, version: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        search(wanted, version)
    assert why in str(caught.value)


def test_the_packages_that_modules_are_built_with(tmp_path: Path) -> None:
    class OfDebian(Apt):
        def lookup(self, wanted: Iterable[tuple[str, str]]) -> dict[str, Pin]:
            return {name: Pin(name, version, "") for name, version in wanted if version == "6.1-1"}

        def _depends(self, pin: Pin) -> str:
            return "linux-headers-6.1-common (= 6.1-1), linux-kbuild-6.1 (>= 6.1-1), gcc-12"

    apt = OfDebian(str(tmp_path), ["bookworm"])
    names = [pin.package for pin in apt.headers("6.1-cloud", "6.1-1")]
    assert names == ["linux-headers-6.1-cloud", "linux-headers-6.1-common", "linux-kbuild-6.1"]
    assert apt.headers("6.1-cloud", "6.2-1") == []


def test_one_that_was_fetched_can_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = Path(debian_kernels.folder("debian:sid"))
    place.mkdir(parents=True)
    other = Path(debian_kernels.folder("debian:sid", "arm64"))
    other.mkdir()
    assert debian_kernels.names() == ["debian:sid", "debian:sid_arm64"]
    with pytest.raises(ConfigError, match=r"no kernel 'debian:6\.1' has been fetched"):
        debian_kernels.remove("debian:6.1")
    with cache.building(lambda: None):
        pass
    debian_kernels.remove("debian:sid")
    assert not place.exists() and debian_kernels.names() == ["debian:sid_arm64"]
    with pytest.raises(ConfigError, match="there is no kernel 'debian:sid_arm64'"):
        debian_kernels.find("debian:sid_arm64")  # it is --arch that chooses
    debian_kernels.remove("debian:sid_arm64")
    assert not other.exists() and debian_kernels.names() == []
