"""A 16550A serial port: registers, 16-byte receive FIFO, interrupts, loopback.

After the PC16550D data sheet (National Semiconductor, 1995; section numbers below) and the names in
<linux/serial_reg.h>. Four things differ from a chip with a wire behind it:

- a byte written is sent at once, and LSR says so: who looks there before each byte never waits;
- in long output, the transmitter's interrupt comes after a time such as a wire would take, whatever
  the divisor says (see `_due`); at first it comes at once, so that the last words of a guest that
  ends are out before it has ended;
- the receiver's character timeout has always just run out, so that a single key interrupts at once;
- the far end does not send before the guest listens (see `Serial.enqueue_input`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import Any, Protocol

from pyvmm.host.saved import Saved
from pyvmm.host.timer import Ring, Timer

# Offsets: read / write. With LCR's DLAB set, 0 and 1 are the divisor.
RBR = THR = 0
IER = 1
IIR = FCR = 2
LCR = 3
MCR = 4
LSR = 5
MSR = 6
SCR = 7

IER_RDI, IER_THRI, IER_RLSI, IER_MSI, IER_ALL = 0x01, 0x02, 0x04, 0x08, 0x0F
IIR_NO_INT, IIR_MSI, IIR_THRI, IIR_RDI, IIR_RLSI, IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_FIFO_ENABLED = 0xC0
FCR_ENABLE, FCR_CLEAR_RCVR, FCR_CLEAR_XMIT = 0x01, 0x02, 0x04
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 0x01, 0x02, 0x20, 0x40
MSR_DCTS, MSR_DDSR, MSR_TERI, MSR_DDCD = 0x01, 0x02, 0x04, 0x08
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80

FIFO_SIZE = 16
_REGISTERS = ("ier", "lcr", "mcr", "scr", "lsr", "msr")  # what is saved of them
_TRIGGERS = (1, 4, 8, 14)  # by the top bits of FCR (8.4)
_SENT = LSR_THRE | LSR_TEMT
_CABLE = MSR_CTS | MSR_DSR | MSR_DCD  # the far end is there and ready

# Seconds that a byte takes on its way, when the guest waits for the interrupt: 64 KB a second. At
# 9600 baud, which Linux sets unless told otherwise, it would be 1 ms.
_BYTE_SECONDS = 16e-6
# An interrupt is this late at most because the guest took long to fill the FIFO.
_LONGEST_FILL = 5e-3

BURST = 4096
"""Bytes that are sent with an interrupt at once, after a rest: what Linux keeps for a port
(UART_XMIT_SIZE in <linux/serial_core.h>)."""
_REST = 20e-3  # seconds without a byte on its way

# What a write to THR is, settled in advance: a byte and nothing else; one more byte of those that
# the guest is to be interrupted for; anything.
_PLAIN, _TIMED, _SLOW = range(3)

# So many reads of LSR in a row, with input waiting, can only be a guest that polls for it: the
# transmitter, which the other pollers wait for, is ready at the first look.
_POLLS = 32

_BYTE = [bytes([value]) for value in range(256)]


class TimerLike(Protocol):
    """`Timer`, or one whose time a test makes."""

    def now(self) -> float: ...

    def set(self, when: float) -> None: ...

    def close(self) -> None: ...


def _make_timer(ring: Ring) -> TimerLike:
    return Timer("serial-port", ring)


class Serial:
    """`Handler` of the eight ports of one 16550A. Any thread may call any method.

    `irq(level)` is called on changes of the interrupt line only, in order. ISA interrupts are edges
    in the I/O APIC: every new event either raises a line that is low or finds it high for a cause
    that the guest has yet to clear.

    `sink(data)` gets each byte as the guest writes it and may block, which holds up that vCPU.
    `make_timer(ring)` is the timer of the transmitter. After `burst` bytes without a rest its
    interrupt takes time, which spares a processor whose handler others keep busy: infinity is right
    for a machine with one.

    To be closed before what `irq` needs.
    """

    def __init__(
        self,
        irq: Callable[[bool], None],
        sink: Callable[[bytes], None],
        make_timer: Callable[[Ring], TimerLike] = _make_timer,
        *,
        burst: float = BURST,
    ) -> None:
        self._irq = irq
        self._sink = sink
        self._timer = make_timer(self._ring)
        self._now = self._timer.now
        self._on_room: Callable[[], None] | None = None
        self._lock = Lock()
        self._line = False
        self._fifo: deque[int] = deque()
        self._ier = self._lcr = self._mcr = self._scr = 0
        self._divisor = 12  # 9600 baud
        self._fifo_enabled = False
        self._trigger = 1
        self._lsr = _SENT
        self._msr = _CABLE
        self._thre_pending = False
        # Bytes that the guest is to be interrupted for are on their way. How many, when the last
        # one was written, and when the guest took the interrupt before. If they are, the interrupt
        # is not pending.
        self._burst = self._quick = burst
        self._sending = False
        self._sent_count = 0
        self._sent_last = 0.0
        self._acknowledged = -_LONGEST_FILL
        self._listening = False
        self._held = False  # input was turned down
        self._polls = 0
        # What the two hot registers need to know, settled in advance by _settle().
        self._thr = _PLAIN
        self._plain_lsr = True

    # --- the guest's side ------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """The register's value. An access wider than a byte reads as many registers in turn."""
        if offset == LSR and size == 1 and self._plain_lsr:
            return self._lsr
        value = 0
        with self._lock:
            for index in range(size):
                value |= self._read_register(offset + index) << 8 * index
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """Set the register. An access wider than a byte writes as many registers in turn."""
        if offset == THR and size == 1 and self._thr != _SLOW:
            if self._thr == _TIMED:
                # Without the lock: if the time is just over, this byte comes before the interrupt.
                self._sent_count += 1
                self._sent_last = self._now()
            self._sink(_BYTE[value & 0xFF])
            return
        for index in range(size):
            self._write_register(offset + index, value >> 8 * index & 0xFF)

    def close(self) -> None:
        """Once this returns, the transmitter does not interrupt any more."""
        self._timer.close()

    # --- the far end's side ----------------------------------------------------------------------

    def enqueue_input(self, data: bytes) -> int:
        """Put what fits of `data` into the receive FIFO; how many bytes that was.

        If it was not all, `watch_room` tells when it is worth trying again. Nothing is accepted
        while the guest does not listen: its driver, when it starts, clears the FIFO, and the first
        line of a script piped into the guest would go with it. A guest listens when it has enabled
        the receive interrupt (and does not just try out the bits of IER), or reads LSR again and
        again.
        """
        with self._lock:
            room = 0
            if self._listening and not self._mcr & MCR_LOOP:
                depth = FIFO_SIZE if self._fifo_enabled else 1
                room = max(0, depth - len(self._fifo))
            taken = data[:room]
            self._fifo.extend(taken)
            self._held = len(taken) < len(data)
            self._settle()
            return len(taken)

    def watch_room(self, on_room: Callable[[], None] | None) -> None:
        """Have `on_room` called when input that was turned down has a chance again. It must not
        block, nor call back. Once this returns, the one set before is not called any more."""
        with self._lock:
            self._on_room = on_room

    # --- saved and restored ----------------------------------------------------------------------

    def save(self) -> dict[str, Any]:
        """The registers and the FIFO. Bytes on their way count as sent, as the far end has them."""
        with self._lock:
            return {
                "fifo": bytes(self._fifo).hex(),
                "fifo_enabled": self._fifo_enabled,
                "trigger": _TRIGGERS.index(self._trigger),
                "divisor": self._divisor,
                **{name: getattr(self, f"_{name}") for name in _REGISTERS},
                "thre_pending": self._thre_pending or self._sending,
                "listening": self._listening,
            }

    def restore(self, saved: Saved) -> None:
        """Restore what `save` gave, to a port that is new. Raises ConfigError.

        The line is low before, so that a cause makes an edge once more: an interrupt that the guest
        has had already is a glance at IIR, one that it never gets is the end of its output."""
        values = {name: saved.bits(name, 8) for name in _REGISTERS}
        fifo = saved.data("fifo", most=FIFO_SIZE)
        trigger, divisor = saved.integer("trigger", len(_TRIGGERS) - 1), saved.bits("divisor", 16)
        flags = [saved.flag(name) for name in ("fifo_enabled", "thre_pending", "listening")]
        with self._lock:
            for name, value in values.items():
                setattr(self, f"_{name}", value)
            self._ier &= IER_ALL
            self._mcr &= 0x1F
            self._lsr = self._lsr & (LSR_OE | LSR_DR) | _SENT
            self._fifo = deque(fifo)
            self._trigger, self._divisor = _TRIGGERS[trigger], divisor
            self._fifo_enabled, self._thre_pending, self._listening = flags
            self._settle()

    # --- registers, the lock held ----------------------------------------------------------------

    def _read_register(self, offset: int) -> int:
        if offset != LSR:
            self._polls = 0
        if self._lcr & LCR_DLAB and offset in (0, 1):
            return self._divisor >> 8 * offset & 0xFF
        if offset == RBR:
            return self._read_rbr()
        if offset == IIR:
            return self._read_iir()
        if offset == LSR:
            return self._read_lsr()
        if offset == MSR:
            return self._read_msr()
        plain = {IER: self._ier, LCR: self._lcr, MCR: self._mcr, SCR: self._scr}
        return plain.get(offset, 0xFF)

    def _read_rbr(self) -> int:
        value = self._fifo.popleft() if self._fifo else 0
        self._settle()
        self._offer_room()
        return value

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRI:
            self._thre_pending = False  # reading it as the source clears it (table in 8.5)
            self._acknowledged = self._now()
            self._settle()
        return cause | (IIR_FIFO_ENABLED if self._fifo_enabled else 0)

    def _read_lsr(self) -> int:
        value = self._lsr
        self._lsr &= ~LSR_OE
        if self._held and not self._listening:
            self._polls += 1
            if self._polls >= _POLLS:
                self._listening = True
                self._offer_room()
        self._settle()
        return value

    def _read_msr(self) -> int:
        value = self._msr
        self._msr &= 0xF0
        self._settle()
        return value

    def _write_register(self, offset: int, value: int) -> None:
        if offset == THR and not self._lcr & LCR_DLAB and not self._mcr & MCR_LOOP:
            self._sink(_BYTE[value])  # without the lock, for it may block
        with self._lock:
            self._polls = 0
            if self._lcr & LCR_DLAB and offset in (0, 1):
                shift = 8 * offset
                self._divisor = self._divisor & ~(0xFF << shift) | value << shift
            elif offset == THR:
                self._write_thr(value)
            elif offset == IER:
                self._write_ier(value)
            elif offset == FCR:
                self._write_fcr(value)
            elif offset == LCR:
                self._lcr = value
            elif offset == MCR:
                self._write_mcr(value)
            elif offset == SCR:
                self._scr = value
            self._settle()

    def _write_thr(self, value: int) -> None:
        if self._mcr & MCR_LOOP:
            self._loop_back(value)
        if not self._ier & IER_THRI:
            return
        now = self._now()
        rested, self._sent_last = now - self._sent_last > _REST, now
        if self._sending:
            self._sent_count += 1
            return
        if rested:
            self._quick = self._burst
        if self._quick > 0:
            self._interrupt_at_once()
            return
        self._thre_pending = False  # writing clears it (table in 8.5)
        self._sending = True
        self._sent_count = 1
        self._timer.set(self._due())

    def _interrupt_at_once(self) -> None:
        if self._fifo_enabled:
            self._quick -= FIFO_SIZE  # which a driver writes for an interrupt: one edge is enough
        else:
            self._quick -= 1
            # Writing clears the interrupt and, the byte sent, it comes again: an edge for each.
            self._thre_pending = False
            self._settle()
        self._thre_pending = True

    def _due(self) -> float:
        """The time at which the bytes on their way will have been sent, and the interrupt is due.

        Linux's handler of an edge starts over if the next one comes while it is still at work, and
        leaves no time to anything else on its processor for as long as somebody prints. So there is
        at least as much time after the last byte as the guest has spent in its handler before it,
        however long an exit takes on this machine.
        """
        wire = min(self._sent_count, FIFO_SIZE) * _BYTE_SECONDS
        fill = min(self._sent_last - self._acknowledged, _LONGEST_FILL)
        return self._sent_last + max(wire, fill)

    def _ring(self) -> float | None:
        """The timer's: interrupt if the bytes have been sent, or say when to look again."""
        with self._lock:
            if not self._sending:
                return None
            due = self._due()
            if self._now() < due:
                return due
            self._finish_sending()
            self._settle()
            return None

    def _finish_sending(self) -> None:
        self._sending = False
        self._sent_last = self._now()  # a rest begins here at the earliest
        self._thre_pending = True

    def _loop_back(self, value: int) -> None:
        if not self._fifo_enabled:
            if self._fifo:
                self._lsr |= LSR_OE  # the unread character is overwritten (8.6)
            self._fifo.clear()
        elif len(self._fifo) >= FIFO_SIZE:
            self._lsr |= LSR_OE  # the new one is lost (8.6)
            return
        self._fifo.append(value)

    def _write_ier(self, value: int) -> None:
        value &= IER_ALL
        changed = value ^ self._ier
        self._ier = value
        if changed & IER_THRI:
            # Enabling the interrupt of an empty transmitter raises it, each time: Linux's
            # serial8250_do_startup tests for chips that do not.
            self._thre_pending = bool(value & IER_THRI) and not self._sending
        if changed:
            self._settle_listening()

    def _settle_listening(self) -> None:
        # All of IER set while OUT2 keeps interrupts from the PC's controller: Linux's autoconfig
        # looks whether the bits hold. It reads and clears whatever it is sent meanwhile.
        probing = self._ier == IER_ALL and not self._mcr & MCR_OUT2
        self._listening = bool(self._ier & IER_RDI) and not probing
        self._offer_room()

    def _write_fcr(self, value: int) -> None:
        enable = bool(value & FCR_ENABLE)
        # Switching the FIFO on would clear it too (8.4). But Linux's set_termios does that just
        # after it has enabled the interrupt, and the first character of a pipe would go.
        if self._fifo_enabled > enable or (enable and value & FCR_CLEAR_RCVR):
            self._fifo.clear()
            self._offer_room()
        if self._sending and (self._fifo_enabled != enable or (enable and value & FCR_CLEAR_XMIT)):
            self._finish_sending()
        self._fifo_enabled = enable
        if enable:  # the other bits count only with this one (8.4)
            self._trigger = _TRIGGERS[value >> 6]

    def _write_mcr(self, value: int) -> None:
        self._mcr = value & 0x1F
        lines = _CABLE
        if value & MCR_LOOP:  # the four outputs are joined to the four inputs (8.7)
            lines = 0
            for output, line in (
                (MCR_RTS, MSR_CTS),
                (MCR_DTR, MSR_DSR),
                (MCR_OUT1, MSR_RI),
                (MCR_OUT2, MSR_DCD),
            ):
                lines |= line if value & output else 0
        before = self._msr & 0xF0
        deltas = (before ^ lines) >> 4 & (MSR_DCTS | MSR_DDSR | MSR_DDCD)
        if before & ~lines & MSR_RI:
            deltas |= MSR_TERI  # only the trailing edge counts (8.8)
        self._msr = lines | self._msr & 0x0F | deltas
        if self._ier & IER_RDI:
            self._settle_listening()
        self._offer_room()

    # --- consequences, the lock held -------------------------------------------------------------

    def _offer_room(self) -> None:
        # Only an empty FIFO is refilled: its interrupt has dropped, so the input makes a new edge,
        # and a guest that stops reading half-way in its handler is called again.
        if self._held and self._listening and not self._fifo and not self._mcr & MCR_LOOP:
            self._held = False
            if self._on_room is not None:
                self._on_room()

    def _cause(self) -> int:
        """The pending interrupt of the highest priority, as IIR shows it (8.5)."""
        enabled = self._ier
        if enabled & IER_RLSI and self._lsr & LSR_OE:
            return IIR_RLSI
        if enabled & IER_RDI and self._fifo:
            full = not self._fifo_enabled or len(self._fifo) >= self._trigger
            return IIR_RDI if full else IIR_TIMEOUT
        if enabled & IER_THRI and self._thre_pending:
            return IIR_THRI
        if enabled & IER_MSI and self._msr & 0x0F:
            return IIR_MSI
        return IIR_NO_INT

    def _settle(self) -> None:
        """Bring everything that follows from the state up to date; the line last."""
        self._lsr = self._lsr & ~LSR_DR | (LSR_DR if self._fifo else 0)
        polled_for = self._held and not self._listening
        self._plain_lsr = not self._lsr & LSR_OE and not polled_for
        if self._lcr & LCR_DLAB or self._mcr & MCR_LOOP or polled_for:
            self._thr = _SLOW
        elif not self._ier & IER_THRI:
            self._thr = _PLAIN
        else:
            # A byte behind the one that has brought the interrupt changes nothing.
            plain = self._thre_pending and self._fifo_enabled and self._quick > 0
            self._thr = _TIMED if self._sending else _PLAIN if plain else _SLOW
        level = self._cause() != IIR_NO_INT
        if level != self._line:
            self._line = level
            self._irq(level)
