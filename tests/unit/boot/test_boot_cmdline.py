"""The kernel command line: merged, checked, never truncated (row 57)."""

from __future__ import annotations

from pathlib import Path

import pytest
from boot_images import Elf, boot, bzimage
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.boot.cmdline import encode, has, merge, split
from pyvmm.errors import ConfigError
from pyvmm.machine.board.x86.layout import FIXED_DEVICES

DEFAULTS = ["console=ttyS0", "panic=-1", "root=/dev/vda", "rw"]


@pytest.mark.parametrize(
    ("user", "merged"),
    [
        ("", "console=ttyS0 panic=-1 root=/dev/vda rw"),
        ("root=/dev/vdb", "console=ttyS0 panic=-1 rw root=/dev/vdb"),
        ("ro", "console=ttyS0 panic=-1 root=/dev/vda ro"),
        ("console=hvc0 console=tty0", "panic=-1 root=/dev/vda rw console=hvc0 console=tty0"),
        (
            'dyndbg="file a.c +p" x',
            'console=ttyS0 panic=-1 root=/dev/vda rw dyndbg="file a.c +p" x',
        ),
        ("-- root=x", "console=ttyS0 panic=-1 root=/dev/vda rw -- root=x"),
        ("panic=5 -- --single", "console=ttyS0 root=/dev/vda rw panic=5 -- --single"),
        ("  quiet \t splash ", "console=ttyS0 panic=-1 root=/dev/vda rw quiet splash"),
        ("rooty=1", "console=ttyS0 panic=-1 root=/dev/vda rw rooty=1"),
        ('"root=/dev/vdb x"', 'console=ttyS0 panic=-1 rw "root=/dev/vdb x"'),
    ],
)
def test_the_user_has_the_last_word(user: str, merged: str) -> None:
    assert merge(DEFAULTS, user) == merged


def test_dash_and_underscore_are_the_same_in_names() -> None:
    assert merge(["log_buf_len=1M"], "log-buf-len=2M") == "log-buf-len=2M"


def test_devices_on_the_command_line_add_up() -> None:
    ours = ["virtio_mmio.device=512@0xd0000000:5"]
    users = "virtio_mmio.device=512@0xe0000000:7"
    assert merge(ours, users) == f"{ours[0]} {users}"


def test_open_quote_is_refused() -> None:
    with pytest.raises(ConfigError, match="never closed"):
        merge(DEFAULTS, 'foo="bar')


def test_has() -> None:
    assert has("a=1 console=ttyS0", "console")
    assert not has("a=console", "console")
    assert not has("-- console=ttyS0", "console")


@given(st.text(alphabet='ab =-_"', max_size=30))
def test_merging_keeps_every_word_of_the_user(user: str) -> None:
    try:
        words = split(user)
    except ConfigError:
        return
    assert split(merge(DEFAULTS, user))[-len(words) :] == words or not words


@pytest.mark.parametrize("bad", ["a\0b", "a\nb", "a\rb", "a\x7fb", "a\x1bb", "\ud800", "a\u200eb"])
def test_row57_what_no_kernel_reads_is_refused(tmp_path: Path, bad: str) -> None:
    for kernel in (bzimage(), Elf().build(), Elf(note=None).build()):
        with pytest.raises(ConfigError, match="--cmdline") as caught:
            boot(tmp_path, kernel, cmdline=bad)
        assert "\n" not in str(caught.value) and "\0" not in str(caught.value)


def test_other_characters_than_ascii_go_to_the_kernel_as_utf8() -> None:
    text = 'root="PARTLABEL=Zürich à la 日本"'
    assert encode(text, 100) == text.encode() + b"\0"
    size = len(text.encode())
    assert len(encode(text, size)) == size + 1
    with pytest.raises(ConfigError, match=f"{size} bytes.*at most {size - 1}.*shorten it by 1"):
        encode(text, size - 1)


@pytest.mark.parametrize("text", ["x=à", "x=\U0001f820", 'x="à" à'])
def test_a_character_that_the_kernel_would_take_for_a_space_needs_quotes(text: str) -> None:
    assert b"\xa0" in text.encode()
    with pytest.raises(ConfigError, match="double quotes"):
        encode(text, 100)


@pytest.mark.parametrize("size", [255, 2047])
def test_row57_the_kernels_own_limit_counts(tmp_path: Path, size: int) -> None:
    kernel = bzimage(cmdline_size=size)
    _, memory = boot(tmp_path, kernel, cmdline="x" * size)
    assert memory.read(0x20000, size + 1) == b"x" * size + b"\0"
    with pytest.raises(ConfigError) as caught:
        boot(tmp_path, kernel, cmdline="x" * (size + 1))
    assert f"{size + 1} bytes" in str(caught.value) and str(size) in str(caught.value)


def test_row57_a_boastful_kernel_gets_no_more_than_the_map_has(tmp_path: Path) -> None:
    kernel = bzimage(cmdline_size=0xFFFF_FFFF)
    boot(tmp_path, kernel, cmdline="x" * 0xFFFF)
    with pytest.raises(ConfigError):
        boot(tmp_path, kernel, cmdline="x" * 0x10000)


def test_row57_elf_has_linux_limit(tmp_path: Path) -> None:
    boot(tmp_path, Elf().build(), cmdline="x" * 2047)
    with pytest.raises(ConfigError, match="2047"):
        boot(tmp_path, Elf().build(), cmdline="x" * 2048)


def test_row57_our_own_parameters_count_too(tmp_path: Path) -> None:
    from pyvmm.boot import x86

    devices = tuple(x86.VirtioMmioDevice(0xD000_0000 + n * 4096, 512, 5) for n in range(8))
    with pytest.raises(ConfigError, match="at most 255"):
        boot(
            tmp_path,
            bzimage(cmdline_size=255),
            cmdline="x" * 10,
            acpi=x86.AcpiConfig(FIXED_DEVICES, virtio=devices),
            virtio_discovery="both",
        )


def test_encode_ends_with_nul() -> None:
    assert encode("a\tb", 3) == b"a\tb\0"
