"""A disk and a random number generator of other processes, driven by a guest without an operating
system: through our own back end, and through QEMU's."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest
from c_guest import c_guest
from front_end_rig import listens_at, process, until

from pyvmm import VM, ConfigError, images
from pyvmm.kvm.system import Kvm

MIB = 1 << 20
TEXT = b"sector 0 of the image"

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (gcc)")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The guest's, built from its source."""
    folder = tmp_path_factory.mktemp("guest")
    return c_guest("virtio_guest.c", folder, "DISK", "RNG")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(TEXT.ljust(MIB, b"\0"))
    return path


@contextmanager
def storage_daemon(image: Path, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """QEMU's export of `image` at `path`."""
    try:
        program = images.storage_command("qemu-storage-daemon")
    except ConfigError as error:
        pytest.skip(str(error))
    export = f"type=vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path={path}"
    file = f"driver=file,node-name=f,filename={image}"
    daemon = subprocess.Popen([*program, "--blockdev", file, "--export", export])
    try:
        until(lambda: listens_at(path) or daemon.poll() is not None)
        yield daemon
    finally:
        daemon.kill()
        daemon.wait()
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("peer", ["ours", "qemu"])
def test_a_guest_uses_devices_of_other_processes(
    kvm: Kvm, tmp_path: Path, kernel: str, image: Path, peer: str
) -> None:
    disk, rng = tmp_path / "disk.sock", tmp_path / "rng.sock"

    def back_end() -> AbstractContextManager[subprocess.Popen[bytes]]:
        if peer == "qemu":
            return storage_daemon(image, disk)
        return process("vhost-user-blk", "--disk", str(image), path=disk)

    devices = [f"socket={disk},type=blk", f"socket={rng},type=rng"]
    with (
        process("vhost-user", "--rng", path=rng),
        back_end() as serving,
        VM(kernel=kernel, kvm="host", vhost_user=devices, vsock=False) as vm,
    ):
        vm.console.expect("ready")
        vm.console.send("r")
        vm.console.expect(TEXT.decode())
        vm.console.send("w")
        vm.console.expect("written")
        assert image.read_bytes()[512:1024] == b"g" * 512
        vm.console.send("n")
        vm.console.expect("random")
        vm.pause()
        vm.resume()
        serving.kill()
        serving.wait()
        disk.unlink()
        vm.console.send("r")
        with back_end():
            vm.console.expect(TEXT.decode())

            def reconnections() -> int | None:
                stats = vm.stats()["devices"]["vhost-user-blk"]
                return stats["reconnections"] if stats["connected"] else None

            until(lambda: reconnections() == 1)  # it is counted once it serves
            vm.console.send("O")
            assert vm.wait().exit_code == 0


@pytest.mark.parametrize("peer", ["ours", "qemu"])
def test_a_guest_goes_on_from_a_snapshot_with_other_back_ends(
    kvm: Kvm, tmp_path: Path, kernel: str, image: Path, peer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    disk, rng = tmp_path / "disk.sock", tmp_path / "rng.sock"

    def back_ends() -> ExitStack:
        with ExitStack() as opened:
            opened.enter_context(process("vhost-user", "--rng", path=rng))
            words = ("vhost-user-blk", "--disk", str(image))
            ours = peer == "ours"
            served = process(*words, path=disk) if ours else storage_daemon(image, disk)
            opened.enter_context(served)
            return opened.pop_all()

    devices = [f"socket={disk},type=blk", f"socket={rng},type=rng"]
    with back_ends(), VM(kernel=kernel, kvm="host", vhost_user=devices, vsock=False) as vm:
        vm.console.expect("ready")
        vm.console.send("w")
        vm.console.expect("written")
        vm.snapshot("first")
        vm.console.send("n")  # it goes on
        vm.console.expect("random")
        with pytest.raises(ConfigError, match=r"copies cannot share the back end at .*disk.sock"):
            vm.clone()
        vm.snapshot("second", stop=True)
    with pytest.raises(ConfigError, match=r"no back end can be reached.*start it first"):
        VM.restore("second", kvm="host").start()
    with back_ends(), VM.restore("second", kvm="host") as vm:
        vm.console.send("r")
        vm.console.expect(TEXT.decode())
        vm.console.send("w")
        vm.console.expect("written")
        vm.console.send("n")
        vm.console.expect("random")
        assert vm.stats()["devices"]["vhost-user-blk"]["connected"]
        vm.snapshot("third", stop=True)
    image.write_bytes(bytes(2 * MIB))
    with back_ends(), pytest.raises(ConfigError, match="has a disk of another size"):
        VM.restore("third", kvm="host").start()
