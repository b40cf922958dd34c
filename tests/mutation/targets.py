"""The modules that are mutated, and the tests that are to notice it: those about them first."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """Modules, as globs below pyvmm, and the tests for them, as globs of names in tests/unit, and
    in tests/kvm, which are skipped on a host without /dev/kvm."""

    area: str
    modules: str
    tests: str
    kvm: str = ""


# The first one that a module fits.
TARGETS = (
    Target(
        "queue and chain", "virtio/queue/chain.py",
        "chain queue_fast_path queue_buffers queue blk_request",
    ),
    Target(
        "queue and chain", "virtio/queue/split.py",
        "split_queue queue queue_fast_path queue_buffers queue_hostile queue_model"
        " vhost_user_inflight chain worker_polling split_queue_fuzz queue_processes",
    ),
    Target(
        "queue and chain", "virtio/queue/packed.py",
        "packed_queue queue queue_fast_path queue_buffers queue_hostile queue_model"
        " worker_polling packed_queue_fuzz queue_processes",
    ),
    Target(
        "queue and chain", "virtio/queue/*.py",
        "queue queue_fast_path queue_buffers split_queue packed_queue queue_hostile"
        " queue_model vhost_user_inflight worker_polling stats"
        " transport_robustness_queues start_imports net_vhost",
    ),
    Target(
        "negotiation and lifecycle",
        "virtio/lifecycle.py virtio/negotiation.py virtio/status.py virtio/features.py"
        " virtio/defects.py virtio/device.py virtio/events.py transport/events.py",
        "status negotiation transport_robustness transport_robustness_queues queue_reset"
        " mmio_registers negotiation_threads trace stats worker queue_device mmio_fuzz vhost_user"
        " net_vhost pause forgotten pci_transport",
    ),
    Target(
        "worker", "virtio/worker.py",
        "worker worker_* queue_device"
        " net_receive vsock_device stats every_device rate_limit",
    ),
    Target("worker", "virtio/offload.py", "offload net_vhost vhost_user_front_end"),
    Target(
        "vhost-user", "virtio/vhost_user/*.py",
        "vhost_user_front_end vhost_user_hostile_back_end",
    ),
    Target("worker", "virtio/rate_limit.py", "rate_limit net_limits stats"),
    Target(
        "transports", "transport/*.py",
        "registers transport_base mmio_registers transport_robustness transport_robustness_queues"
        " negotiation negotiation_threads trace queue_reset mmio_fuzz net_vhost pci_transport",
    ),
    Target("PCI bus", "pci/*.py", "pci_bus pci_msix pci_transport"),
    Target("bus, memory, vCPU loop", "bus/*.py", "bus kvm_loop vcpu_runner"),
    Target(
        "bus, memory, vCPU loop", "memory/*.py",
        "guest_memory lent_memory boot_memory_map chain vhost_user balloon_device",
    ),
    Target("bus, memory, vCPU loop", "kvm/vcpu.py", "kvm_vcpu kvm_loop", "kick smp"),
    Target(
        "bus, memory, vCPU loop", "kvm/loop.py kvm/exits.py kvm/exit_decoding.py",
        "kvm_* vcpu_runner", "port_io mmio kick halt vcpu_calls vcpu_state",
    ),
    Target(
        "vhost-user", "transport/vhost_user/*.py",
        "vhost_user vhost_user_inflight vhost_user_server vhost_user_hostile vhost_user_fuzz",
    ),
    Target("blk", "virtio/blk/*.py", "blk_* disk_queues disk_files stats every_device"),
    Target(
        "console", "virtio/console/*.py",
        "console_* terminal* window_size worker_device stats every_device",
    ),
    Target("vsock", "virtio/vsock/*.py", "vsock_* stats every_device"),
    Target("net", "virtio/net/*.py", "net_* stats every_device"),
    Target("balloon", "virtio/balloon/*.py", "balloon_* stats every_device"),
    Target("rng", "virtio/rng/*.py", "rng_device every_device"),
    Target("pmem", "virtio/pmem/*.py", "pmem_device every_device"),
    Target(  # new ones
        "negotiation and lifecycle", "virtio/*.py transport/*.py",
        "every_device transport_robustness",
    ),
    Target("agent", "agent/*.py", "agent agent_* cli_guest"),
    Target("container images", "images/container/*.py", "container_*"),
)  # fmt: skip


def files(root: Path) -> list[str]:
    """The modules, as paths below `root`."""
    found = {
        str(path.relative_to(root))
        for target in TARGETS
        for module in target.modules.split()
        for path in (root / "pyvmm").glob(module)
    }
    return sorted(found)


def tests_of(file: str) -> tuple[str, ...]:
    """The tests of a module, as paths below the root."""
    root = Path(__file__).parents[2]
    found: dict[str, None] = {}
    target = _target_of(file)
    for folder, tests in (("unit", target.tests), ("kvm", target.kvm)):
        for test in tests.split():
            for path in sorted((root / "tests" / folder).rglob(f"test_{test}.py")):
                found[str(path.relative_to(root))] = None
    return tuple(found)


def area_of(file: str) -> str:
    """The module's weight in the score."""
    return _target_of(file).area


def _target_of(file: str) -> Target:
    path = Path(file)
    return next(
        target
        for target in TARGETS
        if any(path.match(f"pyvmm/{module}") for module in target.modules.split())
    )
