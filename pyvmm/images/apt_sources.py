"""The mirror from which this machine's apt gets Debian: images come from the same one.

Read from apt's own files, in both of their formats (sources.list(5): one line per source, and
deb822 paragraphs). Our list names other suites on the same mirror, and the same keyring.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pyvmm.errors import ConfigError

MIRROR_VARIABLE = "PYVMM_DEBIAN_MIRROR"
_RELEASES = r"bullseye|bookworm|trixie|forky|duke|sid|(old){0,2}stable|testing|unstable"
_ARCHIVE_SUITE = re.compile(rf"({_RELEASES})(-updates|-backports)?$")
_SECURITY_SUITE = re.compile(rf"({_RELEASES})(-security|/updates)$")
_ONE_LINE = re.compile(r"deb\s+(\[(?P<options>[^]]*)\]\s+)?(?P<uri>\S+)\s+(?P<rest>\S.*)")


class Source(NamedTuple):
    """One mirror and suite; `signed_by` is a keyring's path, or "" for apt's trusted keys."""

    uri: str
    suite: str
    components: tuple[str, ...]
    signed_by: str = ""


def parse_one_line(text: str) -> Iterator[Source]:
    """The "deb" lines of a sources.list."""
    for line in text.splitlines():
        found = _ONE_LINE.match(line.partition("#")[0].strip())
        if not found:
            continue
        suite, *components = found["rest"].split()
        options = dict(
            option.split("=", 1) for option in (found["options"] or "").split() if "=" in option
        )
        keyring = options.get("signed-by", "")
        yield Source(found["uri"], suite, tuple(components), _keyring(keyring))


def parse_deb822(text: str) -> Iterator[Source]:
    """The sources of a .sources file, one for each of a paragraph's URIs and suites."""
    for fields in paragraphs(text):
        wanted = "deb" in fields.get("types", "").split()
        if not wanted or fields.get("enabled", "yes").lower() in ("no", "false", "0"):
            continue
        components = tuple(fields.get("components", "").split())
        keyring = _keyring(fields.get("signed-by", ""))
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield Source(uri, suite, components, keyring)


def paragraphs(text: str) -> Iterator[dict[str, str]]:
    """deb822: paragraphs of "Field: value" and indented continuation lines; lower-case names."""
    fields: dict[str, str] = {}
    name = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t":
            fields[name] = f"{fields.get(name, '')}\n{line.strip()}"
        else:
            name, _, value = line.partition(":")
            name = name.lower()
            fields[name] = value.strip()


def machine_sources(folder: str = "/etc/apt") -> list[Source]:
    """Every source in apt's configuration `folder`."""
    parts = os.path.join(folder, "sources.list.d")
    names = sorted(os.listdir(parts)) if os.path.isdir(parts) else []
    sources: list[Source] = []
    for path in [os.path.join(folder, "sources.list"), *(os.path.join(parts, n) for n in names)]:
        parse = parse_deb822 if path.endswith(".sources") else parse_one_line
        if path.endswith((".list", ".sources")) and os.path.isfile(path):
            with open(path, encoding="utf-8", errors="replace") as file:
                sources += parse(file.read())
    return sources


def derive(sources: Iterable[Source], suites: Sequence[str], mirror: str = "") -> list[Source]:
    """`suites` on the mirrors that `sources` name; a security suite only where there is one.

    `mirror` overrides the archive's address. Raises ConfigError where no source is Debian's.
    """
    usable = [s for s in sources if "main" in s.components and not s.uri.startswith("cdrom:")]
    archive = _best(usable, _ARCHIVE_SUITE)
    security = _best(usable, _SECURITY_SUITE)
    if mirror:
        archive = Source(mirror, "", ("main",), archive.signed_by if archive else "")
    if not archive:
        raise ConfigError(
            "apt's sources on this machine name no Debian mirror",
            cure=f"set {MIRROR_VARIABLE} to the address of one",
        )
    derived = []
    for suite in suites:
        base = security if _SECURITY_SUITE.match(suite) else archive
        if base:
            derived.append(base._replace(suite=suite, components=("main",)))
    return derived


def render(sources: Iterable[Source]) -> str:
    """A sources.list, one line each."""
    lines = []
    for source in sources:
        options = f"[signed-by={source.signed_by}] " if source.signed_by else ""
        lines.append(f"deb {options}{source.uri} {source.suite} {' '.join(source.components)}\n")
    return "".join(lines)


def _best(sources: Sequence[Source], suite: re.Pattern[str]) -> Source | None:
    """The likeliest to be Debian's own archive: others also call their suites "bookworm"."""
    named = [source for source in sources if suite.match(source.suite)]
    return max(named, key=_likeness, default=None)


def _likeness(source: Source) -> int:
    folder = source.uri.rstrip("/").rpartition("/")[2]
    return 2 * ("debian-archive" in source.signed_by) + ("debian" in folder)


def _keyring(signed_by: str) -> str:
    """A path as it is; a key that is written out in the source is not carried over."""
    return signed_by if signed_by.startswith("/") and "\n" not in signed_by else ""
