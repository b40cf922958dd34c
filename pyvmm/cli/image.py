"""`pyvmm image`: guest kernels, initramfs and root disks made of Debian's packages."""

from __future__ import annotations

import os

import click

from pyvmm import images
from pyvmm.errors import ConfigError

_FOR_A_START = ("kernel-6.1", "initramfs-6.1", "rootfs-minbase", "kernel-host")


@click.group()
def image() -> None:
    """Build and find guest images.

    They are made of Debian's packages, without root privileges or loop mounts, and kept in
    $XDG_CACHE_HOME/pyvmm (by default ~/.cache/pyvmm).
    """


@image.command()
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every image there is a recipe for.")
@click.option("--locked", is_flag=True, help="Fail if the mirror no longer has a pinned version.")
def build(names: tuple[str, ...], everything: bool, locked: bool) -> None:
    """Make the named images, if they are not in the cache.

    Without a name: what it takes to boot Debian, the emulated KVM host's kernel included.
    """
    images.build(None if everything else names or _FOR_A_START, locked=locked)


@image.command("list")
def list_images() -> None:
    """Show the images, and where those are that have been built."""
    for name, folder in images.listing():
        click.echo(f"{name:18} {folder or 'not built'}")


@image.command()
@click.argument("name")
def path(name: str) -> None:
    """Print the folder of an image that has been built."""
    click.echo(images.path(name))


@image.command()
@click.argument("target")
@click.option("--variant", default=images.DEFAULT_VARIANT, show_default=True)
@click.option("--force", is_flag=True, help="Replace TARGET if it exists.")
def disk(target: str, variant: str, force: bool) -> None:
    """Write a fresh, writable root disk to TARGET."""
    if os.path.exists(target) and not force:
        raise ConfigError(f"{target} exists", cure="name another file, or use --force")
    if os.path.exists(target) and not os.path.isfile(target):
        raise ConfigError(f"{target} is no regular file, to be replaced", cure="name another file")
    images.fresh_disk(target, variant, make=True)


@image.command()
def lock() -> None:
    """Pin the versions that the mirror has now, in guest-images/."""
    images.refresh_lock()


@image.command()
def prune() -> None:
    """Remove images from the cache that no current recipe makes."""
    for folder in images.prune():
        click.echo(f"removed {folder}")
