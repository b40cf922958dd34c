"""One connection to a back end: requests with an answer each, checked and bounded in time.

What a back end sends is hostile input: an answer to something else, of another size, with file
descriptors, twice, late or never. It raises BackEndError or HostError, and the connection is of no
more use then.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from struct import Struct
from typing import Any

from pyvmm.errors import HostError, PyvmmError
from pyvmm.host import unix_sockets
from pyvmm.host.syscalls import Closable
from pyvmm.vhost_user import protocol
from pyvmm.vhost_user.channel import Channel, Message
from pyvmm.vhost_user.protocol import BY_NAME, BackEndError
from pyvmm.virtio import features

CONFIG_CHANGED = "config"  # what a back end asks for
PATIENCE = 10.0  # seconds for the answer to a request; a back end may have to end its I/O first
# Seconds for the answers of one that we have just started: in an emulated KVM host on a busy
# machine a program takes more than PATIENCE to begin.
STARTING = 90.0
# Patiences for all answers together, when they come one after the other. Of the time that passes
# half is given back.
_ALLOWANCE, _GIVEN_BACK = 3, 0.5
# The state that a back end keeps of its device: how much there may be, and how long each of the two
# steps of its transfer may take, in patiences. The machine stands still meanwhile.
MOST_STATE = 64 << 20  # bytes
_STATE_PATIENCES = 5
_PIECE = 1 << 16
# The protocol features of which we make use.
WANTED = features.mask(
    protocol.VHOST_USER_PROTOCOL_F_MQ,
    protocol.VHOST_USER_PROTOCOL_F_REPLY_ACK,
    protocol.VHOST_USER_PROTOCOL_F_CONFIG,
    protocol.VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
    protocol.VHOST_USER_PROTOCOL_F_RESET_DEVICE,
    protocol.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
    protocol.VHOST_USER_PROTOCOL_F_STATUS,
    protocol.VHOST_USER_PROTOCOL_F_DEVICE_STATE,
)
# What goes with CONFIG only: a back end says there that its configuration has changed.
WANTED_WITH_CONFIG = features.mask(protocol.VHOST_USER_PROTOCOL_F_BACKEND_REQ)


class StateRefused(PyvmmError):
    """The back end does not give the state of its device, or does not take it; it goes on."""


class Link(Closable):
    """A connection. `features` and `protocol_features` are what both ends know, once `agree` has
    returned; `queues` is how many rings the back end has, 0 where it does not say."""

    def __init__(self, connection: socket.socket, patience: float = PATIENCE) -> None:
        """`connection` is closed with it."""
        self._socket = connection
        self._channel = Channel(self._socket, BackEndError)
        self.expect(patience)
        self._requests: socket.socket | None = None
        self.features = 0
        self.protocol_features = 0
        self.queues = 0
        self.lent: list[tuple[int, int, int, int]] = []  # the memory regions that it has

    @classmethod
    def to(cls, path: str, patience: float = PATIENCE) -> Link:
        """One to whoever listens at `path`. Raises HostError."""
        return cls(socket.socket(fileno=unix_sockets.connect(path).detach()), patience)

    def expect(self, patience: float) -> None:
        """From now on the back end has `patience` seconds for an answer."""
        self._patience = patience
        self._allowance = _ALLOWANCE * patience
        self._counted_at = time.monotonic()

    def close(self) -> None:
        self._socket.close()
        self._close_requests()

    def _close_requests(self) -> None:
        requests, self._requests = self._requests, None
        if requests is not None:
            requests.close()

    def hang_up(self) -> None:
        """End a wait of another thread's for an answer, which fails."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def fileno(self) -> int:
        return self._socket.fileno()

    def has(self, feature: int) -> bool:
        """True if a protocol feature (bit number) was agreed on."""
        return features.has(self.protocol_features, feature)

    # --- requests ---------------------------------------------------------------------------------

    def ask(
        self, name: str, payload: bytes = b"", fds: Sequence[int] = (), work: float = 0.0
    ) -> Message:
        """The answer to a request that always has one; for a ``with`` block. The back end may
        `work` for so many seconds first, in which no vCPU waits."""
        self._send(name, payload, fds, acknowledged=False)
        if work:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            poll.poll(1000 * work)
        return self._answer(name)

    def ask_fields(
        self,
        name: str,
        payload: bytes = b"",
        layout: Struct = protocol.U64,
        fds: Sequence[int] = (),
        work: float = 0.0,
    ) -> Any:
        """The fields of an answer of `layout`, without file descriptors."""
        with self.ask(name, payload, fds, work) as answer:
            if len(answer.payload) != layout.size or answer.fds:
                raise BackEndError(
                    f"answers {name} with {len(answer.payload)} bytes and {len(answer.fds)} file "
                    "descriptors"
                )
            return layout.unpack(answer.payload)

    def tell(self, name: str, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Make a request. A refusal raises BackEndError if the back end can tell (REPLY_ACK)."""
        acknowledged = self.has(protocol.VHOST_USER_PROTOCOL_F_REPLY_ACK)
        self._send(name, payload, fds, acknowledged=acknowledged)
        if acknowledged:
            with self._answer(name) as answer:
                if len(answer.payload) != protocol.U64.size:
                    raise BackEndError(f"answers {name} with {len(answer.payload)} bytes")
                if answer.payload != bytes(protocol.U64.size):
                    raise BackEndError(f"refuses {name}")

    def tell_ring(self, name: str, index: int, number: int) -> None:
        """A request with a vring state description."""
        self.tell(name, protocol.VRING_STATE.pack(index, number))

    def _send(self, name: str, payload: bytes, fds: Sequence[int], *, acknowledged: bool) -> None:
        if self._has_something():
            raise BackEndError(f"says something that nobody asked for, before {name}")
        self._socket.settimeout(self._patience)
        sent = self._channel.send(BY_NAME[name].number, payload, fds, acknowledged=acknowledged)
        if not sent:
            raise BackEndError(f"has gone before {name}")

    def _has_something(self) -> bool:
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        if not poll.poll(0):
            return False
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def _answer(self, name: str) -> Message:
        try:
            with self.waiting() as until:
                answer = self._channel.receive(replies=True, until=until)
        except HostError as error:
            if error.errno != errno.ETIMEDOUT:
                raise
            if self._allowance <= 0:
                many = f"{_ALLOWANCE * self._patience:g}"
                raise BackEndError(f"lets us wait for more than {many} seconds in all") from None
            raise BackEndError(f"has not answered {name} in {self._patience:g} s") from None
        if answer is None:
            raise BackEndError(f"has gone at {name}")
        if answer.request != BY_NAME[name].number:
            with answer:
                raise BackEndError(f"answers request {answer.request}, which is not {name}")
        return answer

    @contextmanager
    def waiting(self) -> Iterator[float]:
        """Around a wait for the back end, which is counted: by when, of time.monotonic, it must
        end. A vCPU may be waiting, and a back end with many rings is asked many things at once."""
        began = time.monotonic()
        whole = _ALLOWANCE * self._patience
        given_back = _GIVEN_BACK * (began - self._counted_at)
        self._allowance = min(whole, max(self._allowance, 0) + given_back)
        try:
            yield began + min(self._patience, self._allowance)
        finally:
            self._counted_at = time.monotonic()
            self._allowance -= self._counted_at - began

    # --- the beginning ----------------------------------------------------------------------------

    def agree(self) -> None:
        """Find out what the back end can do, and say what of it is wanted."""
        own = features.mask(protocol.VHOST_USER_F_PROTOCOL_FEATURES)
        (offered,) = self.ask_fields("GET_FEATURES")
        if offered & own:
            (known,) = self.ask_fields("GET_PROTOCOL_FEATURES")
            wanted = WANTED
            if features.has(known, protocol.VHOST_USER_PROTOCOL_F_CONFIG):
                wanted |= WANTED_WITH_CONFIG
            # By what it was told before: SET_PROTOCOL_FEATURES itself is not acknowledged by all.
            self.tell("SET_PROTOCOL_FEATURES", protocol.U64.pack(known & wanted))
            self.protocol_features = known & wanted
        self.features = offered
        self.tell("SET_OWNER")
        if self.has(protocol.VHOST_USER_PROTOCOL_F_MQ):
            (self.queues,) = self.ask_fields("GET_QUEUE_NUM")
        if self.has(protocol.VHOST_USER_PROTOCOL_F_BACKEND_REQ):
            try:
                self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            except OSError as error:
                raise HostError(error.errno or 0, "socketpair") from None
            with theirs:
                self.tell("SET_BACKEND_REQ_FD", fds=[theirs.fileno()])

    @property
    def enables_rings(self) -> bool:
        """True if rings begin to work when they are enabled; else they do when they have a kick."""
        return features.has(self.features, protocol.VHOST_USER_F_PROTOCOL_FEATURES)

    # --- configuration space ----------------------------------------------------------------------

    def read_config(self, size: int) -> bytes | None:
        """The first `size` bytes of the configuration space; None if the back end refuses that."""
        asked = protocol.CONFIG_HEADER.pack(0, size, 0)
        with self.ask("GET_CONFIG", asked + bytes(size)) as answer:
            payload = answer.payload
            if not payload:
                return None
            start = protocol.CONFIG_HEADER.size
            if answer.fds or len(payload) != start + size or payload[:8] != asked[:8]:
                raise BackEndError(f"gives {len(payload)} bytes for {size} of its configuration")
            return payload[start:]

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver has written `data` at `offset`."""
        header = protocol.CONFIG_HEADER.pack(offset, len(data), 0)
        self.tell("SET_CONFIG", header + data)

    # --- requests in flight -----------------------------------------------------------------------

    def make_inflight(self, num_queues: int, queue_size: int) -> tuple[bytes, int] | None:
        """Memory for notes on requests in flight, made by the back end: its description and file
        descriptor, which is the caller's. None if it has none after all."""
        asked = protocol.INFLIGHT.pack(0, 0, num_queues, queue_size) + bytes(4)
        with self.ask("GET_INFLIGHT_FD", asked) as answer:
            if len(answer.payload) != len(asked) or len(answer.fds) > 1:
                raise BackEndError(
                    f"answers GET_INFLIGHT_FD with {len(answer.payload)} bytes and "
                    f"{len(answer.fds)} file descriptors"
                )
            if not answer.fds:
                return None
            # What it says is how much is read of the notes, and they must not let us wait.
            if answer.payload[16:20] != asked[16:20] or not _is_memory(answer.fds[0]):
                raise BackEndError("gives other notes on requests in flight than it was asked for")
            return answer.payload, answer.take_fd()

    # --- the state of the device itself -----------------------------------------------------------

    def save_state(self) -> bytes:
        """What the back end knows of the device beyond its rings, which have stopped.

        Raises StateRefused, BackEndError or HostError.
        """
        fd, state, why = self._begin_transfer(protocol.STATE_SAVE), bytearray(), ""
        try:
            for _ in self._turns(fd, select.POLLIN):
                try:
                    piece = os.read(fd, _PIECE)
                except BlockingIOError:
                    continue
                if not piece:
                    break
                state += piece
                if len(state) > MOST_STATE:
                    why = f"has more than {MOST_STATE >> 20} MiB of it"
                    break
            else:
                why = "takes too long to give it"
        finally:
            os.close(fd)
        self._end_transfer(why or "does not find all of it", failed=bool(why))
        return bytes(state)

    def load_state(self, state: bytes) -> None:
        """Have the back end go on from what `save_state` of another one gave. No ring has begun.

        Raises StateRefused, BackEndError or HostError.
        """
        fd, rest, why = self._begin_transfer(protocol.STATE_LOAD), memoryview(state), ""
        try:
            for _ in self._turns(fd, select.POLLOUT):
                try:
                    rest = rest[os.write(fd, rest[:_PIECE]) :]
                except BlockingIOError:
                    continue
                except BrokenPipeError:  # it says next whether that was enough
                    break
                if not rest:
                    break
            else:
                why = "takes too long to read it"
        finally:
            os.close(fd)
        damaged = "does not take it: it is damaged, or of something else than is served there now"
        self._end_transfer(why or damaged, failed=bool(why))

    def _begin_transfer(self, direction: int) -> int:
        """Our end of a pipe for the state. Its other end is the back end's alone, so that nobody
        else changes how ours waits."""
        if not self.has(protocol.VHOST_USER_PROTOCOL_F_DEVICE_STATE):
            raise StateRefused("does not know how (DEVICE_STATE)")
        try:
            reading, writing = os.pipe()
        except OSError as error:
            raise HostError(error.errno or 0, "pipe") from None
        ours, theirs = (
            (reading, writing) if direction == protocol.STATE_SAVE else (writing, reading)
        )
        try:
            os.set_blocking(ours, False)
            asked = protocol.DEVICE_STATE.pack(direction, protocol.STATE_STOPPED)
            (said,) = self.ask_fields("SET_DEVICE_STATE_FD", asked, fds=[theirs])
            if said & protocol.STATE_ERROR_MASK:
                raise StateRefused("refuses to begin")
            return ours
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)

    def _turns(self, fd: int, events: int) -> Iterator[None]:
        """A turn whenever `fd` is ready; no more when the time is over."""
        until = time.monotonic() + self._for_state
        poll = select.poll()
        poll.register(fd, events)
        while (left := until - time.monotonic()) > 0 and poll.poll(1000 * left):
            yield

    @property
    def _for_state(self) -> float:
        return _STATE_PATIENCES * self._patience

    def _end_transfer(self, why: str, *, failed: bool) -> None:
        """Hear how it went, also where it has `failed` for us, as other requests come later.
        `why` is what to say if it is no good."""
        (said,) = self.ask_fields("CHECK_DEVICE_STATE", work=self._for_state)
        if failed or said:
            raise StateRefused(why)

    # --- memory -----------------------------------------------------------------------------------

    def lend(self, fd: int, regions: Sequence[tuple[int, int, int, int]]) -> None:
        """Let the back end have just these `regions` of the file `fd`: (guest address, size, our
        address, offset in the file)."""
        wanted = list(regions)
        if wanted == self.lent:
            return
        slots = self.has(protocol.VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS)
        if slots and (self.lent or len(wanted) > protocol.MAX_FDS):
            for row in [row for row in self.lent if row not in wanted]:
                self.tell("REM_MEM_REG", protocol.SINGLE_REGION.pack(0, *row))
            for row in [row for row in wanted if row not in self.lent]:
                self.tell("ADD_MEM_REG", protocol.SINGLE_REGION.pack(0, *row), [fd])
        elif len(wanted) > protocol.MAX_FDS:
            raise BackEndError(f"takes {protocol.MAX_FDS} memory regions, not {len(wanted)}")
        else:
            rows = b"".join(protocol.MEMORY_REGION.pack(*row) for row in wanted)
            header = protocol.MEMORY_HEADER.pack(len(wanted), 0)
            self.tell("SET_MEM_TABLE", header + rows, [fd] * len(wanted))
        self.lent = wanted

    # --- what the back end asks for: BACKEND_REQ --------------------------------------------------

    @property
    def requests_fd(self) -> int:
        """The descriptor that is readable when the back end asks for something; -1 if it cannot."""
        return -1 if self._requests is None else self._requests.fileno()

    def take_request(self) -> str:
        """Answer what it has asked for: what that was, in a word, and "" for nothing.

        Raises BackEndError for what is not a request, HostError."""
        if self._requests is None:
            return ""
        channel = Channel(self._requests, BackEndError)
        message = channel.receive(until=time.monotonic() + self._patience)
        if message is None:
            self._close_requests()
            return ""
        with message:
            known = message.request == protocol.VHOST_USER_BACKEND_CONFIG_CHANGE_MSG
            known = known and not message.payload and not message.fds
            # At once: it may wait for this before it answers what we ask.
            if message.needs_reply and self.has(protocol.VHOST_USER_PROTOCOL_F_REPLY_ACK):
                channel.reply(message.request, protocol.U64.pack(int(not known)))
            return CONFIG_CHANGED if known else f"request {message.request}"


def _is_memory(fd: int) -> bool:
    """True if a file is memory (memfd, tmpfs, hugetlbfs), which alone has seals (fcntl(2))."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True
