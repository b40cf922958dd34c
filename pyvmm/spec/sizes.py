"""Sizes as the user writes them: "512M", "2G", "4096B"."""

from __future__ import annotations

from pyvmm.errors import ConfigError

DIGITS = 20
"""More than any memory has bytes; Python refuses to read very long numbers."""

_POWERS = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_UNITS = {
    **{unit + end: size for unit, size in _POWERS.items() for end in ("ib", "b", "")},
    "b": 1,  # after those that end in it
    "": 1 << 20,
}


def parse_memory(text: str, option: str = "--memory") -> int:
    """Bytes of "512M", "2G", "65536K", "4096B" or "512" (MiB). Raises ConfigError, which names
    `option`."""
    stripped = text.strip().lower()
    unit = next((unit for unit in _UNITS if unit and stripped.endswith(unit)), "")
    digits = stripped.removesuffix(unit)
    if not (digits.isascii() and digits.isdigit() and len(digits) <= DIGITS):
        raise ConfigError(f"cannot read {text!r} as a size", cure="write 512M or 2G", option=option)
    return int(digits) * _UNITS[unit]


def write_memory(size: int) -> str:
    """The shortest text that `parse_memory` reads as `size` bytes."""
    for unit, factor in reversed(_POWERS.items()):
        if size and size % factor == 0:
            return f"{size // factor}{unit.upper()}"
    return f"{size}B"
