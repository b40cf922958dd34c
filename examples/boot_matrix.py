"""Boots the guest kernels given (or Debian's default one) side by side and shows what each says:

python examples/boot_matrix.py 6.1 6.12
"""

from __future__ import annotations

import asyncio
import sys

from pyvmm import AsyncVM, Disk, PyvmmError, images


async def boot(kernel: str) -> str:
    """Boot `kernel`; return what it says of itself, or what went wrong, in one line."""
    files = images.artifacts(kernel, make=True)
    disk = Disk(files.rootfs, snapshot=True)
    name = f"kernel-{kernel}"
    try:
        async with AsyncVM(
            kernel=files.vmlinux, initrd=files.initramfs, disks=disk, name=name
        ) as vm:
            await vm.wait_ready()
            version = (await vm.run(["uname", "-rv"], check=True)).stdout.decode().strip()
            clock = await vm.clock()
            return f"{version}, up for {clock.uptime:.1f} s"
    except PyvmmError as error:
        return str(error)


async def main(kernels: list[str]) -> None:
    for kernel, said in zip(kernels, await asyncio.gather(*map(boot, kernels)), strict=True):
        print(f"{kernel}: {said}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:] or [images.DEFAULT_KERNEL]))
