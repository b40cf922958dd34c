"""An encoder for the little ACPI Machine Language that the DSDT needs.

Every function gives the bytes of one term. Source: ACPI 6.5, chapter 20 "ACPI Machine Language
(AML) Specification", and 6.4 "Resource Data Types for ACPI" for the descriptors.
"""

from __future__ import annotations

import struct

_ZERO, _ONE = 0x00, 0x01
_BYTE, _WORD, _DWORD, _STRING, _QWORD = 0x0A, 0x0B, 0x0C, 0x0D, 0x0E
_NAME, _SCOPE, _BUFFER, _PACKAGE, _METHOD, _NOTIFY = 0x08, 0x10, 0x11, 0x12, 0x14, 0x86
_IF, _ELSE, _LEQUAL, _LNOT, _RETURN, _ARG0 = 0xA0, 0xA1, 0x93, 0x92, 0xA4, 0x68
_STORE, _AND, _OR, _LOCAL0, _DWORD_FIELD = 0x70, 0x7B, 0x7D, 0x60, 0x8A
_REGION, _FIELD, _DEVICE = b"\x5b\x80", b"\x5b\x81", b"\x5b\x82"
_SYSTEM_IO = 1
_DWORD_ACCESS = 3
_DUAL_NAME, _MULTI_NAME = 0x2E, 0x2F

_MEMORY, _BUS_NUMBERS = 0, 2  # types of address spaces
_READ_WRITE = 1 << 0
_PREFETCHABLE = 3 << 1
_END_TAG = b"\x79\x00"  # the checksum 0 stands for "not checked"


def integer(value: int) -> bytes:
    """The shortest encoding of an unsigned number (20.2.3)."""
    if value in (0, 1):
        return bytes([_ONE if value else _ZERO])
    for opcode, size in ((_BYTE, 1), (_WORD, 2), (_DWORD, 4), (_QWORD, 8)):
        if value < 1 << 8 * size:
            return bytes([opcode]) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} does not fit an AML integer")


def string(text: str) -> bytes:
    """A string constant (20.2.3)."""
    return bytes([_STRING]) + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A hardware id of three letters and four hex digits, compressed (19.3.4 EISAID)."""
    letters = [ord(char) - 0x40 for char in text[:3]]
    packed = letters[0] << 26 | letters[1] << 21 | letters[2] << 16 | int(text[3:], 16)
    return integer(int.from_bytes(packed.to_bytes(4, "big"), "little"))


def path(text: str) -> bytes:
    r"""A name such as ``\_SB.COM1`` (20.2.2); segments are padded to four characters."""
    prefix = b"\\" if text.startswith("\\") else b""
    segments = [part.ljust(4, "_").encode("ascii") for part in text.lstrip("\\").split(".")]
    if len(segments) == 2:
        prefix += bytes([_DUAL_NAME])
    elif len(segments) > 2:
        prefix += bytes([_MULTI_NAME, len(segments)])
    return prefix + b"".join(segments)


def name(where: str, value: bytes) -> bytes:
    """Name (where, value)."""
    return bytes([_NAME]) + path(where) + value


def scope(where: str, *terms: bytes) -> bytes:
    """Scope (where) {terms}."""
    return bytes([_SCOPE]) + _with_length(path(where) + b"".join(terms))


def device(where: str, *terms: bytes) -> bytes:
    """Device (where) {terms}."""
    return _DEVICE + _with_length(path(where) + b"".join(terms))


def method(where: str, arguments: int, *terms: bytes) -> bytes:
    """Method (where, arguments, Serialized) {terms}: 20.2.5.2 "Named Objects Encoding"."""
    serialized = 1 << 3
    return bytes([_METHOD]) + _with_length(
        path(where) + bytes([arguments | serialized]) + b"".join(terms)
    )


def notify(where: str, value: int) -> bytes:
    """Notify (where, value): 20.2.5.3 "Statement Opcodes Encoding"."""
    return bytes([_NOTIFY]) + path(where) + integer(value)


def buffer(data: bytes) -> bytes:
    """Buffer () {data}: 20.2.5.4 "Expression Opcodes Encoding"."""
    return bytes([_BUFFER]) + _with_length(integer(len(data)) + data)


def uuid(text: str) -> bytes:
    """ToUUID (text), 19.6.142: its first three groups are little-endian."""
    groups = [bytes.fromhex(group) for group in text.split("-")]
    return buffer(b"".join([*(group[::-1] for group in groups[:3]), *groups[3:]]))


def argument(number: int) -> bytes:
    """ArgN of a method (20.2.6.1)."""
    return bytes([_ARG0 + number])


def return_(value: bytes) -> bytes:
    """Return (value)."""
    return bytes([_RETURN]) + value


def if_equal(left: bytes, right: bytes, *terms: bytes) -> bytes:
    """If (LEqual (left, right)) {terms}."""
    return bytes([_IF]) + _with_length(bytes([_LEQUAL]) + left + right + b"".join(terms))


def if_not_equal(left: bytes, right: bytes, *terms: bytes) -> bytes:
    """If (LNot (LEqual (left, right))) {terms}."""
    return bytes([_IF]) + _with_length(bytes([_LNOT, _LEQUAL]) + left + right + b"".join(terms))


def else_(*terms: bytes) -> bytes:
    """Else {terms}, after an If: 20.2.5.3 "Statement Opcodes Encoding"."""
    return bytes([_ELSE]) + _with_length(b"".join(terms))


def and_(left: bytes, right: bytes, target: bytes) -> bytes:
    """And (left, right, target)."""
    return bytes([_AND]) + left + right + target


def or_(left: bytes, right: bytes, target: bytes) -> bytes:
    """Or (left, right, target)."""
    return bytes([_OR]) + left + right + target


def dword_field(where: str, source: bytes, at: int) -> bytes:
    """CreateDWordField (source, at, where): 20.2.5.2 "Named Objects Encoding"."""
    return bytes([_DWORD_FIELD]) + source + integer(at) + path(where)


def if_any(left: bytes, right: bytes, *terms: bytes) -> bytes:
    """If (And (left, right)) {terms}."""
    both = bytes([_AND]) + left + right + bytes([_ZERO])  # which are stored nowhere
    return bytes([_IF]) + _with_length(both + b"".join(terms))


def local(number: int) -> bytes:
    """LocalN of a method (20.2.6.2)."""
    return bytes([_LOCAL0 + number])


def store(value: bytes, target: bytes) -> bytes:
    """Store (value, target)."""
    return bytes([_STORE]) + value + target


def io_registers(where: str, port: int, *registers: str) -> bytes:
    """OperationRegion (where, SystemIO, port, …) and Field (where, DWordAcc, NoLock, Preserve)
    {registers}, each of 32 bits: 20.2.5.2 "Named Objects Encoding"."""
    size = 4 * len(registers)
    region = _REGION + path(where) + bytes([_SYSTEM_IO]) + integer(port) + integer(size)
    fields = b"".join(path(register) + bytes([32]) for register in registers)
    return region + _FIELD + _with_length(path(where) + bytes([_DWORD_ACCESS]) + fields)


def package(*values: bytes) -> bytes:
    """Package () {values}."""
    return bytes([_PACKAGE]) + _with_length(bytes([len(values)]) + b"".join(values))


def resource_template(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {descriptors}: a buffer that ends in an end tag."""
    return buffer(b"".join(descriptors) + _END_TAG)


def memory32_fixed(base: int, size: int) -> bytes:
    """Memory32Fixed (ReadWrite, base, size), 6.4.3.4."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


def io(port: int, count: int) -> bytes:
    """IO (Decode16, port, port, 1, count), 6.4.2.5."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, count)


def interrupt(gsi: int) -> bytes:
    """Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive) {gsi}, 6.4.3.6."""
    consumer, edge = 1 << 0, 1 << 1
    return struct.pack("<BHBBI", 0x89, 6, consumer | edge, 1, gsi)


def bus_numbers(first: int, last: int) -> bytes:
    """WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, …), 6.4.3.5.3."""
    return _window(0x88, "H", _BUS_NUMBERS, 0, first, last)


def memory32_window(base: int, size: int) -> bytes:
    """DWordMemory (ResourceProducer, …, NonCacheable, ReadWrite, …), 6.4.3.5.2."""
    return _window(0x87, "I", _MEMORY, _READ_WRITE, base, base + size - 1)


def memory64_window(base: int, size: int) -> bytes:
    """QWordMemory (ResourceProducer, …, Prefetchable, ReadWrite, …), 6.4.3.5.1."""
    return _window(0x8A, "Q", _MEMORY, _PREFETCHABLE | _READ_WRITE, base, base + size - 1)


def _window(tag: int, code: str, kind: int, flags: int, first: int, last: int) -> bytes:
    """6.4.3.5 "Address Space Resource Descriptors": what a bridge passes on, all of it fixed."""
    fixed = 1 << 3 | 1 << 2  # maximum and minimum address
    numbers = struct.pack(f"<5{code}", 0, first, last, 0, last - first + 1)
    return struct.pack("<BHBBB", tag, 3 + len(numbers), kind, fixed, flags) + numbers


def _with_length(body: bytes) -> bytes:
    """`body` with the length that counts itself in front (20.2.4)."""
    if len(body) + 1 < 1 << 6:
        return bytes([len(body) + 1]) + body
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little") + body
    raise ValueError(f"an AML package cannot hold {len(body)} bytes")
