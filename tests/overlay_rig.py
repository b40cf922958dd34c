"""Shared by the tests of overlays: a record of what reaches the overlay's file."""

from __future__ import annotations

import pytest

from pyvmm.virtio.blk import overlay as overlay_module
from pyvmm.virtio.blk.backend import FileBackend


class Journal:
    """Everything that was written to the overlay's file and when it was synced, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[int, bytes] | None] = []  # None is a sync
        real_write, real_pages = FileBackend.writev, overlay_module.pwritev_all

        def writev(disk: FileBackend, views: list[memoryview], size: int, offset: int) -> None:
            real_write(disk, views, size, offset)
            self.steps.append((offset, b"".join(views)))

        def write_pages(fd: int, views: list[memoryview], offset: int) -> int:
            self.steps.append((offset, b"".join(views)))
            return real_pages(fd, views, offset)

        def flush(disk: FileBackend) -> None:
            self.steps.append(None)

        monkeypatch.setattr(FileBackend, "writev", writev)
        monkeypatch.setattr(FileBackend, "flush", flush)
        monkeypatch.setattr(overlay_module, "pwritev_all", write_pages)
