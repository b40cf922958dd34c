"""The Python API on a guest that echoes, on real KVM."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest
from echo_guest import echo_kernel, stop_process

import pyvmm
from pyvmm import VM, ConfigError, Disk, GuestEnded, GuestPanic, MonitorDied, VMError, VMTimeout
from pyvmm.api.attached import AttachedMonitor
from pyvmm.api.monitor import OwnMonitor
from pyvmm.control import registry
from pyvmm.kvm.system import Kvm
from pyvmm.machine.outcome import Ending

SAFETY_TIMEOUT = 60


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of its own for control sockets: so a VM is called vm, whatever else runs."""
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    return tmp_path


@pytest.fixture
def kernel(kvm: Kvm, tmp_path: Path) -> str:
    return echo_kernel(tmp_path)


def test_talking_to_a_guest(kernel):
    with VM(kernel=kernel, kvm="host", memory="64M") as vm:
        assert vm.console.expect("rea(..)", timeout=SAFETY_TIMEOUT) == 0
        assert (vm.console.match.group(1), vm.console.after) == ("dy", "ready")
        vm.console.sendline("hello")
        assert vm.console.expect_exact(["never", "hello"], timeout=SAFETY_TIMEOUT) == 1
        vm.console.sendcontrol("c")
        vm.console.expect("\x03", timeout=SAFETY_TIMEOUT)
        assert vm.console.before.endswith("\n")
        assert "ready\nhello" in vm.console.text
        assert registry.running() == ["vm"] == [vm.name]
        assert vm.status()["memory"] == 64 << 20
    assert registry.running() == []
    assert vm.outcome.ending is Ending.TERMINATED


def test_a_monitor_imports_nothing_that_a_guest_may_have_written(
    kernel: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty entry of PYTHONPATH is the current directory, and that may be shared."""
    for name in ("json.py", "sitecustomize.py"):
        (place / name).write_text(f"open({str(place / 'mark')!r}, 'w')")
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", ":/nowhere")
    with VM(kernel=kernel, kvm="host", memory="64M") as vm:
        vm.console.expect_exact("ready", timeout=SAFETY_TIMEOUT)
    assert not (place / "mark").exists()


def test_much_that_is_typed_all_arrives(kernel):
    with VM(kernel=kernel, kvm="host", memory="64M") as vm:
        vm.console.send("x" * 5000 + "\n")
        vm.console.expect("x{5000}\n", timeout=SAFETY_TIMEOUT)


def test_a_guest_that_powers_off_by_itself(kernel):
    with VM(kernel=kernel, kvm="host") as vm:
        vm.console.expect("ready", timeout=SAFETY_TIMEOUT)
        vm.console.send("O")
        assert vm.wait(SAFETY_TIMEOUT).ending is Ending.POWEROFF
        with pytest.raises(GuestEnded, match="vm has ended"):
            vm.console.expect("more")
        assert vm.console.expect(["more", pexpect.EOF]) == 1
        with pytest.raises(GuestEnded):
            vm.pause()
        with pytest.raises(VMError):
            vm.console.send("x")


def test_a_panic_is_told_with_the_end_of_the_console(kernel):
    with VM(kernel=kernel, kvm="host") as vm:
        vm.console.expect("ready", timeout=SAFETY_TIMEOUT)
        vm.console.send("P")
        with pytest.raises(GuestPanic, match=r"vm has ended: .*panic") as error:
            vm.console.expect("never", timeout=SAFETY_TIMEOUT)
    assert error.value.outcome.exit_code == 11
    assert error.value.console == "ready\nKernel panic - not syncing: asked for"
    assert "not syncing" in error.value.__notes__[0]


def test_a_monitor_that_is_killed(kernel):
    with VM(kernel=kernel, kvm="host") as vm:
        os.kill(vm.pid, signal.SIGKILL)
        with pytest.raises(MonitorDied, match="exit code -9"):
            vm.console.expect("never", timeout=SAFETY_TIMEOUT)
        with pytest.raises(MonitorDied):
            vm.status()
        assert vm.wait(SAFETY_TIMEOUT).exit_code == -signal.SIGKILL


def test_what_does_not_come_in_time(kernel):
    with VM(kernel=kernel, kvm="host") as vm:
        vm.console.expect("ready", timeout=SAFETY_TIMEOUT)
        with pytest.raises(VMTimeout, match=r"did not show 'never' within 0.1 s") as error:
            vm.console.expect("never", timeout=0.1)
        assert error.value.console == "ready"
        assert vm.console.expect([pexpect.TIMEOUT, "never"], timeout=0.1) == 0
        with pytest.raises(TimeoutError, match="vm still runs"):
            vm.wait(0.1)


def test_two_at_a_time_have_names_of_their_own(kernel):
    with VM(kernel=kernel, kvm="host") as one, VM(kernel=kernel, kvm="host") as two:
        assert {one.name, two.name} == {"vm", "vm-2"}
        for vm in (one, two):
            vm.console.expect("ready", timeout=SAFETY_TIMEOUT)
        one.kill()
        two.console.send("still here")
        two.console.expect("still here", timeout=SAFETY_TIMEOUT)


def test_pausing_and_going_on(kernel):
    with VM(kernel=kernel, kvm="host") as vm:
        vm.console.expect("ready", timeout=SAFETY_TIMEOUT)
        vm.pause()
        assert vm.status()["state"] == "paused"
        vm.console.send("x")
        with pytest.raises(VMTimeout):
            vm.console.expect("x", timeout=0.2)
        vm.resume()
        vm.console.expect("x", timeout=SAFETY_TIMEOUT)


def test_a_paused_vm_is_named_as_such_whatever_is_wanted_of_its_guest(kernel, place):
    with VM(kernel=kernel, kvm="host") as vm:
        vm.pause()
        for ask in (
            lambda: vm.run(["true"], timeout=SAFETY_TIMEOUT),
            lambda: vm.popen(["true"]),
            lambda: vm.pull("/etc/hosts", place),
            lambda: vm.push(kernel, "/"),
            vm.wait_ready,
            vm.clock,
            vm.set_clock,
        ):
            with pytest.raises(pyvmm.PyvmmError, match=r"^vm is paused; pyvmm resume vm has it"):
                ask()
        vm.resume()
        with pytest.raises(pyvmm.PyvmmError, match="no agent answers"):
            vm.run(["true"])


def test_a_monitor_that_stands_still_holds_nobody_up_longer_than_is_wanted(kernel, place):
    with VM(kernel=kernel, kvm="host") as vm:
        stop_process(vm.pid)
        begin = time.monotonic()
        with pytest.raises(pyvmm.CommandTimeout, match=r"true took longer than 0\.2 s"):
            vm.run(["true"], timeout=0.2)
        with pytest.raises(pyvmm.CommandTimeout):
            vm.popen(["true"], timeout=0.2)
        with pytest.raises(pyvmm.CommandTimeout, match="the copy took longer"):
            vm.pull("/etc/hosts", place, timeout=0.2)
        with pytest.raises(pyvmm.PyvmmError, match="does not answer"):
            vm.wait_ready(0.2)
        # Each has looked for two seconds whether the VM has ended; without a limit it is a minute.
        assert time.monotonic() - begin < 4 * 15
        assert vm.stop(0.2).exit_code == -signal.SIGKILL


def test_a_monitor_that_does_not_come_up_is_given_up(kernel, monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 1000\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    vm = VM(kernel=kernel, kvm="host")
    with pytest.raises(VMTimeout, match=r"did not start within 0\.2 s"):
        vm.start(0.2)
    assert vm.outcome is not None


def test_a_disk_grows(kernel, place):
    (place / "disk.img").write_bytes(bytes(1 << 20))
    disk = Disk(str(place / "disk.img"), id="data")
    with VM(kernel=kernel, kvm="host", disks=disk) as vm:
        assert vm.resize_disk("data", "2M") == 2 << 20
        with pytest.raises(pyvmm.PyvmmError, match="would be lost"):
            vm.resize_disk("data", 1 << 20)
        assert vm.resize_disk("data", 1 << 20, shrink=True) == 1 << 20
    assert (place / "disk.img").stat().st_size == 1 << 20


def test_a_balloon(kernel):
    with VM(kernel=kernel, kvm="host", balloon=True) as vm:
        vm.balloon.set("64M")
        assert vm.balloon.stats()["target"] == 64 << 20
    with (
        VM(kernel=kernel, kvm="host") as vm,
        pytest.raises(pyvmm.PyvmmError, match="has no balloon"),
    ):
        vm.balloon.set(0)


# --- starting and ending --------------------------------------------------------------------------


def test_options_are_checked_before_anything_starts(kernel):
    with pytest.raises(ConfigError, match="65 vCPUs"):
        VM(kernel=kernel, cpus=65)
    with pytest.raises(TypeError, match="memry"):
        VM(kernel=kernel, memry=3)


def test_what_only_the_monitor_sees_is_a_config_error_too(kernel, place):
    vm = VM(kernel=kernel, kvm="host", disks=["nowhere.img"])
    with pytest.raises(ConfigError, match=r"nowhere\.img.*check the path"):
        vm.start()
    assert registry.running() == []


def test_what_does_not_start_in_time_is_ended(kernel):
    vm = VM(kernel=kernel, kvm="host")
    with pytest.raises(VMTimeout, match="vm did not start within 0 s"):
        vm.start(timeout=0)
    assert registry.running() == []


def test_a_name_that_is_taken(kernel):
    with VM(kernel=kernel, kvm="host", name="mine") as vm:
        assert vm.name == "mine"
        with pytest.raises(ConfigError, match="'mine' is running"):
            VM(kernel=kernel, kvm="host", name="mine").start()
        assert vm.status()["state"] == "running"


def test_a_monitor_that_has_ended_before_its_name_is_asked_for(kernel):
    with VM(kernel=kernel, kvm="host", name="mine") as vm:
        monitor = OwnMonitor(vm.spec, "host")
        assert monitor.wait(SAFETY_TIMEOUT).exit_code == 2
        with pytest.raises(ConfigError, match="'mine' is running"):
            monitor.wait_for_name(SAFETY_TIMEOUT)


def test_a_monitor_that_has_ended_is_not_signalled(kernel):
    with VM(kernel=kernel, kvm="host", name="mine") as vm:
        attached = AttachedMonitor("mine")
    assert attached.wait(SAFETY_TIMEOUT).exit_code == 143
    attached.signal(signal.SIGTERM)
    attached.detach()
    assert vm.outcome.ending is Ending.TERMINATED


def test_stopping_again_and_before_it_was_started(kernel):
    vm = VM(kernel=kernel, kvm="host")
    assert vm.stop() == (None, "")
    with pytest.raises(VMError, match="not been started"):
        vm.pause()
    vm.start()
    assert vm.stop() == vm.stop()
    with pytest.raises(VMError, match="started before"):
        vm.start()


def test_a_configuration_file_makes_the_same_vm(kernel, place):
    first = VM(kernel=kernel, kvm="host", memory="64M", disks=["ram:1M"], rng=True)
    (place / "vm.toml").write_text(first.to_config())
    second = VM.from_config(place / "vm.toml", cpus=2)
    assert second.spec.disks == first.spec.disks
    assert second.spec.devices == first.spec.devices
    assert (second.spec.memory, second.spec.cpus) == (64 << 20, 2)
    with second as vm:
        vm.console.expect("ready", timeout=SAFETY_TIMEOUT)


PROGRAM = """
import sys, threading, time
from pyvmm import VM
def start():
    vm = VM(kernel=sys.argv[1], kvm="host").start()
    vm.console.expect("ready", timeout=60)
    print(vm.pid, flush=True)
# The thread that has started it ends; the VM does not.
thread = threading.Thread(target=start)
thread.start()
thread.join()
sys.stdin.read()
"""


def test_it_ends_when_the_program_is_killed_that_started_it(kernel):
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, kernel], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with program:
        pid = int(program.stdout.readline())
        monitor = os.pidfd_open(pid)
        assert registry.running() == ["vm"]
        program.kill()
    poll = select.poll()
    poll.register(monitor, select.POLLIN)
    assert poll.poll(SAFETY_TIMEOUT * 1000), "the monitor has outlived its program"
    os.close(monitor)
    assert registry.running() == []


def test_ctrl_c_is_the_programs_alone(kernel):
    with VM(kernel=kernel, kvm="host") as vm:
        vm.console.expect("ready", timeout=SAFETY_TIMEOUT)
        assert os.getpgid(vm.pid) != os.getpgrp()


def test_using_the_package_for_something_else_costs_nothing():
    code = "import sys, pyvmm; print(*(name for name in sys.modules if name.startswith('pyvmm')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["pyvmm"]
    assert set(pyvmm.__all__) == set(pyvmm._PUBLIC)
    for name in pyvmm.__all__:
        assert getattr(pyvmm, name)


# --- events, and VMs that run already -------------------------------------------------------------


def test_what_happens_is_told(kernel):
    with VM(kernel=kernel, kvm="host") as vm:
        events = vm.events()
        assert next(events).kind == "started"
        vm.pause()
        vm.resume()
        vm.console.expect("ready", timeout=SAFETY_TIMEOUT)
        vm.console.send("P")
        found = list(events)
        assert [event.kind for event in found] == ["paused", "resumed", "panic", "ended"]
        assert found[-1].details["exit_code"] == 11
        assert found[0].time <= found[-1].time
        with pytest.raises(GuestPanic):
            vm.events()


def test_attaching_to_a_vm_that_runs(kernel):
    with VM(kernel=kernel, kvm="host", name="mine") as vm:
        vm.console.expect("ready", timeout=SAFETY_TIMEOUT)
        with VM.attach("mine") as same:
            assert (same.name, same.pid) == ("mine", vm.pid)
            same.console.expect("ready", timeout=SAFETY_TIMEOUT)
            same.console.sendline("from elsewhere")
            same.console.expect("from elsewhere", timeout=SAFETY_TIMEOUT)
            assert same.status()["name"] == "mine"
        vm.console.expect("from elsewhere", timeout=SAFETY_TIMEOUT)
        assert vm.status()["state"] == "running"
        with pytest.raises(VMError):
            same.console.expect("more", timeout=SAFETY_TIMEOUT)
        again = VM.attach("mine")
        vm.console.send("O")
        assert again.wait(SAFETY_TIMEOUT) == vm.wait(SAFETY_TIMEOUT) == (0, "")
        assert again.events is not None
    with pytest.raises(ConfigError, match="no VM called 'mine'"):
        VM.attach("mine")


def test_stopping_a_vm_that_was_attached_to(kernel):
    with VM(kernel=kernel, kvm="host") as vm:
        assert VM.attach("vm").stop().ending is Ending.TERMINATED
        assert vm.wait(SAFETY_TIMEOUT).ending is Ending.TERMINATED
        with pytest.raises(ConfigError):
            VM.attach("vm")


FORKS = """
import asyncio, gc, multiprocessing, os, sys, time
from pyvmm import VM, AsyncVM, VMError

kernel, way = sys.argv[1:]
TIMEOUT = 60

def leave(vm):
    if way == "return":
        return
    if way == "collected":
        del vm
        gc.collect()
    if way == "finally":
        try:
            sys.exit(7)
        finally:
            vm.stop()
            vm.kill()
            vm.detach()
    if way == "methods":
        assert vm.status()["state"] == "running"
        vm.pause()
        vm.resume()
        owner = os.getppid()
        for ask in (
            vm.wait, attached.wait, console.tail, lambda: vm.console, lambda: vm.messages,
            lambda: console.expect("x"), lambda: console.send("x"), lambda: console.text,
        ):
            try:
                ask()
            except VMError as error:
                assert f"belongs to process {owner}, which this one was forked from" in str(error)
            else:
                raise AssertionError(ask)
        with VM.attach(vm.name) as own:
            own.console.send("mine")
            own.console.expect("mine", timeout=TIMEOUT)
    if way == "own":
        with VM(kernel=kernel, kvm="host") as own:
            own.console.expect("ready", timeout=TIMEOUT)
            assert own.name == "vm-2"
        assert own.outcome is not None
    if way == "_exit":
        os._exit(7)
    sys.exit(7)

def wait_for(child, vm):
    begin = time.monotonic()
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), "at once" if time.monotonic() - begin < 20 else "late")
    assert vm.outcome is None

async def in_asyncio():
    async with AsyncVM(kernel=kernel, kvm="host") as vm:
        await vm.console.expect("ready", timeout=TIMEOUT)
        if not (child := os.fork()):
            await vm.stop()
            await vm.kill()
            await vm.__aexit__(None, None, None)
            os._exit(7)  # asyncio's own clean-up would harm the loop of the other process
        wait_for(child, vm.vm)
        await vm.console.send("still here")
        await vm.console.expect("still here", timeout=TIMEOUT)

if way == "asyncio":
    asyncio.run(in_asyncio())
    sys.exit(0)
with VM(kernel=kernel, kvm="host") as vm:
    console = vm.console
    console.expect("ready", timeout=TIMEOUT)
    attached = VM.attach(vm.name)
    if way == "multiprocessing":
        process = multiprocessing.get_context("fork").Process(target=leave, args=(vm,))
        process.start()
        wait_for(process.pid, vm)
    else:
        with attached:
            if child := os.fork():
                wait_for(child, vm)
                attached.console.send("attached")
                attached.console.expect("attached", timeout=TIMEOUT)
            else:
                leave(vm)
    if os.getpid() == vm._monitor.owner:
        console.send("still here")
        console.expect("still here", timeout=TIMEOUT)
"""


@pytest.mark.parametrize(
    ("way", "code"),
    [
        ("exit", 7),
        ("return", 0),
        ("collected", 7),
        ("finally", 7),
        ("_exit", 7),
        ("own", 7),
        ("multiprocessing", 7),
        ("asyncio", 7),
        ("methods", 7),
    ],
)
def test_a_forked_process_has_no_vm_to_end_and_waits_for_none(kernel, way, code) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKS, kernel, way],
        capture_output=True,
        text=True,
        timeout=4 * SAFETY_TIMEOUT,
    )
    assert (done.returncode, done.stdout) == (0, f"{code} at once\n"), done.stderr
    assert registry.running() == []
