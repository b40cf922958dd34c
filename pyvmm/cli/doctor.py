"""`pyvmm doctor`: what this machine can do, and what to do about the rest."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator

import click

from pyvmm.emulated_host.probe import Check
from pyvmm.emulated_host.probe import probe as probe_emulated_host
from pyvmm.errors import PyvmmError


@click.command()
def doctor() -> None:
    """Say what this machine can do: KVM, the emulated KVM host, images, and what to change.

    Exits with 0 if a Linux guest can be run in one way at least, with 1 if not.
    """
    host = list(check_kvm())
    emulated = list(check_emulated_host())
    _show("KVM of this machine", host)
    _show("Emulated KVM host", emulated)
    _show("Networks", list(check_networks()))
    _show("Confinement", list(check_confinement()))
    _show("Debian packages", list(check_packages()))
    _show("Images", list(check_images()))
    _show_what_is_not_built()
    host_runs, emulation_runs = (all(check.ok for check in checks) for checks in (host, emulated))
    if host_runs:
        click.echo("\nLinux guests run on this machine's KVM.")
    elif emulation_runs:
        click.echo(
            "\nLinux guests run in the emulated KVM host, 10 to 20 times slower than on KVM."
        )
    else:
        click.echo("\nNo Linux guest can run here yet: see the lines marked ✗.")
        raise click.exceptions.Exit(1)


def _show(title: str, checks: list[Check]) -> None:
    click.echo(click.style(title, bold=True))
    for check in checks:
        mark = click.style("✓", fg="green") if check.ok else click.style("✗", fg="red")
        click.echo(f"  {mark} {check.name}: {check.found}")
        if check.cure and not check.ok:
            click.echo(f"      {check.cure}")


def check_kvm() -> Iterator[Check]:
    """/dev/kvm, what it offers, and whether it really runs kernels."""
    from pyvmm.kvm.probe import probe
    from pyvmm.kvm.system import Kvm
    from pyvmm.machine.board.registry import board_of_host

    try:
        board = board_of_host()
        kvm = Kvm.open()
    except PyvmmError as error:
        yield Check("/dev/kvm", False, *_message_and_cure(error))
        return
    with kvm:
        yield Check("/dev/kvm", True, f"KVM API 12, up to {kvm.max_vcpus} vCPUs")
        try:
            kvm.check_required(board.requirements)
            yield Check("capabilities", True, "all that pyvmm needs")
        except PyvmmError as error:
            yield Check("capabilities", False, *_message_and_cure(error))
            return
        found = probe(board.probe_guest(kvm))
        yield Check(
            "probe guest",
            found.usable,
            found.reason,
            "kernels cannot run here; pyvmm uses the emulated KVM host instead",
        )


def check_emulated_host() -> Iterator[Check]:
    """QEMU and the rest of what the emulated KVM host is made of."""
    yield from probe_emulated_host()


def check_networks() -> Iterator[Check]:
    """The network backends that `--net` can use here."""
    from pyvmm import images
    from pyvmm.host import passt, tap

    passt.newer_by(images.passt_command)
    found = passt.which()
    yield Check("passt", found is not None, found or "not installed", passt.CURE)
    usable = tap.device_usable()
    yield Check(
        "taps",
        usable,
        f"{tap.DEVICE} can be opened" if usable else f"{tap.DEVICE} cannot be opened",
        f"`chmod 666 {tap.DEVICE}` (udev's mode for it), or use --net user"
        if os.path.exists(tap.DEVICE)
        else "`modprobe tun`, or use --net user",
    )


def check_confinement() -> Iterator[Check]:
    """The layers of a monitor's box, and what each needs of the kernel."""
    from pyvmm.host import box

    found = box.probe()
    if found.on:
        yield Check("monitor", True, ", ".join(found.on))
    for layer, reason in found.off:
        cure = "monitors go without it; --confine strict refuses to"
        yield Check(layer, False, reason, cure)


def check_packages() -> Iterator[Check]:
    """The programs that build images and stand behind devices."""
    from pyvmm.images import recipes, tools

    try:
        missing = tools.missing_packages(os.path.join(recipes.folder(), "system-packages.txt"))
    except PyvmmError as error:
        yield Check("packages", False, *_message_and_cure(error))
        return
    yield Check(
        "packages",
        not missing,
        f"missing: {' '.join(missing)}" if missing else "all that pyvmm needs",
        f"as root: apt-get install --no-install-recommends {' '.join(missing)}",
    )


def check_images() -> Iterator[Check]:
    """The images that have been built; an image that has not been is not a fault."""
    from pyvmm import images

    for name, folder in images.listing():
        if folder is not None:
            yield Check(name, True, folder)


def _show_what_is_not_built() -> None:
    from pyvmm import images

    names = [name for name, folder in images.listing() if folder is None]
    if names:
        click.echo("  - not built; `pyvmm image build NAME` makes one, and so does what needs it:")
        indent = " " * 6
        text = ", ".join(names)
        click.echo(
            textwrap.fill(
                text, 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
            )
        )


def _message_and_cure(error: PyvmmError) -> tuple[str, str]:
    message = getattr(error, "message", None) or str(error)
    return message, getattr(error, "cure", "")
