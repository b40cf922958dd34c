"""A disk's boot entry: entries, GRUB's configuration, the newest kernel."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyvmm.boot import extlinux
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


# --- what real images have ------------------------------------------------------------------------

MKCONFIG_HEAD = """\
### BEGIN /etc/grub.d/00_header ###
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
   set boot_once=true
else
   set default="DEFAULT"
fi
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
fi
function savedefault {
  if [ -z "${boot_once}" ]; then
    saved_entry="${chosen}"
  fi
}
function gfxmode {
\tset gfxpayload="${1}"
\tif [ "${1}" = "keep" ]; then
\t\tset vt_handoff=vt.handoff=7
\telse
\t\tset vt_handoff=
\tfi
}
"""
DEBIAN = (
    MKCONFIG_HEAD
    + """\
menuentry 'Debian GNU/Linux' --class debian --class os $menuentry_id_option 'gnulinux-simple-7a' {
\tload_video
\tif [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
\tset root='hd0,gpt1'
\tsearch --no-floppy --fs-uuid --set=root 7a
\techo\t'Loading Linux 6.12 ...'
\tlinux\t/boot/vmlinuz-6.12 root=PARTUUID=7a ro console=tty0 console=ttyS0,115200 $vt_handoff
\techo\t'Loading initial ramdisk ...'
\tinitrd\t/boot/initrd.img-6.12
}
submenu 'Advanced options' $menuentry_id_option 'gnulinux-advanced-7a' {
\tmenuentry 'Debian, with Linux 6.12' --class os $menuentry_id_option 'gnulinux-6.12-advanced-7a' {
\t\tlinux\t/boot/vmlinuz-6.12 root=PARTUUID=7a ro
\t\tinitrd\t/boot/initrd.img-6.12
\t}
\tmenuentry 'Debian, with Linux 6.1' --class os $menuentry_id_option 'gnulinux-6.1-advanced-7a' {
\t\tlinux\t/boot/vmlinuz-6.1 root=PARTUUID=7a ro single
\t\tinitrd\t/boot/initrd.img-6.1
\t}
}
if [ "$grub_platform" = "efi" ]; then
\tmenuentry 'UEFI Firmware Settings' $menuentry_id_option 'uefi-firmware' {
\t\tfwsetup
\t}
fi
"""
)
BOTH = {f"/boot/{kind}-{v}": "" for kind in ("vmlinuz", "initrd.img") for v in ("6.1", "6.12")}


@pytest.mark.parametrize(
    ("default", "saved", "version"),
    [
        ("0", "", "6.12"),
        ("1", "", "6.12"),  # the menu's first
        ("1>1", "", "6.1"),
        ("gnulinux-advanced-7a>gnulinux-6.1-advanced-7a", "", "6.1"),
        ("Advanced options>Debian, with Linux 6.1", "", "6.1"),
        ("${saved_entry}", "gnulinux-advanced-7a>gnulinux-6.1-advanced-7a", "6.1"),
        ("${saved_entry}", "", "6.12"),
        ("2", "", "6.12"),  # it loads no kernel
        ("1>9", "", "6.12"),
        ("no such title", "", "6.12"),
    ],
)
def test_what_grub_mkconfig_writes(look: Look, default: str, saved: str, version: str) -> None:
    block = f"# GRUB Environment Block\n{f'saved_entry={saved}' if saved else ''}\n{'#' * 900}"
    files = {**BOTH, "/boot/grub/grub.cfg": DEBIAN.replace("DEFAULT", default)}
    entry = look({**files, "/boot/grub/grubenv": block})
    assert entry is not None
    assert entry.kernel == f"/boot/vmlinuz-{version}"
    assert entry.initrds == (f"/boot/initrd.img-{version}",)
    assert entry.cmdline[:2] == ("root=PARTUUID=7a", "ro") and "$vt_handoff" not in entry.cmdline


def test_an_ubuntu_image_tries_without_its_initrd_first(look: Look) -> None:
    text = """\
set default="0"
menuentry 'Ubuntu' --class ubuntu $menuentry_id_option 'gnulinux-simple' {
\tif [ "${initrdfail}" = 1 ]; then
\t  echo 'Attempting with initrd.'
\t  linux /vmlinuz-6.8 root=PARTUUID=e5 ro console=tty1 console=ttyS0
\t  initrd /initrd.img-6.8
\telse
\t  linux /vmlinuz-6.8 root=PARTUUID=e5 ro console=tty1 console=ttyS0 panic=-1
\tfi
\tinitrdfail
}
"""
    entry = look({"/vmlinuz-6.8": "", "/initrd.img-6.8": "", "/grub/grub.cfg": text})
    assert entry is not None and entry.initrds == ("/initrd.img-6.8",)
    assert entry.cmdline == ("root=PARTUUID=e5", "ro", "console=tty1", "console=ttyS0")


def fedora(version: str, options: str) -> str:
    return (
        f"title Fedora Linux ({version})\nversion {version}\nlinux /vmlinuz-{version}\n"
        f"initrd /initramfs-{version}.img\noptions {options}\ngrub_users $grub_users\n"
        "grub_arg --unrestricted\ngrub_class fedora\n"
    )


FEDORA = {
    f"/{name}": ""
    for v in ("6.15.3-200.fc42.x86_64", "6.9.7-200.fc42.x86_64", "0-rescue-3c")
    for name in (f"vmlinuz-{v}", f"initramfs-{v}.img")
}
FEDORA |= {
    f"/loader/entries/3c-{v}.conf": fedora(v, "root=UUID=5e ro rootflags=subvol=root $tuned_params")
    for v in ("6.15.3-200.fc42.x86_64", "6.9.7-200.fc42.x86_64", "0-rescue-3c")
}


@pytest.mark.parametrize(
    ("saved", "version"),
    [
        ("", "6.15.3-200.fc42.x86_64"),
        ("saved_entry=3c-6.9.7-200.fc42.x86_64\nboot_success=1", "6.9.7-200.fc42.x86_64"),
        ("saved_entry=1", "6.9.7-200.fc42.x86_64"),
        ("saved_entry=7", "6.15.3-200.fc42.x86_64"),
        ("saved_entry=3c-5.0", "6.15.3-200.fc42.x86_64"),
    ],
)
def test_a_boot_of_fedora_s(look: Look, saved: str, version: str) -> None:
    stub = 'set default="${saved_entry}"\ninsmod blscfg\nblscfg\n'
    entry = look({**FEDORA, "/grub2/grubenv": saved, "/grub2/grub.cfg": stub})
    assert entry is not None
    assert (entry.kernel, entry.initrds) == (f"/vmlinuz-{version}", (f"/initramfs-{version}.img",))
    assert entry.cmdline == ("root=UUID=5e", "ro", "rootflags=subvol=root")


@pytest.mark.parametrize(
    ("block", "config", "words"),
    [
        ("kernelopts=root=/dev/mapper/a-root ro \n", "", ("root=/dev/mapper/a-root", "ro")),
        (
            "",
            'if [ -z "${kernelopts}" ]; then\n  set kernelopts="root=UUID=8 ro"\nfi\n'
            'set tuned_params="a=b c"\n',
            ("root=UUID=8", "ro", "a=b", "c"),
        ),
        ("kernelopts=root=UUID=9", 'set kernelopts="root=UUID=8"\n', ("root=UUID=9",)),
        ("", "set kernelopts=a\nset kernelopts=b\n", ()),  # nobody knows
        ("", 'set kernelopts="$other"\n', ()),
        ("", "", ()),
    ],
)
def test_entries_with_variables_of_grubs(
    look: Look, block: str, config: str, words: tuple[str, ...]
) -> None:
    files = {"/vmlinuz-4.18": "", "/initramfs-4.18.img": ""}
    files["/loader/entries/a.conf"] = fedora("4.18", "$kernelopts ${tuned_params}")
    entry = look({**files, "/grub2/grubenv": block, "/grub2/grub.cfg": config})
    assert entry is not None and entry.cmdline == words


def test_values_that_would_grow_a_line_without_end(look: Look) -> None:
    files = {"/vmlinuz-4.18": "", "/initramfs-4.18.img": ""}
    files["/loader/entries/a.conf"] = fedora("4.18", "$kernelopts " * 500)
    files["/grub2/grubenv"] = f"kernelopts={'a' * 4000}\n"
    with pytest.raises(ConfigError, match="in the disk has a line of"):
        look(files)


@pytest.mark.parametrize(
    "lines", [["options $kernelopts"] * 3, ["options a"] * 5000, ["options " + "a" * 60] * 1500]
)
def test_an_entry_with_many_lines_of_options_costs_little(look: Look, lines: list[str]) -> None:
    files = {"/vmlinuz-4.18": "", "/grub2/grubenv": f"kernelopts={'a ' * 2000}\n"}
    files["/loader/entries/a.conf"] = "\n".join(["linux /vmlinuz-4.18", *lines])
    with pytest.raises(ConfigError, match=r"has a line of|more than the 65536 it may have"):
        look(files)


def test_systemd_boots_default_is_a_pattern(look: Look) -> None:
    files = {f"/loader/entries/{name}.conf": f"linux /{name}\noptions root=LABEL=x {name}\n"
             for name in ("arch", "arch-lts", "debian")}  # fmt: skip
    files |= {"/arch": "", "/arch-lts": "", "/debian": ""}
    for pattern, name in (
        ("arch.conf", "arch"), ("*-lts.conf", "arch-lts"), ("arch-*", "arch-lts"),
        ("none*", "debian"), ("*" * 9000, "debian"),
    ):  # fmt: skip
        entry = look({**files, "/loader/loader.conf": f"timeout 3\ndefault {pattern}\n"})
        assert entry is not None and entry.kernel == f"/{name}", pattern


ALPINE = """\
SERIAL 0 115200
DEFAULT menu.c32
PROMPT 0
MENU TITLE Alpine/Linux Boot Menu
TIMEOUT 10
LABEL lts
  MENU LABEL Linux lts
  LINUX vmlinuz-lts
  INITRD initramfs-lts
  APPEND root=UUID=0d modules=sd-mod,usb-storage,ext4 quiet
LABEL virt
  MENU DEFAULT
  MENU LABEL Linux virt
  LINUX vmlinuz-virt
  INITRD initramfs-virt
  APPEND root=UUID=0d modules=ext4,virtio_blk rootfstype=ext4
MENU SEPARATOR
"""
ARCH = """\
default arch
APPEND root=/dev/vda3 rw
label memtest
    kernel /memtest.bin
label arch
    kernel ../vmlinuz-linux
    initrd ../intel-ucode.img,../initramfs-linux.img
label fallback
    kernel ../vmlinuz-linux
    append initrd=../initramfs-linux.img root=/dev/vda4 quiet
"""


def test_alpine_has_extlinux(look: Look) -> None:
    files = {
        f"/boot/{kind}-{name}": "" for kind in ("vmlinuz", "initramfs") for name in ("lts", "virt")
    }
    entry = look({**files, "/boot/extlinux.conf": ALPINE})
    assert entry is not None
    assert (entry.kernel, entry.initrds) == ("/boot/vmlinuz-virt", ("/boot/initramfs-virt",))
    assert entry.cmdline == ("root=UUID=0d", "modules=ext4,virtio_blk", "rootfstype=ext4")
    other = look({**files, "/boot/extlinux.conf": ALPINE.replace("menu.c32", "lts")})
    assert other is not None and other.kernel == "/boot/vmlinuz-lts"
    none = look(files)
    assert none is not None and none.initrds == ("/boot/initramfs-virt",)


def test_arch_has_syslinux(look: Look) -> None:
    names = ("vmlinuz-linux", "intel-ucode.img", "initramfs-linux.img")
    files = {f"/boot/syslinux/../{name}": "" for name in names}
    entry = look({**files, "/boot/syslinux/syslinux.cfg": ARCH})
    assert entry is not None and entry.kernel == "/boot/syslinux/../vmlinuz-linux"
    assert [name.rpartition("/")[2] for name in entry.initrds] == list(names[1:])
    assert entry.cmdline == ("root=/dev/vda3", "rw")
    other = look(
        {**files, "/boot/syslinux/syslinux.cfg": ARCH.replace("default arch", "default fallback")}
    )
    assert other is not None and other.initrds == ("/boot/syslinux/../initramfs-linux.img",)
    assert other.cmdline == ("root=/dev/vda4", "quiet")


@pytest.mark.parametrize(
    "text",
    ["", "LABEL", "LABEL x\nLINUX\n", "LINUX /x\n", "LABEL x\nKERNEL chain.c32\n", "\0" * 99],
)
def test_a_configuration_of_extlinux_without_a_kernel_is_none(look: Look, text: str) -> None:
    entry = look({**KERNELS, "/boot/extlinux/extlinux.conf": text})
    assert entry is not None and entry.source == "/boot/vmlinuz-6.12"


def test_what_all_labels_of_extlinux_share_is_read_for_one_of_them() -> None:
    shared = f"append {'b ' * 20000}\ninitrd {'a,' * 20000}\n"
    text = shared + "".join(f"label {number}\nkernel a\n" for number in range(256))
    tracemalloc.start()
    try:
        found = extlinux.chosen(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found is not None and len(found.initrds) == 20000
    assert peak < 16 << 20


def test_a_configuration_in_the_efi_partition_names_files_of_boots(look: Look) -> None:
    """As RHEL 7 has it; Debian's there only leads to another."""
    text = "menuentry 'CentOS Linux (7)' --id 'a' {\n\tlinuxefi /vmlinuz-3.10 root=UUID=4 ro\n"
    text += "\tinitrdefi /initramfs-3.10.img\n}\n"
    esp: Any = Files({"/EFI/centos/grub.cfg": text, "/EFI/debian/grub.cfg": "configfile /x\n"})
    boot: Any = Files({"/vmlinuz-3.10": "", "/initramfs-3.10.img": ""})
    entry = find([esp, boot])
    assert entry is not None and entry.system is boot
    assert (entry.kernel, entry.initrds) == ("/vmlinuz-3.10", ("/initramfs-3.10.img",))
    with pytest.raises(ConfigError, match="which is not in any file system of the disk"):
        other: Any = Files({"/nothing": ""})
        find([esp, other])


def test_a_configuration_without_a_menu(look: Look) -> None:
    text = "set timeout=0\nlinux /boot/vmlinuz-6.1 root=/dev/vda1\ninitrd /boot/initrd.img-6.1\n"
    entry = look({**KERNELS, "/boot/grub/grub.cfg": text + "boot\n"})
    assert entry is not None and entry.kernel == "/boot/vmlinuz-6.1"
    assert entry.cmdline == ("root=/dev/vda1",)
    entry = look({**KERNELS, "/boot/grub/grub.cfg": text})  # it would show a prompt
    assert entry is not None and entry.source == "/boot/vmlinuz-6.12"


@pytest.mark.parametrize(
    "line",
    [
        "menuentry {" + "a" * 900_000,
        "menuentry x " + "--id" * 200_000,
        "menuentry x --id" + " " * 900_000,
        "menuentry '" + '"' * 900_000,
        "set " + "a" * 900_000,
        "set " * 200_000,
        "set default=" + ">a" * 400_000,
        "linux /boot/vmlinuz-6.1 " + "$a" * 4000,
        "${" * 400_000,
        "}\n" * 400_000,
        "{\n" * 400_000,
    ],
    ids=lambda line: line[:16],
)
def test_no_line_takes_long(look: Look, line: str) -> None:
    """Time that grows with the square of a line's length would be minutes here."""
    text = f"{line}\nmenuentry y {{\nlinux /boot/vmlinuz-6.1\n}}\n"
    entry = look({**KERNELS, "/boot/grub/grub.cfg": text})
    assert entry is not None and entry.kernel == "/boot/vmlinuz-6.1"


def test_menus_within_menus_have_an_end(look: Look) -> None:
    text = "submenu x {\n" * 3000 + "menuentry y {\nlinux /boot/vmlinuz-6.1\n}\n"
    assert look({**KERNELS, "/boot/grub/grub.cfg": text}) is not None


# --- unified kernel images ------------------------------------------------------------------------


def unified(**sections: bytes) -> bytes:
    """An EFI program with these sections, each padded in the file."""
    head = bytearray(b"MZ".ljust(60, b"\0") + struct.pack("<I", 64))
    head += b"PE\0\0" + struct.pack("<HH12xHH", 0x8664, len(sections), 16, 0) + bytes(16)
    at, body = 1024, b""
    for name, data in sections.items():
        label = f".{name.rstrip('_')}".encode().ljust(8, b"\0")
        padded = data.ljust(-(-len(data) // 512) * 512, b"\0")
        head += struct.pack("<8sIIII16x", label, len(data), 0x1000, len(padded), at)
        at, body = at + len(padded), body + padded
    return bytes(head).ljust(1024, b"\0") + body


class Binaries(Files):
    def read_file(self, path: str, most: int) -> Iterator[bytes]:
        data = self.files[self._clean(path)].encode("latin-1")
        for at in range(0, len(data), 700):
            yield data[at : at + 700]


def test_a_unified_kernel_image() -> None:
    image = unified(
        osrel=b"ID=fedora\n", cmdline=b"console=ttyS0\nquiet\n\0", uname=b"6.15.3",
        linux=b"the kernel" * 99, initrd=b"the initrd" * 200,
        profile=b"ID=other\n", cmdline_=b"other",
    )  # fmt: skip
    older = unified(linux=b"old", uname=b"6.9")
    files = {"/EFI/Linux/3c-6.15.efi": image, "/EFI/Linux/z.efi": older, "/EFI/Linux/a.efi": b"MZ"}
    systems: Any = [Binaries({path: data.decode("latin-1") for path, data in files.items()})]
    entry = find(systems)
    assert entry is not None and entry.source == "/EFI/Linux/3c-6.15.efi"
    assert entry.cmdline == ("console=ttyS0", "quiet")
    assert b"".join(entry.read_kernel(1 << 20)) == b"the kernel" * 99
    assert entry.has_initrd
    assert b"".join(entry.read_initrds(1 << 20)) == b"the initrd" * 200
    with pytest.raises(ConfigError, match=r"has 2000 bytes of \.initrd, more than the 1999"):
        list(entry.read_initrds(1999))


def test_many_large_unified_kernel_images_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that stands far behind is not looked for."""
    monkeypatch.setattr("pyvmm.boot.boot_entry._FAR", 5000)
    images = {f"/EFI/Linux/{n:03}.efi": unified(linux=b"k" * 90000, uname=b"9") for n in range(99)}
    taken = 0

    class Counted(Binaries):
        def read_file(self, path: str, most: int) -> Iterator[bytes]:
            nonlocal taken
            for piece in super().read_file(path, most):
                taken += len(piece)
                yield piece

    systems: Any = [Counted({path: data.decode("latin-1") for path, data in images.items()})]
    entry = find(systems)
    assert entry is not None and entry.kernel == "/EFI/Linux/031.efi"  # by its name
    assert taken <= 32 * 66_000


def test_damaged_unified_kernel_images_cost_little() -> None:
    image = unified(cmdline=b"x" * 99, linux=b"k" * 999)
    chance = random.Random(7)
    for _ in range(500):
        data = bytearray(image[: chance.randrange(len(image))])
        for _ in range(chance.choice((0, 1, 8)) if data else 0):
            data[chance.randrange(min(len(data), 200))] = chance.choice((0, 1, 0x7F, 0xFF))
        systems: Any = [Binaries({"/EFI/Linux/a.efi": data.decode("latin-1")})]
        try:
            entry = find(systems)
            if entry is not None:
                assert len(b"".join(entry.read_kernel(1 << 20))) <= len(image)
        except ConfigError as error:
            assert "\n" not in str(error)
