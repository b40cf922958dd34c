"""VMs as a back end for Ray's sandboxes, which are an alpha of Ray 2.60: docs/ray.md.

    backend = SandboxBackend()
    box = backend.create_sandbox(SandboxConfig("debian"))
    print(backend.exec_command(box, "uname -r").stdout)
    backend.delete_sandbox(box)

It works by itself, in an actor of the user's: `ray.experimental.sandbox.create` makes gVisor's back
end, and takes no other one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from threading import Lock, Timer
from typing import Any, NamedTuple

from pyvmm.agent import CommandTimeout, NoAgent
from pyvmm.api.errors import VMTimeout
from pyvmm.api.pool import Pool
from pyvmm.api.vm import VM
from pyvmm.errors import ConfigError, PyvmmError, how_many

try:
    from ray.experimental.sandbox.backend.base import (
        BaseSandboxBackend,
        ExecResult,
        SandboxStatus,
    )
    from ray.experimental.sandbox.config import SandboxConfig, parse_memory_bytes
    from ray.experimental.sandbox.exceptions import (
        SandboxCreationError,
        SandboxError,
        SandboxExecError,
        SandboxNotFoundError,
        SandboxTimeoutError,
    )
except ImportError as error:
    raise ImportError(
        "pyvmm.ray_sandbox needs Ray 2.60: pip install '.[ray]', in pyvmm's checkout (docs/ray.md)"
    ) from error

_DNS = 'printf "nameserver %s\\n" "$@" > /etc/resolv.conf'
_WORKDIR = 'mkdir -p -- "$1"'
_READ_ONLY = """
set -e
[ -z "$1" ] || { mkdir -p -- "$1"; mount -t tmpfs tmpfs "$1"; }
mount -t tmpfs -o nosuid,nodev,mode=1777 tmpfs /tmp
mount -o remount,ro /
"""
_WRITE = 'mkdir -p -- "$(dirname -- "$1")" && cat %s "$1"'


class _Box(NamedTuple):
    vm: VM
    config: SandboxConfig
    timer: Timer | None


class SandboxBackend(BaseSandboxBackend):  # type: ignore[misc]  # its types are not looked at
    """A VM for each sandbox. Any thread may use it.

    A configuration's `image` is one of pyvmm's (`debian`, or a disk image's path), or the name of a
    pool. `cpu` is rounded up to vCPUs. `network` is "none", or "public": passt, which reaches what
    this machine reaches. What is gVisor's alone is refused.
    """

    def __init__(self, pools: Mapping[str, Pool] | None = None, **options: Any) -> None:
        """`pools` are those whose VMs can be taken, by the names that configurations have for them;
        they are closed by whoever has made them. `options` are for the other VMs, as of
        `pyvmm.VM`. Raises ConfigError."""
        super().__init__(image_manager=self)
        VM(**options)
        self._pools = dict(pools or {})
        self._options = options
        self._boxes: dict[str, _Box] = {}
        self._lock = Lock()

    def pull_image(self, image: str, timeout_seconds: float = 0.0, **more: Any) -> str:
        """Have `image` here, built if need be, however long that takes; its name. Raises
        SandboxCreationError."""
        if image not in self._pools:
            with _as(SandboxCreationError):
                VM(image, **self._options)._resolve()
        return image

    def create_sandbox(self, config: SandboxConfig) -> str:
        """Start a VM, or take one from a pool; its name. Raises SandboxCreationError,
        SandboxTimeoutError."""
        deadline = time.monotonic() + config.timeout_seconds
        with _as(SandboxCreationError):
            vm = self._vm(config)
            try:
                _prepare(vm, config, deadline)
            except BaseException:
                vm.kill()
                raise
        timer = None
        if config.ttl_seconds is not None and config.ttl_seconds > 0:
            timer = Timer(config.ttl_seconds, self.delete_sandbox, (vm.name,))
            timer.daemon = True
        with self._lock:
            self._boxes[vm.name] = _Box(vm, config, timer)
        if timer is not None:
            timer.start()
        return vm.name

    def _vm(self, config: SandboxConfig) -> VM:
        """It runs. Raises PyvmmError."""
        for name in ("capabilities", "_oci_spec_transform_fn"):
            if getattr(config, name) is not None:
                raise ConfigError(f"a VM has no {name}", cure="leave it out")
        if config.network not in ("none", "public"):
            raise ConfigError(f"a VM has no network {config.network!r}", cure="take none or public")
        memory = parse_memory_bytes(config.memory) or 0
        cpus = max(1, math.ceil(config.cpu or 0))
        if (pool := self._pools.get(config.image)) is not None:
            return _fits(pool.take(config.timeout_seconds), config, cpus, memory)
        options = {**self._options, "cpus": cpus, "name": f"sandbox-{os.urandom(6).hex()}"}
        if memory:
            options["memory"] = memory
        if config.network == "public":
            options["net"] = "user"
        else:
            options.pop("net", None)
        return VM(config.image, **options).start(config.timeout_seconds)

    def delete_sandbox(self, sandbox_id: str) -> None:
        """End the VM at once; one that is not there has ended."""
        with self._lock:
            box = self._boxes.pop(sandbox_id, None)
        if box is not None:
            if box.timer is not None:
                box.timer.cancel()
            with suppress(PyvmmError):
                box.vm.kill()

    def exec_command(
        self,
        sandbox_id: str,
        command: str | Sequence[str],
        timeout: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        shell: str | None = None,
        user: str | None = None,
    ) -> ExecResult:
        """Run a command to its end: text by the shell. A signal that has ended it is 128 and its
        number. Raises SandboxTimeoutError, SandboxExecError, SandboxNotFoundError."""
        vm, config, _ = self._box(sandbox_id)
        argv = [shell or config.shell, "-c", command] if isinstance(command, str) else list(command)
        begin = time.monotonic()
        with _as(SandboxExecError):
            done = vm.run(
                argv,
                env={**config.env, **(env or {})},
                cwd=cwd or config.workdir or "/",
                user=user,
                timeout=timeout,
            )
        return ExecResult(
            exit_code=done.returncode if done.returncode >= 0 else 128 - done.returncode,
            stdout=done.stdout.decode(errors="replace"),
            stderr=done.stderr.decode(errors="replace"),
            duration_seconds=time.monotonic() - begin,
        )

    def write_file(
        self, sandbox_id: str, path: str, content: str | bytes, append: bool = False
    ) -> None:
        """Write `content` to a file, in a directory that is made if need be. Raises SandboxError,
        SandboxNotFoundError."""
        data = content.encode() if isinstance(content, str) else content
        self._file(sandbox_id, ["sh", "-c", _WRITE % (">>" if append else ">"), "sh", path], data)

    def read_file(self, sandbox_id: str, path: str) -> bytes:
        """What is in a file. Raises SandboxError, SandboxNotFoundError."""
        return self._file(sandbox_id, ["cat", "--", path], None)

    def _file(self, sandbox_id: str, argv: list[str], data: bytes | None) -> bytes:
        vm, config, _ = self._box(sandbox_id)
        with _as(SandboxError):
            found: bytes = vm.run(argv, cwd=config.workdir or "/", input=data, check=True).stdout
        return found

    def get_status(self, sandbox_id: str) -> SandboxStatus:
        """Whether the VM runs. One that is not there has ended."""
        with self._lock:
            box = self._boxes.get(sandbox_id)
        outcome = None if box is None else box.vm.outcome
        if box is not None and outcome is None:
            return SandboxStatus.RUNNING
        if outcome is None or outcome.exit_code == 0:  # it powered off
            return SandboxStatus.TERMINATED
        return SandboxStatus.ERROR

    def _box(self, sandbox_id: str) -> _Box:
        with self._lock:
            box = self._boxes.get(sandbox_id)
        if box is None:
            raise SandboxNotFoundError(f"there is no sandbox {sandbox_id!r}")
        return box


def _fits(vm: VM, config: SandboxConfig, cpus: int, memory: int) -> VM:
    """`vm`, of a pool, if it has what is asked for, and no network that is not."""
    has_net = any(device.kind == "net" for device in vm.spec.devices)
    if vm.spec.cpus >= cpus and vm.spec.memory >= memory:
        if has_net == (config.network == "public"):
            return vm
        why = "has a network" if has_net else "has no network"
    else:
        why = f"has {how_many(vm.spec.cpus, 'vCPU')} and {vm.spec.memory >> 20} MiB"
    vm.kill()
    raise ConfigError(f"the pool {config.image} is of VMs that a sandbox cannot be: each {why}")


def _prepare(vm: VM, config: SandboxConfig, deadline: float) -> None:
    """Have the guest be as `config` says. Raises PyvmmError."""

    def left() -> float:
        return max(0.1, deadline - time.monotonic())

    def run(script: str, *args: str) -> None:
        vm.run(["sh", "-c", script, "sh", *args], timeout=left(), check=True)

    vm.wait_ready(left())
    if config.dns is not None:
        run(_DNS, *config.dns)
    if config.readonly:
        run(_READ_ONLY, config.workdir or "")
    elif config.workdir:
        run(_WORKDIR, config.workdir)


@contextmanager
def _as(kind: type[Exception]) -> Iterator[None]:
    """In which our errors become Ray's."""
    try:
        yield
    except (CommandTimeout, VMTimeout, NoAgent) as error:
        raise SandboxTimeoutError(str(error)) from error
    except PyvmmError as error:
        raise kind(str(error)) from error
