"""Running other programs: a failure is one line that says what to do."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from pyvmm.errors import ConfigError

# The Debian packages of programs whose names differ from the package's.
_PACKAGES = {
    "mke2fs": "e2fsprogs",
    "depmod": "kmod",
    "musl-gcc": "musl-tools",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "dpkg-deb": "dpkg",
    "dpkg-query": "dpkg",
    "apt-get": "apt",
    "apt-cache": "apt",
    "apt-config": "apt",
}
_ONLY_FOR_TESTS = "# Only for the tests"  # the heading of the last part of system-packages.txt
_MOST_SAID = 400  # characters
_NO_SPACE = "No space left on device"
_CURES = {
    _NO_SPACE: "free 3 GiB, or set XDG_CACHE_HOME to another place",
    "Failed to fetch": "check the network, and the mirrors in this machine's /etc/apt",
    "Unable to locate package": "check the name: apt-cache search, or https://packages.debian.org",
}
# Debian's folders of an administrator's programs; not on every PATH.
_ADMIN_PATH = "/usr/local/sbin:/usr/sbin:/sbin"


def run(
    command: Sequence[str],
    what: str,
    *,
    cwd: str | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> str:
    """Run `command` to its end; its standard output. No input, the C locale.

    `env` is added to this process' environment. Raises ConfigError that starts with `what` and
    has the program's own last complaint, or says that it took more than `timeout` seconds.
    """
    require(command[0])
    try:
        result = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "PATH": _search_path(), "LC_ALL": "C", **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{what}: not done after {timeout:.0f} s") from None
    if result.returncode:
        message = complaint(result.stderr, result.returncode)
        raise ConfigError(f"{what}: {message}", cure=_cure(message))
    return result.stdout


def feed(
    command: Sequence[str],
    what: str,
    write: Callable[[IO[bytes]], None],
    *,
    env: Mapping[str, str] | None = None,
) -> str:
    """Run `command` with what `write` writes as its input, to its end; its standard error.

    If it ends before it has read all, it is that end that is reported, as `run` does.
    """
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PATH": _search_path(), "LC_ALL": "C.UTF-8", **(env or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        assert process.stdin is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                write(process.stdin)
        except BaseException:
            process.kill()
            raise
        finally:
            # By itself: its BrokenPipeError would take the place of a KeyboardInterrupt.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            status = process.wait()
        stderr.seek(0)
        said = stderr.read(1 << 20).decode(errors="replace")
    if status:
        message = complaint(said, status)
        raise ConfigError(f"{what}: {message}", cure=_cure(message))
    return said


def _cure(message: str) -> str:
    return next((cure for words, cure in _CURES.items() if words in message), "")


def require(program: str) -> str:
    """The path of `program`. Raises ConfigError that names the package to install where it is
    missing."""
    path = shutil.which(program, path=_search_path())
    if path is None:
        raise ConfigError(
            f"the program {program} is missing",
            cure=f"install it: apt-get install {_PACKAGES.get(program, program)}",
        )
    return path


def missing_packages(listed: str) -> list[str]:
    """The Debian packages that running pyvmm needs and this machine lacks; `listed` is the path of
    system-packages.txt. Raises ConfigError where dpkg is not there to be asked."""
    with open(listed, encoding="utf-8") as file:
        needed = file.read().partition(_ONLY_FOR_TESTS)[0]
    names = [name for line in needed.splitlines() if (name := line.partition("#")[0].strip())]
    require("dpkg-query")
    # Its exit status only says that it does not know a package, which is an answer too.
    asked = ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Package}\n", "--", *names]
    answer = subprocess.run(
        asked, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )
    there = {line.removeprefix("installed ") for line in answer.stdout.splitlines()}
    return [name for name in names if name not in there]


def complaint(stderr: str, status: int) -> str:
    """The line of `stderr` that says most: the first error, else the last line. It may quote what
    strangers wrote, so it is made fit for a terminal."""
    printable = "".join(
        char if char == "\n" or char.isprintable() else ascii(char)[1:-1] for char in stderr
    )
    lines = [line.strip()[:_MOST_SAID] for line in printable.splitlines() if line.strip()]
    for line in lines:
        if _NO_SPACE in line:
            return _NO_SPACE
    errors = [line for line in lines if line.startswith(("E:", "Err:"))]
    if errors:
        return errors[0].removeprefix("E:").strip()
    return lines[-1] if lines else f"exit status {status}"


def _search_path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:{_ADMIN_PATH}"
