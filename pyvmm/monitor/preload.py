"""All modules that a monitor may import once its guest runs, for one that can read none by then.

What a monitor imports late it can read, in its box, from where it is; so this is only for another
user whom files of Python are closed to, as they were installed with a umask of 077, or lie below
/root where there is no root of the monitor's own. It takes some hundred milliseconds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from pyvmm.host import confinement

if TYPE_CHECKING:
    from pyvmm.host.other_user import OtherUser

PACKAGES = (
    *("agent", "boot", "bus", "control", "host", "images", "kinds", "kvm", "machine", "memory"),
    *("monitor", "pci", "platform", "spec", "transport", "vhost_user", "virtio"),
)
"""Those of pyvmm in which a monitor finds what it needs."""

_OTHERS = """
base64 bisect bz2 ctypes difflib encodings.ascii encodings.idna encodings.latin_1 fnmatch glob grp
hashlib importlib.util inspect ipaddress json linecache logging lzma math pathlib pwd queue shlex
shutil signal socket subprocess tempfile threading tokenize tomllib traceback uuid zlib
cffi _cffi_backend elftools.elf.structs ioctl_opt pyroute2 zstandard
"""


def for_user(user: OtherUser) -> None:
    """Import what `user`, whom this process is about to be, could not. Raises OSError."""
    if user.can(_closed):
        all_modules()


def code() -> Iterator[str]:
    """The folders of Python's own modules and those of packages, which are loaded when they are
    wanted."""
    yield os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    yield os.path.dirname(os.path.abspath(os.__file__))
    yield from confinement.package_folders()


def _closed() -> str:
    """Something of `code` that we cannot read; "" if there is nothing."""
    for path in (os.path.abspath(__file__), os.path.abspath(os.__file__)):
        if not os.access(path, os.R_OK, effective_ids=True):
            return path
    for folder in code():
        if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            return folder
    return ""


def all_modules() -> None:
    """Import them. What is missing here is missing later as well."""
    for name in (*_OTHERS.split(), *names()):
        with suppress(ImportError, OSError):
            import_module(name)


def names() -> Iterator[str]:
    """Of pyvmm's own modules."""
    above = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    for package in PACKAGES:
        for folder, folders, files in os.walk(os.path.join(above, "pyvmm", package)):
            folders.sort()
            dotted = os.path.relpath(folder, above).replace(os.sep, ".")
            for file in sorted(files):
                stem, suffix = os.path.splitext(file)
                if suffix == ".py" and stem != "__main__":
                    yield dotted if stem == "__init__" else f"{dotted}.{stem}"
