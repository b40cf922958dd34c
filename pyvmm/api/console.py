"""A guest's console: expect and send, in pexpect's words and with pexpect's patterns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

from pexpect import EOF, TIMEOUT
from pexpect.spawnbase import SpawnBase

from pyvmm.api.errors import TAIL_LINES, VMError, VMTimeout
from pyvmm.api.transcript import Transcript

Pattern = Any  # a str (a regular expression), a compiled one, pexpect.EOF or pexpect.TIMEOUT
TIMEOUT_SECONDS = 30.0


class Console:
    """A guest's console. After `expect`, `before` is the text in front of the match,
    `after` the match, and `match` a re.Match or, after `expect_exact`, the string.

    Lines end with "\\r\\n", as pexpect's do on every terminal; in `text` they end with "\\n".
    """

    def __init__(
        self,
        transcript: Transcript,
        write: Callable[[bytes], None],
        why_ended: Callable[[], VMError],
    ) -> None:
        """`VM.console` is one. `why_ended` gives the error for a VM that has ended."""
        self._transcript = transcript
        self._write = write
        self._why_ended = why_ended
        self._spawn = _Spawn(transcript)
        self._lock = Lock()

    def expect(
        self, pattern: Pattern | Sequence[Pattern], timeout: float | None = TIMEOUT_SECONDS
    ) -> int:
        """Wait until the console shows `pattern`, or one of several; its index.

        `timeout` is in seconds, None for none. What was shown before is searched too, from behind
        the last match on. Raises VMTimeout, or the error for a VM that has ended, unless
        pexpect.TIMEOUT or pexpect.EOF is among the patterns.
        """
        return self._expect(self._spawn.expect, pattern, timeout)

    def expect_exact(
        self, pattern: Pattern | Sequence[Pattern], timeout: float | None = TIMEOUT_SECONDS
    ) -> int:
        """As `expect`, but patterns are plain strings."""
        return self._expect(self._spawn.expect_exact, pattern, timeout)

    def _expect(
        self,
        wait: Callable[..., int],
        pattern: Any,
        timeout: float | None,
    ) -> int:
        with self._lock:
            try:
                return wait(pattern, timeout=timeout)
            except TIMEOUT:
                wanted = getattr(pattern, "pattern", pattern)
                raise VMTimeout(
                    f"the console did not show {wanted!r:.200} within {timeout:g} s",
                    console=self.tail(),
                ) from None
            except EOF:
                raise self._why_ended() from None

    @property
    def before(self) -> Any:
        return self._spawn.before

    @property
    def after(self) -> Any:
        return self._spawn.after

    @property
    def match(self) -> Any:
        return self._spawn.match

    def send(self, text: str | bytes) -> None:
        """Type `text`."""
        self._write(text.encode() if isinstance(text, str) else text)

    def sendline(self, text: str | bytes = "") -> None:
        """Type `text`, and Enter."""
        self.send((text.encode() if isinstance(text, str) else text) + b"\n")

    def sendcontrol(self, key: str) -> None:
        """Type Ctrl and `key`, a letter or one of ``@[\\]^_``."""
        if not (len(key) == 1 and "@" <= key.upper() <= "_"):
            raise ValueError(f"there is no Ctrl-{key}")
        self.send(bytes([ord(key.upper()) - 64]))

    @property
    def text(self) -> str:
        """All that it has shown so far (of very much, the last 4 MiB)."""
        return self._transcript.text

    def tail(self, lines: int = TAIL_LINES) -> str:
        """The last lines of it."""
        return self._transcript.tail(lines)


class _Spawn(SpawnBase):  # type: ignore[misc]
    """pexpect's matching, on a transcript."""

    def __init__(self, transcript: Transcript) -> None:
        super().__init__(maxread=1 << 16, encoding="utf-8", codec_errors="replace")
        self.delayafterread = None
        self._transcript = transcript
        self._position = 0

    def read_nonblocking(self, size: int = 1, timeout: float | None = None) -> str:
        """As pexpect wants it."""
        try:
            data, self._position = self._transcript.read(self._position, size, timeout)
        except TimeoutError:
            raise TIMEOUT("") from None
        if not data:
            raise EOF("")
        text: str = self._decoder.decode(data, final=False)
        return text
