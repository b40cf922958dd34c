"""The Ctrl-A keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.platform.escape import HELP, Command, EscapeParser

QUIT, SHOW_HELP = Command.QUIT, Command.HELP


@pytest.mark.parametrize(
    ("typed", "to_guest", "commands"),
    [
        (b"ls\r", b"ls\r", []),
        (b"\x03\x1a\x1c", b"\x03\x1a\x1c", []),  # Ctrl-C, Ctrl-Z and Ctrl-\ are the guest's
        (b"\x01x", b"", [QUIT]),
        (b"\x01h", b"", [SHOW_HELP]),
        (b"\x01a", b"\x01", []),
        (b"\x01\x01", b"\x01", []),
        (b"\x01\x01x", b"\x01x", []),  # a literal Ctrl-A, then an x
        (b"\x01\x01\x01x", b"\x01", [QUIT]),
        (b"\x01l", b"\x01l", []),  # nothing of ours: both keys go through
        (b"one\x01htwo\x01xthree", b"onetwothree", [SHOW_HELP, QUIT]),
        (b"\x01", b"", []),
        (bytes(range(2, 256)), bytes(range(2, 256)), []),
    ],
)
def test_keys(typed: bytes, to_guest: bytes, commands: list[Command]) -> None:
    assert EscapeParser().feed(typed) == (to_guest, commands)


@given(st.lists(st.sampled_from([b"\x01", b"x", b"a", b"h", b"q", b"\xff"]).map(bytes)))
def test_where_the_reads_are_cut_makes_no_difference(keys: list[bytes]) -> None:
    whole = EscapeParser().feed(b"".join(keys))
    parser = EscapeParser()
    pieces = [parser.feed(key) for key in keys]
    assert b"".join(piece for piece, _ in pieces) == whole[0]
    assert [command for _, commands in pieces for command in commands] == whole[1]


@given(st.binary())
def test_doubling_ctrl_a_sends_anything(data: bytes) -> None:
    assert EscapeParser().feed(data.replace(b"\x01", b"\x01\x01")) == (data, [])


def test_help_names_every_key() -> None:
    assert all(f"Ctrl-A {key} " in HELP for key in "hxa")
