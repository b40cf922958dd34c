"""A disk that is a function of the sector's number: what docs/tutorial/03-a-disk.md builds.

pyvmm run … --disk examples/squares.py:Squares
"""

from pyvmm.virtio.blk.backend import Backend, scatter


class Squares(Backend):
    """Sector n, of 512 bytes, says what n times n is."""

    read_only = True

    def __init__(self, sectors: int = 2048) -> None:
        self.size_sectors = sectors

    def readv(self, views: list[memoryview], size: int, offset: int) -> None:
        numbers = range(offset // 512, (offset + size) // 512)
        text = (f"{n} x {n} = {n * n}\n".encode().ljust(512, b"\0") for n in numbers)
        scatter(b"".join(text), views)
