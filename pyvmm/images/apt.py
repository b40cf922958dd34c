"""Debian packages through apt's own client, with a state of our own: nothing is installed.

apt checks the signatures; the lock file then says whether the version and the checksum are the
pinned ones. All of apt's folders are under the cache, so this works without being root and leaves
the machine's own apt alone.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Sequence

from pyvmm.errors import ConfigError
from pyvmm.images import apt_sources, tools
from pyvmm.images.lock import Pin

# The machine's own settings that reaching its mirror may take.
_KEPT_SETTINGS = ("http", "https", "ftp", "Retries", "Check-Valid-Until", "Check-Date")
# A kernel's package only depends on these since it was split.
_PARTS = ("linux-base-", "linux-binary-", "linux-modules-")


class Apt:
    """apt with its lists and caches in `folder`, for `suites` on the machine's own mirror, and for
    packages of `architecture`, none of whose programs is run."""

    def __init__(self, folder: str, suites: Sequence[str], architecture: str = "amd64") -> None:
        self._folder = folder
        self._suites = suites
        self._architecture = architecture
        self._updated = False
        self._env = {"APT_CONFIG": os.path.join(folder, "apt.conf")}
        self.sources = os.path.join(folder, "sources.list")
        self.settings = os.path.join(folder, "settings.conf")

    def update(self) -> None:
        """Fetch the package lists, once for each instance. Raises ConfigError."""
        if self._updated:
            return
        for name in ("lists/partial", "cache/archives/partial"):
            os.makedirs(os.path.join(self._folder, name), exist_ok=True)
        self._write_configuration()
        self._run(["apt-get", "update"], "apt cannot fetch the package lists")
        self._updated = True

    def lookup(self, wanted: Iterable[tuple[str, str]]) -> dict[str, Pin]:
        """Those of the (package, version) pairs that the mirror has, by package."""
        arguments = [f"{package}={version}" for package, version in wanted]
        if not arguments:
            return {}
        text = self._run(["apt-cache", "show", *arguments], "apt-cache", failure_is_empty=True)
        found: dict[str, Pin] = {}
        for fields in apt_sources.paragraphs(text):
            pin = Pin(fields["package"], fields["version"], fields.get("sha256", ""))
            if f"{pin.package}={pin.version}" in arguments:
                found[pin.package] = pin
        return found

    def newest(self, package: str, suite: str) -> Pin:
        """The package as `suite` has it. Raises ConfigError where it has none."""
        text = self._run(
            ["apt-get", "download", "--print-uris", f"{package}/{suite}"],
            f"the mirror has no {package} in {suite}",
        )
        file = text.split()[1]  # 'URI' name_version_arch.deb size hash
        version = file.split("_")[1].replace("%3a", ":")
        return self._known(package, version)

    def kernel(self, pin: Pin) -> list[Pin]:
        """The kernel proper that a kernel's metapackage `pin` depends on: a package, or those that
        it has been split into since Linux 7."""
        depends = self._depends(pin)
        for package, version in _exact(depends):  # linux-image-6.1.0-9-amd64 (= 6.1.27-1)
            if package.startswith("linux-image-"):
                image = self._known(package, version)
                parts = [row for row in _exact(self._depends(image)) if row[0].startswith(_PARTS)]
                return [self._known(*part) for part in parts] or [image]
        raise ConfigError(f"{pin.package} {pin.version} depends on no kernel, but on: {depends}")

    def headers(self, release: str, version: str) -> list[Pin]:
        """The packages that modules for the kernel `release` are built with: its headers, those of
        all flavours, and the tools. `version` is that of its packages. Empty where the mirror has
        none."""
        name = f"linux-headers-{release}"
        pin = self.lookup([(name, version)]).get(name)
        if pin is None:
            return []
        others = [row.split()[0] for row in self._depends(pin).split(",")]
        parts = [one for one in others if one.startswith(("linux-headers-", "linux-kbuild-"))]
        return [pin, *(self._known(part, version) for part in parts)]

    def _depends(self, pin: Pin) -> str:
        text = self._run(["apt-cache", "show", f"{pin.package}={pin.version}"], "apt-cache")
        return next(apt_sources.paragraphs(text)).get("depends", "")

    def closure(self, packages: Sequence[str]) -> list[Pin]:
        """The packages and all that they depend on, from the last of the suites where it has them.

        Raises ConfigError.
        """
        return self._all_of(packages, ("--target-release", self._suites[-1]))

    def minbase(self, packages: Sequence[str], release: str) -> list[Pin]:
        """A Debian of the `release` with these packages: what mmdebstrap's variant of that name
        has, which is the essential and the required packages, and apt. Raises ConfigError."""
        found = ["?essential", "?priority(required)", "apt", *packages]
        if release == "bookworm":
            found.append("usr-is-merged")  # instead of the program that merges it, and all of Perl
        return self._all_of(found)

    def _all_of(self, packages: Sequence[str], settings: Sequence[str] = ()) -> list[Pin]:
        text = self._run(
            ["apt-get", "install", "--simulate", "--no-install-recommends", *settings, *packages],
            f"the mirror has no {', '.join(packages)}",
        )
        # Inst libc6 (2.41-12 Debian:13.2/stable [amd64])
        rows = [line.split() for line in text.splitlines() if line.startswith("Inst ")]
        wanted = [(row[1], row[2].lstrip("(")) for row in rows]
        found = self.lookup(wanted)
        return [found[package] for package, _ in wanted]

    def download(self, pin: Pin, folder: str) -> str:
        """The path of the .deb, fetched into `folder` and checked against `pin`'s checksum."""
        [path] = self.download_all([pin], folder)
        return path

    def download_all(self, pins: Sequence[Pin], folder: str) -> list[str]:
        """The paths of the .debs, as `download` fetches and checks them."""
        self._run(
            ["apt-get", "download", *(f"{pin.package}={pin.version}" for pin in pins)],
            f"cannot fetch {' '.join(pins[0][:2])}" + (" and others" if len(pins) > 1 else ""),
            cwd=folder,
        )
        paths = []
        for pin in pins:
            name = f"{pin.package}_{pin.version.replace(':', '%3a')}_*.deb"
            [path] = glob.glob(os.path.join(glob.escape(folder), name))
            check_sum(path, pin)
            paths.append(path)
        return paths

    def _known(self, package: str, version: str) -> Pin:
        found = self.lookup([(package, version)])
        if package not in found:
            raise ConfigError(f"the mirror does not have {package} {version}")
        return found[package]

    def _run(
        self,
        command: list[str],
        what: str,
        *,
        cwd: str | None = None,
        failure_is_empty: bool = False,
    ) -> str:
        try:
            return tools.run(command, what, cwd=cwd, env=self._env)
        except ConfigError:
            if failure_is_empty:
                return ""
            raise

    def _write_configuration(self) -> None:
        sources = apt_sources.derive(
            apt_sources.machine_sources(),
            self._suites,
            os.environ.get(apt_sources.MIRROR_VARIABLE, ""),
        )
        _write(self.sources, apt_sources.render(sources))
        settings = machine_settings()
        _write(self.settings, settings)
        private = _private_folders(self._folder, self._architecture)
        _write(self._env["APT_CONFIG"], settings + private)
        _write(os.path.join(self._folder, "status"), "")  # nothing is installed


def usable(apt: Apt, image: str, pins: Sequence[Pin], *, locked: bool) -> bool:
    """True if the mirror still has all of the pinned packages (and there are any).

    Raises ConfigError where a pinned version's checksum is another one, always, and, if `locked`,
    where a version is gone or nothing is pinned.
    """
    found = apt.lookup((pin.package, pin.version) for pin in pins)
    for pin in pins:
        there = found.get(pin.package)
        if there and there.sha256 != pin.sha256:
            raise ConfigError(
                f"{image}: the mirror's {pin.package} {pin.version} has the SHA-256 "
                f"{there.sha256}, the lock file says {pin.sha256}",
                cure="do not use that mirror",
            )
    gone = [pin for pin in pins if pin.package not in found]
    if pins and not gone:
        return True
    if locked:
        what = f"{gone[0].package} {gone[0].version} is not on the mirror" if gone else "no pins"
        raise ConfigError(f"{image}: {what}", cure="refresh with: pyvmm image lock")
    return False


def check_sum(path: str, pin: Pin) -> None:
    """Raises ConfigError where the file's SHA-256 is not `pin`'s."""
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != pin.sha256:
        raise ConfigError(
            f"{pin.package} {pin.version} came with the SHA-256 {actual} instead of {pin.sha256}",
            cure="do not use that mirror",
        )


def _exact(depends: str) -> list[tuple[str, str]]:
    """The dependencies on one version of a package, as (package, version)."""
    rows = [row.replace("(=", "").replace(")", "").split() for row in depends.split(",")]
    return [(row[0], row[1]) for row in rows if len(row) == 2]


def machine_settings() -> str:
    """This machine's settings for apt to reach mirrors: proxies, retries, credentials' place."""
    names = [f"Acquire::{name}" for name in _KEPT_SETTINGS]
    text = tools.run(["apt-config", "dump", *names], "apt-config")
    kept = [line for line in text.splitlines() if line.startswith("Acquire::") and '""' not in line]
    kept += [
        'Dir::Etc::netrc "/etc/apt/auth.conf";',
        'Dir::Etc::netrcparts "/etc/apt/auth.conf.d";',
    ]
    return "".join(f"{line}\n" for line in kept)


def _private_folders(folder: str, architecture: str) -> str:
    """apt.conf: every folder that apt writes is in `folder`; the machine's hooks are not run."""
    values = {
        "Dir::Etc::main": "/dev/null",
        "Dir::Etc::parts": "/dev/null",
        "Dir::Etc::sourcelist": f"{folder}/sources.list",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::State": folder,
        "Dir::State::lists": f"{folder}/lists",
        "Dir::State::status": f"{folder}/status",
        "Dir::Cache": f"{folder}/cache",
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "root",  # the folders are not the user _apt's to write
        "APT::Update::Error-Mode": "any",
        "Acquire::Languages": "none",
    }
    return "".join(f'{name} "{value}";\n' for name, value in values.items())


def _write(path: str, text: str) -> None:
    # The settings may hold a proxy's password.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
