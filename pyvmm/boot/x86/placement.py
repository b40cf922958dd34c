"""The initrd's place: as high as kernel and RAM allow, out of the kernel's way."""

from __future__ import annotations

from pyvmm.boot.image_file import ImageFile
from pyvmm.boot.x86 import layout
from pyvmm.errors import ConfigError
from pyvmm.memory import GuestMemory

_PAGE = 0x1000


def mib(size: int) -> str:
    """`size` bytes in words, whole MiB rounded up, or KiB below one."""
    if size < layout.MIB:
        return f"{-(-size // 1024)} KiB"
    return f"{-(-size // layout.MIB)} MiB"


def check_kernel_fits(memory: GuestMemory, kernel: ImageFile, end: int) -> None:
    """Raise ConfigError unless a kernel that needs RAM up to guest-physical `end` has it."""
    low = memory.regions[0].end
    if end <= low:
        return
    if end > layout.HOLE_START:
        raise kernel.error(
            f"{kernel.path} wants memory up to {end:#x}, past the {mib(layout.HOLE_START)} of RAM "
            "that any guest has below 4 GiB",
            "is the file damaged?",
        )
    raise kernel.error(
        f"{kernel.path} needs {mib(end)} of memory to start, the guest has {mib(low)}",
        f"give it --memory {_memory_for(end)} or more",
    )


def load_initrd(
    memory: GuestMemory,
    initrd: ImageFile,
    *,
    kernel: tuple[int, int],
    addr_max: int,
) -> tuple[int, int]:
    """Read the initrd into guest RAM; (address, bytes).

    `kernel` is (start, end) of what the kernel needs while it starts; `addr_max` is the highest
    address that a byte of the initrd may have. It goes above the kernel, or in a small guest
    between 1 MiB and the kernel. Raises ConfigError, naming sizes, if it fits nowhere.
    """
    top = min(addr_max + 1, memory.regions[0].end)
    above = (top - initrd.size) & -_PAGE
    below = (min(kernel[0], top) - initrd.size) & -_PAGE
    if above >= kernel[1]:
        start = above
    elif below >= layout.HIGH_RAM:
        start = below
    else:
        raise _does_not_fit(memory, initrd, kernel, addr_max)
    initrd.read_into(memory.view(start, initrd.size), 0)
    return start, initrd.size


def _does_not_fit(
    memory: GuestMemory, initrd: ImageFile, kernel: tuple[int, int], addr_max: int
) -> ConfigError:
    low = memory.regions[0].end
    needed = -(-kernel[1] // _PAGE) * _PAGE + initrd.size + _PAGE
    limit = min(addr_max + 1, layout.HOLE_START)
    text = (
        f"{initrd.path} has {mib(initrd.size)} ({initrd.size} bytes), and the kernel takes the "
        f"memory from {mib(kernel[0])} to {mib(kernel[1])}"
    )
    if needed > limit:
        return initrd.error(
            f"{text}; no initrd may lie above {limit:#x} ({mib(limit)})", "use a smaller one"
        )
    return initrd.error(
        f"{text}; the guest has {mib(low)}", f"give it --memory {_memory_for(needed)} or more"
    )


def _memory_for(needed: int) -> str:
    return f"{-(-needed // layout.MIB)}M"
