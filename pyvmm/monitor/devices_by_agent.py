"""What a guest does with its devices, as its agent finds and does it. What the agent says is the
guest's word: bounded, and made printable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.machine.machine import Machine
from pyvmm.monitor.guest_agent import agent_at, vsock_of

_AGENT_SECONDS = 5.0
_MOST_SAID = 1 << 16  # bytes of its answer
_MOST_WORDS = 200  # bytes of what a guest says of a device that it uses

# $1 is the PCI function, $2 the tag of a shared directory, if it is one. Says what it is used for,
# and ends with 3 then.
_USED_FOR = """\
while [ "$2" ] && read -r id parent device root place rest; do
    case "$rest" in
    *" - virtiofs $2 "*) echo "it is mounted at $place"; exit 3 ;;
    esac
done < /proc/self/mountinfo
for disk in /sys/bus/pci/devices/"$1"/virtio*/block/*; do
    for part in "$disk" "$disk"/*; do
        [ -r "$part/dev" ] || continue
        name=${part##*/}
        read -r number < "$part/dev"
        while read -r id parent device root place rest; do
            case "$device $rest" in
            "$number "*|*" - "*" /dev/$name "*) echo "$name is mounted at $place"; exit 3 ;;
            esac
        done < /proc/self/mountinfo
        while read -r file rest; do
            [ "$file" != "/dev/$name" ] || { echo "$name is swap space"; exit 3; }
        done < /proc/swaps
        for holder in "$part"/holders/*; do
            [ ! -e "$holder" ] || { echo "$name is part of ${holder##*/}"; exit 3; }
        done
    done
done
"""
_IN_USE = 3
# Mounts the shared directory $1 at $2 with the options $3, once its driver knows the tag.
_MOUNT = """\
mkdir -p "$2" || exit
step=0
until said=$(mount -t virtiofs -o "$3" "$1" "$2" 2>&1); do
    step=$((step + 1))
    [ $step -lt 60 ] || { echo "$said"; exit 1; }
    sleep 0.2
done
"""
_DRIVER_SECONDS = 25.0  # for a driver that is not loaded yet, in a guest that is slow
_MOUNT_SECONDS = 60.0


def use_of(machine: Machine, number: int, tag: str) -> str:
    """The use of the device in slot `number`, a shared directory if it has a `tag`, as the guest's
    agent tells it; "" if it is unused, or if no agent answers."""
    vsock = vsock_of(machine)
    if vsock is None:
        return ""
    from pyvmm.agent.session import printable

    argv = ["/bin/sh", "-c", _USED_FOR, "sh", f"0000:00:{number:02x}.0", tag]
    try:
        agent = agent_at(vsock, _AGENT_SECONDS)
        done = agent.run(argv, timeout=_AGENT_SECONDS, most=_MOST_SAID)
    except (PyvmmError, OSError):
        return ""
    if done.returncode != _IN_USE:
        return ""
    return printable(done.stdout.strip()[:_MOST_WORDS]) or "it does not say what for"


def mount(machine: Machine, share: Any, name: str, wait: Callable[[float], dict[str, Any]]) -> None:
    """Have the guest's agent mount the shared directory `share`, which is the device `name`. `wait`
    waits for its driver, so many seconds (Hotplug.wait_for_driver). Raises ConfigError if that does
    not succeed."""
    from pyvmm.agent.session import printable

    mode = "ro" if share.read_only else "rw"
    argv = ["/bin/sh", "-c", _MOUNT, "sh", share.tag, share.mountpoint, mode]
    vsock = vsock_of(machine)
    try:
        if vsock is None:
            raise ConfigError("it has no agent, as it has no --vsock")
        found = wait(_DRIVER_SECONDS)
        if not found["taken"]:
            raise ConfigError(found["why"] or "its kernel has no virtiofs driver")
        agent = agent_at(vsock, _AGENT_SECONDS)
        done = agent.run(argv, timeout=_MOUNT_SECONDS, most=_MOST_SAID)
    except (PyvmmError, OSError) as error:
        why = str(error)
    else:
        if not done.returncode:
            return
        why = printable(b" ".join((done.stdout + done.stderr)[:_MOST_WORDS].split()))
    raise ConfigError(
        f"{name} is plugged in, but the guest has not mounted it: {why}",
        cure=f"mount it there: mount -t virtiofs {share.tag} {share.mountpoint}",
    )
