"""The quick reader of `pyvmm run` and click read the same from a command line."""

from __future__ import annotations

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.cli.quick import parse_run
from pyvmm.cli.run import run

DEFAULTS = parse_run(["run"]) or {}
FLAGS = [
    *("--kernel", "--disk", "--initrd", "--cpus", "--memory", "--cmdline", "--trace"),
    *(
        "--rm",
        "--detach",
        "--log-format",
        "-d",
        "--trace-file",
        "--kvm",
        "--discovery",
        "--name",
        "--debug",
        "--help",
        "--ker",
        "-k",
        "x",
    ),
]
VALUES = [
    "json",
    "a",
    "2",
    "",
    "-1",
    "-",
    "--",
    "host",
    "auto",
    "acpi",
    "HOST",
    "a=b",
    "1_0",
    "٣",
    " 4",
]

word = st.one_of(
    st.sampled_from(FLAGS),
    st.sampled_from(VALUES),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.sampled_from(VALUES)),
)


def by_click(argv: list[str]) -> dict[str, object] | None:
    """The options as click reads them, without those of click's own that nobody gives."""
    try:
        params = run.make_context("run", list(argv)).params
    except click.ClickException:
        return None
    return {name: value for name, value in params.items() if name in DEFAULTS or value}


@given(st.lists(word, max_size=8))
def test_what_the_quick_reader_takes_click_reads_alike(argv):
    quick = parse_run(["run", "--kernel=vmlinuz", *argv])
    if quick is not None:
        assert quick == by_click(["--kernel=vmlinuz", *argv])


def test_an_option_that_is_not_given_is_the_same_for_both():
    assert parse_run(["run", "--kernel", "k"]) == by_click(["--kernel", "k"])


@pytest.mark.parametrize("option", run.params, ids=lambda option: option.name)
def test_it_leaves_to_click_what_it_does_not_know(option):
    argv = ["--kernel", "k", option.opts[-1]]
    if isinstance(option, click.Option) and not option.is_flag:
        argv.append("1")
    assert parse_run(["run", *argv]) in (None, by_click(argv))


def test_a_usual_command_line_is_read_quickly():
    argv = ["--kernel", "k", "--initrd=i", "--disk", "a,readonly", "--disk=b", "--cpus", "4"]
    argv += [
        "debian",
        "--rm",
        "--memory",
        "1G",
        "--kvm=host",
        "--trace",
        "all",
        "--cmdline",
        "quiet root=/dev/vdb",
    ]
    quick = parse_run(["run", *argv])
    assert quick is not None
    assert quick == by_click(argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "--help"],
        ["run", "--kernel"],
        ["run", "--kernel", "k", "--cpus", "many"],
        ["run", "--kernel", "k", "--kvm=sometimes"],
        ["run", "image", "extra"],
        ["run", "--rm=yes"],
        ["run", "--kernel", "k", "--debug"],
        ["doctor"],
        [],
    ],
    ids=" ".join,
)
def test_whatever_needs_words_is_left_to_click(argv):
    assert parse_run(argv) is None
