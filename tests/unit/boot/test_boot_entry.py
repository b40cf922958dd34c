"""A disk's boot entry: entries, GRUB's configuration, the newest kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyvmm.boot.boot_entry import BootEntry, find
from pyvmm.errors import ConfigError


class Files:
    """A file system of a few texts, with what `boot_entry` asks of one."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = {self._clean(path): text for path, text in files.items()}
        self.where = "the disk"

    @staticmethod
    def _clean(path: str) -> str:
        return "/" + "/".join(part for part in path.split("/") if part)

    def has(self, path: str) -> bool:
        return self._clean(path) in self.files or bool(self.names(path))

    def names(self, path: str) -> list[str]:
        folder = self._clean(path).rstrip("/") + "/"
        below = {
            one.removeprefix(folder).split("/")[0] for one in self.files if one.startswith(folder)
        }
        return sorted(below)

    def read_file(self, path: str, most: int) -> Iterator[bytes]:
        yield self.files[self._clean(path)].encode()

    def read_text(self, path: str, most: int) -> str:
        text = self.files[self._clean(path)]
        if len(text) > most:
            raise ConfigError(f"{path} has {len(text)} bytes, more than the {most} it may have")
        return text


Look = Callable[[dict[str, str]], BootEntry | None]


@pytest.fixture
def look() -> Look:
    def of(files: dict[str, str]) -> BootEntry | None:
        systems: Any = [Files(files)]
        return find(systems)

    return of


KERNELS = {"/boot/vmlinuz-6.1": "", "/boot/initrd.img-6.1": "", "/boot/vmlinuz-6.12": ""}
GRUB = """\
set default="0"
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
fi
menuentry 'Debian GNU/Linux' --class debian {
\tinsmod ext2
\tlinux\t/boot/vmlinuz-6.1 root=PARTUUID=1234 ro console=tty0 dyndbg="file a.c +p" $extra
\tinitrd\t/boot/initrd.img-6.1
}
submenu 'Advanced options' {
\tmenuentry 'older' {
\t\tlinux\t/boot/vmlinuz-6.12 root=/dev/vda1
\t}
}
"""


def test_grubs_default(look: Look) -> None:
    entry = look({**KERNELS, "/boot/grub/grub.cfg": GRUB})
    assert entry is not None
    assert (entry.kernel, entry.initrds) == ("/boot/vmlinuz-6.1", ("/boot/initrd.img-6.1",))
    assert entry.cmdline == ("root=PARTUUID=1234", "ro", "console=tty0", '"dyndbg=file a.c +p"')
    other = look({**KERNELS, "/boot/grub/grub.cfg": GRUB.replace('"0"', '"1"')})
    assert other is not None and other.kernel == "/boot/vmlinuz-6.12" and other.initrds == ()


def test_boot_as_a_file_system_of_its_own(look: Look) -> None:
    text = "menuentry x {\nlinux ($root)/vmlinuz-6.1 ro\ninitrd /initrd-6.1\n}\n"
    entry = look({"/vmlinuz-6.1": "", "/initrd-6.1": "", "/grub2/grub.cfg": text})
    assert entry is not None
    assert (entry.kernel, entry.initrds) == ("/vmlinuz-6.1", ("/initrd-6.1",))


def test_the_newest_entry_of_the_specification_comes_first(look: Look) -> None:
    entries = {
        f"/boot/loader/entries/{version}.conf": f"title Linux\nversion {version}\n"
        f"linux /vmlinuz-{version}\ninitrd /initrd.img-{version} $tuned_initrd\n"
        "options root=UUID=1 ro $kernelopts\noptions quiet\n"
        for version in ("6.9", "6.12~rc1", "6.12")
    }
    entries["/boot/loader/entries/shell.conf"] = "title x\nefi /shell.efi\nversion 99\n"
    files = {
        f"/boot/{kind}-{v}": ""
        for v in ("6.9", "6.12~rc1", "6.12")
        for kind in ("vmlinuz", "initrd.img")
    }
    entry = look({**entries, **files, "/boot/grub/grub.cfg": GRUB})
    assert entry is not None
    assert (entry.kernel, entry.initrds) == ("/boot/vmlinuz-6.12", ("/boot/initrd.img-6.12",))
    assert entry.cmdline == ("root=UUID=1", "ro", "quiet")
    assert entry.source == "/boot/loader/entries/6.12.conf"


def test_the_newest_kernel_where_nobody_says_anything(look: Look) -> None:
    files = {
        **KERNELS,
        "/boot/vmlinuz-6.9": "",
        "/boot/vmlinuz-0-rescue": "",
        "/boot/initrd-6.12": "",
    }
    entry = look(files)
    assert entry is not None
    assert (entry.kernel, entry.initrds) == ("/boot/vmlinuz-6.12", ("/boot/initrd-6.12",))
    assert look({"/etc/fstab": ""}) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "menuentry x {\nlinux /boot/vmlinuz-9 ro\n}",
            "grub.cfg in the disk names '/boot/vmlinuz-9'",
        ),
        ("menuentry x {\nlinux /boot/$kernel ro\n}", "which is not in that file system"),
        ("menuentry x {\nlinux /boot/vmlinuz-6.1 'ro\n}", "a quote that never ends"),
        (
            f"menuentry x {{\nlinux /boot/vmlinuz-6.1 {'a' * 9000}\n}}",
            "has a line of 9024 characters",
        ),
        ("#" * (1 << 20) + "#", "more than the 1048576 it may have"),
    ],
)
def test_what_cannot_be_followed_is_one_line(look: Look, text: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        look({**KERNELS, "/boot/grub/grub.cfg": text})
    assert why in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "menuentry x {\nlinux\n}", "linux /boot/x", "menuentry x {\n" * 9]
)
def test_a_configuration_without_an_entry_is_none(look: Look, text: str) -> None:
    entry = look({**KERNELS, "/boot/grub/grub.cfg": text})
    assert entry is not None and entry.source == "/boot/vmlinuz-6.12"


@pytest.mark.parametrize("more", ["", "initrd /boot/initrd.img-6.1\n"])
def test_an_entry_whose_kernel_is_a_variable(look: Look, more: str) -> None:
    entry = f"linux $kernel\n{more}"
    with pytest.raises(ConfigError, match=r"names '\$kernel', which is not in"):
        look({**KERNELS, "/boot/loader/entries/a.conf": entry})
