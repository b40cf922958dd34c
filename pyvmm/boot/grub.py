"""GRUB's configuration: the entry that it would boot by itself.

Source: the GNU GRUB manual ("Simple configuration handling", `default`; "Writing full configuration
files directly"; "The GRUB environment block"). The configuration is a script, which is not run: its
menu is read as it stands, and a variable has a value if everybody who sets it says the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

MOST_ENTRIES = 256
_DEEPEST = 8  # menus within menus
_MOST_VARIABLES, _MOST_VALUE = 256, 4096  # characters
_LINUX, _INITRD = ("linux", "linux16", "linuxefi"), ("initrd", "initrd16", "initrdefi")
_SAVED = ("${saved_entry}", "$saved_entry")
_SETTING = re.compile(r"set\s+([A-Za-z_]\w{0,63})=(.*)")
_WORD = r"(?:'([^']*)'|\"([^\"]*)\"|([^\s'\"{]+))"
_TITLE = re.compile(rf"\w+\s+{_WORD}")
_ID = re.compile(rf"(?:\$menuentry_id_option|--id)[ =]+{_WORD}")


class Command(NamedTuple):
    """An entry's lines `linux` and `initrd`; "" for one that there is not."""

    linux: str
    initrd: str


class _Item:
    """An entry of a menu, or a menu of its own."""

    def __init__(self, line: str = "", *, is_menu: bool = False) -> None:
        line = line[:_MOST_VALUE]
        self.title, self.id = _first(_TITLE.match(line)), _first(_ID.search(line))
        self.is_menu = is_menu
        self.linux = self.initrd = ""
        self.items: list[_Item] = []

    def bootable(self) -> Iterator[_Item]:
        """The entries in it that load a kernel, in their order."""
        if self.linux:
            yield self
        for item in self.items:
            yield from item.bootable()

    def named(self, name: str) -> _Item | None:
        """The item that `default` calls `name`: a number from 0, an ID or a title."""
        if name.isdecimal() and len(name) < 5:
            return self.items[int(name)] if int(name) < len(self.items) else None
        return next((item for item in self.items if name in (item.id, item.title)), None)


def _first(found: re.Match[str] | None) -> str:
    return next((group for group in found.groups() if group is not None), "") if found else ""


def environment(text: str) -> dict[str, str]:
    """The variables of an environment block, a file grubenv."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals and name.isidentifier() and len(found) < _MOST_VARIABLES:
            found[name] = re.sub(r"\\(.)", r"\1", value[:_MOST_VALUE])
    return found


def variables(text: str, saved: Mapping[str, str]) -> dict[str, str]:
    """The variables of the configuration `text` that can be told without running it. Those that are
    `saved` in the environment block come first."""
    found: dict[str, str | None] = {}
    for line in text.splitlines():
        setting = _SETTING.fullmatch(line.strip())
        if setting is None:
            continue
        name, value = setting[1], _unquoted(setting[2])
        if name not in found and len(found) == _MOST_VARIABLES:
            continue
        same = found.get(name, value) == value
        found[name] = value if same and "$" not in value and len(value) <= _MOST_VALUE else None
    told = {name: value for name, value in found.items() if value is not None}
    return {**told, **saved}


def _unquoted(text: str) -> str:
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def chosen(text: str, saved: Mapping[str, str]) -> Command | None:
    """What the default entry of the configuration `text` loads, or the first entry that loads a
    kernel, where the default entry does not; None if none does."""
    root, bare, default = _read(text, saved)
    found: _Item | None = root
    for name in re.split("(?<!>)>(?!>)", default) if default else ():
        found = None if found is None else found.named(name.replace(">>", ">"))
    for start in (found, root, bare):
        item = None if start is None else next(start.bootable(), None)
        if item is not None:
            return Command(item.linux, item.initrd)
    return None


def _read(text: str, saved: Mapping[str, str]) -> tuple[_Item, _Item, str]:
    """The menu, what is booted without a menu, and the name of the default entry."""
    root, bare, default, boots, count = _Item(is_menu=True), _Item(), "", False, 0
    blocks: list[_Item | None] = []  # that are open; None for one that is not of the menu
    for line in map(str.strip, text.splitlines()):
        word = line.partition(" ")[0].partition("\t")[0]
        if word in ("menuentry", "submenu"):
            # One that comes in another one that is no menu: that was never closed.
            while blocks and not (blocks[-1] and blocks[-1].is_menu):
                blocks.pop()
            if count < MOST_ENTRIES and len(blocks) < _DEEPEST:
                item = _Item(line, is_menu=word == "submenu")
                ((blocks and blocks[-1]) or root).items.append(item)
                blocks.append(item)
                count += 1
            else:
                blocks.append(None)
        elif line == "}":
            del blocks[-1:]
        elif line.endswith("{"):
            blocks.append(None)
        elif word == "set" and (setting := _SETTING.fullmatch(line)) and setting[1] == "default":
            default = _default(_unquoted(setting[2]), saved) or default
        else:
            block = blocks[-1] if blocks else bare
            if block is not None and not block.is_menu:
                _add_command(block, word, line)
            boots = boots or (not blocks and word == "boot")
    return root, bare if boots else _Item(), default


def _default(value: str, saved: Mapping[str, str]) -> str:
    if value in _SAVED:
        return saved.get("saved_entry", "")
    return "" if "$" in value else value


def _add_command(entry: _Item, word: str, line: str) -> None:
    if word in _LINUX and not entry.linux and line != word:
        entry.linux = line
    elif word in _INITRD and entry.linux and not entry.initrd:
        entry.initrd = line
