"""One connection to the agent: frames out, frames in, nothing believed that is not checked."""

from __future__ import annotations

import os
import select
import time

from pyvmm.agent.errors import AgentError, AgentGone, CommandTimeout, WrongAgent
from pyvmm.agent.protocol import HEADER, HELLO, MAX_DATA, NUMBER, VERSION, Frame, FrameType, frame
from pyvmm.host.syscalls import Closable
from pyvmm.host.unix_sockets import Socket

_CHUNK = MAX_DATA + HEADER.size
NO_ANSWER = "the guest's agent does not answer"
_LONGEST_POLL = (1 << 31) - 1
PATIENCE = 30.0  # seconds for what needs no work in the guest
NOT_THE_AGENT = "what answers in the guest is not pyvmm's agent"


class Session(Closable):
    """A request and its answers, on a connection of its own.

    `deadline` everywhere is a time of time.monotonic(), or None to wait for ever.
    """

    def __init__(self, connection: Socket) -> None:
        """`connection` is closed with the session."""
        self._connection = connection
        self._connection.setblocking(False)
        self._received = bytearray()
        self._ended = False
        self._kept: list[Frame] = []  # has come, and `receive` has not returned it yet
        self.hello: tuple[int, int] | None = None  # realtime and boottime, in nanoseconds

    def fileno(self) -> int:
        """Readable when `receive` has something."""
        return self._connection.fileno()

    def close(self) -> None:
        self._connection.close()

    def send(self, type: FrameType, payload: bytes = b"", deadline: float | None = None) -> None:
        """Send a frame, all of it. Raises AgentError; `error_or` says why, where the agent did."""
        self.send_bytes(frame(type, payload), deadline)

    def send_bytes(self, data: bytes | memoryview, deadline: float | None = None) -> None:
        """Send frames that are made already."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._connection.send(view) :]
            except (BlockingIOError, InterruptedError):
                self._wait(select.POLLOUT, deadline)
            except OSError:
                self._raise_why_ended()

    def _raise_why_ended(self) -> None:
        """The agent may have said what is wrong before it hung up; `receive` returns the rest."""
        self._kept = self.receive()
        for one in self._kept:
            if one.type == FrameType.FAILED:
                raise failure(one)
        raise AgentGone

    def receive(self) -> list[Frame]:
        """The frames that are there, without waiting; [] for none yet. Raises AgentError if the
        connection has ended, or what comes is not of an agent."""
        if self._kept:
            found, self._kept = self._kept, []
            return found
        while not self._ended:
            try:
                data = self._connection.recv(_CHUNK)
            except (BlockingIOError, InterruptedError):
                break
            except OSError:
                data = b""
            self._ended = not data
            self._received += data
            if len(self._received) >= _CHUNK:
                break
        found = self._take_frames()
        if self._ended and not found:
            raise AgentGone
        return found

    def _take_frames(self) -> list[Frame]:
        found = []
        at = 0
        while len(self._received) - at >= HEADER.size:
            (word,) = HEADER.unpack_from(self._received, at)
            size = word >> 8
            if size > MAX_DATA:
                raise WrongAgent(NOT_THE_AGENT)
            start = at + HEADER.size
            if len(self._received) < start + size:
                break
            found.append(Frame(word & 0xFF, bytes(self._received[start : start + size])))
            at = start + size
        del self._received[:at]
        if found and self.hello is None:
            self._take_hello(found.pop(0))
        return found

    def _take_hello(self, first: Frame) -> None:
        if first.type == FrameType.FAILED:
            raise failure(first)
        if first.type != FrameType.HELLO or len(first.payload) < HELLO.size:
            raise WrongAgent(NOT_THE_AGENT)
        version, _, realtime, boottime = HELLO.unpack_from(first.payload)
        if version != VERSION:
            raise WrongAgent(
                f"the guest's agent speaks version {version}, not {VERSION}",
                cure="build the image again",
            )
        self.hello = (realtime, boottime)

    def wait_for_frames(self, deadline: float | None) -> list[Frame]:
        """The next frames, at least one. Raises AgentError, CommandTimeout at `deadline`."""
        while not (found := self.receive()):
            self._wait(select.POLLIN, deadline)
        return found

    def greet(self, deadline: float | None) -> tuple[int, int]:
        """The agent's clocks at the start of the session, realtime and boottime in nanoseconds.

        Raises AgentError, CommandTimeout. To be called before anything is sent."""
        while self.hello is None:
            self._wait(select.POLLIN, deadline)
            if self.receive():
                raise AgentError(NOT_THE_AGENT)
        return self.hello

    def answer(self, wanted: FrameType, size: int, deadline: float | None) -> bytes:
        """The payload of the one frame that answers, `size` bytes of it. Raises AgentError."""
        first = self.wait_for_frames(deadline)[0]
        if first.type == FrameType.FAILED:
            raise failure(first)
        if first.type != wanted or len(first.payload) < size:
            raise AgentError(NOT_THE_AGENT)
        return first.payload

    def _wait(self, event: int, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(self._connection.fileno(), event)
        if not poll.poll(milliseconds_to(deadline)):
            raise CommandTimeout(NO_ANSWER)


def milliseconds_to(deadline: float | None) -> float | None:
    """For poll(2), which takes no more than 24 days."""
    if deadline is None:
        return None
    return min(max(0.0, deadline - time.monotonic()) * 1000, _LONGEST_POLL)


def check(deadline: float | None) -> None:
    """Raise CommandTimeout if `deadline` has passed: for loops that a guest who always has
    something to say would keep going."""
    if deadline is not None and time.monotonic() > deadline:
        raise CommandTimeout(NO_ANSWER)


def failure(found: Frame) -> AgentError:
    """The error that a FAILED frame tells of."""
    if len(found.payload) < NUMBER.size:
        return AgentError(NOT_THE_AGENT)
    (number,) = NUMBER.unpack_from(found.payload)
    what = printable(found.payload[NUMBER.size : NUMBER.size + 256])
    reason = os.strerror(number) if 0 < number < 4096 else "it failed"
    return AgentError(f"in the guest: {what}: {reason}", errno=number)


def printable(data: bytes) -> str:
    """The guest's bytes as text for a terminal, which they cannot play tricks on."""
    text = data.decode(errors="replace")
    return "".join(character if character.isprintable() else "�" for character in text)
