"""`pyvmm image`: guest kernels, initramfs and root disks made of Debian's packages."""

from __future__ import annotations

import os
from typing import Any

import click

from pyvmm import images
from pyvmm.cli.answers import show_table
from pyvmm.control import registry
from pyvmm.errors import ConfigError
from pyvmm.host import log
from pyvmm.images import bootable
from pyvmm.spec.sizes import parse_memory

EPILOG = """\b
Examples:
  pyvmm image build --from debian:trixie --include fio,python3 --size 4G bench
  pyvmm image build --from debian:bookworm --copy ./app:/opt/app --script setup.sh app
  pyvmm image build --from oci-archive:alpine.tar alpine
"""
_FOR_A_FOREIGN_START = ("programs-emulator-{0}", "programs-{0}", "rootfs-{0}")
_FOR_A_START = ("kernel-6.1", "initramfs-6.1", "rootfs-minbase", "kernel-host")


@click.group()
def image() -> None:
    """Build and find guest images.

    They are made of Debian's packages, without root privileges or loop mounts, and kept in
    $XDG_CACHE_HOME/pyvmm (by default ~/.cache/pyvmm).
    """


@image.command(epilog=EPILOG)
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option(
    "--from",
    "source",
    metavar="SOURCE",
    help="Make an image of your own called NAME: from debian:bookworm, trixie or sid; or of a "
    "saved container image, oci-archive:FILE, docker-archive:FILE or oci:DIRECTORY (with several "
    "in it FILE:IMAGE).",
)
@click.option(
    "--include", metavar="PACKAGE[,...]", multiple=True, help="Install these Debian packages too."
)
@click.option("--size", metavar="SIZE", help="Of the root disk; its file is sparse.  [default: 2G]")
@click.option(
    "--kernel",
    metavar="VERSION",
    help="The kernel that goes with it, 6.1, 6.12 or 7 (the newest).  [default: 6.1]",
)
@click.option("--script", metavar="FILE", help="Run this in it (in Debian), as root, at the end.")
@click.option(
    "--copy",
    "copies",
    metavar="FILE:PATH",
    multiple=True,
    help="Put a file or directory at PATH in it (in Debian), as root's.",
)
@click.option(
    "--arch",
    type=click.Choice(bootable.FOREIGN),
    help="For machines of that architecture, which are emulated here (docs/arm64.md).",
)
@click.option("--force", is_flag=True, help="Replace the image of that name, if there is one.")
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Every image there is a recipe for, but those that take minutes.",
)
@click.option("--locked", is_flag=True, help="Fail if the mirror no longer has a pinned version.")
def build(
    names: tuple[str, ...],
    source: str | None,
    include: tuple[str, ...],
    size: str | None,
    kernel: str | None,
    script: str | None,
    copies: tuple[str, ...],
    arch: str | None,
    force: bool,
    everything: bool,
    locked: bool,
) -> None:
    """Make an image of your own (--from), or the named parts that pyvmm has recipes for.

    Without a name: what it takes to boot Debian, the emulated KVM host's kernel included. A name
    like debian:sid stands for a kernel of Debian's, which is fetched anew.
    """
    own = {
        "--include": include,
        "--size": size,
        "--kernel": kernel,
        "--script": script,
        "--copy": copies,
        "--force": force,
    }
    try:
        if source is not None:
            _build_own(names, source, {**own, "--arch": arch})
            return
        for option, value in own.items():
            if value:
                raise ConfigError("is for an image of your own", cure="add --from", option=option)
        parts = [name for name in names if not _is_kernel(name)]
        if arch and (parts or everything):
            cure = "add --from, or name nothing else"
            raise ConfigError("is for an image, or a kernel", cure=cure, option="--arch")
        _fetch_kernels([name for name in names if _is_kernel(name)], arch or "")
        for_a_start = [name.format(arch) for name in _FOR_A_FOREIGN_START if arch] or _FOR_A_START
        if parts or not names:
            images.build(None if everything else parts or for_a_start, locked=locked)
    except KeyboardInterrupt:
        log.to_stderr("interrupted; what was being built is gone")
        raise click.exceptions.Exit(130) from None


def _is_kernel(name: str) -> bool:
    return name.startswith("debian:")


def _fetch_kernels(names: list[str], arch: str) -> None:
    from pyvmm.images import debian_kernels

    for name in names:
        debian_kernels.find(name, refresh=True, arch=arch)


def _build_own(names: tuple[str, ...], source: str, own: dict[str, Any]) -> None:
    if len(names) != 1:
        raise ConfigError(
            "one image is made at a time",
            cure="pyvmm image build --from … NAME",
            option="--from",
        )
    images.build_from(
        names[0],
        source,
        packages=[name for text in own["--include"] for name in text.split(",") if name],
        size=parse_memory(own["--size"], option="--size") if own["--size"] else 0,
        kernel=own["--kernel"] or images.DEFAULT_KERNEL,
        script=own["--script"] or "",
        copies=[_pair(text) for text in own["--copy"]],
        replace=own["--force"],
        arch=own["--arch"] or "",
    )


def _pair(text: str) -> tuple[str, str]:
    source, _, target = text.rpartition(":")
    if not source or not target.startswith("/") or ".." in target.split("/"):
        raise ConfigError(
            f"cannot read {text!r}", cure="write FILE:/PATH/IN/THE/IMAGE", option="--copy"
        )
    return source, target


@image.command("list")
@click.option("--all", "everything", is_flag=True, help="Also the parts, and where they are.")
@click.option("--json", "as_json", is_flag=True, help="Print all that is known, as JSON.")
def list_images(everything: bool, as_json: bool) -> None:
    """Show the images that `pyvmm run` takes."""
    rows = images.machine_images()
    parts = images.listing() if everything else []
    if everything:
        from pyvmm.images import debian_kernels

        parts += [(name, debian_kernels.folder(name)) for name in debian_kernels.names()]
    if as_json:
        import json

        found: list[object] = [row._asdict() for row in rows]
        found += [{"name": name, "folder": folder} for name, folder in parts]
        click.echo(json.dumps(found, indent=2))
        return
    lines = [("NAME", "SIZE", "MADE", "KERNEL", "FROM")]
    for row in rows:
        size = "-" if row.size is None else f"{row.size >> 20}M"
        lines.append((row.name, size, (row.made_at or "-")[:10], row.kernel, row.made_from))
    show_table(lines)
    for name, folder in parts:
        click.echo(f"{name:18} {folder or 'not built'}")


@image.command("rm")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--force", is_flag=True, help="Even if VMs need it, which then cannot go on.")
def remove(names: tuple[str, ...], force: bool) -> None:
    """Remove images that you have built, and kernels (debian:…) that were fetched."""
    for name in names:
        if _is_kernel(name):
            from pyvmm.images import debian_kernels

            debian_kernels.remove(name)
            continue
        images.remove(name, running=registry.running(), force=force)


@image.command()
@click.argument("name")
def path(name: str) -> None:
    """Print the folder of a part of the images that has been built.

    `pyvmm image list --all` shows the names of the parts.
    """
    click.echo(images.path(name))


@image.command()
@click.argument("kernel", metavar="debian:VERSION")
def headers(kernel: str) -> None:
    """Print the folder in which modules for a kernel of Debian's are built: make -C FOLDER M=….

    It is fetched at the first use; docs/kernels.md has an example.
    """
    from pyvmm.images import debian_kernels

    click.echo(debian_kernels.headers(kernel))


@image.command()
@click.argument("target")
@click.option(
    "--variant",
    default=images.DEFAULT_VARIANT,
    show_default=True,
    help="minbase (that of debian), systemd (of debian-systemd) or test (of debian-test).",
)
@click.option("--force", is_flag=True, help="Replace TARGET if it exists.")
def disk(target: str, variant: str, force: bool) -> None:
    """Write a fresh, writable root disk to TARGET."""
    if os.path.exists(target) and not force:
        raise ConfigError(f"{target} exists", cure="name another file, or use --force")
    if os.path.exists(target) and not os.path.isfile(target):
        raise ConfigError(
            f"{target} is not a regular file, to be replaced", cure="name another file"
        )
    images.fresh_disk(target, variant, make=True)


@image.command()
def lock() -> None:
    """Pin the versions that the mirror has now, in guest-images/."""
    images.refresh_lock()


@image.command()
@click.option("--kernels", is_flag=True, help="Also all of Debian's kernels that were fetched.")
def prune(kernels: bool) -> None:
    """Remove images from the cache that no current recipe makes, and headers without a kernel."""
    for folder in images.prune(kernels=kernels):
        click.echo(f"removed {folder}")
