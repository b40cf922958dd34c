"""Does this KVM run unmodified kernels? Found out by running a few instructions, not by name.

Some KVMs have no hardware to run a guest with and interpret it (kvm_pvm does, for guests that do
not know it). They serve the whole API, and stop at the first instruction their interpreter lacks:
`int3`, which every Linux kernel tries on itself at boot, or `cmpxchg16b`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Timer
from typing import Protocol

from pyvmm.errors import ConfigError, PyvmmError
from pyvmm.kvm import kick, uapi
from pyvmm.kvm.vcpu import Vcpu

# Interpreters manage 1 to 2 million a second, translators (a KVM inside QEMU's TCG) over a hundred,
# hardware thousands. Booting Linux takes some billions.
ENOUGH_INSTRUCTIONS_PER_SECOND = 20_000_000
_TIME_LIMIT = 2.0  # seconds; only a KVM that hangs in the guest ever gets there
_BLOCKS = 3


class ProbeGuest(Protocol):
    """A VM with one vCPU that runs a few instructions of its architecture, up to an access that
    makes KVM_RUN return `done`, one of KVM_EXIT_…. `counting_loop` is code that executes
    `loop_instructions` before each such access."""

    done: int
    counting_loop: bytes
    loop_instructions: int
    vcpu: Vcpu

    def instructions(self) -> Iterator[tuple[str, bytes]]:
        """(name, code) of what kernels execute on this machine, each to be run on its own."""

    def start(self, code: bytes) -> None:
        """Put `code` into memory and the vCPU, all its state fresh, at its beginning."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(frozen=True)
class KvmProbe:
    """`failures` names each instruction that did not run, with what KVM said instead.

    `reason` is one line for humans, whether `usable` or not.
    """

    usable: bool
    failures: tuple[str, ...]
    instructions_per_second: float
    reason: str


def probe(guest: ProbeGuest) -> KvmProbe:
    """Run `guest` and close it: some 20 ms on an interpreting KVM, 5 ms on hardware."""
    with contextlib.closing(guest):
        vcpu = guest.vcpu
        with _time_limit(vcpu):
            failures = tuple(_failures(guest))
            speed = _instructions_per_second(guest)
    return verdict(failures, speed)


def verdict(failures: tuple[str, ...], instructions_per_second: float) -> KvmProbe:
    """The meaning of the findings."""
    millions = f"{instructions_per_second / 1e6:,.0f} million"
    if instructions_per_second < 1e6:  # as on a busy machine
        millions = "less than a million"
    millions += " instructions a second"
    interpreted = instructions_per_second < ENOUGH_INSTRUCTIONS_PER_SECOND
    if not failures and not interpreted:
        return KvmProbe(True, (), instructions_per_second, f"runs unmodified kernels, {millions}")
    what = "this machine's KVM cannot run unmodified kernels: "
    names = ", ".join(failure.partition(":")[0] for failure in failures)
    what += f"it fails at {names}" if failures else "it is too slow"
    if interpreted:
        what += f" (it interprets its guests, {millions})"
    return KvmProbe(False, failures, instructions_per_second, what)


def _failures(guest: ProbeGuest) -> Iterator[str]:
    for name, code in guest.instructions():
        said = _run_to_the_end(guest, code)
        if said is not None:
            yield f"{name}: {said}"


def _run_to_the_end(guest: ProbeGuest, code: bytes) -> str | None:
    """None if `code` reaches its end, else what happened instead."""
    try:
        guest.start(code)
        if guest.vcpu.run() == guest.done:
            return None
        if guest.vcpu.exit_reason == uapi.KVM_EXIT_INTR:
            return "it did not return"
        return str(guest.vcpu.exit())
    except PyvmmError as error:
        return str(error)


def _instructions_per_second(guest: ProbeGuest) -> float:
    """The best of a few blocks: the first one pays for faulting in, translating and the like."""
    best = 0.0
    try:
        guest.start(guest.counting_loop)
        for _ in range(_BLOCKS):
            start = time.perf_counter()
            if guest.vcpu.run() != guest.done:
                break
            elapsed = time.perf_counter() - start
            best = max(best, guest.loop_instructions / elapsed)
    except PyvmmError:
        pass
    return best


@contextlib.contextmanager
def _time_limit(vcpu: Vcpu) -> Iterator[None]:
    with contextlib.suppress(ConfigError):
        kick.install()  # elsewhere than in the main thread there is no limit for a guest that hangs
    vcpu.bind_thread()
    timer = Timer(_TIME_LIMIT, vcpu.kick)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # a late kick must find the vCPU still there
        vcpu.unbind_thread()
