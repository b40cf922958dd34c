"""The capabilities of KVM that pyvmm needs, each with the reason, so that a refusal teaches
something.

The capabilities that only x86 has are in x86/capabilities.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from pyvmm.errors import ConfigError
from pyvmm.kvm import uapi


class Requirement(NamedTuple):
    """A capability by number and header name, and what pyvmm does with it."""

    capability: int
    name: str
    reason: str


REQUIRED = (
    Requirement(uapi.KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY", "guest RAM is our own memory"),
    Requirement(
        uapi.KVM_CAP_DESTROY_MEMORY_REGION_WORKS,
        "KVM_CAP_DESTROY_MEMORY_REGION_WORKS",
        "memory slots can be removed again",
    ),
    Requirement(
        uapi.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS,
        "KVM_CAP_JOIN_MEMORY_REGIONS_WORKS",
        "memory slots may touch one another",
    ),
    Requirement(uapi.KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP", "the interrupt controllers are KVM's"),
    Requirement(uapi.KVM_CAP_IRQFD, "KVM_CAP_IRQFD", "devices interrupt through eventfds"),
    Requirement(
        uapi.KVM_CAP_IRQ_ROUTING, "KVM_CAP_IRQ_ROUTING", "interrupt lines are wired up by us"
    ),
    Requirement(
        uapi.KVM_CAP_IOEVENTFD, "KVM_CAP_IOEVENTFD", "a queue is kicked without leaving the kernel"
    ),
    Requirement(uapi.KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE", "vCPUs wait for their start-up"),
    Requirement(
        uapi.KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", "a vCPU can be stopped with no race"
    ),
)


def missing(
    check_extension: Callable[[int], int], required: Iterable[Requirement]
) -> list[Requirement]:
    """Those of `required` for which `check_extension` says 0."""
    return [requirement for requirement in required if check_extension(requirement.capability) <= 0]


def check(check_extension: Callable[[int], int], required: Iterable[Requirement]) -> None:
    """Raise ConfigError that names every missing capability and why it is needed."""
    lacking = missing(check_extension, required)
    if lacking:
        listed = ", ".join(f"{need.name} ({need.reason})" for need in lacking)
        raise ConfigError(
            f"this KVM lacks {listed}",
            cure="use a newer host kernel, or --kvm=emulated",
        )
