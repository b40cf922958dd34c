"""The errors, sorted by whose fault they are: the user's, the host's, or the guest driver's.

Every error that leaves a pyvmm function is one of these, so that one place at the top (the command
line, a test) can say it in one line, and one place in the middle (the transport) can turn the
guest's mistakes into DEVICE_NEEDS_RESET without catching anybody else's.
"""

from __future__ import annotations

import errno
import os
from typing import Any


def how_many(number: int, noun: str) -> str:
    """ "1 byte", "2 bytes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class PyvmmError(Exception):
    """Base of all errors raised on purpose; ``str()`` is one line, fit for a terminal."""

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception usually goes to other processes as a call of its class with `args`, which
        # here is the text alone.
        return _again, (type(self), self.args), self.__dict__


def _again(of: type[PyvmmError], args: tuple[Any, ...]) -> PyvmmError:
    error = of.__new__(of, *args)
    error.args = args  # OSError's, of which VMTimeout is one, leaves them to __init__
    return error


class ConfigError(PyvmmError):
    """The user asked for something that cannot be had.

    `cure` says what to change and is appended to the message. `option` names the command line
    option at fault (``"--kernel"``), where there is one; it is put in front.
    """

    def __init__(self, message: str, *, cure: str = "", option: str = "") -> None:
        self.message = message
        self.cure = cure
        self.option = option
        text = f"{option}: {message}" if option else message
        super().__init__(f"{text}; {cure}" if cure else text)


class HostError(PyvmmError):
    """A system call on the host failed.

    `errno` is the number, `call` what was being done (``"KVM_CREATE_VM"``), `cure` what may help,
    where that is not the same for all calls.
    """

    def __init__(self, errno: int, call: str, *, cure: str = "") -> None:
        self.errno = errno
        self.call = call
        self.cure = cure = cure or _CURES.get(errno, "")
        text = f"{call}: {os.strerror(errno)}"
        super().__init__(f"{text}; {cure}" if cure else text)


_CURES = {
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    # unix(7): what all processes of a user have on their way counts, for each that sends.
    errno.ETOOMANYREFS: "raise the limit of open files, ulimit -Hn: more are on their way between "
    "this user's processes than one may have",
}


class DriverError(PyvmmError):
    """The guest's driver broke a rule of the virtio specification.

    `section` is the number and title in virtio 1.3, such as ``"2.7.5.2 Indirect Descriptors"``. A
    device raises it; only a transport catches it, and sets DEVICE_NEEDS_RESET.
    """

    def __init__(self, message: str, *, section: str) -> None:
        self.message = message
        self.section = section
        super().__init__(f"{message} (virtio 1.3, {section})")


class GuestMemoryError(DriverError):
    """A guest-physical range that does not lie within one region of guest RAM.

    A `DriverError`, because outside of boot every such address came from the guest.
    """

    def __init__(self, addr: int, length: int) -> None:
        self.addr = addr
        self.length = length
        super().__init__(
            f"guest-physical range {addr:#x} + {length:#x} bytes is not RAM",
            section="2.7.5 The Virtqueue Descriptor Table",
        )
