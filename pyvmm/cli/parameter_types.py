"""The values of `--timeout`, `--wait` and `--interval`."""

from __future__ import annotations

import math
from typing import Any

import click


class Seconds(click.FloatRange):
    """A number of seconds, which is not "nan", and not "inf", which poll(2) could not wait."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As click wants it."""
        try:
            seconds: float = super().convert(float(value), param, ctx)
        except ValueError:
            self.fail(f"{value!r} is not a number of seconds", param, ctx)
        if not math.isfinite(seconds) or seconds > _LONGEST:
            self.fail(f"{value!r} is not a number of seconds up to {_LONGEST}", param, ctx)
        return seconds


_LONGEST = 2_000_000
