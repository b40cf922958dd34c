"""A guest's output, made harmless for a terminal.

A terminal obeys what is shown on it: control sequences move the cursor over what was there before,
change its title, and make some answer as if the user had typed. What an untrusted guest has said
some time ago must not do that to whoever reads it. Colours stay, for they are harmless.
"""

from __future__ import annotations

import codecs
import re

RESET = "\x1b[m"

_COLOUR = re.compile(r"\x1b\[[0-9;:]{0,64}m")
_CONTROL = re.compile(r"\x1b\[[0-?]{0,64}[ -/]{0,8}[@-~]")  # ECMA-48, 5.4 "Control sequences"
_BEGINNING = re.compile(r"\x1b(\[[0-?]{0,64}[ -/]{0,8})?")  # of one, at the end of a piece


class PlainText:
    """Takes bytes as they come, and gives text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes) -> str:
        """The text of what is whole by now. Colours and newlines stay, other control sequences are
        left out, and other control characters are shown as ^X."""
        text = self._held + self._decoder.decode(data)
        self._held = ""
        shown = []
        place = 0
        while place < len(text):
            char = text[place]
            if char == "\x1b":
                if found := _COLOUR.match(text, place):
                    shown.append(found[0])
                    place = found.end()
                    continue
                if found := _CONTROL.match(text, place):
                    place = found.end()
                    continue
                found = _BEGINNING.match(text, place)
                if found and found.end() == len(text):
                    self._held = text[place:]
                    break
            if char == "\r" and place + 1 == len(text):
                self._held = char
                break
            if char == "\r":
                shown.append("" if text[place + 1] == "\n" else "\n")
            else:
                shown.append(_visible(char))
            place += 1
        return "".join(shown)

    def end(self) -> str:
        """The text that was held back as the beginning of a sequence."""
        held, self._held = self._held + self._decoder.decode(b"", final=True), ""
        return "".join("\n" if char == "\r" else _visible(char) for char in held)


def _visible(char: str) -> str:
    if char.isprintable() or char in "\n\t":
        return char
    code = ord(char)
    if code < 0x20:
        return "^" + chr(code + 0x40)
    return "^?" if code == 0x7F else "\ufffd"
