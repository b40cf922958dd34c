"""From the rates of a specification (spec.rates) to what a device is limited by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pyvmm.virtio.rate_limit import RateLimiter


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


def limiter(rates: Rates) -> RateLimiter | None:
    """The limits, full at first; None for none."""
    return _limiter(rates.bps, rates.iops, rates.bps_burst, rates.iops_burst)


def net_limiter(rates: object, way: str) -> RateLimiter | None:
    """The limits of a network card in direction `way`, "rx" or "tx"; None for none."""
    fields = (f"{way}_bps", f"{way}_pps", f"{way}_bps_burst", f"{way}_pps_burst")
    return _limiter(*(getattr(rates, field) for field in fields))


def _limiter(bps: int, iops: int, bps_burst: int, iops_burst: int) -> RateLimiter | None:
    if not bps and not iops:
        return None
    from pyvmm.virtio import rate_limit

    return rate_limit.limiter(bps=bps, iops=iops, bps_burst=bps_burst, iops_burst=iops_burst)
