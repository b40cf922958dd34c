"""Rate limits as the user writes them: ``bps=10M,iops=500,bps-burst=50M,iops-burst=1000``.

The names are QEMU's; numbers take K, M and G (of 1024, as for memory). A burst is what may be had
at once after a rest; without it, that is a tenth of a second's worth.
"""

from __future__ import annotations

from collections.abc import Mapping

from pyvmm.errors import ConfigError

SYNTAX = "[,bps=N][,iops=N][,bps-burst=N][,iops-burst=N]"
# What stands on the command line → the field that holds it.
KEYS = {"bps": "bps", "iops": "iops", "bps-burst": "bps_burst", "iops-burst": "iops_burst"}
# A network card's directions, as the guest sees them; its operations are packets.
NET_KEYS = {
    f"{way}-{what}{burst}": f"{way}_{what}{burst.replace('-', '_')}"
    for way in ("rx", "tx")
    for what in ("bps", "pps")
    for burst in ("", "-burst")
}


def net_fields(way: str) -> tuple[str, str, str, str]:
    """The fields of a network card's direction: bytes and packets a second, the bursts of both."""
    return f"{way}_bps", f"{way}_pps", f"{way}_bps_burst", f"{way}_pps_burst"


FIELDS = frozenset((*KEYS.values(), *NET_KEYS.values()))

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_DIGITS = 15


def parse_rate(key: str, text: str, option: str) -> int:
    """The number in `text`, at least 1. Raises ConfigError that names `option`."""
    lower = text.lower()
    digits, unit = (lower[:-1], lower[-1]) if lower[-1:].isalpha() else (lower, "")
    readable = digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS
    if not readable or unit not in _UNITS or not int(digits):
        raise ConfigError(
            f"{key} cannot be {text!r}", cure="write a number, 500 or 10M", option=option
        )
    return int(digits) * _UNITS[unit]


def check(rates: object, option: str, keys: Mapping[str, str] = KEYS) -> None:
    """Raise ConfigError for numbers that make no limits in the fields that `keys` name."""
    for key, field in keys.items():
        if getattr(rates, field) < 0:
            raise ConfigError(f"{key} is negative", cure="use a number above 0", option=option)
        rate = key.removesuffix("-burst")
        if getattr(rates, field) and not getattr(rates, keys[rate]):
            raise ConfigError(f"{key} without {rate}", cure=f"give {rate} too", option=option)
