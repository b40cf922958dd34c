"""A root disk: Debian's minbase and some packages, as an ext4 file system without partitions.

mmdebstrap makes a tar archive of it, which needs no privileges; `mke2fs -d` makes the file system
from the unpacked archive, under fakeroot where we are not root so that the files belong to root.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pyvmm.errors import ConfigError
from pyvmm.images import apt, cache, foreign_rootfs, tools
from pyvmm.images.lock import Pin
from pyvmm.images.progress import Progress
from pyvmm.images.recipes import Recipes

FILE = "rootfs.ext4"
LABEL = "pyvmm-root"

# Root file system → ext4, in one process so that one fakeroot sees both the owners and the reader.
# No lazy initialisation: the guest's kernel would write to the disk behind the user's back.
_MAKE_DISK = """
mkdir "$ROOM/root"
tar -C "$ROOM/root" --numeric-owner -xpf "$ROOM/root.tar"
"$CUSTOMIZE" "$VARIANT" "$ROOM/root" "$AGENT"
chmod 755 "$ROOM/root"
mke2fs -q -t ext4 -L "$LABEL" -m 0 -E lazy_itable_init=0,lazy_journal_init=0 \
    -d "$ROOM/root" "$DISK" "${SIZE}M"
chmod -R u+rwX "$ROOM/root"
"""


# A hook of mmdebstrap's; its first line with an E: is what the user gets to see.
_RUN_SCRIPT = """chmod 700 "$1/pyvmm-script"
said=$(chroot "$1" /pyvmm-script 2>&1) || {
    code=$?
    echo "E: --script ended with $code: $(printf '%s' "$said" | tail -n 1)" >&2
    exit 1
}"""


@dataclass(frozen=True)
class Plan:
    """The parts of a root disk. `name` is for messages, `size` in MiB, `variant` what customize
    is told, `agent` the path of the guest's agent. With `pins` exactly their versions are
    installed, without them the mirror's newest. `architecture` is Debian's name of it.

    `additions`, a tar archive, is unpacked in it, then `script` is run in it; both are paths.
    """

    name: str
    release: str
    packages: Sequence[str]
    size: int
    variant: str
    agent: str
    pins: Sequence[Pin] = ()
    additions: str = ""
    script: str = ""
    architecture: str = "amd64"


def plan(variant: str, recipes: Recipes, agent: str, pins: Sequence[Pin]) -> Plan:
    """The plan for a recipe's root disk."""
    recipe = recipes.rootfs[variant]
    return Plan(
        *(f"rootfs-{variant}", recipes.release, recipe.packages, recipe.size, variant, agent, pins),
        architecture=recipe.architecture,
    )


def build(
    plan: Plan,
    recipes: Recipes,
    client: apt.Apt,
    into: str,
    progress: Progress,
    machine: foreign_rootfs.Machine | None = None,
) -> list[tuple[str, str]]:
    """Write `into`/rootfs.ext4; the (package, version) pairs that are in it. `machine` configures
    the packages, where they are of another architecture. Raises ConfigError."""
    with cache.workspace() as room:
        if machine is not None:
            script = recipes.file("rootfs", foreign_rootfs.SCRIPT)
            wanted = _for_machine(plan, client)
            foreign_rootfs.build(wanted, machine, client, script, room, progress)
        else:
            with progress.step(f"{plan.name}: installing Debian {plan.release} (mmdebstrap)"):
                _bootstrap(plan, client, room)
        with progress.step(f"{plan.name}: making the ext4 file system"):
            _make_disk(plan, recipes, room, os.path.join(into, FILE))
        with open(os.path.join(room, "packages"), encoding="utf-8") as file:
            return [(words[0], words[1]) for line in file if (words := line.split())]


def _for_machine(plan: Plan, client: apt.Apt) -> foreign_rootfs.Wanted:
    """The packages that mmdebstrap would install, all of them by name."""
    pins = plan.pins or client.minbase(plan.packages, plan.release)
    return foreign_rootfs.Wanted(
        *(plan.name, plan.architecture, pins, plan.size, plan.additions, plan.script)
    )


def _bootstrap(plan: Plan, client: apt.Apt, room: str) -> None:
    preferences = os.path.join(room, "preferences")
    with open(preferences, "w", encoding="utf-8") as file:
        file.write(apt_preferences(plan.pins))
    command = [
        "mmdebstrap",
        f"--mode={_mode()}",
        "--variant=minbase",
        "--architectures=amd64",
        f"--include={','.join(plan.packages)}",
        f"--aptopt={client.settings}",
        f"--setup-hook=upload {shlex.quote(preferences)} /etc/apt/preferences.d/99pyvmm",
        *(f"--customize-hook={hook}" for hook in _own_hooks(plan)),
        "--customize-hook=chroot \"$1\" dpkg-query -W -f '${Package} ${Version}\\n' > "
        '"$1/packages"',
        f"--customize-hook=download /packages {shlex.quote(room)}/packages",
        '--customize-hook=rm "$1/packages"',
        plan.release,
        f"{room}/root.tar",
        client.sources,
    ]
    # SOURCE_DATE_EPOCH: no file is younger than the pins, so two builds are alike.
    environment = {"SOURCE_DATE_EPOCH": "1700000000"}
    if os.geteuid() == 0:
        environment["TMPDIR"] = room
    # Otherwise it works under /tmp: the user of its namespace may not get into this folder.
    tools.run(command, "mmdebstrap", env=environment)


def _own_hooks(plan: Plan) -> Iterator[str]:
    """The user's requests; the paths are those of our own copies."""
    if plan.additions:
        yield f"tar-in {shlex.quote(plan.additions)} /"
    if plan.script:
        yield f"upload {shlex.quote(plan.script)} /pyvmm-script"
        yield _RUN_SCRIPT
        yield 'rm "$1/pyvmm-script"'


def _mode() -> str:
    """The way for mmdebstrap to get its chroot; it decides for itself for a user who is not root.

    As root it would mount /proc, /sys and /dev under the cache, in everybody's sight: a build that
    is killed would leave them there, for the next one's clean-up to walk into. So they go into a
    mount namespace; a container that may not have one may not mount either.
    """
    if os.geteuid() != 0:
        return "auto"
    try:
        tools.run(["unshare", "--mount", "--propagation", "unchanged", "true"], "unshare")
    except ConfigError:
        return "root"
    return "unshare"


def _make_disk(plan: Plan, recipes: Recipes, room: str, disk: str) -> None:
    for program in ("tar", "mke2fs"):
        tools.require(program)
    fake = [] if os.geteuid() == 0 else ["fakeroot"]
    environment = {
        "ROOM": room,
        "VARIANT": plan.variant,
        "AGENT": plan.agent,
        "CUSTOMIZE": recipes.file("rootfs", "customize"),
        "LABEL": LABEL,
        "DISK": disk,
        "SIZE": str(plan.size),
    }
    tools.run([*fake, "sh", "-euc", _MAKE_DISK], "making the file system", env=environment)
    os.chmod(disk, 0o444)


def apt_preferences(pins: Sequence[Pin]) -> str:
    """apt_preferences(5) that make apt take the pinned versions, be they newer or older."""
    return "\n".join(
        f"Package: {pin.package}\nPin: version {pin.version}\nPin-Priority: 1001\n" for pin in pins
    )
