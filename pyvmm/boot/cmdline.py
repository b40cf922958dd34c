"""The kernel command line: checked, never truncated, and merged so that the user has the last word.

Syntax as the kernel's own parser has it (Linux lib/cmdline.c, next_arg): spaces part parameters,
double quotes keep spaces in, ``--`` ends the kernel's parameters and what follows belongs to init.
"""

from __future__ import annotations

from pyvmm.errors import ConfigError

OPTION = "--cmdline"

# To the kernel (lib/ctype.c) this byte is a space, which ends a parameter that is not quoted.
_LATIN1_SPACE = b"\xa0"

# Parameters that exclude each other: the user's one drops our other one.
_SAME = {"ro": "rw"}
# Parameters that add up instead of replacing each other.
_CUMULATIVE = frozenset({"virtio_mmio.device"})


def encode(cmdline: str, limit: int) -> bytes:
    """`cmdline` as the kernel wants it, in UTF-8, with its terminating NUL.

    `limit` is the largest length in bytes without the NUL. Raises ConfigError if it is longer, has
    a control character such as NUL or newline in it, or a character that the kernel would take for
    a space.
    """
    quoted = False
    for position, char in enumerate(cmdline):
        quoted ^= char == '"'
        if not (char.isprintable() or char == "\t"):
            what = {"\0": "a NUL", "\n": "a newline", "\r": "a carriage return"}.get(char)
            raise ConfigError(
                f"the kernel command line has {what or repr(char)} at position {position}",
                cure="use printable characters on one line",
                option=OPTION,
            )
        if not quoted and _LATIN1_SPACE in char.encode():
            raise ConfigError(
                f"the kernel takes the {char!r} at position {position} of its command line for a "
                "space, as its second byte is one in Latin-1",
                cure="put the value into double quotes",
                option=OPTION,
            )
    text = cmdline.encode()
    if len(text) > limit:
        raise ConfigError(
            f"the kernel command line has {len(text)} bytes, this kernel takes at most {limit}",
            cure=f"shorten it by {len(text) - limit}",
            option=OPTION,
        )
    return text + b"\0"


def split(cmdline: str) -> list[str]:
    """The parameters of `cmdline`, quotes kept. Raises ConfigError for a quote that never ends."""
    parameters = []
    current = ""
    quoted = False
    for char in cmdline:
        if char == '"':
            quoted = not quoted
        if char in " \t" and not quoted:
            if current:
                parameters.append(current)
            current = ""
        else:
            current += char
    if quoted:
        raise ConfigError(
            'a double quote (") in the kernel command line is never closed',
            cure="close it",
            option=OPTION,
        )
    if current:
        parameters.append(current)
    return parameters


def name(parameter: str) -> str:
    """The name that `parameter` sets; to the kernel ``-`` and ``_`` are the same in it."""
    key = parameter.strip('"').partition("=")[0].replace("-", "_")
    return _SAME.get(key, key)


def merge(defaults: list[str], user: str) -> str:
    """The command line made of `defaults` and then what the `user` wrote.

    A default goes if the user sets a parameter of that name: any ``console=`` of the user drops all
    of ours, ``ro`` drops ``rw``. What the user wrote keeps its order, and what stands after ``--``
    stays last. Raises ConfigError for a quote that never ends.
    """
    wanted = split(user)
    end = wanted.index("--") if "--" in wanted else len(wanted)
    taken = {name(parameter) for parameter in wanted[:end]} - _CUMULATIVE
    kept = [parameter for parameter in defaults if name(parameter) not in taken]
    return " ".join([*kept, *wanted])


def values(cmdline: str, wanted: str) -> list[str]:
    """The values that `cmdline` gives the kernel's parameter named `wanted`, in order."""
    parameters = split(cmdline)
    end = parameters.index("--") if "--" in parameters else len(parameters)
    found = [one for one in parameters[:end] if name(one) == name(wanted)]
    return [one.strip('"').partition("=")[2].strip('"') for one in found]


def has(cmdline: str, wanted: str) -> bool:
    """True if `cmdline` sets the parameter named `wanted` for the kernel."""
    return bool(values(cmdline, wanted))
