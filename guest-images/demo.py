"""`make demo` and `make shell`: boot Debian from its root disk with `pyvmm run`.

The demo boots twice. The first guest writes a token to its root disk, syncs and powers off; the
second reads it back. Ends with 0 only if it is the same. With `--arch arm64` it is a guest for
arm64, in an emulated machine of that kind.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import subprocess
import sys

from pyvmm import images
from pyvmm.errors import PyvmmError
from pyvmm.images import bootable
from pyvmm.spec.vm import ARCHITECTURES

FIRST = """
echo "  kernel:      $(uname -sr), $(nproc) CPU"
echo "  system:      $(. /etc/os-release; echo $PRETTY_NAME)"
echo "  root device: $(findmnt -no SOURCE,FSTYPE,SIZE / 2>/dev/null || grep ' / ' /proc/mounts)"
echo "  its driver:  $(readlink -f /sys/block/vda/device/driver | sed 's|.*/||'), serial \
$(cat /sys/block/vda/serial), on $(readlink -f /sys/block/vda/device/.. | sed 's|.*/||')"
echo {token} > /root/token && sync && echo "  wrote /root/token: $(cat /root/token)"
"""

SECOND = """
echo "  read /root/token: $(cat /root/token)"
"""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shell", action="store_true")
    parser.add_argument("--arch", choices=ARCHITECTURES)
    asked = parser.parse_args()
    shell, arch = asked.shell, bootable.arch_of_kernel(asked.arch or "")
    try:
        if arch:
            bootfiles = ["--arch", arch]
        else:
            files = images.artifacts(make=True)
            bootfiles = ["--kernel", files.bzimage, "--initrd", files.initramfs]
        os.makedirs("build", exist_ok=True)
        name = ("shell" if shell else "demo") + (f"-{arch}" if arch else "")
        disk = os.path.abspath(os.path.join("build", f"{name}.img"))
        if not (shell and os.path.exists(disk)):
            images.fresh_disk(disk, arch or images.DEFAULT_VARIANT, make=True)
    except (PyvmmError, OSError) as error:
        print(f"pyvmm: {error}", file=sys.stderr)
        return 1
    command = [os.path.join(os.path.dirname(sys.executable), "pyvmm"), "run"]
    command += [*bootfiles, "--disk", disk]
    if shell:
        say(f"$ {shlex.join(command)}")
        say("A root shell in Debian. 'exit' powers off, Ctrl-A x cuts the power, Ctrl-A h helps.")
        say(f"The disk is {disk}; it keeps what you change.")
        os.execv(command[0], command)
    return demo(command)


def demo(command: list[str]) -> int:
    token = secrets.token_hex(8)
    say("First boot: a Debian kernel mounts its root disk through our virtio-blk.")
    if boot(command, FIRST.format(token=token)) is None:
        return 1
    say("Second boot, from the same disk:")
    console = boot(command, SECOND)
    if console is None:
        return 1
    if f"read /root/token: {token}" not in console:
        say(f"FAILED: the second guest did not read {token} back.")
        return 1
    say(f"The second guest read back what the first one wrote: {token}. Both powered off cleanly.")
    say("Next: `make shell` for a shell of your own, `make test` for the tests.")
    return 0


def boot(command: list[str], script: str) -> str | None:
    """Run a guest with `script`; its console, which is also shown, or None if it failed."""
    say(f"$ {shlex.join(command)}")
    guest = subprocess.Popen(
        [*command, "--cmdline", images.exec_argument(script)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert guest.stdout is not None
    console = ""
    for line in guest.stdout:
        console += line
        print(f"  | {line.rstrip()}", flush=True)
    code = guest.wait()
    if code != 0 or "pyvmm: exit 0" not in console:
        say(f"FAILED: pyvmm run ended with {code}.")
        return None
    return console


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # Ctrl-C; the guest has had it too
        sys.exit(130)
