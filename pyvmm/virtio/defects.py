"""What a device's code raises and nobody foresaw: a defect of ours that a guest has found.

It must cost the guest its device until the next reset, not its life.
"""

from __future__ import annotations

from pyvmm.errors import DriverError, PyvmmError
from pyvmm.host import log

# A guest may find a way to make a device fail, reset it and do it again, for ever.
_report = log.RateLimited()


def as_device_failure(where: str, error: Exception) -> PyvmmError:
    """`error` if it was raised on purpose; if not, one that says so, after a line with its place.

    `where` names the device for that line.
    """
    if isinstance(error, PyvmmError):
        return error
    place = _raised_at(error)
    _report(f"{where} failed inside the monitor: {type(error).__name__}: {error} ({place})")
    return DriverError("the device failed inside the monitor", section="2.1 Device Status Field")


def _raised_at(error: BaseException) -> str:
    trace = error.__traceback__
    if trace is None:
        return "unknown place"
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
