"""What a machine has counted, as plain data: docs/watching.md has the names, which stay.

Nothing is gathered before somebody asks: KVM counts exits itself, queues count by the batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from pyvmm.kvm.stats import Values
from pyvmm.machine.builder import Parts
from pyvmm.machine.run_loop import AccessCounts
from pyvmm.transport.base import Transport
from pyvmm.virtio.queue.stats import QueueStats

Plain = dict[str, Any]

_EXITS = "_exits"


class MachineStats:
    """The numbers of one machine. Made when somebody asks for the first time."""

    def __init__(self, parts: Parts, counted: AccessCounts | None, start: float) -> None:
        """`counted` is what pyvmm has counted itself, where KVM does not; `start` is when the run
        began, by time.monotonic()."""
        self._parts = parts
        self._counted = counted
        self._start = start

    def read(self) -> Plain:
        """All numbers, now. Raises HostError."""
        spec, memory = self._parts.prepared.spec, self._parts.prepared.memory
        vcpus = self._vcpus()
        return {
            "uptime_seconds": round(time.monotonic() - self._start, 3),
            "memory": {"size": spec.memory, "resident": memory.resident},
            "exits": _sum(vcpu["exits"] for vcpu in vcpus),
            "interrupts": sum(vcpu["interrupts"] for vcpu in vcpus),
            "vcpus": vcpus,
            "devices": {t.device.name: _device(t) for t in self._parts.transports},
        }

    def _vcpus(self) -> list[Plain]:
        if self._counted is not None:
            # Not by vCPU: all of them use the same buses. What KVM handles itself is not seen.
            return [{"id": 0, "exits": self._counted.exits(), "interrupts": 0}]
        return [
            {
                "id": vcpu.id,
                "exits": exits_by_reason(values := file.read()),
                "interrupts": values.get("irq_injections", 0),
            }
            for vcpu, file in zip(self._parts.vcpus, self._parts.stats, strict=True)
        ]


def exits_by_reason(values: Values) -> dict[str, int]:
    """Of KVM's statistics of a vCPU the exits: `total`, and by reasons that do not overlap."""
    total = values.get("exits", 0)
    assert isinstance(total, int)
    exits = {"total": total}
    for name, value in values.items():
        if name.endswith(_EXITS) and isinstance(value, int):
            exits[name.removesuffix(_EXITS)] = value
    # KVM counts some that are none of the processor's own exits, so what is left may be below 0.
    exits["other"] = max(0, 2 * total - sum(exits.values()))
    return exits


def _sum(parts: Iterable[dict[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parts:
        for name, value in part.items():
            found[name] = found.get(name, 0) + value
    return found


def _device(transport: Transport) -> Plain:
    lifecycle = transport.negotiation
    queues: list[Plain] = [
        {
            "requests": stats.requests,
            "interrupts": stats.interrupts,
            "kicks": kick.total(),
            "latency_ns": _histogram(stats),
            "latency_sum_ns": stats.nanoseconds,
        }
        for stats, kick in zip(lifecycle.queue_stats, transport.kicks, strict=True)
    ]
    return {
        "type": transport.device.device_type,
        "requests": sum(queue["requests"] for queue in queues),
        "interrupts": lifecycle.config_interrupts + sum(queue["interrupts"] for queue in queues),
        "kicks": sum(queue["kicks"] for queue in queues),
        "failures": lifecycle.failures,
        "queues": queues,
        **transport.device.stats(),
    }


def _histogram(stats: QueueStats) -> dict[str, int]:
    """By the upper bound of each bucket, in nanoseconds; those that are empty are left out."""
    return {str(1 << power): count for power, count in enumerate(stats.latency) if count}


def quantile(histogram: dict[str, int], share: float) -> int:
    """The upper bound, in nanoseconds, of the bucket in which `share` of all counted lie; 0 if
    nothing was counted."""
    total = sum(histogram.values())
    seen = 0
    for bound, count in sorted((int(bound), count) for bound, count in histogram.items()):
        seen += count
        if seen >= share * total:
            return bound
    return 0
