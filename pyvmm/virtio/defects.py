"""Unforeseen exceptions of a device's code: defects of ours that a guest has found.

It must cost the guest its device until the next reset, not its life.
"""

from __future__ import annotations

import os

from pyvmm.errors import DriverError, PyvmmError
from pyvmm.host import log

# A guest may find a way to make a device fail, reset it and do it again, for ever.
_report = log.RateLimited()

_PYVMM = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_NOT_A_USERS = (_PYVMM + os.sep, os.path.dirname(os.__file__) + os.sep)


def as_device_failure(where: str, error: Exception) -> PyvmmError:
    """`error` if it was raised on purpose; if not, one that says so, after a line with its place.

    `where` names the device for that line.
    """
    if isinstance(error, PyvmmError):
        return error
    place = raised_at(error)
    _report(f"{where} failed inside the monitor: {type(error).__name__}: {error} ({place})")
    return DriverError("the device failed inside the monitor", section="2.1 Device Status Field")


def raised_at(error: BaseException) -> str:
    """File and line of the code to look at: that of a device that a user wrote, if it is one of
    those that the error came through, else the innermost."""
    places = _places(error)
    return users_place(error) or (places[-1] if places else "unknown place")


def users_place(error: BaseException) -> str | None:
    """File and line of the innermost code that is neither pyvmm's nor Python's own, or None."""
    for place in reversed(_places(error)):
        if not place.startswith((*_NOT_A_USERS, "<frozen ")):
            return place
    return None


def _places(error: BaseException) -> list[str]:
    """``FILE:LINE`` of each call that the error came through, the innermost last."""
    places = []
    trace = error.__traceback__
    while trace is not None:
        places.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    return places
