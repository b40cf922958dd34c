"""Errors about a guest's agent."""

from __future__ import annotations

from pyvmm.errors import PyvmmError


class AgentError(PyvmmError):
    """The agent refused something, or what it said makes no sense.

    `errno` is the guest's error number (ENOENT for a command that is not there), 0 without one;
    `cure` what may help, which is appended to the message.
    """

    def __init__(self, message: str, *, errno: int = 0, cure: str = "") -> None:
        self.errno = errno
        self.cure = cure
        super().__init__(f"{message}; {cure}" if cure else message)


class NoAgent(AgentError):
    """No agent answers in the guest."""


class WrongAgent(AgentError):
    """The guest answers, but not as an agent of this version: waiting does not help."""


class AgentGone(AgentError):
    """The connection to the agent has ended: it, or the whole guest, is gone."""

    def __init__(self) -> None:
        super().__init__("the connection to the guest's agent has ended")


class WrongUser(AgentError):
    """The guest does not have the user, or a group, that a command was to run as."""


class CommandTimeout(AgentError):
    """A command, or the agent itself, took longer than it might. `stdout` and `stderr` are what the
    command had written by then."""

    def __init__(self, message: str, *, stdout: bytes = b"", stderr: bytes = b"") -> None:
        self.stdout = stdout
        self.stderr = stderr
        super().__init__(message)


class TimeLimit(CommandTimeout):
    """The time is over that whoever has asked for it allowed."""
