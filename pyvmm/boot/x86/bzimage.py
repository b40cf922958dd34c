"""Linux bzImage by the x86 64-bit boot protocol, or by the 32-bit one where a kernel has no more.

Source: Linux Documentation/arch/x86/boot.rst ("The Real-Mode Kernel Header", "Details of Header
Fields", "32-bit Boot Protocol", "64-bit Boot Protocol"). The real-mode part of the file is never
run: its header is copied into the zero page, the protected-mode part is loaded, and the vCPU starts
at its 64-bit or 32-bit entry. Not only Linux comes in this format: memtest86+, for one.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.x86 import boot_params, layout
from pyvmm.boot.x86.placement import check_kernel_fits
from pyvmm.errors import how_many
from pyvmm.memory import GuestMemory

SECTOR = 512
HEADER_BYTES = 0x290  # as much of the file as may hold a header
PARAGRAPH = 16
MIN_VERSION = 0x0206  # the first with cmdline_size; Linux 2.6.22
_PREF_ADDRESS_VERSION = 0x020A  # and init_size
_XLOADFLAGS_VERSION = 0x020C
_HEADER_END_MIN = 0x23C  # of MIN_VERSION
XLF_KERNEL_64 = 1 << 0
ENTRY_64 = 0x200  # startup_64, from the load address
_KERNEL_VERSION_MAX = 256


class BzImage(NamedTuple):
    """A checked bzImage header. Sizes and offsets in bytes."""

    version: int  # of the boot protocol, 0x020f for 2.15
    header: bytes  # the setup header, from offset 0x1f1 on, for the zero page
    setup_size: int  # real-mode part: boot sector and setup
    code_size: int  # protected-mode part, which follows it
    load_addr: int
    init_size: int  # memory that the kernel needs from its load address on
    initrd_addr_max: int
    cmdline_max: int  # without the NUL
    payload_offset: int  # in the protected-mode part
    payload_length: int
    kernel_version: str
    has_64bit_entry: bool

    @property
    def end(self) -> int:
        """The first address past what the kernel needs while it starts."""
        return self.load_addr + max(self.init_size, self.code_size)


def parse(kernel: ImageFile) -> BzImage:
    """Check the header of `kernel`. Raises ConfigError for whatever cannot be booted."""
    head = kernel.read(0, HEADER_BYTES)
    head = head.ljust(HEADER_BYTES, b"\0")
    if head[boot_params.HEADER_MAGIC :][:4] != boot_params.HDRS:
        raise kernel.error(f"{kernel.path} is not a bzImage: it has no HdrS signature")
    version = _u16(head, boot_params.VERSION)
    _check_protocol(kernel, head, version)
    end = _header_end(kernel, head)
    fields = head[:end].ljust(HEADER_BYTES, b"\0")  # what follows the header is code, not fields
    sectors = fields[boot_params.HDR] or 4  # boot.rst: 0 stands for 4
    setup_size = (sectors + 1) * SECTOR
    has_64bit_entry = bool(version >= _XLOADFLAGS_VERSION and _u16(fields, 0x236) & XLF_KERNEL_64)
    has_pref_address = version >= _PREF_ADDRESS_VERSION
    return BzImage(
        version=version,
        header=fields[boot_params.HDR : end],
        setup_size=setup_size,
        code_size=_code_size(kernel, fields, setup_size),
        load_addr=_load_addr(kernel, fields, has_pref_address),
        init_size=_u32(fields, 0x260) if has_pref_address else 0,
        initrd_addr_max=_u32(fields, 0x22C),
        cmdline_max=min(_u32(fields, boot_params.CMDLINE_SIZE), layout.CMDLINE_SIZE - 1),
        payload_offset=_u32(fields, 0x248),
        payload_length=_u32(fields, 0x24C),
        kernel_version=_kernel_version(kernel, fields),
        has_64bit_entry=has_64bit_entry,
    )


def load(memory: GuestMemory, kernel: ImageFile, image: BzImage) -> None:
    """Read the protected-mode part to its load address. Raises ConfigError if RAM is too small."""
    check_kernel_fits(memory, kernel, image.end)
    kernel.read_into(memory.view(image.load_addr, image.code_size), image.setup_size)


def _check_protocol(kernel: ImageFile, head: bytes, version: int) -> None:
    said = f"{version >> 8}.{version & 0xFF:02}"
    if version < MIN_VERSION:
        raise kernel.error(
            f"{kernel.path} speaks boot protocol {said}, 2.06 is the oldest that is understood",
            "use a kernel of Linux 2.6.22 or later",
        )
    if not head[boot_params.LOADFLAGS] & boot_params.LOADED_HIGH:
        raise kernel.error(f"{kernel.path} is a zImage", "build a bzImage")


def _header_end(kernel: ImageFile, head: bytes) -> int:
    # boot.rst: the byte before the signature is the operand of a jump over the header.
    end = 0x202 + head[0x201]
    if not _HEADER_END_MIN <= end <= boot_params.HDR_END:
        raise kernel.error(f"{kernel.path} is damaged: its setup header ends at {end:#x}")
    return end


def _code_size(kernel: ImageFile, head: bytes, setup_size: int) -> int:
    said = _u32(head, 0x1F4) * PARAGRAPH
    if said <= ENTRY_64:
        raise kernel.error(f"{kernel.path} is damaged: its header says that it has no kernel in it")
    # syssize counts paragraphs, so that the last of them need not be whole in the file.
    if kernel.size <= setup_size + said - PARAGRAPH:
        raise kernel.error(
            f"{kernel.path} is truncated: it has {how_many(kernel.size, 'byte')}, "
            f"its header says {setup_size + said}",
            "copy or build it again",
        )
    return min(said, kernel.size - setup_size)


def _load_addr(kernel: ImageFile, head: bytes, has_pref_address: bool) -> int:
    preferred = layout.HIGH_RAM  # where every older bzImage is loaded
    if has_pref_address:
        preferred = struct.unpack_from("<Q", head, 0x258)[0]
    alignment = _u32(head, boot_params.KERNEL_ALIGNMENT)
    if not head[0x234]:  # relocatable_kernel
        if preferred < layout.HIGH_RAM:
            raise kernel.error(
                f"{kernel.path} can only run at {preferred:#x}, below 1 MiB",
                "use a kernel with CONFIG_RELOCATABLE",
            )
        return int(preferred)
    if not alignment or alignment & (alignment - 1):
        raise kernel.error(f"{kernel.path} is damaged: kernel_alignment is {alignment:#x}")
    # Below pref_address there is nothing to gain: the kernel would move itself up to it.
    start = max(preferred, layout.HIGH_RAM)
    return int(-(-start // alignment) * alignment)


def _kernel_version(kernel: ImageFile, head: bytes) -> str:
    offset = _u16(head, 0x20E)
    if not offset:
        return ""
    text = kernel.read(offset + SECTOR, _KERNEL_VERSION_MAX).partition(b"\0")[0]
    return text.decode("ascii", "replace")


def _u16(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 2], "little")


def _u32(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little")
