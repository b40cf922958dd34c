"""The work of `pyvmm run` once its options are read: it runs what they describe in this process, in
one in the background, or for one command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyvmm.errors import ConfigError
from pyvmm.host.unix_sockets import Socket
from pyvmm.kinds.vm_spec import validate
from pyvmm.monitor.kernel_choice import specify
from pyvmm.monitor.run_spec import refuse_foreign, run_spec
from pyvmm.spec.surroundings import NAMES, USUAL, Surroundings, read_surroundings
from pyvmm.spec.vm import VmSpec

if TYPE_CHECKING:
    from pyvmm.monitor.run_command import CommandLine


def start(
    *,
    kvm: str = "auto",
    detach: bool = False,
    command: Sequence[str] = (),
    debug: bool = False,
    restore: str | None = None,
    guest_user: str | None = None,
    **options: Any,
) -> int:
    """Run the machine that the options describe; the exit code. They have the names, and their
    values the forms, that pyvmm.kinds.vm_spec.make_spec tells. With `detach` it runs in the
    background, and the exit code tells whether it does; with `command` that is run in the guest,
    which then powers off, and the exit code is the command's; `guest_user` is the user there that
    it runs as. With `restore` it goes on from the snapshot of that name.

    Raises PyvmmError for what is wrong with them.
    """
    around = {name: options[name] for name in NAMES if name in options}
    surroundings = read_surroundings(around) if around else USUAL
    options = {name: value for name, value in options.items() if name not in NAMES}
    if guest_user is not None and (detach or restore is not None):
        raise ConfigError(
            "there is no command that runs as that user",
            cure="use pyvmm exec --user",
            option="--guest-user",
        )
    if guest_user is not None and not guest_user.partition(":")[0]:
        # The agent would take root for it. Who names nobody may have meant another.
        raise ConfigError(
            f"{guest_user!r:.80} names no user",
            cure="name one of the guest's, such as root or 1000:100",
            option="--guest-user",
        )
    if restore is not None:
        return _restore(restore, kvm, surroundings, options, detach=detach, command=command)
    if command and detach:
        raise ConfigError("a command is waited for", cure="use pyvmm exec", option="--detach")
    refuse_foreign(options, kvm)
    spec, image = specify(options)
    rm = bool(options.get("rm"))
    line = None if detach else _command_line(command, options.get("root"), image, guest_user)
    if line is not None:
        return _run_command(spec, kvm, surroundings, image, rm, line, debug)
    if not detach:
        return run_spec(spec, kvm, surroundings=surroundings, image=image, rm=rm)
    from pyvmm.monitor.process import run_detached

    return run_detached(
        lambda tell: run_spec(
            spec, kvm, surroundings=surroundings, image=image, rm=rm, on_name=tell
        )
    )


def _restore(
    name: str,
    kvm: str,
    surroundings: Surroundings,
    options: Mapping[str, Any],
    *,
    detach: bool,
    command: Sequence[str],
) -> int:
    from pyvmm.monitor.snapshots import restored

    if command:
        raise ConfigError(
            "a command runs in a guest that boots for it",
            cure="restore it with --detach, then use pyvmm exec",
            option="--restore",
        )
    spec = restored(name, options)
    if not detach:
        return run_spec(spec, kvm, surroundings=surroundings)
    from pyvmm.monitor.process import run_detached

    return run_detached(lambda tell: run_spec(spec, kvm, surroundings=surroundings, on_name=tell))


def _command_line(
    command: Sequence[str], root: Any, image: str | None, user: str | None
) -> CommandLine | None:
    """The command that runs in the guest; None if it is for its init to say."""
    if root is None and not command:
        if user is not None:
            raise ConfigError(
                "there is no command that runs as that user",
                cure="add one: -- CMD",
                option="--guest-user",
            )
        return None
    if root is not None:
        from pyvmm.monitor.host_root import command_line

        line = command_line(root, command, user)
    else:
        from pyvmm.monitor.run_command import for_image

        line = for_image(command, image)
    if user is None:
        return line
    from dataclasses import replace

    return replace(line, user=user, user_option="--guest-user")


def _run_command(
    spec: VmSpec,
    kvm: str,
    surroundings: Surroundings,
    image: str | None,
    rm: bool,
    line: CommandLine,
    debug: bool,
) -> int:
    from pyvmm.monitor import run_command

    spec = validate(run_command.for_command(spec, rm=rm))

    def wrap(spec: VmSpec, control: Socket | None, run: Callable[[], int]) -> tuple[int, bool]:
        return run_command.run_with_command(spec, control, run, line, debug=debug)

    return run_spec(
        spec,
        kvm,
        surroundings=surroundings,
        image=image,
        rm=rm,
        wrap=wrap,
        cut_if_nothing_kept=True,
    )
