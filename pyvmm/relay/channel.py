"""One relayed connection, at one end: the local socket, and what both ends have said so far.

Two directions end apart, as they do on a socket: EOF ends one. A local socket that takes no more
(`deaf`) can still have something to say, and the other way round.
"""

from __future__ import annotations

from pyvmm.host.unix_sockets import SHUT_WR, Socket
from pyvmm.relay.frames import CLOSE, CREDIT, DATA, EOF, MAX_DATA, WINDOW, Violation, encode

# Credit is given back in pieces of this size: fewer frames, and nobody has to wait for it.
_PIECE = WINDOW // 4


class Channel:
    """The state of one slot; frames to send are appended to `out`.

    `socket` is None where nobody could be reached. `credit`: bytes that may be sent to the other
    end; `granted`: bytes it may still send; `said`: bytes that were read from the local socket and
    go out before all others.
    """

    def __init__(
        self, slot: int, socket: Socket | None, out: bytearray, *, credit: int, said: bytes = b""
    ) -> None:
        self.slot = slot
        self.socket = socket
        self.credit = credit
        self.granted = WINDOW
        self.pending = bytearray()  # for the local socket
        self.sent_eof = self.got_eof = False
        self.sent_close = self.got_close = False
        self.deaf = False
        self.said = said
        self._owed = 0  # bytes delivered for which no credit was given back yet
        self._out = out

    @property
    def free(self) -> bool:
        """True if the slot may be used anew."""
        return self.sent_close and self.got_close

    @property
    def wants_input(self) -> bool:
        """True if the local socket is to be read."""
        ended = self.sent_eof or self.sent_close or self.got_close
        return self.credit > 0 and not self.said and not ended

    # --- the local socket is ready ---------------------------------------------------------------

    def read(self, hung_up: bool) -> None:
        """Send a piece of what the local socket has; `hung_up`: nobody will read from it."""
        assert self.socket is not None
        try:
            data = self.socket.recv(min(self.credit, MAX_DATA))
        except (BlockingIOError, InterruptedError):
            return
        except ConnectionResetError:
            # It was closed with something unread. What it wrote before is still to be had.
            self.drop_pending()
            return
        except OSError:
            data = b""
        if data:
            self.credit -= len(data)
            self._out += encode(DATA, self.slot, data=data)
            return
        self.sent_eof = True
        self._out += encode(EOF, self.slot)
        if hung_up:
            self.drop_pending()
        self.close_if_done()

    def send_said(self) -> None:
        """Send a piece of `said`; there is credit."""
        piece = self.said[: min(self.credit, MAX_DATA)]
        self.said = self.said[len(piece) :]
        self.credit -= len(piece)
        self._out += encode(DATA, self.slot, data=piece)

    def write(self) -> None:
        """Hand the local socket what is pending."""
        assert self.socket is not None
        try:
            while self.pending:
                done = self.socket.send(self.pending)
                del self.pending[:done]
                self._delivered(done)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.drop_pending()
        self._shut_if_ended()
        self.close_if_done()

    def drop_pending(self) -> None:
        """The local socket takes nothing any more; what comes for it is thrown away."""
        self.deaf = True
        self._delivered(len(self.pending))
        self.pending.clear()

    def _delivered(self, count: int) -> None:
        self._owed += count
        if self._owed >= _PIECE and not (self.got_eof or self.sent_close):
            self.granted += self._owed
            self._out += encode(CREDIT, self.slot, self._owed)
            self._owed = 0

    def _shut_if_ended(self) -> None:
        if self.got_eof and not self.pending and not self.deaf and self.socket is not None:
            try:
                self.socket.shutdown(SHUT_WR)
            except OSError:
                self.deaf = True

    def close_if_done(self) -> None:
        """Close the local socket if neither direction can carry anything any more."""
        # After CLOSE what the local socket may still say interests nobody.
        all_said = self.sent_eof or self.got_close
        all_heard = self.deaf or ((self.got_eof or self.got_close) and not self.pending)
        if all_said and all_heard:
            self.close()

    def close(self) -> None:
        """Close the local socket and say so, once."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
        self.pending.clear()
        self.said = b""
        if not self.sent_close:
            self.sent_close = True
            self._out += encode(CLOSE, self.slot)

    # --- the other end says something ------------------------------------------------------------

    def receive_data(self, data: bytes) -> None:
        """DATA. Raises Violation for more than was granted, or after EOF."""
        if self.got_eof or len(data) > self.granted:
            raise Violation(f"{len(data)} bytes in slot {self.slot}, which may have {self.granted}")
        self.granted -= len(data)
        if self.socket is None or self.deaf:
            self._delivered(len(data))
            return
        self.pending += data
        self.write()

    def receive_credit(self, count: int) -> None:
        """CREDIT. Raises Violation for more than the window."""
        if not 1 <= count <= WINDOW - self.credit:
            raise Violation(f"credit of {count} in slot {self.slot}, on top of {self.credit}")
        self.credit += count

    def receive_eof(self) -> None:
        """EOF. Raises Violation for a second one."""
        if self.got_eof:
            raise Violation(f"a second end in slot {self.slot}")
        self.got_eof = True
        self._shut_if_ended()
        self.close_if_done()

    def receive_close(self) -> None:
        """CLOSE: what is pending is still delivered."""
        self.got_close = True
        self.said = b""
        if self.socket is None:
            self.close()
        else:
            self.close_if_done()
