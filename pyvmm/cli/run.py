"""`pyvmm run`: from options to a running guest."""

from __future__ import annotations

from typing import Any

import click

from pyvmm.cli.quick import CHOICES, split_command
from pyvmm.monitor.start import start
from pyvmm.spec.vm import TRACE_KINDS

EPILOG = """\b
Examples:
  pyvmm run                       Debian, built at the first use; ends by poweroff
  pyvmm run --rm debian-systemd   another image; what the guest changes is thrown away
  pyvmm run --rm -- uname -r      boots, runs a command, exits with its code
  pyvmm run --kernel vmlinuz --initrd initrd.img --disk debian.img
  pyvmm run --kernel vmlinux --disk root.img --disk data.img,readonly,id=data,bps=20M,iops=500
  pyvmm run --kernel vmlinux --disk base.img,snapshot --disk big.qcow2
  pyvmm run --kernel vmlinuz --disk root.img --cpus 4 --memory 2G --cmdline "loglevel=7"

\b
Disk options:
  readonly, direct (O_DIRECT), snapshot (changes are thrown away), overlay=FILE
  (changes are kept there), format=raw|qcow2 (else by name), backing=FILE and
  data-file=FILE (what a qcow2 image may open beside itself), id=NAME,
  block-size=BYTES, on-error=report|stop; bytes and requests a second at most:
  bps=N, iops=N, bps-burst=N, iops-burst=N; a class's own for FILE.py:CLASS

\b
Keys, where standard input is a terminal:
  Ctrl-A x quits, Ctrl-A h shows help, Ctrl-A Ctrl-A sends Ctrl-A to the guest.

\b
Exit codes:
  0 the guest powered off     10 it rebooted (--on-reboot end, or it got nowhere three times)
  11 its kernel panicked
  12 it triple-faulted        13 KVM could not run it    14 Ctrl-A x
  15 a disk with on-error=stop failed
  1 the host failed           2 wrong options            128+N ended by signal N
"""


class _RunCommand(click.Command):
    """With everything behind ``--``, which click would drop, as the parameter `command`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options, ctx.params["command"] = split_command(args)
        return super().parse_args(ctx, options)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- CMD [ARG]...]"]


@click.command(cls=_RunCommand, epilog=EPILOG)
@click.argument("image", required=False)
@click.option(
    "--kernel",
    metavar="PATH",
    help="Linux kernel: a bzImage (Debian's /boot/vmlinuz) or an ELF vmlinux; instead of IMAGE's, "
    "and of its initrd.",
)
@click.option(
    "--disk",
    "disks",
    metavar="PATH[,OPTION...]",
    multiple=True,
    help="Image, block device, ram:SIZE or FILE.py:CLASS, served by virtio-blk; may be repeated. "
    "The first is /dev/vda and the root disk. snapshot and overlay=FILE leave the image as it is.",
)
@click.option(
    "--initrd",
    metavar="PATH",
    help="Initial RAM disk. Debian's kernels need one, as their virtio drivers are modules.",
)
@click.option(
    "--net",
    "net",
    metavar="user|tap=NAME[,OPTIONS]",
    multiple=True,
    help="Add a network card: user-mode networking, as user,forward=8080:80, or a tap interface. "
    "Both take mac=, mtu= and packed; docs/networking.md has the other options.",
)
@click.option("--rng", is_flag=True, help="Add a virtio-rng device: random numbers for the guest.")
@click.option(
    "--rng-limit",
    metavar="[bps=N][,iops=N][,packed]",
    help="Add one that gives no more than this: bytes, or requests, a second; bursts as for disks.",
)
@click.option(
    "--device",
    "devices",
    metavar="FILE.py:CLASS[,KEY=VALUE][,packed]",
    multiple=True,
    help="Add a virtio device of your own: a class in a Python file, with its options; may be "
    "repeated.",
)
@click.option(
    "--console",
    type=click.Choice(("serial", "virtio", "virtio,packed")),
    help="What the terminal is in the guest: the serial port (the default), or a virtio-console "
    "(/dev/hvc0), which knows the terminal's size.",
)
@click.option(
    "--port",
    "ports",
    metavar="name=NAME,path=PATH[,packed]",
    multiple=True,
    help="Add a port, /dev/virtio-ports/NAME in the guest, that a program of the host finds at the "
    "Unix socket PATH; may be repeated.",
)
@click.option(
    "--balloon",
    metavar="[size=SIZE][,free-page-reporting][,deflate-on-oom][,packed]",
    is_flag=False,
    flag_value="",
    help="Add a virtio-balloon device, which takes SIZE of the guest's memory (none at first; see "
    "`pyvmm balloon`). With free-page-reporting memory that the guest has freed comes back by "
    "itself.",
)
@click.option(
    "--vsock",
    metavar="[cid=N][,path=PATH][,packed]",
    is_flag=False,
    flag_value="",
    help="Add a virtio-vsock device. A program connects to the socket at PATH and sends CONNECT "
    "PORT; a guest that connects to port N of CID 2 reaches the listener at PATH_N. Without a path "
    "there is the control socket's way: pyvmm exec, pyvmm cp.",
)
@click.option(
    "--agent", is_flag=True, help="Have pyvmm exec and cp reach the guest: a vsock device."
)
@click.option("--cpus", type=int, default=1, show_default=True, help="Number of vCPUs.")
@click.option(
    "--memory", metavar="SIZE", default="512M", show_default=True, help="RAM, such as 512M or 2G."
)
@click.option(
    "--cmdline",
    metavar="TEXT",
    default="",
    help="Added to the kernel command line; a parameter given here (root=, console=, panic=, ...) "
    "replaces pyvmm's own.",
)
@click.option(
    "--trace",
    metavar="KIND[,KIND]",
    default="",
    help=f"Print decoded events on standard error: {', '.join(TRACE_KINDS)} or all.",
)
@click.option("--trace-file", metavar="PATH", help="Write the trace to this file instead.")
@click.option(
    "--kvm",
    type=click.Choice(CHOICES["kvm"]),
    default="auto",
    show_default=True,
    help="Use this machine's KVM, an emulated KVM host (QEMU, slow, works anywhere), or whichever "
    "can boot Linux.",
)
@click.option(
    "--discovery",
    type=click.Choice(CHOICES["discovery"]),
    default="auto",
    show_default=True,
    help="How the guest learns of its virtio-mmio devices.",
)
@click.option(
    "--on-reboot",
    type=click.Choice(CHOICES["on_reboot"]),
    default="restart",
    show_default=True,
    help="What a reboot in the guest does: it starts again, as a machine would, or ends the run "
    "with 10. After a panic or a triple fault the run always ends, and with CMD.",
)
@click.option(
    "--name",
    default="",
    help="The VM's name, in messages and for pyvmm ps, stop, pause…; what it has changed on "
    "IMAGE's disk is kept under it.  [default: IMAGE's or vm, or vm-2…]",
)
@click.option(
    "--rm",
    is_flag=True,
    help="Throw away what the guest changes on IMAGE's disk; with CMD, on whatever root disk.",
)
@click.option(
    "--config",
    metavar="FILE",
    help="Read options from a TOML file (docs/python-api.md); those given here win.",
)
@click.option(
    "--allow-code",
    is_flag=True,
    help="Run the Python files that FILE names for disks and devices, as you; without this they "
    "are refused.",
)
@click.option(
    "--print-config", is_flag=True, help="Print such a file for this VM, and do not start it."
)
@click.option(
    "--detach",
    "-d",
    is_flag=True,
    help="Return once the guest runs, which goes on in the background, and print the VM's name; "
    "pyvmm console shows what it says.",
)
@click.option(
    "--log-format",
    type=click.Choice(CHOICES["log_format"]),
    default="text",
    show_default=True,
    help="What pyvmm's own messages on standard error are: lines for humans, or JSON objects.",
)
@click.option("--debug", is_flag=True, help="Show a traceback when pyvmm itself fails.")
def run(
    config: str | None,
    allow_code: bool,
    print_config: bool,
    detach: bool,
    log_format: str,
    debug: bool,
    command: tuple[str, ...],
    **options: Any,
) -> int:
    """Boot a Linux guest and join its serial console to this terminal.

    IMAGE is one that `pyvmm image list` shows; with neither it nor --kernel it is debian. The disk
    of an image is /dev/vda, --disk adds others; where only disks are named, the kernel of debian
    boots from the first.

    With CMD that runs in the guest, by its agent, with the standard streams of this command; then
    the guest powers off. The console is shown only if the guest does not come that far (or with
    --debug), Ctrl-C reaches CMD, and the exit code is CMD's.

    Ends when the guest powers off. Where this machine's KVM cannot run Linux (a container, a CI
    runner), the whole monitor runs in an emulated KVM host instead and says so.
    """
    values = _given(options)
    if config is not None:
        from pyvmm.api.config_file import load

        values = {**load(config, allow_code=allow_code), **values}
    if values.pop("agent", False) and values.get("vsock") in (None, False):
        values["vsock"] = ""  # what the agent is reached by; one that was described has more
    if print_config:
        from pyvmm.api.config_file import describe

        click.echo(describe(values), nl=False)
        return 0
    return start(**values, detach=detach, command=command, debug=debug)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """What the command line says, by the names of pyvmm.spec.options."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    given = {
        name: value
        for name, value in options.items()
        if context.get_parameter_source(name) is not default
    }
    if "rng_limit" in given:
        given["rng"] = given.pop("rng_limit")
    return given
