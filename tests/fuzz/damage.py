"""How a thing that was right becomes one that lies: a number by its name, a part, or some bytes."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import NamedTuple


class Number(NamedTuple):
    """A number in a form: where it is, and its bytes."""

    name: str
    at: int
    size: int
    order: str = "little"


def fields(text: str, at: int = 0, order: str = "little") -> list[Number]:
    """Numbers that follow one another from `at` on, as "name:4 other:2 :6", where those without a
    name are passed over."""
    found = []
    for word in text.split():
        name, _, size = word.partition(":")
        if name:
            found.append(Number(name, at, int(size), order))
        at += int(size)
    return found


def wrong(rng: Random, value: int, size: int, others: Sequence[int] = ()) -> int:
    """A number of `size` bytes in place of `value`."""
    top = 1 << 8 * size
    kind = rng.randrange(8)
    if kind == 0:
        found = value ^ 1 << rng.randrange(8 * size)
    elif kind == 1:
        found = value + rng.choice((-1, 1, 2, -2, 8, 512, 4096))
    elif kind == 2:
        found = rng.choice((0, 1, top - 1, top >> 1, (top >> 1) - 1))
    elif kind == 3:
        found = value * rng.choice((2, 3, 8, 256)) + rng.randrange(2)
    elif kind == 4 and others:
        found = rng.choice(others)
    elif kind == 5:
        found = 1 << rng.randrange(8 * size)
    elif kind == 6:
        found = value // 2
    else:
        found = rng.getrandbits(8 * size)
    return found % top


def lie(rng: Random, data: bytearray, numbers: Sequence[Number]) -> str:
    """Change one of `numbers` in `data`; which, and to what."""
    there = [one for one in numbers if one.at + one.size <= len(data)]
    if not there:
        return "nothing"
    one = rng.choice(there)
    order = "big" if one.order == "big" else "little"
    end = one.at + one.size
    value = int.from_bytes(data[one.at : end], order)
    other = rng.choice(there)
    others = (int.from_bytes(data[other.at : other.at + other.size], order), len(data))
    new = wrong(rng, value, one.size, others)
    data[one.at : end] = new.to_bytes(one.size, order)
    return f"{one.name} {value:#x} is {new:#x}"


def spoil(rng: Random, data: bytearray, near: int = 0) -> str:
    """Change some bytes of `data`, or their number; what was done. With `near`, mostly there."""
    if not data:
        return "nothing"
    at = rng.randrange(len(data))
    if near and rng.random() < 0.7:
        at = min(len(data) - 1, max(0, near + rng.randrange(-64, 64)))
    size = rng.choice((1, 2, 4, 8, 16, 64, 512))
    kind = rng.randrange(7)
    if kind == 0:
        del data[at:]
        return f"cut at {at:#x}"
    if kind == 1:
        data[at] ^= 1 << rng.randrange(8)
        return f"a bit at {at:#x}"
    if kind == 2:
        data[at : at + size] = rng.randbytes(size)[: len(data) - at]
        return f"{size} bytes at {at:#x}"
    if kind == 3:
        data[at : at + size] = bytes(size)[: len(data) - at]
        return f"{size} zeros at {at:#x}"
    if kind == 4:
        data[at:at] = data[at : at + size]
        return f"{size} bytes at {at:#x} twice"
    if kind == 5:
        del data[at : at + size]
        return f"{size} bytes less at {at:#x}"
    to = rng.randrange(len(data))
    data[to : to + size] = data[at : at + size][: len(data) - to]
    return f"{size} bytes of {at:#x} at {to:#x}"


def harm(rng: Random, data: bytearray, numbers: Sequence[Number], note: list[str]) -> None:
    """A few lies, and now and then other damage."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if numbers and rng.random() < 0.75:
            note.append(lie(rng, data, numbers))
        else:
            note.append(spoil(rng, data))
