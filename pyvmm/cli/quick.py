"""`pyvmm run` without click, for command lines that leave no question open.

click and what it imports are a third of a start. So a plain command line is read here, and whatever
is not plain (help, a rarer option, a missing or odd value) is left to click, which alone
explains and complains. A test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pyvmm.spec.vm import DISCOVERY, ON_REBOOT

# The usual parameters of pyvmm.cli.run.run and their values where no option is given.
DEFAULTS: dict[str, Any] = {
    "image": None,
    "kernel": None,
    "disks": (),
    "initrd": None,
    "cpus": 1,
    "memory": "512M",
    "cmdline": "",
    "trace": "",
    "trace_file": None,
    "kvm": "auto",
    "discovery": "auto",
    "on_reboot": "restart",
    "name": "",
    "rm": False,
    "detach": False,
    "log_format": "text",
    "command": (),
    "debug": False,
}
CHOICES = {
    "kvm": ("auto", "host", "emulated"),
    "discovery": DISCOVERY,
    "on_reboot": ON_REBOOT,
    "log_format": ("text", "json"),
}
_NO_VALUE = {"--rm": "rm", "--detach": "detach", "-d": "detach"}
_NO_SUCH_FLAG = ("debug", "image", "command", *_NO_VALUE.values())
_FLAGS = {
    "--disk" if name == "disks" else f"--{name.replace('_', '-')}": name
    for name in DEFAULTS
    if name not in _NO_SUCH_FLAG
}


def split_command(argv: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """What is for `pyvmm run` and, behind the first ``--``, what is to run in the guest."""
    words = list(argv)
    if "--" not in words:
        return words, ()
    place = words.index("--")
    return words[:place], tuple(words[place + 1 :])


def parse_run(argv: Sequence[str]) -> dict[str, Any] | None:
    """The parameters of `run` that `argv` gives, or None if click should look at it."""
    if argv[:1] != ["run"]:
        return None
    values = dict(DEFAULTS)
    options, values["command"] = split_command(argv[1:])
    words = iter(options)
    for word in words:
        if word in _NO_VALUE:
            values[_NO_VALUE[word]] = True
            continue
        if word and not word.startswith("-") and values["image"] is None:
            values["image"] = word
            continue
        flag, equals, text = word.partition("=")
        name = _FLAGS.get(flag)
        if name is None:
            return None
        if not equals:
            text = next(words, "-")
            if text.startswith("-"):
                return None
        if name == "disks":
            values[name] += (text,)
        elif name == "cpus":
            if not (text.isascii() and text.isdigit() and len(text) < 10):
                return None
            values[name] = int(text)
        elif text not in CHOICES.get(name, (text,)):
            return None
        else:
            values[name] = text
    return values


def run_quickly(argv: Sequence[str]) -> Callable[[], int] | None:
    """What carries out `argv`, or None if click should."""
    values = parse_run(argv)
    if values is None:
        return None
    del values["debug"], values["log_format"]  # the latter was looked at before all others
    from pyvmm.monitor.start import start

    return lambda: start(**values)
