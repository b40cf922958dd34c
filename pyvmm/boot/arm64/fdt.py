"""Writes a flattened device tree, version 17 (Devicetree Specification v0.4, chapter 5 "Flattened
Devicetree (DTB) Format").

    root = Node("")
    cpus = root.child("cpus", {"#address-cells": cells(1), "#size-cells": cells(0)})
    blob = flatten(root)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

_MAGIC = 0xD00D_FEED
_VERSION, _LAST_COMPATIBLE = 17, 16
_HEADER = struct.Struct(">10I")
_BEGIN_NODE, _END_NODE, _PROP, _END = 1, 2, 3, 9
_NO_RESERVATIONS = bytes(16)


class Node:
    """A node: its name with the unit address ("serial@9000000"), properties and children, which are
    written in the order in which they came."""

    def __init__(self, name: str, properties: Mapping[str, bytes] | None = None) -> None:
        self.name = name
        self.properties = dict(properties or {})
        self.children: list[Node] = []

    def child(self, name: str, properties: Mapping[str, bytes] | None = None) -> Node:
        """A new child."""
        node = Node(name, properties)
        self.children.append(node)
        return node


def cells(*numbers: int) -> bytes:
    """A property of 32-bit numbers."""
    return struct.pack(f">{len(numbers)}I", *numbers)


def places(*ranges: tuple[int, int]) -> bytes:
    """A property of (address, size) pairs where both have two cells, as `reg` has them."""
    return b"".join(struct.pack(">2Q", *row) for row in ranges)


def words(*texts: str) -> bytes:
    """A property of strings. Raises ValueError for one with a NUL in it."""
    if any("\0" in text for text in texts):
        raise ValueError("a NUL in a string of the device tree")
    return b"".join(text.encode() + b"\0" for text in texts)


def flatten(root: Node) -> bytes:
    """The whole tree as it lies in memory, at an address that is a multiple of 8."""
    names = bytearray()
    structure = bytearray()
    _append(root, structure, names)
    structure += struct.pack(">I", _END)
    at_structure = _HEADER.size + len(_NO_RESERVATIONS)
    at_names = at_structure + len(structure)
    header = _HEADER.pack(
        _MAGIC,
        at_names + len(names),
        at_structure,
        at_names,
        _HEADER.size,
        _VERSION,
        _LAST_COMPATIBLE,
        0,  # the CPU that boots
        len(names),
        len(structure),
    )
    return header + _NO_RESERVATIONS + bytes(structure) + bytes(names)


def _append(node: Node, structure: bytearray, names: bytearray) -> None:
    structure += struct.pack(">I", _BEGIN_NODE) + _padded(node.name.encode() + b"\0")
    for name, value in node.properties.items():
        place = _name_place(names, name)
        structure += struct.pack(">3I", _PROP, len(value), place) + _padded(value)
    for child in _children(node):
        _append(child, structure, names)
    structure += struct.pack(">I", _END_NODE)


def _children(node: Node) -> Sequence[Node]:
    names = [child.name for child in node.children]
    if len(set(names)) < len(names):
        raise ValueError(f"two children of the node {node.name!r} have one name")
    return node.children


def _name_place(names: bytearray, name: str) -> int:
    """The place of the property's name in the block of strings; one may be the end of another."""
    text = name.encode() + b"\0"
    found = names.find(text)
    if found < 0:
        found = len(names)
        names += text
    return found


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
