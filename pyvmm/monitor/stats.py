"""The counters of a machine, as plain data and as text for Prometheus (exposition format 0.0.4).

Nothing is gathered before somebody asks: KVM counts exits itself, queues count by the batch.
docs/watching.md has the names, which stay. Prometheus' follow its conventions: base units (seconds,
bytes), `_total` for counters.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyvmm.kvm.stats import Values
    from pyvmm.machine.builder import Parts
    from pyvmm.machine.run_loop import AccessCounts
    from pyvmm.transport.base import Transport
    from pyvmm.virtio.queue.protocol import QueueStats

Plain = dict[str, Any]

_EXITS = "_exits"

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_NANO = 1e-9
# Of the histogram, the same in every answer: 1 µs to 17 s. What is beyond is in the last bucket.
_BOUNDS = tuple(1 << power for power in range(10, 35))
# Of a device's own counters, those with a name of their own here. All others are device_stat.
_BYTES = {"bytes_to_guest": "to_guest", "bytes_from_guest": "from_guest"}
_COMMON = ("type", "requests", "interrupts", "kicks", "failures", "queues", "errors", *_BYTES)


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


# --- as text for Prometheus -----------------------------------------------------------------------

Labels = Mapping[str, object]
Sample = tuple[str, Labels, float]  # suffix of the name, labels, value


class Family:
    """A metric: `# HELP`, `# TYPE`, and its samples."""

    def __init__(self, name: str, kind: str, help: str) -> None:
        self._head = f"# HELP pyvmm_{name} {help}\n# TYPE pyvmm_{name} {kind}\n"
        self._name = f"pyvmm_{name}"
        self._samples: list[Sample] = []

    def add(self, value: float, labels: Labels, suffix: str = "") -> None:
        """Another sample."""
        self._samples.append((suffix, labels, value))

    def text(self) -> str:
        """Its lines; none if it has no samples."""
        if not self._samples:
            return ""
        return self._head + "".join(
            f"{self._name}{suffix}{_braced(labels)} {_number(value)}\n"
            for suffix, labels, value in self._samples
        )


def as_text(vm: str, status: Mapping[str, Any], stats: Mapping[str, Any]) -> str:
    """The answers to the control socket's `status` and `stats` of the VM called `vm`."""
    families = (*_of_machine(vm, status, stats), *_of_vcpus(vm, stats), *_of_devices(vm, stats))
    return "".join(family.text() for family in families)


def _of_machine(vm: str, status: Mapping[str, Any], stats: Mapping[str, Any]) -> Iterator[Family]:
    info = Family("info", "gauge", "The VM and the pyvmm that runs it; always 1.")
    info.add(1, {"vm": vm, "version": status["version"]})
    yield info
    for name, help, value in (
        ("uptime_seconds", "Time since the VM was started.", stats["uptime_seconds"]),
        ("paused", "Whether the VM is paused.", status["state"] == "paused"),
        ("cpus", "Number of vCPUs.", status["cpus"]),
        ("memory_bytes", "RAM of the guest.", stats["memory"]["size"]),
        ("memory_resident_bytes", "What of it the host has given.", stats["memory"]["resident"]),
    ):
        family = Family(name, "gauge", help)
        family.add(value, {"vm": vm})
        yield family
    for name, help, of in (
        ("console_left_out_bytes_total", "Console output that nobody read.", "console_bytes"),
        ("messages_left_out_total", "Messages that nobody read.", "messages"),
    ):
        family = Family(name, "counter", help)
        family.add(stats["left_out"][of], {"vm": vm})
        yield family


def _of_vcpus(vm: str, stats: Mapping[str, Any]) -> Iterator[Family]:
    exits = Family("exits_total", "counter", "Exits from the guest, by reason.")
    injected = Family("interrupts_total", "counter", "Interrupts injected into a vCPU.")
    for vcpu in stats["vcpus"]:
        labels = {"vm": vm, "vcpu": vcpu["id"]}
        for reason, count in vcpu["exits"].items():
            if reason != "total":  # who wants it sums over the reasons
                exits.add(count, {**labels, "reason": reason})
        injected.add(vcpu["interrupts"], labels)
    yield exits
    yield injected


def _of_devices(vm: str, stats: Mapping[str, Any]) -> Iterator[Family]:
    requests = Family("device_requests_total", "counter", "Buffers given back to the driver.")
    interrupts = Family("device_interrupts_total", "counter", "Notifications sent to the driver.")
    kicks = Family("device_kicks_total", "counter", "Notifications that the driver sent.")
    bytes = Family("device_bytes_total", "counter", "Bytes of data carried.")
    errors = Family("device_errors_total", "counter", "Requests that failed.")
    failures = Family("device_failures_total", "counter", "How often a device needed a reset.")
    latency = Family(
        "device_latency_seconds",
        "histogram",
        "From when a device turns to a batch of requests until it gives them back.",
    )
    other = Family("device_stat", "gauge", "What else a device tells of itself.")
    for name, device in stats["devices"].items():
        labels = {"vm": vm, "device": name}
        failures.add(device["failures"], labels)
        for index, queue in enumerate(device["queues"]):
            of_queue = {**labels, "queue": index}
            if device.get("served_by") and not queue["requests"]:
                continue  # nobody counts, and 0 would be wrong
            requests.add(queue["requests"], of_queue)
            interrupts.add(queue["interrupts"], of_queue)
            kicks.add(queue["kicks"], of_queue)
            _add_histogram(latency, queue, of_queue)
        for key, direction in _BYTES.items():
            if key in device:
                bytes.add(device[key], {**labels, "direction": direction})
        if "errors" in device:
            errors.add(device["errors"], labels)
        for path, value in _numbers(device):
            other.add(value, {**labels, "name": path})
    yield from (requests, interrupts, kicks, bytes, errors, failures, latency, other)


def _add_histogram(family: Family, queue: Mapping[str, Any], labels: Labels) -> None:
    counts = {int(bound): count for bound, count in queue["latency_ns"].items()}
    for bound in _BOUNDS:
        seen = sum(count for upper, count in counts.items() if upper <= bound)
        family.add(seen, {**labels, "le": f"{bound * _NANO:.9f}"}, "_bucket")
    total = sum(counts.values())
    family.add(total, {**labels, "le": "+Inf"}, "_bucket")
    family.add(queue["latency_sum_ns"] * _NANO, labels, "_sum")
    family.add(total, labels, "_count")


def _numbers(device: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a device's own counters, those within others as a.b."""
    for key, value in device.items():
        if not prefix and key in _COMMON:
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


def _braced(labels: Labels) -> str:
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: object) -> str:
    return str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return repr(float(value)) if isinstance(value, float) else str(int(value))
