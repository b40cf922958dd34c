"""`pyvmm stop`, SIGTERM and `vm.stop()` ask the guest first, by its power button here; on real KVM.
(tests/guest has the agent, and Linux's own driver for the button.)
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from boot_images import Elf, Load
from running import SAFETY_TIMEOUT, Running

from pyvmm import VM
from pyvmm.api.errors import VMTimeout
from pyvmm.control.client import HasEnded, events
from pyvmm.kvm.system import Kvm

# Unmask pin 9 of the I/O APIC, as vector 0x40 of CPU 0: its index register, then its window.
# mov ebx,0xfec00000; mov dword [rbx],0x22; mov dword [rbx+16],0x40; then 0x23 and 0 likewise
UNMASK = bytes.fromhex("bb0000c0fe c70322000000 c7431040000000 c70323000000 c7431000000000")
# mov ecx,0xfee00000; mov dword [rcx+0xf0],0x1ff: the local APIC takes interrupts
ENABLE = bytes.fromhex("b90000e0fe c781f0000000ff010000")
# mov dx,0x3f8; mov al,'w'; out dx,al
SAY = bytes.fromhex("66baf803 b077 ee")
# again: mov eax,[rcx+0x220]; test al,1; jz again: until the local APIC has vector 0x40
WAIT = bytes.fromhex("8b8120020000 a801 74f6")
# mov dx,0x600; mov al,5<<2|0x20; out dx,al; jmp $: sleep state S5
OFF = bytes.fromhex("66ba0006 b034 ee ebfe")
# mov dx,0x3f8; mov al,'p'; out dx,al; jmp $
IGNORE = bytes.fromhex("66baf803 b070 ee ebfe")
# mov al,0xfe; out 0x64,al; jmp back
RESET = bytes.fromhex("b0fe e664 ebfa")

OBEYS = UNMASK + ENABLE + SAY + WAIT + OFF
IGNORES = UNMASK + ENABLE + SAY + WAIT + IGNORE
REBOOTS = UNMASK + ENABLE + SAY + WAIT + RESET
# Nobody listens to the first press: mov dx,0x3f8; mov al,'p'; out dx,al; then pin 9 brings vector
# 0x41, and the guest waits for that.
MISSES = UNMASK + ENABLE + SAY + WAIT + IGNORE[:-2] + UNMASK.replace(b"\x10\x40", b"\x10\x41")
MISSES += WAIT.replace(b"\xa8\x01", b"\xa8\x02") + OFF
DEAF = SAY + bytes.fromhex("ebfe")


class Guest(Running):
    folder: Path

    def wait_for(self, said: bytes) -> None:
        """Until the guest's console has said so."""
        deadline = time.monotonic() + SAFETY_TIMEOUT
        while said not in (self.folder / "console").read_bytes():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self) -> tuple[int, str]:
        code = self.process.wait(SAFETY_TIMEOUT)
        assert self.process.stderr is not None
        return code, self.process.stderr.read().decode()


@pytest.fixture
def start(kvm: Kvm, tmp_path: Path) -> Iterator[Callable[..., Guest]]:
    started: list[Guest] = []

    class Made(Guest):
        folder = tmp_path

        def start(self, *args: str) -> subprocess.Popen[bytes]:
            with open(tmp_path / "console", "wb") as console:
                return subprocess.Popen(
                    [sys.executable, "-m", "pyvmm", *args],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.PIPE,
                )

    def run(code: bytes, *options: str) -> Guest:
        guest = Made(tmp_path, "web", code, *options)
        started.append(guest)
        guest.wait_for(b"w")
        return guest

    yield run
    for guest in started:
        guest.__exit__()


ASKED = "pyvmm: web: asked the guest to power off, by its power button\n"


def test_a_guest_that_is_asked_powers_off(start) -> None:
    guest = start(OBEYS)
    done = guest("stop", "web")
    assert (done.returncode, done.stderr) == (0, "")
    assert guest.end() == (0, ASKED)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_too(start, number) -> None:
    guest = start(OBEYS)
    guest.process.send_signal(number)
    assert guest.end() == (0, ASKED)


def test_a_paused_guest_is_resumed_to_be_asked(start) -> None:
    guest = start(OBEYS)
    assert guest("pause", "web").returncode == 0
    assert guest("stop", "web").returncode == 0
    assert guest.end() == (0, ASKED)


def test_a_guest_that_does_not_is_cut_off_and_that_is_said(start) -> None:
    guest = start(IGNORES)
    done = guest("stop", "--timeout", "0.5", "web")
    cut = "web: ended by pyvmm stop: did not power off within 0.5 s, so its power was cut\n"
    assert (done.returncode, done.stderr) == (0, f"pyvmm: {cut}")
    assert guest.end() == (143, f"{ASKED}pyvmm: {cut}")
    assert b"p" in (guest.folder / "console").read_bytes()


def test_a_guest_that_missed_the_press_is_asked_again(start) -> None:
    guest = start(MISSES)
    done = guest("stop", "--timeout", "1000", "web")
    assert (done.returncode, done.stderr) == (0, "")
    assert guest.end() == (0, ASKED)
    assert (guest.folder / "console").read_bytes() == b"wp"


def test_a_guest_that_reboots_when_asked_does_not_start_again(start) -> None:
    guest = start(REBOOTS)
    guest.process.send_signal(signal.SIGTERM)
    code, messages = guest.end()
    assert code == 10
    assert (guest.folder / "console").read_bytes() == b"w"
    assert "starts again" not in messages


def test_nobody_to_be_asked_is_no_reason_to_wait(start) -> None:
    guest = start(DEAF)
    began = time.monotonic()
    done = guest("stop", "--timeout", "1000", "web")
    cut = "nobody in the guest can be asked, so its power was cut"
    line = f"pyvmm: web: ended by pyvmm stop: {cut}\n"
    assert (done.returncode, done.stderr) == (0, line)
    assert time.monotonic() - began < 500
    assert guest.end() == (143, line)


@pytest.mark.parametrize("option", ["--now", "--timeout=0"])
def test_now_asks_nobody(start, option) -> None:
    guest = start(IGNORES)
    assert guest("stop", option, "web").returncode == 0
    assert guest.end() == (143, "pyvmm: web: ended by pyvmm stop\n")
    assert b"p" not in (guest.folder / "console").read_bytes()


def test_a_guest_has_as_long_after_a_signal_as_the_option_says(start) -> None:
    guest = start(IGNORES, "--stop-timeout", "0.5")
    guest.process.send_signal(signal.SIGTERM)
    code, messages = guest.end()
    assert code == 143
    assert messages.startswith(ASKED) and "within 0.5 s" in messages
    assert b"p" in (guest.folder / "console").read_bytes()


def test_a_signal_cuts_at_once_where_a_guest_has_no_time(start) -> None:
    guest = start(IGNORES, "--stop-timeout", "0")
    guest.process.send_signal(signal.SIGTERM)
    code, messages = guest.end()
    assert code == 143 and ASKED not in messages


def test_a_second_signal_cuts(start) -> None:
    guest = start(IGNORES)
    guest.process.send_signal(signal.SIGTERM)
    guest.wait_for(b"p")
    assert guest.process.poll() is None
    guest.process.send_signal(signal.SIGINT)
    assert guest.end() == (130, f"{ASKED}pyvmm: web: interrupted\n")


def test_a_second_stop_cuts_and_the_first_hears_of_it(start) -> None:
    guest = start(IGNORES)
    first = guest.start_command("stop", "--timeout", "1000", "web")
    guest.wait_for(b"p")
    assert guest("stop", "--now", "web").returncode == 0
    assert guest.end()[0] == 143
    assert first.wait(SAFETY_TIMEOUT) == 0


def test_sigquit_asks_nobody(start) -> None:
    guest = start(IGNORES)
    guest.process.send_signal(signal.SIGQUIT)
    assert guest.end() == (14, "pyvmm: web: ended by SIGQUIT\n")


def test_the_events_tell_that_it_was_asked(start) -> None:
    guest = start(OBEYS)
    listener = guest.start_command("events", "web")
    assert listener.stdout is not None
    first = listener.stdout.readline()  # so it listens
    guest.process.send_signal(signal.SIGTERM)
    out, _ = listener.communicate(timeout=SAFETY_TIMEOUT)
    heard = [json.loads(line) for line in (first + out).splitlines()]
    assert [event["event"] for event in heard] == ["started", "stopping", "ended"]
    assert heard[1]["asked"] == "power button"
    assert (heard[2]["ending"], heard[2]["exit_code"]) == ("poweroff", 0)


# --- from Python ----------------------------------------------------------------------------------


@pytest.fixture
def make(kvm: Kvm, tmp_path: Path, monkeypatch) -> Callable[..., VM]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "disk").write_bytes(bytes(1 << 20))

    def make(code: bytes, **options: object) -> VM:
        kernel = tmp_path / "kernel"
        kernel.write_bytes(Elf(loads=[Load(data=code.ljust(256, b"\x90"))], note=None).build())
        return VM(kernel=str(kernel), kvm="host", **options)  # type: ignore[arg-type]

    return make


def test_stop_asks(make) -> None:
    vm = make(OBEYS).start()
    vm.console.expect("w")
    assert vm.stop().exit_code == 0
    assert vm.stop().exit_code == 0  # once more does nothing


def test_stop_cuts_when_the_time_is_over(make) -> None:
    vm = make(IGNORES).start()
    vm.console.expect("w")
    with pytest.raises(VMTimeout):
        vm.stop(0.3, escalate=False)
    assert vm.outcome is None
    vm.console.expect("p")
    assert vm.stop(now=True).exit_code == 143


@pytest.mark.parametrize(("disk", "code"), [("", 0), (",snapshot", 143), (",readonly", 143)])
def test_the_end_of_a_block_asks_where_something_is_kept(make, tmp_path, disk, code) -> None:
    with make(OBEYS, disks=f"{tmp_path / 'disk'}{disk}") as vm:
        vm.console.expect("w")
    assert vm.outcome.exit_code == code


@pytest.mark.parametrize(("disk", "said"), [("", True), (",snapshot", False)])
def test_a_program_that_is_killed_has_its_guest_asked_if_it_keeps_something(
    make, tmp_path, disk, said
) -> None:
    script = f"""
import os, signal
from pyvmm import VM
vm = VM(kernel={str(tmp_path / "kernel")!r}, kvm="host", name="web",
        disks={str(tmp_path / "disk") + disk!r}).start()
vm.console.expect("w")
import sys
print(vm.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    make(OBEYS)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ
    ) as program:
        assert program.stdout is not None
        pid = int(program.stdout.readline())
        try:
            heard = [event["event"] for event in events("web")]
        except HasEnded:  # where nothing is waited for, it may have ended already
            heard = [] if said else ["ended"]
    assert ("stopping" in heard) == said
    assert heard[-1] == "ended"
    deadline = time.monotonic() + SAFETY_TIMEOUT
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()
