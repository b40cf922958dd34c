"""A disk as Debian's cloud images are, of Debian's own packages: for tests, as none of these images
is in Debian's archive.

    python tests/guest/cloud_image.py FILE     # a qcow2 image, in three minutes

Its table, packages and settings are those of the Debian cloud team's class for bookworm and amd64
(salsa.debian.org/cloud-team/debian-cloud-images, config_space): partition 1 is the root, 14 the
BIOS boot partition, 15 that of EFI; cloud-init sets up a network by systemd-networkd. GRUB is
there, and its own grub-mkconfig has written grub.cfg, but it is not in any boot sector.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from partition_tables import MIB, SECTOR, partitioned, put_bytes, run

from pyvmm.images import apt_sources, rootfs

RELEASE = "bookworm"
PACKAGES = (
    *("linux-image-cloud-amd64", "apparmor", "grub-cloud-amd64", "init", "udev", "dbus"),
    *("cloud-init", "cloud-guest-utils", "cloud-initramfs-growroot", "libpam-systemd"),
    *("openssh-server", "sudo", "chrony", "iproute2", "iputils-ping", "isc-dhcp-client"),
    *("less", "logrotate", "netbase", "nftables", "kmod", "zstd"),
)
_ESP_START, _ROOT_START, _ROOT_SIZE = 8192, 262144, 1900 * MIB  # the starts in sectors
_TABLE = f"""label: gpt
1 : start={_ROOT_START}, size={_ROOT_SIZE // SECTOR}, type=0FC63DAF-8483-4772-8E79-3D69D8477DE4
14 : start=2048, size=6144, type=21686148-6449-6E6F-744E-656564454649
15 : start={_ESP_START}, size=253952, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B
"""
# What grub-mkconfig wants to know of a device that is not there yet.
_PROBE = """#!/bin/sh
while [ $# -gt 0 ]; do
    case $1 in -t) target=$2 ;; --target=*) target=${1#--target=} ;; esac
    shift
done
case $target in
    device) echo /dev/vda1 ;;
    fs_uuid) echo ROOT ;;
    fs) echo ext2 ;;
    partmap) echo gpt ;;
esac
"""
_SETTLE = """set -eu
root=$1
cat > "$root/etc/fstab" <<END
# /etc/fstab: static file system information
UUID=ROOT / ext4 rw,discard,errors=remount-ro,x-systemd.growfs 0 1
UUID=ESP /boot/efi vfat defaults 0 0
END
mkdir -p "$root/boot/efi" "$root/boot/grub" "$root/etc/default/grub.d"
echo GRUB_TIMEOUT=0 > "$root/etc/default/grub.d/15_timeout.cfg"
echo 'manage_etc_hosts: true' > "$root/etc/cloud/cloud.cfg.d/01_debian_cloud.cfg"
echo LANG=C.UTF-8 > "$root/etc/default/locale"
echo localhost > "$root/etc/hostname"
: > "$root/etc/machine-id"
chroot "$root" systemctl enable systemd-networkd
mv "$root/usr/sbin/grub-probe" "$root/usr/sbin/grub-probe.own"
cat "$PROBE" > "$root/usr/sbin/grub-probe"
chmod 755 "$root/usr/sbin/grub-probe"
mkdir -p "$root/dev/disk/by-uuid"
: > "$root/dev/disk/by-uuid/ROOT"
chroot "$root" grub-mkconfig -o /boot/grub/grub.cfg
rm -r "$root/dev/disk"
mv "$root/usr/sbin/grub-probe.own" "$root/usr/sbin/grub-probe"
"""
_MAKE_ROOT = """mkdir "$ROOM/root"
tar -C "$ROOM/root" --numeric-owner -xpf "$ROOM/root.tar"
truncate -s "$SIZE" "$ROOM/part"
mke2fs -q -t ext4 -U "$UUID" -E lazy_itable_init=0,lazy_journal_init=0 -d "$ROOM/root" "$ROOM/part"
mkdir -p "$ROOM/efi/boot" "$ROOM/efi/debian"
cp "$ROOM/root/usr/lib/shim/shimx64.efi.signed" "$ROOM/efi/boot/bootx64.efi"
cp "$ROOM/root/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed" "$ROOM/efi/debian/grubx64.efi"
chmod -R u+rwX "$ROOM/root"
"""
_EFI_GRUB = """search.fs_uuid {root} root
set prefix=($root)'/boot/grub'
configfile $prefix/grub.cfg
"""


def make(target: Path) -> None:
    """Write the image, qcow2, to `target`. Raises CalledProcessError, ConfigError."""
    root, esp = str(uuid.uuid4()), uuid.uuid4().hex[:8].upper()

    def filled(text: str) -> str:
        return text.replace("ROOT", root).replace("ESP", f"{esp[:4]}-{esp[4:]}")

    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        room = Path(folder)
        (room / "probe").write_text(filled(_PROBE))
        (room / "settle").write_text(f"PROBE={shlex.quote(str(room / 'probe'))}\n{filled(_SETTLE)}")
        suites = (RELEASE, f"{RELEASE}-updates", f"{RELEASE}-security")
        sources = apt_sources.derive(
            apt_sources.machine_sources(), suites, os.environ.get(apt_sources.MIRROR_VARIABLE, "")
        )
        (room / "sources.list").write_text(apt_sources.render(sources))
        mode = rootfs._mode()  # as the images of the project are made
        subprocess.run(
            [
                *("mmdebstrap", f"--mode={mode}", "--variant=minbase", "--architectures=amd64"),
                f"--include={','.join(PACKAGES)}",
                f'--customize-hook=sh {shlex.quote(str(room / "settle"))} "$1"',
                *(RELEASE, str(room / "root.tar"), str(room / "sources.list")),
            ],
            env={**os.environ, "LC_ALL": "C", **({"TMPDIR": folder} if os.geteuid() == 0 else {})},
            stdin=subprocess.DEVNULL,
            check=True,
        )
        values = {"ROOM": folder, "UUID": root, "SIZE": str(_ROOT_SIZE)}
        fake = [] if os.geteuid() == 0 else ["fakeroot"]
        subprocess.run(
            [*fake, "sh", "-euc", _MAKE_ROOT],
            env={**os.environ, **values, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
            check=True,
        )
        disk = partitioned(room / "disk", _TABLE, size=_ROOT_START * SECTOR + _ROOT_SIZE + MIB)
        put_bytes(disk, _ROOT_START * SECTOR, room / "part")
        _put_esp(disk, room, root, esp)
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, target)


def _put_esp(disk: Path, room: Path, root: str, esp: str) -> None:
    (room / "efi/debian/grub.cfg").write_text(_EFI_GRUB.format(root=root))
    part = room / "esp"
    with open(part, "wb") as file:
        file.truncate(253952 * SECTOR)
    run("mkfs.vfat", "-i", esp, part)
    run("mcopy", "-s", "-i", part, room / "efi", "::EFI")
    put_bytes(disk, _ESP_START * SECTOR, part)


if __name__ == "__main__":
    make(Path(sys.argv[1]).absolute())
