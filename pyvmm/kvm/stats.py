"""KVM's own counters: binary statistics (KVM API, 4.133 KVM_GET_STATS_FD).

The file describes itself: a header, a descriptor for each statistic, then the values. So what a
newer kernel counts shows without a line changed here.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from pyvmm.errors import HostError
from pyvmm.host import syscalls
from pyvmm.kvm import uapi

# struct kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset
_HEADER = struct.Struct("=6I")
# struct kvm_stats_desc up to its name: flags, exponent, size, offset, bucket_size
_DESC = struct.Struct("=IhHII")

Values = dict[str, int | list[int]]


class _Description(NamedTuple):
    name: str
    numbers: int  # of 64-bit numbers: more than one is a histogram
    offset: int


class StatsFile(syscalls.Closable):
    """The statistics of a VM or a vCPU. They can still be read when that is closed."""

    def __init__(self, owner: int) -> None:
        """`owner` is the VM's or vCPU's descriptor; a vCPU must not run yet, as KVM would wait
        until it leaves the guest. Raises HostError (ENOTTY: an old kernel)."""
        self._fd = syscalls.ioctl(owner, uapi.KVM_GET_STATS_FD, 0, "KVM_GET_STATS_FD")
        self._layout: tuple[list[_Description], int, int] | None = None  # read when asked

    def _describe(self) -> tuple[list[_Description], int, int]:
        header = self._read(_HEADER.size, 0)
        _, name_size, number, _, desc_offset, data_offset = _HEADER.unpack(header)
        step = _DESC.size + name_size
        raw = self._read(step * number, desc_offset)
        found = []
        end = 0
        for place in range(0, len(raw), step):
            _, _, count, offset, _ = _DESC.unpack_from(raw, place)
            name = raw[place + _DESC.size : place + step].split(b"\0", 1)[0].decode()
            found.append(_Description(name, count, offset))
            end = max(end, offset + 8 * count)
        return found, data_offset, end

    def _read(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise HostError(error.errno or 0, "read of KVM's statistics") from None

    def read(self) -> Values:
        """All statistics by KVM's names, now. Raises HostError."""
        if self._layout is None:
            self._layout = self._describe()
        descriptions, start, size = self._layout
        data = memoryview(self._read(size, start)).cast("Q")
        values: Values = {}
        for name, count, offset in descriptions:
            first = offset // 8
            values[name] = data[first] if count == 1 else data[first : first + count].tolist()
        return values

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
