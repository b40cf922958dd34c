"""Rate limits as the user writes them: ``bps=10M,iops=500,bps-burst=50M,iops-burst=1000``.

The names are QEMU's; numbers take K, M and G (of 1024, as for memory). A burst is what may be had
at once after a rest; without it, that is a tenth of a second's worth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pyvmm.errors import ConfigError

if TYPE_CHECKING:
    from pyvmm.virtio.rate_limit import RateLimiter

SYNTAX = "[,bps=N][,iops=N][,bps-burst=N][,iops-burst=N]"
# What stands on the command line → the field that holds it.
KEYS = {"bps": "bps", "iops": "iops", "bps-burst": "bps_burst", "iops-burst": "iops_burst"}

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_DIGITS = 15


class Rates(Protocol):
    """The fields of a specification that can be limited: bytes and operations a second, and the
    bursts of both; 0 is no limit, and the usual burst."""

    @property
    def bps(self) -> int: ...
    @property
    def iops(self) -> int: ...
    @property
    def bps_burst(self) -> int: ...
    @property
    def iops_burst(self) -> int: ...


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


def check(rates: Rates, option: str) -> None:
    """Raise ConfigError for numbers that make no limits."""
    for key, field in KEYS.items():
        if getattr(rates, field) < 0:
            raise ConfigError(f"{key} is negative", cure="use a number above 0", option=option)
    for rate, burst in (("bps", "bps-burst"), ("iops", "iops-burst")):
        if getattr(rates, KEYS[burst]) and not getattr(rates, rate):
            raise ConfigError(f"{burst} without {rate}", cure=f"give {rate} too", option=option)


def limiter(rates: Rates) -> RateLimiter | None:
    """The limits, full at first; None for none."""
    if not rates.bps and not rates.iops:
        return None
    from pyvmm.virtio import rate_limit

    return rate_limit.limiter(
        bps=rates.bps, iops=rates.iops, bps_burst=rates.bps_burst, iops_burst=rates.iops_burst
    )
