"""A plain `pyvmm run` imports what it needs and no more: each module costs every start.

The start runs for real, in a process of its own, up to where KVM would come in.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import replace

import boot_images
import pytest

from pyvmm.kinds.vm_spec import to_json, validate
from pyvmm.spec.vm import DiskSpec, VmSpec

# Runs sys.argv[2:] as the command line until the machine is about to be put together.
RUN = """
import sys
before = set(sys.modules) | {"gc"}
entry, *sys.argv = sys.argv[1:]
if entry == "command":
    from pyvmm.cli import main
else:
    from pyvmm.monitor.emulated_inside import main
from pyvmm.monitor import phases
def stop(*parts):
    import gc
    assert gc.get_threshold()[0] >= 100_000, "the start searches for garbage all the time"
    print(*sorted(set(sys.modules) - before))
    sys.stdout.flush()
    import os
    os._exit(0)
phases.open_kvm = stop
main()
"""

NEVER = {
    *("argparse", "asyncio", "concurrent", "email", "hashlib", "http", "importlib.metadata"),
    *("ast", "dataclasses", "inspect"),
    *(
        "logging",
        "multiprocessing",
        "pathlib",
        "platform",
        "random",
        "shutil",
        "socket",
        "ssl",
        "subprocess",
    ),
    *("tempfile", "traceback", "unittest", "urllib", "xml"),
    *("cffi", "click", "pycparser", "elftools", "pkg_resources", "setuptools", "rich"),
    # for failures, other kinds of kernels, other commands
    *("pyvmm.boot.x86.elf", "pyvmm.cli.doctor", "pyvmm.monitor.emulated", "pyvmm.cli.image"),
    *("pyvmm.emulated_host", "pyvmm.images", "pyvmm.kvm.exits", "pyvmm.kvm.probe"),
    *("pyvmm.kvm.report", "pyvmm.testing"),
    # for devices that this VM has not
    *(
        f"pyvmm.kinds.{kind}"
        for kind in ("net", "console", "port", "rng", "user", "balloon", "pmem")
    ),
    *("pyvmm.kinds.vsock", "pyvmm.kinds.border", "pyvmm.spec.tables"),
    # once the guest runs, or somebody asks
    *("pyvmm.control.client", "pyvmm.control.server", "pyvmm.monitor.control"),
}


@pytest.fixture
def spec(tmp_path) -> VmSpec:
    (tmp_path / "kernel").write_bytes(boot_images.bzimage())
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    disks = (DiskSpec(str(tmp_path / "disk")),)
    return validate(VmSpec(kernel=str(tmp_path / "kernel"), disks=disks, memory=64 << 20))


def imported(entry: str, *arguments: str) -> set[str]:
    with tempfile.TemporaryDirectory() as folder:  # as VMs that have ended have more to be read
        done = subprocess.run(
            [sys.executable, "-c", RUN, entry, "pyvmm", *arguments],
            env={**os.environ, "XDG_RUNTIME_DIR": folder},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_run_imports_nothing_that_it_does_not_need(spec):
    modules = imported(
        "command",
        *("run", "--kvm=host", "--memory=64M"),
        *("--kernel", spec.kernel, "--disk", spec.disks[0].path),
    )
    assert "pyvmm.transport.mmio" in modules  # it did start
    assert not modules & (NEVER | {"json"})


def test_a_restore_loads_neither_what_takes_snapshots_nor_disks_that_are_not_there() -> None:
    code = "import sys; from pyvmm.monitor import phases, snapshots; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {
        *("pyvmm.control.client", "pyvmm.monitor.snapshot_sender", "pyvmm.virtio.blk.device")
    }


def test_nor_does_the_emulated_hosts_side(spec):
    modules = imported("inside", to_json(spec), to_json(spec), "30", "{}")
    assert "pyvmm.transport.mmio" in modules
    assert not modules & (NEVER | {"pyvmm.cli.main", "pyvmm.cli.run", "pyvmm.control.registry"})


def test_an_arm64_guest_needs_no_more_modules(tmp_path, spec):
    kernel = tmp_path / "Image"
    kernel.write_bytes(struct.pack("<2I3Q24x4sI", 0, 0, 0, 4 << 20, 0xA, b"ARM\x64", 0))
    inside = to_json(replace(spec, kernel=str(kernel), arch="arm64"))
    modules = imported("inside", inside, inside, "30", "{}")
    assert "pyvmm.boot.arm64.device_tree" in modules  # it did start
    assert not modules & NEVER


# Argument: what a device offers. Prints which layouts of queues are loaded once it stands.
LAYOUTS = """
import sys
from pyvmm.memory import GuestMemory
from pyvmm.transport.mmio import MmioTransport
from pyvmm.virtio.device import VirtioDevice
VirtioDevice.features = int(sys.argv[1])
class Nothing(VirtioDevice):
    name, device_type, queue_sizes = "nothing", 42, (8,)
    def activate(self, activation): pass
    def reset(self): pass
MmioTransport(Nothing(), GuestMemory([(0, 1 << 20)]), lambda: None)
print(*(name for name in ("split", "packed") if f"pyvmm.virtio.queue.{name}" in sys.modules))
"""


@pytest.mark.parametrize(("offered", "loaded"), [(0, "split"), (1 << 34, "split packed")])
def test_the_layouts_that_a_driver_may_choose_are_there_before_it_does(
    offered: int, loaded: str
) -> None:
    """Or a vCPU would wait for the import."""
    done = subprocess.run(
        [sys.executable, "-c", LAYOUTS, str(offered)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == loaded
