"""The images come from the mirror that this machine's apt uses, whatever its format."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm.errors import ConfigError
from pyvmm.images import apt_sources
from pyvmm.images.apt_sources import Source

SUITES = ["bookworm", "bookworm-security", "bookworm-backports"]

DEB822 = """\
# written by an installer
Types: deb deb-src
URIs: http://mirror.test/debian
Suites: trixie trixie-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.test/debian-security
Suites: trixie-security
Components: main

Types: deb
Enabled: no
URIs: http://off.test/debian
Suites: bookworm
Components: main
"""


def test_deb822_gives_other_suites_on_the_same_mirror() -> None:
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    derived = apt_sources.derive(apt_sources.parse_deb822(DEB822), SUITES)
    assert derived == [
        Source("http://mirror.test/debian", "bookworm", ("main",), keyring),
        Source("http://mirror.test/debian-security", "bookworm-security", ("main",), ""),
        Source("http://mirror.test/debian", "bookworm-backports", ("main",), keyring),
    ]


def test_one_line_format_with_options_and_comments() -> None:
    text = (
        "# deb http://commented.test/debian bookworm main\n"
        "deb-src http://mirror.test/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/etc/keys/d.gpg] http://mirror.test/debian bookworm main # x\n"
        "deb cdrom:[Debian]/ bookworm main\n"
    )
    derived = apt_sources.derive(apt_sources.parse_one_line(text), ["bookworm-backports"])
    assert apt_sources.render(derived) == (
        "deb [signed-by=/etc/keys/d.gpg] http://mirror.test/debian bookworm-backports main\n"
    )


def test_a_security_suite_is_left_out_where_the_machine_has_none() -> None:
    sources = [Source("http://mirror.test/debian", "sid", ("main",))]
    assert [s.suite for s in apt_sources.derive(sources, SUITES)] == [
        "bookworm",
        "bookworm-backports",
    ]


def test_another_vendors_repository_of_the_same_suite_is_not_taken_for_debian() -> None:
    vendor = Source("http://vendor.test/prod", "bookworm", ("main",), "/etc/keys/vendor.gpg")
    debian = Source("http://mirror.test/debian", "bookworm", ("main",))
    assert apt_sources.derive([vendor, debian], ["bookworm"])[0].uri == debian.uri
    assert apt_sources.derive([debian, vendor], ["bookworm"])[0].uri == debian.uri


def test_a_mirror_of_ones_own_replaces_the_address_and_keeps_the_keyring() -> None:
    debian = Source("http://mirror.test/debian", "bookworm", ("main",), "/k.gpg")
    [derived] = apt_sources.derive([debian], ["bookworm"], "http://near.test/d")
    assert (derived.uri, derived.signed_by) == ("http://near.test/d", "/k.gpg")


def test_without_a_debian_mirror_the_error_names_the_cure() -> None:
    ubuntu = Source("http://ubuntu.test/ubuntu", "noble", ("main",))
    with pytest.raises(ConfigError, match="no Debian mirror; set PYVMM_DEBIAN_MIRROR"):
        apt_sources.derive([ubuntu], ["bookworm"])


def test_a_key_written_into_the_source_is_not_taken_for_a_path() -> None:
    text = (
        "Types: deb\nURIs: http://m.test/debian\nSuites: sid\nComponents: main\n"
        "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDMEY865UxYJ\n"
    )
    assert [source.signed_by for source in apt_sources.parse_deb822(text)] == [""]


def test_both_formats_are_read_from_apts_folder(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text("deb http://a.test/debian sid main\n")
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "debian.sources").write_text(DEB822)
    (parts / "debian.sources.save").write_text(DEB822)
    found = [source.uri for source in apt_sources.machine_sources(str(tmp_path))]
    assert found == ["http://a.test/debian", *["http://mirror.test/debian"] * 2,
                     "http://mirror.test/debian-security"]  # fmt: skip
