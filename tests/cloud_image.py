"""A disk like Debian's cloud image, made of Debian's packages, since no package has the image.

    sudo python tests/cloud_image.py TARGET.img
    pyvmm run --kernel disk --disk TARGET.img,snapshot --disk TARGET.img.seed,readonly --memory 1G

It has what the generic cloud image has, as far as a boot goes: a GPT with the root as partition 1,
a BIOS boot partition 14 and an EFI system partition 15; Debian's cloud kernel and its own initrd;
a grub.cfg by update-grub; systemd, networkd, OpenSSH and cloud-init. The seed is cloud-init's
(NoCloud): it prints a line and powers off. Needs root, loop devices, mmdebstrap, sfdisk and
mkfs.vfat, and a mirror. A tool, run by hand; no test needs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

SECTOR, MIB = 512, 1 << 20
SIZE = 2048 * MIB
ROOT = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"
ESP = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
BIOS = "21686148-6449-6E6F-744E-656564454649"
ROOT_START = 262144  # sectors, as in Debian's image
TABLE = f"""label: gpt
1 : start={ROOT_START}, type={ROOT}
14 : start=2048, size=6144, type={BIOS}
15 : start=8192, size=253952, type={ESP}
"""
PACKAGES = (
    "linux-image-cloud-amd64,grub-cloud-amd64,cloud-init,cloud-guest-utils,netplan.io,"
    "systemd-sysv,dbus,libpam-systemd,openssh-server,ca-certificates,iproute2,sudo"
)
META_DATA = "instance-id: one\nlocal-hostname: cloudy\n"
USER_DATA = """#cloud-config
output: {all: "| tee -a /dev/ttyS0"}
runcmd:
  - [sh, -c, "echo cloud-init is done on $(findmnt -no SOURCE,FSTYPE /) > /dev/ttyS0"]
power_state: {mode: poweroff}
"""


def run(*command: str | Path, text: str | None = None) -> str:
    done = subprocess.run(
        [str(word) for word in command], input=text, text=True, check=True, stdout=subprocess.PIPE
    )
    return done.stdout.strip()


@contextmanager
def loop(image: Path, start: int, size: int) -> Iterator[str]:
    """A loop device on a part of `image`."""
    device = run(
        *("losetup", "--find", "--show", "--offset", str(start), "--sizelimit", str(size), image)
    )
    try:
        yield device
    finally:
        run("losetup", "--detach", device)


@contextmanager
def mounted(*words: str | Path) -> Iterator[None]:
    run("mount", *words)
    try:
        yield
    finally:
        run("umount", words[-1])


def make(image: Path) -> None:
    """Make the disk and its seed."""
    with open(image, "wb") as file:
        file.truncate(SIZE)
    run("sfdisk", "--quiet", image, text=TABLE)
    start = ROOT_START * SECTOR
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root = stack.enter_context(loop(image, start, SIZE - start - MIB))
        esp = stack.enter_context(loop(image, 8192 * SECTOR, 253952 * SECTOR))
        run("mkfs.ext4", "-q", root)
        run("mkfs.vfat", "-n", "ESP", esp)
        stack.enter_context(mounted(root, folder))
        release = os.environ.get("RELEASE", "bookworm")
        run("mmdebstrap", "--quiet", "--mode=root", f"--include={PACKAGES}", release, folder)
        (folder / "boot/efi").mkdir(exist_ok=True)  # where the EFI system partition goes: empty
        uuid = run("blkid", "-s", "UUID", "-o", "value", root)
        esp_uuid = run("blkid", "-s", "UUID", "-o", "value", esp)
        (folder / "etc/fstab").write_text(
            f"UUID={uuid} / ext4 rw,discard,errors=remount-ro 0 1\n"
            f"UUID={esp_uuid} /boot/efi vfat defaults 0 0\n"
        )
        stack.enter_context(mounted("-t", "proc", "proc", folder / "proc"))
        stack.enter_context(mounted("-t", "sysfs", "sysfs", folder / "sys"))
        stack.enter_context(mounted("-t", "tmpfs", "tmpfs", folder / "dev"))
        run("cp", "-a", "/dev/null", "/dev/urandom", root, esp, folder / "dev")
        (folder / "dev/disk/by-uuid").mkdir(parents=True)
        (folder / "dev/disk/by-uuid" / uuid).symlink_to(root)
        run("chroot", folder, "update-grub")
    seed = Path(f"{image}.seed")
    with open(seed, "wb") as file:
        file.truncate(4 * MIB)
    run("mkfs.vfat", "-n", "CIDATA", seed)
    with tempfile.TemporaryDirectory() as place:
        for name, text in (("meta-data", META_DATA), ("user-data", USER_DATA)):
            (Path(place) / name).write_text(text)
            run("mcopy", "-i", seed, Path(place) / name, "::")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
