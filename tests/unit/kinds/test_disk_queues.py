"""`--disk PATH,queues=N,packed`: what the user writes, and what the guest's driver then finds."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack

import pytest

from pyvmm.errors import ConfigError
from pyvmm.kinds.disk import parse as parse_disk
from pyvmm.kinds.disk.storage import open_disk
from pyvmm.kinds.vm_spec import from_json, to_json, validate
from pyvmm.machine.outcome import Alarm
from pyvmm.spec.vm import DiskSpec, VmSpec
from pyvmm.testing import attached
from pyvmm.testing.blk_driver import OK, BlockDriver

PACKED, RING_RESET, IN_ORDER = 1 << 34, 1 << 40, 1 << 35


def vm(disk: DiskSpec, cpus: int = 4) -> VmSpec:
    return VmSpec("kernel", disks=(disk,), cpus=cpus)


def test_a_disk_has_one_split_queue_unless_told():
    disk = parse_disk("a.img")
    assert (disk.queues, disk.packed) == (1, False)


def test_queues_and_packed():
    disk = parse_disk("a.img,queues=3,packed,readonly")
    assert (disk.path, disk.queues, disk.packed, disk.read_only) == ("a.img", 3, True, True)
    assert from_json(to_json(validate(vm(disk)))).disks[0].queues == 3


@pytest.mark.parametrize("text", ["queues=", "queues=x", "queues=-1", "queues=1.5", "packed=1"])
def test_what_cannot_be_read(text):
    with pytest.raises(ConfigError):
        parse_disk(f"a.img,{text}")


@pytest.mark.parametrize("queues, cpus", [(0, 4), (5, 4), (2, 1), (10**18, 64)])
def test_more_queues_than_vcpus_are_of_no_use(queues, cpus):
    with pytest.raises(ConfigError, match="one per vCPU at most"):
        validate(vm(DiskSpec("a.img", queues=queues), cpus))


@pytest.mark.parametrize("packed", [False, True])
def test_the_driver_finds_what_was_asked_for(tmp_path, packed):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    spec = DiskSpec(str(path), id="vda", queues=4, packed=packed)
    with ExitStack() as closing:
        device = open_disk(spec, None, closing, Alarm())
        with attached(device, ring="packed" if packed else "split") as driver:
            assert bool(driver.mmio.offered_features() & PACKED) is packed
            assert driver.mmio.offered_features() & (RING_RESET | IN_ORDER) == RING_RESET
            assert len(driver.queues) == 4
            for queue in range(4):
                disk = BlockDriver(driver.mmio, queue)
                assert disk.write(queue, bytes([queue]) * 512).status == OK
                assert disk.read(queue, 512).data == bytes([queue]) * 512
    assert path.read_bytes()[:2048] == b"".join(bytes([n]) * 512 for n in range(4))


LOADED = """
import sys
from pyvmm.testing import attached
from pyvmm.virtio.rng.device import EntropyDevice
device = EntropyDevice()
device.features |= int(sys.argv[1])
with attached(device, start=False):
    print(*(f"pyvmm.virtio.queue.{layout}" in sys.modules for layout in ("split", "packed")))
"""


@pytest.mark.parametrize("features, loaded", [(0, "True False"), (PACKED, "True True")])
def test_a_layout_is_loaded_if_it_is_offered_and_before_a_driver_asks(features, loaded):
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(features)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == loaded


def test_over_vhost_user_the_front_end_has_its_say():
    from click.testing import CliRunner

    from pyvmm.cli.vhost_user import vhost_user_blk

    for option in ("packed", "queues=2"):
        arguments = ["--socket", "x.sock", "--disk", f"x.img,{option}"]
        result = CliRunner().invoke(vhost_user_blk, arguments)
        assert isinstance(result.exception, ConfigError)
        assert "--queues" in str(result.exception.cure)
