"""The Python API on Linux guests: commands, files, the clock, a clean end; asyncio."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from disks import artifacts, fsck, root_disk

from pyvmm import VM, AgentError, AsyncVM, CommandTimeout, GuestPanic, PyvmmError
from pyvmm.machine.outcome import Ending

pytestmark = pytest.mark.usefixtures("linux_guests")

NAMES = [f"{name}-{os.getpid()}" for name in ("one", "two")]


def test_a_vm_from_its_start_to_its_clean_end(tmp_path):
    """One boot for all that is asked of one guest after another."""
    files = artifacts()
    with root_disk(tmp_path) as disk:
        with VM(kernel=files.vmlinux, initrd=files.initramfs, disks=[disk], balloon=True) as vm:
            vm.wait_ready()
            check_commands(vm)
            check_files(vm, tmp_path)
            check_the_rest(vm)
            assert vm.console.expect_exact(["nothing like it", "init reached"], timeout=0) == 1
        # Its disk is kept, so it was asked to power off.
        assert vm.outcome.ending is Ending.POWEROFF
        assert fsck(disk) == ""


def check_commands(vm: VM) -> None:
    done = vm.run(["sh", "-c", "echo out; echo err >&2; pwd; exit 3"], cwd="/tmp")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n/tmp\n", b"err\n")
    assert vm.run(["cat"], input=b"\0binary\xff" * 1000).stdout == b"\0binary\xff" * 1000
    assert vm.run(["sh", "-c", "kill -9 $$"]).returncode == -9
    assert vm.run(["sh", "-c", "echo $GREETING"], env={"GREETING": "hi"}).stdout == b"hi\n"
    with pytest.raises(AgentError, match="no-such-command") as error:
        vm.run(["no-such-command"])
    assert "init reached" in vm.console.text and "console ends" in error.value.__notes__[0]
    with pytest.raises(AgentError, match="exited with 1"):
        vm.run(["false"], check=True)
    with pytest.raises(CommandTimeout):
        vm.run(["sleep", "1000"], timeout=0.5)
    while vm.run(["pidof", "sleep"]).returncode == 0:
        time.sleep(0.1)
    with vm.popen(["cat"], stdin=True) as command:
        assert command.write(b"ping") == 4
        assert command.read() == (1, b"ping")
        command.close_stdin()
        assert command.wait() == 0
    with vm.popen(["sleep", "1000"]) as command:
        pid = _pid_in_guest(vm, "sleep")
    assert _has_gone(vm, pid)


def _pid_in_guest(vm: VM, name: str) -> int:
    while not (found := vm.run(["pidof", name]).stdout):
        time.sleep(0.1)
    return int(found)


def _has_gone(vm: VM, pid: int) -> bool:
    while vm.run(["test", "-d", f"/proc/{pid}"]).returncode == 0:
        time.sleep(0.1)
    return True


def check_files(vm: VM, folder: Path) -> None:
    tree = folder / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "data").write_bytes(bytes(range(256)) * 100)
    (tree / "link").symlink_to("below/data")
    vm.push(tree, "/root/")
    vm.run(["cmp", "/root/tree/below/data", "/root/tree/link"], check=True)
    vm.run(["cp", "-a", "/root/tree", "/root/copy"], check=True)
    vm.pull("/root/copy", folder)
    assert (folder / "copy" / "below" / "data").read_bytes() == bytes(range(256)) * 100
    assert (folder / "copy" / "link").readlink() == Path("below/data")
    with pytest.raises(PyvmmError, match="nowhere"):
        vm.pull("/nowhere", folder)


def check_the_rest(vm: VM) -> None:
    vm.run(["date", "-s", "@1000000000"], check=True)
    assert vm.clock().time < 1_000_100_000
    assert abs(vm.set_clock().offset) < 60
    vm.pause()
    assert vm.status()["state"] == "paused"
    vm.resume()
    vm.balloon.set("32M")
    while vm.balloon.stats()["actual"] < 32 << 20:
        time.sleep(0.1)
    assert vm.run(["true"]).returncode == 0


def test_a_panic_while_a_command_runs():
    with VM("debian") as vm:
        vm.wait_ready()
        with pytest.raises(GuestPanic, match="panic") as error:
            vm.run(["sh", "-c", "echo c > /proc/sysrq-trigger; sleep 1000"])
        assert "sysrq" in str(error.value) and error.value.console in vm.console.text
        assert vm.outcome.ending is Ending.PANIC


def test_two_guests_for_asyncio_at_the_same_time():
    booted: list[str] = []

    async def boot(name: str) -> str:
        async with AsyncVM("debian", name=name) as vm:
            await vm.wait_ready()
            booted.append(name)
            while len(booted) < 2:  # both are there at once
                await asyncio.sleep(0.05)
            command = asyncio.create_task(vm.run(["sleep", "1000"]))
            while (await vm.run(["pidof", "sleep"])).returncode:
                await asyncio.sleep(0.1)
            command.cancel()
            with pytest.raises(asyncio.CancelledError):
                await command
            while (await vm.run(["pidof", "sleep"])).returncode == 0:
                await asyncio.sleep(0.1)
            async with await vm.popen(["cat"], stdin=True) as cat:
                with pytest.raises(TimeoutError):
                    await cat.read(timeout=0.1)
                await cat.write(name.encode())
                piece = await cat.read()
                await cat.close_stdin()
                assert await cat.wait() == 0
            return piece.data.decode()

    async def main() -> list[str]:
        return await asyncio.gather(*map(boot, NAMES))

    assert asyncio.run(main()) == NAMES
