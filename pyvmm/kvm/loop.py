"""The loop a vCPU's thread lives in: enter the guest, serve port I/O and MMIO, enter again.

Every register access of the guest passes here, so this is written for speed: no value is made of an
exit, and the handler of an access is looked up once, then kept under the eight bytes KVM describes
the access with. docs/decisions/0010-exit-path.md has the measurements behind each choice.

The rule to know: an IO or MMIO exit is an instruction *half done*. KVM finishes it (takes the value
read, moves rip) at the start of the next KVM_RUN. Whoever wants the vCPU's registers or state in
between calls `finish_pending` first (KVM API, "KVM_RUN", the note on KVM_EXIT_IO and others).
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from typing import Protocol, TypeVar

from pyvmm.kvm import uapi
from pyvmm.kvm.uapi import ffi
from pyvmm.kvm.vcpu import EXIT_INTR, Vcpu

Action = TypeVar("Action")
ActionOut = TypeVar("ActionOut", covariant=True)


class AccessHandler(Protocol[ActionOut]):
    """Answers one range of an address space, by offset into it."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> ActionOut | None: ...


class AddressSpace(Protocol[ActionOut]):
    """Port or MMIO space, as `pyvmm.bus.Bus` is one; `size` is 1, 2, 4 or 8."""

    def find(self, address: int) -> tuple[int, AccessHandler[ActionOut]] | None: ...

    def read(self, address: int, size: int) -> int: ...

    def write(self, address: int, size: int, value: int) -> ActionOut | None: ...


def _offset(*path: str) -> int:
    return int(ffi.offsetof("struct kvm_run", *path))


# Indices into the kvm_run page seen as bytes, as 32-bit and as 64-bit numbers.
_REASON_U32 = _offset("exit_reason") // 4
_IO_U64 = _offset("io", "direction") // 8  # direction, size, port and count in one number
_IO_DATA_OFFSET_U64 = _offset("io", "data_offset") // 8
_MMIO_ADDRESS_U64 = _offset("mmio", "phys_addr") // 8
_MMIO_DATA = _offset("mmio", "data")
_MMIO_DATA_U64 = _MMIO_DATA // 8
_MMIO_KIND_U64 = _offset("mmio", "len") // 8  # length, then is_write, then padding
_MMIO_LENGTH_U32 = _offset("mmio", "len") // 4
_MMIO_IS_WRITE = _offset("mmio", "is_write")

_MASKS = tuple((1 << (8 * size)) - 1 for size in range(9))
_SIZES = (1, 2, 4, 8)
# What the kind is for plain accesses; anything else (odd sizes, stale padding) goes the long way.
_MMIO_KINDS = tuple(is_write << 32 | size for is_write in (0, 1) for size in _SIZES)
# A guest that touches every byte of a large range must not make the memory of handlers grow.
_MAX_KEPT = 4096


def run_until_exit(
    vcpu: Vcpu, pio: AddressSpace[Action], mmio: AddressSpace[Action]
) -> Action | None:
    """Run the guest; serve its port I/O by `pio` and its MMIO by `mmio`, access by access.

    Returns what a handler's write asked for, or None for any other exit, then
    `vcpu.exit_reason` says which (EXIT_INTR: kicked) and `vcpu.exit()` what it means. A string
    instruction's elements are accesses of their own; an access KVM reports with an odd size (one
    that crosses a page) is made of accesses of 1, 2, 4 and 8 bytes.

    Ranges must not come or go in `pio` and `mmio` meanwhile: kick the vCPUs, change, run again.
    Raises HostError where KVM fails, and whatever a handler raises.
    """
    # Local names: each is read at every exit.
    ioctl, fd, run = fcntl.ioctl, vcpu.fd, uapi.KVM_RUN
    exit_io, exit_mmio = uapi.KVM_EXIT_IO, uapi.KVM_EXIT_MMIO
    reason_at, io_at = _REASON_U32, _IO_U64
    kind_at, address_at, masks = _MMIO_KIND_U64, _MMIO_ADDRESS_U64, _MASKS
    page = vcpu.run_page
    u32, u64 = page.cast("I"), page.cast("Q")
    views = {1: page, 2: page.cast("H"), 4: u32, 8: u64}
    ports: dict[int, _Access[Action]] = {}
    registers: dict[int, dict[int, _Access[Action]]] = {kind: {} for kind in _MMIO_KINDS}
    action: Action | None
    while True:
        try:
            ioctl(fd, run)  # without a third argument, which would cost 1.6 µs
        except OSError as error:
            if vcpu.failed_run(error.errno or 0) is None:
                continue
            return None
        reason = u32[reason_at]
        if reason == exit_io:
            try:
                write, read, offset, size, view, place = ports[u64[io_at]]
            except KeyError:
                action = _first_port_access(page, views, pio, ports)
                if action is not None:
                    return action
                continue
            if write is not None:
                action = write(offset, size, view[place])
                if action is not None:
                    return action
            else:
                view[place] = read(offset, size) & masks[size]
        elif reason == exit_mmio:
            try:
                write, read, offset, size, view, place = registers[u64[kind_at]][u64[address_at]]
            except KeyError:
                action = _first_mmio_access(page, views, mmio, registers)
                if action is not None:
                    return action
                continue
            if write is not None:
                action = write(offset, size, view[place])
                if action is not None:
                    return action
            else:
                view[place] = read(offset, size) & masks[size]
        else:
            return None


def finish_pending(
    vcpu: Vcpu, pio: AddressSpace[Action], mmio: AddressSpace[Action]
) -> Action | None:
    """Complete a half-done access, so that registers and state are those between instructions.

    Enters KVM with immediate_exit, which runs no further instruction, until there is nothing left
    to complete (one instruction may consist of several accesses). Returns the first action that a
    handler asked for meanwhile. immediate_exit stays on: `vcpu.set_immediate_exit(False)` lets the
    guest run again.
    """
    vcpu.set_immediate_exit(True)
    asked: Action | None = None
    while True:
        action = run_until_exit(vcpu, pio, mmio)
        if action is None:
            return asked  # EXIT_INTR: all done. Anything else came of the completion itself.
        if asked is None:
            asked = action


# --- the first access to each place, and the rare kinds ------------------------------------------


class _Write(Protocol[ActionOut]):
    def __call__(self, offset: int, size: int, value: int, /) -> ActionOut | None: ...


class _Read(Protocol):
    def __call__(self, offset: int, size: int, /) -> int: ...


# write (None for a read), read, offset into the range, bytes, and where the data is: the view of
# the page that has numbers of that many bytes, and the index in it
_Access = tuple[_Write[Action] | None, _Read, int, int, memoryview, int]
_Views = dict[int, memoryview]


def _first_port_access(
    page: memoryview,
    views: _Views,
    pio: AddressSpace[Action],
    ports: dict[int, _Access[Action]],
) -> Action | None:
    """Serve the IO exit in `page`; keep the handler for the next one like it, if it is simple."""
    word = views[8][_IO_U64]
    data_offset = views[8][_IO_DATA_OFFSET_U64]
    is_out = word & 0xFF == uapi.KVM_EXIT_IO_OUT
    size, port, count = word >> 8 & 0xFF, word >> 16 & 0xFFFF, word >> 32
    handler = _handler_of_all(pio, port, size)
    if count == 1 and handler is not None:
        start, found = handler
        if len(ports) >= _MAX_KEPT:
            ports.clear()
        write = found.write if is_out else None
        ports[word] = (write, found.read, port - start, size, views[size], data_offset // size)
    return _port_io(page, pio, is_out, port, size, count, data_offset)


def _port_io(
    page: memoryview,
    pio: AddressSpace[Action],
    is_out: bool,
    port: int,
    size: int,
    count: int,
    data_offset: int,
) -> Action | None:
    """`count` accesses of `size` bytes to one port, as a string instruction makes them."""
    asked: Action | None = None
    for place in range(data_offset, data_offset + size * count, size):
        if is_out:
            action = pio.write(port, size, int.from_bytes(page[place : place + size], "little"))
            if asked is None:
                asked = action
        else:
            value = pio.read(port, size) & _MASKS[size]
            page[place : place + size] = value.to_bytes(size, "little")
    return asked


def _first_mmio_access(
    page: memoryview,
    views: _Views,
    mmio: AddressSpace[Action],
    registers: dict[int, dict[int, _Access[Action]]],
) -> Action | None:
    """Serve the MMIO exit in `page`; keep the handler for the next access like it."""
    u64 = views[8]
    address = u64[_MMIO_ADDRESS_U64]
    size = views[4][_MMIO_LENGTH_U32]
    kept = registers.get(u64[_MMIO_KIND_U64])
    handler = _handler_of_all(mmio, address, size) if kept is not None else None
    if kept is not None and handler is not None:
        start, found = handler
        if len(kept) >= _MAX_KEPT:
            kept.clear()
        write = found.write if page[_MMIO_IS_WRITE] else None
        place = _MMIO_DATA // size
        kept[address] = (write, found.read, address - start, size, views[size], place)
    return _mmio_access(page, u64, mmio, address, size)


def _mmio_access(
    page: memoryview, u64: memoryview, mmio: AddressSpace[Action], address: int, size: int
) -> Action | None:
    value = u64[_MMIO_DATA_U64]
    asked: Action | None = None
    if page[_MMIO_IS_WRITE]:
        for at, piece in _pieces(address, size):
            part = value >> (8 * (at - address)) & _MASKS[piece]
            action = mmio.write(at, piece, part)
            if asked is None:
                asked = action
    else:
        value = 0
        for at, piece in _pieces(address, size):
            value |= (mmio.read(at, piece) & _MASKS[piece]) << (8 * (at - address))
        u64[_MMIO_DATA_U64] = value
    return asked


def _pieces(address: int, size: int) -> Iterator[tuple[int, int]]:
    """An access as naturally aligned ones of 1, 2, 4 or 8 bytes; itself if its size is such."""
    if size in _SIZES:
        yield address, size
        return
    end = address + size
    while address < end:
        piece = next(p for p in reversed(_SIZES) if address % p == 0 and address + p <= end)
        yield address, piece
        address += piece


def _handler_of_all(
    space: AddressSpace[Action], address: int, size: int
) -> tuple[int, AccessHandler[Action]] | None:
    """(start, handler) of the range that holds the whole access, or None."""
    found = space.find(address)
    last = space.find(address + size - 1)
    return found if found is not None and last is not None and last[0] == found[0] else None


__all__ = ["EXIT_INTR", "AccessHandler", "AddressSpace", "finish_pending", "run_until_exit"]
