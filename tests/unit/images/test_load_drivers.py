"""The initramfs's load-drivers, run on this machine: it says what it would load."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pyvmm.images import initramfs, recipes
from pyvmm.kinds import registry
from pyvmm.virtio.constants import VIRTIO_ID_BLOCK, VIRTIO_ID_NET, VIRTIO_ID_RNG

needs_compiler = pytest.mark.skipif(
    shutil.which("musl-gcc") is None, reason="needs musl-gcc (musl-tools)"
)
PATIENCE = 60
TYPES = {
    "disk": VIRTIO_ID_BLOCK,
    "net": VIRTIO_ID_NET,
    "rng": VIRTIO_ID_RNG,
    "share": 26,  # VIRTIO_ID_FS of <linux/virtio_ids.h>
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("helpers")
    initramfs.compile_helpers(recipes.load(), str(folder))
    return folder / "load-drivers"


class Guest:
    """What the initramfs and sysfs of a guest have, in a folder."""

    def __init__(self, folder: Path, program: Path) -> None:
        self.program, self.modules, self.sysfs = program, folder / "modules", folder / "sys"
        self.modules.mkdir()
        (self.sysfs / "bus/virtio/devices").mkdir(parents=True)
        self.lists(1, "failover", "net_failover", "virtio_net")
        self.lists(4, "rng_core", "virtio_rng")
        self.lists(26, "fuse", "virtiofs")

    def lists(self, number: int, *modules: str) -> None:
        (self.modules / f"virtio-{number}").write_text("".join(f"{name}\n" for name in modules))
        for name in modules:
            (self.modules / f"{name}.ko").touch()

    def has_loaded(self, *modules: str) -> None:
        for name in modules:
            (self.sysfs / "module" / name).mkdir(parents=True)

    def has_device(self, number: int) -> None:
        device = self.sysfs / f"bus/virtio/devices/virtio{number}"
        device.mkdir()
        (device / "modalias").write_text(alias(number) + "\n")

    @contextmanager
    def running(self, *types: int) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
        """The program, and where its messages come from."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [self.program, "-n", "-m", self.modules, "-s", self.sysfs, *map(str, types)]
        with ours, subprocess.Popen(command, stdin=its, stdout=subprocess.PIPE, text=True) as run:
            its.close()
            try:
                yield run, ours
            finally:
                run.kill()

    def loads(self, messages: Sequence[bytes], *types: int) -> list[str]:
        with self.running(*types) as (run, ours):
            with suppress(BrokenPipeError):  # it has nothing left to do
                for message in messages:
                    ours.send(message)
            ours.shutdown(socket.SHUT_WR)
            said, _ = run.communicate(timeout=PATIENCE)
            assert run.returncode == 0
            return said.split()


@pytest.fixture
def guest(tmp_path: Path, program: Path) -> Guest:
    return Guest(tmp_path, program)


def alias(number: int) -> str:
    """As Linux has it (drivers/virtio/virtio.c, modalias_show)."""
    return f"virtio:d{number:08X}v{0x1AF4:08X}"


def event(modalias: str, action: str = "add", more: Sequence[str] = ()) -> bytes:
    """As Linux has it (lib/kobject_uevent.c)."""
    path = "/devices/pci0000:00/0000:00:04.0/virtio3"
    words = [f"{action}@{path}", f"ACTION={action}", f"DEVPATH={path}", "SUBSYSTEM=virtio"]
    return "".join(f"{word}\0" for word in (*words, *more, f"MODALIAS={modalias}")).encode()


@needs_compiler
def test_a_device_that_comes_gets_its_drivers_in_their_order_and_once(guest: Guest) -> None:
    messages = [event(alias(26)), event(alias(1)), event(alias(26))]
    expected = ["fuse", "virtiofs", "failover", "net_failover", "virtio_net"]
    assert guest.loads(messages, 1, 2, 4, 26) == expected


@needs_compiler
def test_modules_that_are_loaded_are_left_out(guest: Guest) -> None:
    guest.has_loaded("failover", "net_failover", "virtio_net", "fuse")
    assert guest.loads([event(alias(1)), event(alias(26))], 1, 4, 26) == ["virtiofs"]
    guest.has_loaded("virtiofs")
    assert guest.loads([], 1, 26) == []


@needs_compiler
def test_files_may_go_while_it_waits(guest: Guest) -> None:
    guest.has_device(1)  # one that came before it listened
    with guest.running(1, 4) as (run, ours):
        assert run.stdout is not None
        before = [run.stdout.readline().strip() for _ in range(3)]
        assert before == ["failover", "net_failover", "virtio_net"]  # it has opened all by now
        shutil.rmtree(guest.modules)
        ours.send(event(alias(4)))
        ours.shutdown(socket.SHUT_WR)
        said, _ = run.communicate(timeout=PATIENCE)
    assert said.split() == ["rng_core", "virtio_rng"]


@needs_compiler
@pytest.mark.parametrize(
    "message",
    [
        event(alias(1), "remove"),
        event(alias(1), "change"),
        event("pci:v00001AF4d00001041sv00001AF4sd00000040bc02sc00i00"),
        event("virtio:d1v00001AF4"),
        event("virtio:d"),
        event("virtio:d-0000001v00001AF4"),
        event("virtio:d0000001"),
        event("virtio:dFFFFFFFFv00001AF4"),
        event(""),
        b"add@/devices/virtio0",
        b"add@",
        b"\0",
        b"\xff" * 4096,
        b"MODALIAS=" + alias(1).encode(),
        event(alias(1), more=["A" * 9000]),  # longer than any of the kernel's
        b"libudev\0\xfe\xed\xca\xfe" + event(alias(1)),
    ],
)
def test_other_messages_load_nothing(guest: Guest, message: bytes) -> None:
    assert guest.loads([message, event(alias(4))], 1, 4) == ["rng_core", "virtio_rng"]


@needs_compiler
def test_long_lists_and_many_types_are_bounded(guest: Guest) -> None:
    guest.lists(1, *(f"m{number}" for number in range(100)))
    (guest.modules / "virtio-4").write_text("a" * 100_000 + "\n\n\nrng_core")
    assert len(guest.loads([event(alias(1))], *[1] * 40)) == 64
    assert guest.loads([event(alias(4))], 4) == ["rng_core"]


def test_init_asks_for_the_drivers_of_all_devices_that_can_come() -> None:
    init = Path(recipes.load().file("initramfs", "init")).read_text()
    [found] = re.findall(r"&& load-drivers ([\d ]+)$", init, re.MULTILINE)
    assert sorted(found.split()) == sorted(str(TYPES[kind]) for kind in registry.come_and_go())
    recipe = recipes.load().initramfs
    wanted = {f"virtio-{number}" for number in found.split()}
    assert wanted <= set(recipe.modules)
    assert not wanted & set(recipe.compressed), "load-drivers reads no compressed modules"
